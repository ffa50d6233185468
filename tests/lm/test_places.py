"""What attention and MLP add to the stream, against plain hooks on modules named by hand."""

import csv
import json

import numpy as np
import pytest
import torch
import transformers

from experiments.shared import families
from experiments.shared.families import FAMILIES
from fastsae.formats.load import load_sae
from fastsae.interpretation import model_loss
from fastsae.intervention import next_token_losses, replaced, residual_stream
from fastsae.lm import decoders, residual
from fastsae.lm.hook_points import HookPoint
from fastsae.runtime import artifacts
from fastsae.runtime.errors import InputError

LAYERS = (1, 3, 4)
# of each family the modules of resid_mid (what it reads), attn_out and mlp_out (what they give)
LLAMA = ("post_attention_layernorm", "self_attn", "mlp")
GEMMA = ("pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
NAMED = {
    "Llama": LLAMA,
    "Gemma 2": GEMMA,
    "OLMo 2": ("mlp", *GEMMA[1:]),
    "GPT-2": ("ln_2", "attn", "mlp"),
    "BLOOM": ("post_attention_layernorm", "self_attention.dense", "mlp.dense_4h_to_h"),
    "Qwen 3 MoE": LLAMA,
    "GPT-NeoX": (None, "attention", "mlp"),
    "GPT-J": (None, "attn", "mlp"),
    "Falcon": (None, "self_attention", "mlp"),
}
KINDS = ("resid_mid", "attn_out", "mlp_out")


@pytest.fixture
def built(tmp_path):
    def build(name):
        return families.build(FAMILIES[name], tmp_path / "model"), str(tmp_path / "model")

    return build


def by_hooks(model, module, is_input):
    """A function from ids (length,) to {layer: (1, length, d)}: what plain hooks see."""
    blocks = decoders.decoder_stack(model).layers

    @torch.inference_mode()
    def states_of(ids):
        seen = {}

        def see(layer, value):
            seen[layer] = (value[0] if isinstance(value, tuple) else value).clone()

        def hooks():
            for layer in LAYERS:
                part = blocks[layer - 1].get_submodule(module)
                if is_input:
                    yield part.register_forward_pre_hook(lambda _, x, n=layer: see(n, x))
                else:
                    yield part.register_forward_hook(lambda _, __, out, n=layer: see(n, out))

        handles = list(hooks())
        model(torch.tensor(ids[None].astype(np.int64)))
        for handle in handles:
            handle.remove()
        return seen

    return states_of


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMED)
def test_what_is_read_is_what_plain_hooks_see(built, name):
    family = FAMILIES[name]
    model, folder = built(name)
    for kind, module in zip(KINDS, NAMED[name]):
        if module is None:
            with pytest.raises(InputError, match="^HOOK: .* side by side.*choose attn_out"):
                residual.ResidualModel(folder, LAYERS, kind=kind, dtype=torch.float32)
            continue
        fast = residual.ResidualModel(folder, LAYERS, kind=kind, dtype=torch.float32)
        states_of = by_hooks(model, module, kind == "resid_mid")
        for lengths, n_shared in (([1, 3, 40], 0), ([9, 12, 30], families.N_SHARED)):
            found = families.compare(model, fast, family, lengths, n_shared, states_of)
            assert found.largest_error <= 1e-5
        assert fast.where(1)["hook_module"] == module


@pytest.mark.parametrize("name", ["Mamba", "Granite", "OPT, norm after"])
def test_blocks_that_add_up_in_another_way_are_refused(built, name):
    folder = built(name)[1]
    with pytest.raises(InputError, match="^HOOK: block 1 of .* so mlp_out cannot be read. choose"):
        residual.ResidualModel(folder, 2, kind="mlp_out", dtype=torch.float32)


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX", "Gemma 2"])
def test_a_block_without_both_parts_passes_the_stream_on(built, name):
    model, _ = built(name)
    ids = torch.arange(20, 30)[None]

    def nothing(x):
        return torch.zeros_like(x)

    with (
        torch.inference_mode(),
        replaced(model, HookPoint(3, "attn_out"), nothing),
        replaced(model, HookPoint(3, "mlp_out"), nothing),
    ):
        states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[3], states[2])
    assert not torch.equal(states[2], states[1])


@pytest.mark.parametrize("kind", KINDS)
def test_losses_with_something_in_its_place(built, kind):
    """Put back as it was nothing changes; zeros give what the model gives without that part."""
    model, _ = built("Llama")
    examples = [np.arange(20, 29), np.arange(40, 45)]
    point = HookPoint(2, kind)
    found = next_token_losses(
        model, point, examples, {"same": lambda x, token: x, "zeros": lambda x, token: 0 * x}
    )
    real = ~np.isnan(found["clean"].ce)
    assert abs(found["same"].ce - found["clean"].ce)[real].max() <= 1e-6
    with torch.inference_mode(), replaced(model, point, torch.zeros_like):
        logits = model(torch.tensor(examples[0][None])).logits[0].log_softmax(-1)
    expected = [-float(logits[i, token]) for i, token in enumerate(examples[0][1:])]
    assert np.allclose(found["zeros"].ce[1:9], expected, atol=1e-5)
    stream = residual_stream(model, point, examples)
    module = dict(zip(KINDS, LLAMA))[kind]
    alone = by_hooks(model, module, kind == "resid_mid")
    block = 2  # by_hooks reads LAYERS, of which 1 and 3 are beside it
    assert stream.shape == (14, 32) and block not in LAYERS
    at_3 = residual_stream(model, HookPoint(3, kind), examples)
    assert np.allclose(at_3[:9], alone(examples[0])[3][0], atol=1e-5)


