"""Every family with tiny random weights against what transformers gives, and models that no stream
can be read of, which end in one line."""

import functools
import json

import numpy as np
import pytest
import sampling
import torch
import transformers

from experiments.benchmarks import families as benchmark
from experiments.shared import families
from experiments.shared.families import FAMILIES, Family
from fastsae.intervention import generate, next_token_losses, replaced
from fastsae.lm import checks, cpu_kernels, decoders, first_blocks, loading, places, residual
from fastsae.runtime.errors import InputError

LAYERS = (1, 2, 4)  # the first, a middle one, the last
WITHOUT_LENS = ("GPT-1", "OPT, norm after")  # they end without a norm


@pytest.fixture
def built(tmp_path):
    """(the whole model, its folder) of a family."""

    def build(family):
        return families.build(family, tmp_path / "model"), str(tmp_path / "model")

    return build


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_read_is_what_transformers_gives(built, name):
    """Batches, the shared prefix and the logit lens; lengths up to 600 where all are tried."""
    family = FAMILIES[name]
    model, folder = built(family)
    fast = residual.ResidualModel(folder, LAYERS, dtype=torch.float32)
    more = [600] if sampling.exhaustive else []
    alone = families.compare(model, fast, family, [1, 3, 40, *more], 0)
    shared = families.compare(model, fast, family, [9, 12, 30, *more], families.N_SHARED)
    assert alone.largest_error <= 1e-5 and shared.largest_error <= 1e-5
    assert shared.n_prefix == (families.N_SHARED if family.reuses else 0)
    error = families.lens_error(model, folder)
    assert error is None if name in WITHOUT_LENS else error <= 1e-3
    known = json.loads(benchmark.RESULT.read_text())["families"][name]
    assert known["blocks"] == fast.stack.path and known["reuses"] == family.reuses
    assert known["lens"] == (error is not None)
    assert known["places"] == sorted(places.places_in(decoders.decoder_stack(model), 1))


def test_the_table_in_docs_has_every_family():
    known = json.loads(benchmark.RESULT.read_text())["families"]
    assert list(known) == list(FAMILIES) and len(known) >= 35
    page = (benchmark.PROJECT / "docs" / "models.md").read_text()
    assert benchmark.table() in page
    assert max(row["largest_error"] for row in known.values()) <= 1e-5


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["GPT-2", "Falcon, ALiBi", "GPT-1", "Gemma 2", "Jamba", "Mamba"])
def test_a_stream_put_back_as_it_was_changes_no_loss(built, name):
    """Blocks that return tuples, caches of states, attention biases: skipped or run again."""
    model, _ = built(FAMILIES[name])
    examples = [torch.arange(20, 20 + n).numpy() for n in (5, 9)]
    found = next_token_losses(model, 2, examples, {"same": lambda x, token: x})
    # the head is given only some of the places
    wanted = np.isin(np.arange(14), (3, 4, 9, 13))
    some = next_token_losses(
        model, 2, examples, {"twice": lambda x, token: 2 * x}, wanted=wanted, batch_tokens=9
    )
    twice = next_token_losses(model, 2, examples, {"twice": lambda x, token: 2 * x})
    for name, each in some.items():
        for figure in ("ce", "kl"):
            assert (np.isnan(getattr(each, figure)) == ~wanted).all()
            all_of_them = getattr(twice[name], figure)[wanted]
            assert np.allclose(getattr(each, figure)[wanted], all_of_them, atol=1e-5)
    assert abs(found["same"].ce - found["clean"].ce)[1:5].max() <= 1e-5
    zeros = next_token_losses(model, 2, examples, {"zeros": lambda x, token: x * 0})
    assert abs(zeros["zeros"].ce - zeros["clean"].ce)[1:5].max() > 1e-3


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["GPT-1", "Gemma 2", "RecurrentGemma", "Jamba", "Mamba", "RWKV"])
def test_a_text_goes_on_as_it_does_when_all_is_read_again(built, name):
    """With a key-value cache, a state, or neither; a token-wise change of the stream included."""
    model, _ = built(FAMILIES[name])
    prompts = ids = torch.arange(20, 32).view(2, 6)

    def halved(stream):
        return 0.5 * stream

    written = generate(model, prompts, n_new=5, stop_ids=[], layer=2, function=halved)
    with torch.inference_mode(), replaced(model, 2, halved):
        for _ in range(5):
            best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, best[:, None]], 1)
    assert written == ids[:, 6:].tolist()


