"""The addresses of a layer in each library, worked out by hand."""

import pytest
import torch

from fastsae.lm.hook_points import KINDS, HookPoint, Kind


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
        "blocks.11.hook_mlp_out",
        "blocks.11.attn.hook_z",
        "model.layers.11.mlp",
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


def test_the_module_whose_output_it_is(monkeypatch):
    stack = torch.nn.Module()
    blocks = [torch.nn.ModuleDict({"mlp": torch.nn.Linear(1, 1)}) for _ in range(3)]
    stack.layers = torch.nn.ModuleList(blocks)
    assert HookPoint(3).module_in(stack) is blocks[2]
    monkeypatch.setitem(KINDS, "mlp_out", Kind(transformer_lens="hook_mlp_out", module="mlp"))
    point = HookPoint(2, "mlp_out")
    assert point.module_in(stack) is blocks[1]["mlp"]
    assert point.transformer_lens == "blocks.1.hook_mlp_out"
    assert point.hugging_face == "model.layers.1.mlp"