# Through the stages


def test_the_three_stages_on_what_the_mlp_adds(tmp_path, tiny_llama, run_main, capsys, monkeypatch):
    """Files, model card and export name the place; another place's autoencoder is refused."""
    data, common = tmp_path / "texts.jsonl", ["--n-top-neurons", 0]
    data.write_text(
        "".join(json.dumps({"text": f"word {i} and {i * i}" * 3}) + "\n" for i in range(30))
    )
    flags = [
        *("--dataset-path", data, "--output-dir", tmp_path, "--model-name", tiny_llama),
        *("--device", "cpu", "--layer-idx", 2, "--label-field", "none"),
    ]
    read = ["--hook", "mlp_out", "--storage-dtype", "float32"]
    assert run_main("extract_activations", *flags, *read, "--layer-idx", "1,2") == 0
    path = tmp_path / "activations" / "activations_layer2_mlp_out.npz"
    found = artifacts.read_npz(path, made_by="the test")
    about = json.loads(str(found["metadata"]))
    assert about["settings"]["HOOK"] == "mlp_out" and about["hook_module"] == "mlp"
    assert (path.parent / "activations_layer1_mlp_out.npz").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = found["token_ids"][: found["seq_lengths"][0]]
    seen = []
    model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    with torch.inference_mode():
        model(torch.tensor(ids[None].astype(np.int64)))
    assert families.largest_error(found["activations"][: len(ids)], seen[0].numpy()) <= 1e-5

    small = ["--m", 16, "--k", 2, "--matryoshka-prefixes", "none", "--n-epochs", 1]
    train = [*flags, *small, "--hook", "mlp_out", "--export", "saelens,sparsify"]
    assert run_main("train_sae", *train) == 0
    run = tmp_path / "checkpoints" / "texts"
    card = (run / "README.md").read_text()
    assert "Reads what the MLP adds to the residual stream in block 1, counted from 0" in card
    assert "`model.layers.1.mlp`" in card and "`blocks.1.hook_mlp_out`" in card
    (exported,) = run.glob("*.saelens")
    names = json.loads((exported / "cfg.json").read_text())["metadata"]
    assert names["hook_name"] == "blocks.1.hook_mlp_out"
    assert names["hf_hook_name"] == "model.layers.1.mlp"
    assert next(run.glob("*.sparsify/layers.1.mlp/cfg.json")).exists()
    assert load_sae(exported)[1]["activations"]["settings"] == {"LAYER_IDX": 2, "HOOK": "mlp_out"}
    places, measure = [], model_loss.measure
    monkeypatch.setattr(
        model_loss, "measure", lambda *given: places.append(given[2]) or measure(*given)
    )
    assert run_main("interpret_sae", *flags, *common, "--hook", "mlp_out") == 0
    assert places == [HookPoint(2, "mlp_out")]  # where the reconstruction is put
    with (tmp_path / "interpretations.csv").open(encoding="utf-8") as file:
        assert len(rows := list(csv.DictReader(file))) == 16
    table, effects = what_the_model_told(tmp_path)
    assert 0 < table["effects"]["n_features"] == len(effects) <= 8
    assert all(each["removed"]["kl"] > 0 for each in effects.values())
    assert {int(row["feature"]) for row in rows if row["kl_removed"]} == set(effects)
    assert all(each["continuations"]["unchanged"] for each in effects.values())
    assert "what the MLP adds to the residual stream" in (
        tmp_path / "interpretations.html"
    ).read_text(encoding="utf-8")

    # read back from another library's format it does the same
    elsewhere = [*flags, *common, "--hook", "mlp_out", "--sae-path", exported]
    assert run_main("interpret_sae", *elsewhere) == 0
    imported = what_the_model_told(tmp_path)[1]
    assert list(imported) == list(effects)
    for feature, effect in effects.items():
        assert imported[feature]["removed"]["kl"] == pytest.approx(
            effect["removed"]["kl"], rel=0.02
        )

    assert run_main("extract_activations", *flags) == 0  # the stream, beside it
    capsys.readouterr()
    assert run_main("interpret_sae", *flags, *common, "--sae-path", exported) == 2
    assert "error: HOOK: " in (line := capsys.readouterr().err) and "--hook mlp_out" in line


def what_the_model_told(folder):
    """(the run table, {feature: its effects}) of interpretations.jsonl."""
    head, *rows = map(json.loads, (folder / "interpretations.jsonl").read_text().splitlines())
    return head["run_table"], {row["feature"]: row["effects"] for row in rows if row["effects"]}


def test_a_place_between_is_not_exported_by_a_modules_name(run_main, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_main("train_sae", "--hook", "resid_mid", "--export", "sparsify")
    assert "error: EXPORT: sparsify names its folders by" in capsys.readouterr().err