# What is refused


def refused(config, tmp_path):
    """The line that a model of this configuration ends in before its weights are read."""
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        loading.load_config(str(tmp_path))
    line = str(caught.value)
    assert line.startswith("MODEL_NAME: ") and "\n" not in line
    assert "choose a causal decoder, such as Llama, Qwen, Gemma, Mistral, GPT-2, Pythia" in line
    return line


@pytest.mark.parametrize(
    "config, why",
    [
        (transformers.T5Config(), "(t5) is an encoder-decoder model"),
        (transformers.BartConfig(), "(bart) is an encoder-decoder model"),
        (transformers.TrOCRConfig(), "TrOCRForCausalLM is the decoder of an encoder"),
        (transformers.BertConfig(), "BertLMHeadModel is not built as one list of blocks"),
        (transformers.RobertaConfig(), "RobertaForCausalLM is not built as one list of blocks"),
        (transformers.XLMConfig(), "XLMWithLMHeadModel is not built as one list of blocks"),
        (transformers.ViTConfig(), "(vit) is not a causal language model in transformers"),
        (transformers.ModernBertConfig(), "(modernbert) is not a causal language model"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_encoders_are_refused_before_their_weights_are_read(tmp_path, config, why):
    assert why in refused(config, tmp_path)


def test_a_stream_laid_out_otherwise_is_refused(built):
    """XLNet's is (length, batch, d_model)."""
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    family = Family("XLNetConfig", "", sizes, tuple(families.SIZES.keys() - {"vocab_size"}))
    with pytest.raises(InputError, match="^MODEL_NAME: .* has no residual stream of width 32"):
        residual.ResidualModel(built(family)[1], 1, dtype=torch.float32)


def test_several_streams_at_once_are_refused(built):
    """DeepSeek V4 and Gemma 3n pass several streams from block to block."""
    wide = {**families.ROUTED, "hc_mult": 4, "num_hidden_layers": 2}
    family = Family("DeepseekV4Config", "", wide)
    with pytest.raises(InputError, match="^MODEL_NAME: .* has no residual stream of width 32"):
        residual.ResidualModel(built(family)[1], 1, dtype=torch.float32)


class Chain(torch.nn.Module):
    """Stands for a decoder: three blocks, called in the given order."""

    def __init__(self, order):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.order = order

    def forward(self, input_ids):
        x = torch.ones(*input_ids.shape, 4)
        for i in self.order:
            x = self.layers[i](x)
        return x


@pytest.mark.parametrize("order, fits", [((0, 1, 2), True), ((0, 2, 1), False), ((0, 1), False)])
def test_blocks_have_to_pass_one_stream_on(order, fits):
    decoder = decoders.Decoder(Chain(order), "layers", None)
    ids = torch.zeros(1, 2, dtype=torch.long)
    if fits:
        checks.require_chain(decoder, 3, ids, "m")
    else:
        with pytest.raises(InputError, match="^MODEL_NAME: the blocks of m do not pass"):
            checks.require_chain(decoder, 3, ids, "m")
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in decoder.layers)


@pytest.mark.parametrize("name", ["GPT-2", "OPT", "GPT-J", "MPT"])
def test_positions_that_end_are_said_before_anything_runs(built, name):
    model = residual.ResidualModel(built(FAMILIES[name])[1], 1, dtype=torch.float32)
    model.require_length(1024)
    with pytest.raises(InputError, match=r"^MAX_LENGTH: an example has 1025 .* --max-length 1024"):
        model.require_length(1025)


def test_rotary_positions_go_on(built):
    residual.ResidualModel(built(FAMILIES["Llama"])[1], 1, dtype=torch.float32).require_length(1100)


def test_a_module_that_reads_its_weights_keeps_them(built):
    """Mamba's blocks multiply with a layer's weight themselves: packed ones would be wrong."""
    fast = residual.ResidualModel(built(FAMILIES["Mamba"])[1], 1, dtype=torch.float32)
    assert not families.uses_kernels(fast)
    gpt2 = residual.ResidualModel(built(FAMILIES["GPT-2"])[1], 1, dtype=torch.float32)
    assert families.uses_kernels(gpt2) or not hasattr(torch.ops.mkldnn, "_linear_pointwise")


def test_blocks_that_would_differ_stay_as_they_were(built, monkeypatch):
    monkeypatch.setattr(cpu_kernels.PackedLinear, "forward", lambda self, x: 1.01 * x)
    model, _ = built(FAMILIES["GPT-2"])
    decoder = decoders.decoder_stack(model)
    before = [type(module) for module in decoder.module.modules()]
    cpu_kernels.quicken(decoder)
    assert [type(module) for module in decoder.module.modules()] == before


# Only what is needed


def bits_of(model, layer):
    ids = checks.sample_ids(model)
    return model(ids)[layer]


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_blocks_alone_give_the_same_bits(built, name, monkeypatch):
    """A model read with three of its four blocks, the twin with all; some families are read
    whole."""
    _, folder = built(FAMILIES[name])
    read, load_model = [], loading.load_model

    def loaded(wanted, *arguments, n_blocks, **options):
        read.append(load_model(*arguments, n_blocks=wanted, **options))
        return read[-1]

    found = []
    for wanted in (None, 3):
        monkeypatch.setattr(residual, "load_model", functools.partial(loaded, wanted))
        model = residual.ResidualModel(folder, 2, dtype=torch.float32, exact_twin=True)
        found.append(bits_of(model, 2))
    assert torch.equal(*found)
    n_blocks = [each.config.get_text_config().num_hidden_layers for each in read]
    assert n_blocks == [4, 4 if name in READ_WHOLE else 3]


# what their blocks do depends on how many there are, or they have a table for all
READ_WHOLE = ("MiniCPM 3", "Gemma 4", "CTRL", "RWKV", "MiniMax")


def test_blocks_that_depend_on_their_number_are_read_whole(built):
    """MiniCPM 3 divides what a block adds by the root of the number of blocks."""
    for name in ("MiniCPM 3", "Llama"):
        config = loading.load_config(built(FAMILIES[name])[1], whole=True)
        shorter = first_blocks.shortened(config, 2)
        assert (shorter is None) == (name in READ_WHOLE)
        assert config.num_hidden_layers == 4 and first_blocks.shortened(config, 4) is None
    assert shorter.num_hidden_layers == 2


def test_of_a_list_for_each_block_the_first_values_stay(built):
    config = loading.load_config(built(FAMILIES["Gemma 3"])[1], whole=True).get_text_config()
    whole = list(config.layer_types)
    assert len(whole) == 4
    assert first_blocks.shortened(config, 3).layer_types == whole[:3]


def test_stage_1_reads_no_more_blocks_than_it_needs(built, monkeypatch):
    """The one after the last is tried."""
    _, folder = built(FAMILIES["Llama"])
    asked = []
    monkeypatch.setattr(first_blocks, "shortened", lambda config, n: asked.append(n))
    monkeypatch.setattr(loading, "shortened", first_blocks.shortened)
    residual.ResidualModel(folder, (1, 2), dtype=torch.float32)
    residual.ResidualModel(folder, 2, dtype=torch.float32, exact_twin=True)
    assert asked == [3]


# On a GPU


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_that_keeps_nothing_changes_nothing(built, name):
    """With it no pass looks for packed sequences; lengths beyond windows too."""
    _, folder = built(FAMILIES[name])
    model = residual.ResidualModel(folder, 3, dtype=torch.float32, exact_twin=True)
    assert not model.keeps_nothing  # on a CPU
    if not model._agrees_with_empty_cache():
        assert name in WITHOUT_CACHE
        return
    for length in (1, 7, 40):
        ids = torch.arange(2 * length).reshape(2, length) % model.stack.config.vocab_size
        model.keeps_nothing = False
        expected = model(ids)[3]
        model.keeps_nothing = True
        torch.testing.assert_close(model(ids)[3], expected, rtol=1e-5, atol=1e-6)


WITHOUT_CACHE = ("GPT-1", "Mamba", "Mamba 2", "Falcon Mamba", "RWKV", "MiniMax")
