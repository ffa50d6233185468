"""What is special about some models: windows, several modalities, half precision, other devices,
products that are replaced. All families are in test_families.py."""

import json

import numpy as np
import pytest
import torch

from fastsae.activations import extraction
from fastsae.data.tokenization import TokenTable, mark_shared_prefix
from fastsae.lm import checks, cpu_kernels, loading, residual
from fastsae.runtime.errors import InputError

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 2,
    "max_position_embeddings": 256,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 16}
FAMILIES = {  # config class, options, whether the shared prefix of 8 tokens can be reused
    "gemma 3, window of 12": ("Gemma3TextConfig", {**MIXED, "sliding_window": 12}, True),
    "gemma 3, window below the prefix": ("Gemma3TextConfig", {**MIXED, "sliding_window": 6}, False),
    "gemma 3, tied and untied": (
        "Gemma3TextConfig",
        {**MIXED, "sliding_window": 100, "tie_word_embeddings": False},
        True,
    ),
}


@pytest.fixture
def tiny(tmp_path):
    """(folder, the whole model) of a config class; weights, norms and biases far from their start
    values."""

    def make(config_name, options, text_config=None):
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, config_name)(**{**({} if text_config else SIZES), **options})
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(
                    torch.randn_like(parameter) * 0.2
                ) if parameter.ndim == 1 else parameter.mul_(3)
        model.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model"), transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model"
        ).eval()

    return make


@pytest.fixture(scope="module")
def table():
    """8 examples of 12 to 55 tokens that share their first 8."""
    generator = np.random.default_rng(0)
    lengths = np.array([12, 30, 20, 55, 13, 41, 40, 14], np.int32)
    ids = [np.concatenate([np.arange(10, 18), generator.integers(20, 512, n - 8)]) for n in lengths]
    kind = np.concatenate([np.array([1] * 8 + [0] * (n - 8), np.uint8) for n in lengths])
    ids = np.concatenate(ids).astype(np.int32)
    return TokenTable(
        ids, kind, np.zeros(len(ids), np.uint8), lengths, np.arange(1, 9, dtype=np.int32)
    )


def fast_and_whole(folder, model, table, layers):
    """({layer: rows of the fast path}, {layer: rows of the whole model on each example alone},
    reused prefix)."""
    fast = residual.ResidualModel(folder, layers, dtype=torch.float32)
    forward = extraction.Forward(
        fast,
        table,
        n_shared=mark_shared_prefix(table),
        batch_tokens=120,
        storage_dtype="float32",
        dataset_name="d",
    )
    whole = {layer: [] for layer in layers}
    for ids in np.split(table.ids, np.cumsum(table.lengths)[:-1]):
        with torch.inference_mode():
            states = model(
                torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True
            ).hidden_states
        for layer in layers:
            whole[layer].append(states[layer][0].numpy())
    return (
        forward.chunk(0, 8, lambda n: None),
        {layer: np.concatenate(rows) for layer, rows in whole.items()},
        forward.n_prefix,
    )


