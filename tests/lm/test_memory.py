"""What does not fit on a device is refused from the configuration, before the model is read."""

import pytest
import torch
import transformers
from conftest import PROJECT

import config
from fastsae.activations.compression import bytes_of
from fastsae.lm import memory
from fastsae.lm.memory import require_memory, weight_bytes
from fastsae.runtime.errors import InputError
from fastsae.training.limits import bytes_needed

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


def test_the_arithmetic_of_the_preset_is_what_the_page_says():
    """docs/scale.md, for `--preset llama-3.1-8b`."""
    page = (PROJECT / "docs" / "scale.md").read_text(encoding="utf-8")
    preset = config.PRESETS["llama-3.1-8b"]
    d, m = LLAMA_8B.hidden_size, preset["M"]
    rows = {
        "stage 1, 12 of 32 blocks": weight_bytes(LLAMA_8B, preset["LAYER_IDX"], torch.bfloat16),
        "Adam and the best weights": bytes_needed(m, d),
        "buffer of a million tokens": bytes_of(10**6, d, preset["STORAGE_DTYPE"]),
    }
    for what, needed in rows.items():
        (line,) = [line for line in page.splitlines() if what in line]
        assert f"| {needed / 1e9:.1f} GB |" in line, line
    assert f"M = 131,072 with {bytes_needed(131_072, d) / 1e9:.1f} GB is too much" in page
    assert f"M = {m:,}, of which K = {preset['K']} are active" in page
    assert f"prefixes of {m // 4:,} and {m:,}, batches of {preset['BATCH_SIZE']:,} tokens" in page
    total = sum(rows.values()) / 1e9 + 1
    assert f"| {total:.0f} GB and a batch of stage 1 |" in page
    assert f"{bytes_of(10**8, d, 'int8') / 1e9:.0f} GB in all" in page


def test_what_cannot_be_built_is_not_judged():
    assert weight_bytes(None, 1, torch.float32) is None
    require_memory(None, 1, torch.float32, device="cpu", name="m")


def test_the_line(monkeypatch):
    monkeypatch.setattr(memory, "memory_of", lambda device: 4 * 10**9)
    with pytest.raises(
        InputError,
        match=r"^MODEL_NAME: the blocks of m up to 12 take 6.3 GB in bfloat16, cuda:0 has 4.0 GB. "
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
    assert line.startswith("error: MODEL_NAME: the blocks of ") and "cpu has 0.0 GB" in line
