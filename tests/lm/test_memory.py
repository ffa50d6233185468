"""What does not fit on a device is refused from the configuration, before the model is read."""

import pytest
import torch
import transformers

from fastsae.lm import memory
from fastsae.lm.memory import require_memory, weight_bytes
from fastsae.runtime.errors import InputError

LLAMA_8B = transformers.LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
# of a block: q and o, k and v, the three of the MLP, two norms
BLOCK = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336 + 2 * 4096
BEFORE = 128_256 * 4096 + 4096  # embedding, and the norm at the end


def test_by_hand():
    for n in (1, 12, 32):
        assert weight_bytes(LLAMA_8B, n, torch.bfloat16) == 2 * (n * BLOCK + BEFORE)
    assert weight_bytes(LLAMA_8B, 12, torch.float32) == 4 * (12 * BLOCK + BEFORE)


def test_a_tiny_model_has_what_its_weights_have():
    config = transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=3, n_head=2, n_positions=16)
    model = transformers.GPT2Model(config)
    count = sum(p.numel() for p in model.parameters())
    last = sum(p.numel() for p in model.h[2].parameters())
    assert weight_bytes(config, 3, torch.float32) == 4 * count
    assert weight_bytes(config, 2, torch.float32) == 4 * (count - last)


def test_what_cannot_be_built_is_not_judged():
    assert weight_bytes(None, 1, torch.float32) is None
    require_memory(None, 1, torch.float32, device="cpu", name="m")


def test_the_line(monkeypatch):
    monkeypatch.setattr(memory, "memory_of", lambda device: 4 * 10**9)
    with pytest.raises(
        InputError,
        match=r"^MODEL_NAME: 12 blocks of m take 6.3 GB in bfloat16, cuda:0 has 4.0 GB. "
        r"choose a smaller model, or lower --layer-idx.$",
    ):
        require_memory(LLAMA_8B, 12, torch.bfloat16, device="cuda:0", name="m")
    require_memory(LLAMA_8B, 5, torch.bfloat16, device="cuda:0", name="m")
    monkeypatch.setattr(memory, "memory_of", lambda device: None)
    require_memory(LLAMA_8B, 12, torch.bfloat16, device="cuda:0", name="m")


def test_stage_1_asks_before_it_reads_the_data(tmp_path, tiny_llama, run_main, monkeypatch, capsys):
    monkeypatch.setattr(memory, "memory_of", lambda device: 1000)
    (tmp_path / "bad.jsonl").write_text("no row of anything\n")
    flags = ["--dataset-path", tmp_path / "bad.jsonl", "--model-name", tiny_llama]
    flags += ["--layer-idx", 1, "--device", "cpu", "--output-dir", tmp_path / "out"]
    assert run_main("extract_activations", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: MODEL_NAME: 1 block of ") and "cpu has 0.0 GB" in line
