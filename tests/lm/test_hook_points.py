"""The addresses of a layer in each library, worked out by hand."""

import json

import pytest
from conftest import PROJECT

from experiments.shared.families import FAMILIES
from fastsae.lm.hook_points import HookPoint


def test_the_addresses_of_layer_12():
    point = HookPoint(12)
    assert point.block == 11
    assert point.hidden_states_index == 12
    assert point.transformer_lens == "blocks.11.hook_resid_post"
    assert point.hugging_face == "model.layers.11"
    assert point.sparsify == "layers.11"
    assert point.neuronpedia_source("fast-2k") == "11-fast-2k"
    assert point.file_stem == "activations_layer12"


@pytest.mark.parametrize(
    "name, layer",
    [
        ("blocks.11.hook_resid_post", 12),
        ("blocks.12.hook_resid_pre", 12),
        ("blocks.0.hook_resid_post", 1),
        ("blocks.0.hook_resid_pre", 0),
        ("model.layers.11", 12),
        ("layers.0", 1),
        ("layers_11", 12),
        ("transformer.h.5", 6),
        ("model.language_model.layers.3", 4),
    ],
)
def test_names_are_read_back(name, layer):
    assert HookPoint.parse(name) == HookPoint(layer)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.11.attn.hook_z",
        "blocks.11.hook_mlp_in",
        "model.layers.11.mlp.down_proj",
        "model.layers.11.input_layernorm",
        "blocks.hook_resid_post",
        "layers.",
        "",
        "blocks.-1.hook_resid_post",
    ],
)
def test_other_places_are_not_the_residual_stream(name):
    assert HookPoint.parse(name) is None


@pytest.mark.parametrize("layer", [1, 2, 12, 128])
def test_what_is_written_is_read_back(layer):
    point = HookPoint(layer)
    for name in (point.transformer_lens, point.hugging_face, point.sparsify):
        assert HookPoint.parse(name) == point
    assert HookPoint.of_block(point.block) == point
    assert HookPoint.of_activations({"settings": {"LAYER_IDX": layer}}) == point


def test_the_index_in_hidden_states_is_that_of_every_family():
    """`shift` is tried with the families themselves (tests/lm/test_families.py)."""
    rows = json.loads((PROJECT / "experiments/results/families.json").read_text())["families"]
    assert any(FAMILIES[name].shift for name in rows)
    for name, row in rows.items():
        point = HookPoint.of_activations({"settings": {"LAYER_IDX": 3}, "blocks": row["blocks"]})
        assert point.hidden_states_index == 3 - FAMILIES[name].shift


def test_gemma_scope_names_blocks_in_its_folders():
    # the innermost folder counts
    path = "/data/layer_3/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz"
    assert HookPoint.of_gemma_scope(path) == HookPoint(21)
    assert HookPoint.of_gemma_scope("/data/params.npz") is None


def test_no_layer_is_no_hook_point():
    with pytest.raises(ValueError, match="expected a layer"):
        HookPoint.of_activations({"settings": {"LAYER_IDX": None}})


def test_the_embedding_has_no_block():
    for address in ("block", "transformer_lens", "hugging_face", "sparsify"):
        with pytest.raises(ValueError, match="embedding"):
            getattr(HookPoint(0), address)


@pytest.mark.parametrize("arguments", [(-1,), (12, "mlp_in")])
def test_what_is_no_hook_point_is_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        HookPoint(*arguments)


@pytest.mark.parametrize(
    "kind, lens, module",
    [
        ("resid_mid", "blocks.11.hook_resid_mid", "model.layers.11.post_attention_layernorm"),
        ("attn_out", "blocks.11.hook_attn_out", "model.layers.11.self_attn"),
        ("mlp_out", "blocks.11.hook_mlp_out", "model.layers.11.mlp"),
    ],
)
def test_the_addresses_of_other_kinds(kind, lens, module):
    point = HookPoint(12, kind)
    assert (point.transformer_lens, point.hugging_face) == (lens, module)
    assert point.sparsify == module.removeprefix("model.")
    assert point.file_stem == f"activations_layer12_{kind}"
    assert point.is_input == (kind == "resid_mid")
    assert HookPoint.parse(lens) == point
    if not point.is_input:
        assert HookPoint.parse(module) == HookPoint.parse(point.sparsify) == point
    settings = {"LAYER_IDX": 12, "HOOK": kind}
    assert HookPoint.of_activations({"settings": settings}) == point
    found = HookPoint.of_activations(
        {"settings": settings, "blocks": "transformer.h", "hook_module": "attn"}
    )
    assert found.hugging_face == "transformer.h.11.attn" and found.sparsify == "h.11.attn"


def test_gemma_scope_names_the_kind_in_its_repository():
    path = "/hub/models--google--gemma-scope-2b-pt-{}/layer_20/width_16k/params.npz"
    assert HookPoint.of_gemma_scope(path.format("res")) == HookPoint(21)
    assert HookPoint.of_gemma_scope(path.format("mlp")) == HookPoint(21, "mlp_out")
    for site in ("att", "transcoders"):
        with pytest.raises(ValueError, match=site):
            HookPoint.of_gemma_scope(path.format(site))