def largest_error(found, expected):
    return float(
        (np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_path_equals_the_whole_model(tiny, table, family):
    """Buckets of padded examples and the reused prefix against hidden_states[LAYER_IDX] of each
    example alone."""
    config_name, options, reusable = FAMILIES[family]
    found, expected, n_prefix = fast_and_whole(*tiny(config_name, options), table, (1, 2, 3))
    assert n_prefix == (8 if reusable else 0)
    for layer in (1, 2, 3):
        assert largest_error(found[layer], expected[layer]) <= 1e-5


def nested_gemma():
    text = {**SIZES, **MIXED, "sliding_window": 12}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        "boi_token_index": 5,
        "eoi_token_index": 6,
        "image_token_index": 7,
    }


def test_text_part_of_a_multimodal_model(tiny, table):
    folder, model = tiny("Gemma3Config", nested_gemma(), text_config=True)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert loading.load_config(folder).num_hidden_layers == 4
    found, expected, n_prefix = fast_and_whole(folder, model, table, (1, 3))
    assert n_prefix == 8
    for layer in (1, 3):
        assert largest_error(found[layer], expected[layer]) <= 1e-5
    # Gemma scales its embeddings: what enters the first block is sqrt(d) times the table, and that
    # is inside the stream
    states = model(torch.tensor([[20, 30]]), output_hidden_states=True).hidden_states[0][0]
    table_rows = model.get_input_embeddings().weight[[20, 30]]
    assert torch.allclose(states, table_rows * 32**0.5, rtol=1e-5)


def test_a_multimodal_model_through_the_script(tmp_path, tiny, smol_tokenizer, run_main):
    options = nested_gemma()
    options["text_config"]["vocab_size"] = 49152
    folder, model = tiny("Gemma3Config", options, text_config=True)
    smol_tokenizer.save_pretrained(folder)
    dataset = tmp_path / "texts.jsonl"
    dataset.write_text("".join(json.dumps({"text": "word " * n}) + "\n" for n in (3, 9, 40)))
    flags = [
        "--dataset-path",
        dataset,
        "--output-dir",
        tmp_path,
        "--model-name",
        folder,
        "--device",
        "cpu",
        "--storage-dtype",
        "float32",
    ]
    assert run_main("extract_activations", *flags, "--layer-idx", 2) == 0
    from fastsae.runtime import artifacts

    data = artifacts.read_npz(
        tmp_path / "activations" / "activations_layer2.npz", made_by="the test"
    )
    rows = []
    for ids in np.split(data["token_ids"], np.cumsum(data["seq_lengths"])[:-1]):
        with torch.inference_mode():
            rows.append(
                model(torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True)
                .hidden_states[2][0]
                .numpy()
            )
    assert largest_error(data["activations"], np.concatenate(rows)) <= 1e-5
    assert run_main("extract_activations", *flags, "--layer-idx", 5) == 2


def test_attention_that_sees_later_tokens_is_refused(tiny):
    folder, _ = tiny(
        "Gemma3TextConfig", {**MIXED, "sliding_window": 12, "use_bidirectional_attention": True}
    )
    with pytest.raises(InputError, match=r"^MODEL_NAME: in .* a token sees later ones"):
        residual.ResidualModel(folder, 1, dtype=torch.float32)


def test_overflow_of_half_precision_is_one_line(tiny, table):
    """Gemma's streams leave float16's range: as the model's type and as the file's type each has
    its own remedy."""
    folder, model = tiny("Gemma3TextConfig", {**MIXED, "sliding_window": 12})
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e5)
    model.save_pretrained(folder)
    for dtype, storage, remedy in (
        (torch.float16, "float16", "--dtype float32 or bfloat16"),
        (torch.bfloat16, "float16", "--storage-dtype float32"),
        (torch.float32, "float16", "--storage-dtype float32"),
    ):
        fast = residual.ResidualModel(folder, 1, dtype=dtype)
        forward = extraction.Forward(
            fast, table, n_shared=0, batch_tokens=120, storage_dtype=storage, dataset_name="d"
        )
        with pytest.raises(InputError, match=rf"^d:\d+: .*{remedy}\.$"):
            forward.chunk(0, 8, lambda n: None)


@pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="no oneDNN in this PyTorch: nothing is replaced",
)
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_gated_mlps_are_replaced_by_what_equals_them(activation):
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP

    torch.manual_seed(0)
    mlp = Gemma3MLP(
        Gemma3TextConfig(hidden_size=48, intermediate_size=96, hidden_activation=activation)
    ).eval()
    assert cpu_kernels.GatedMlp.fits(mlp) and cpu_kernels.same_result(
        cpu_kernels.GatedMlp(mlp), mlp
    )
    x = torch.randn(3, 5, 48)
    with torch.inference_mode():
        assert torch.allclose(cpu_kernels.GatedMlp(mlp)(x), mlp(x), atol=1e-6)

    class Sparse(Gemma3MLP):  # the same parts, used in another way
        def forward(self, x):
            gate = self.gate_proj(x)
            return self.down_proj(self.act_fn(gate - gate.mean(-1, keepdim=True)) * self.up_proj(x))

    other = Sparse(
        Gemma3TextConfig(hidden_size=48, intermediate_size=96, hidden_activation=activation)
    ).eval()
    assert cpu_kernels.GatedMlp.fits(other) and not cpu_kernels.same_result(
        cpu_kernels.GatedMlp(other), other
    )


class WrongDevice:
    """Stands for a decoder stack: right on the CPU, and after `to("wrong")` off by a factor at one
    token."""

    def __init__(self, factor):
        self.factor, self.config = factor, type("Config", (), {"vocab_size": 50})()

    def to(self, device):
        self.wrong = device == "wrong"


class FakeModel:
    d_model, layers, device = 4, (1, 2), "cpu"

    def __init__(self, factor, dtype=torch.float32):
        self.stack, self.dtype = WrongDevice(factor), dtype
        self.stack.wrong = False

    def __call__(self, ids):
        stream = torch.randn(*ids.shape, 4, generator=torch.Generator().manual_seed(0))
        if self.stack.wrong:
            stream[0, 3] *= self.stack.factor
        return {1: stream, 2: stream + 1}


@pytest.mark.parametrize(
    "factor, dtype, agrees",
    [
        (1 + 1e-5, torch.float32, True),
        (1.1, torch.float32, False),
        (1.1, torch.bfloat16, True),
        (-1.0, torch.bfloat16, False),
        (float("nan"), torch.float32, False),
    ],
)
def test_a_device_that_computes_something_else_is_noticed(factor, dtype, agrees, capsys):
    model = FakeModel(factor, dtype)
    found, largest = checks.device_agrees(model, checks.sample_ids(model), "wrong")
    assert found is agrees and model.device == "wrong" and (largest > 0.01 or factor == 1 + 1e-5)
    checks.move(FakeModel(factor, dtype), "wrong")
    assert ("warning: DEVICE: wrong and the CPU differ" in capsys.readouterr().err) is not agrees
    assert (
        checks.device_agrees(FakeModel(factor, dtype), checks.sample_ids(model), "cpu")[0] is True
    )
