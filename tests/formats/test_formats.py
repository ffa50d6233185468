"""Autoencoders that leave and enter: exports loaded by sae-lens, sparsify and dictionary-learning
(if installed), imports against formulas and theirs."""

import csv
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from conftest import planted_tokens
from safetensors.torch import load_file, save_file
from small import small

from fastsae.formats import export
from fastsae.formats.load import (
    architecture_of,
    architecture_text,
    check_fit,
    load_sae,
    trained_architecture,
)
from fastsae.formats.source import locate
from fastsae.lm import embedded
from fastsae.lm.names import EMBEDDED, described, hub_id
from fastsae.runtime import artifacts, storage
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.sae.autoencoder import decode, encode, inference_form, new_sae, save_sae
from fastsae.sae.normalisation import Normalisation
from fastsae.trained_sae import TrainedSae
from fastsae.training.fine_tuning import check_start, start_from

D, M, K = 12, 40, 4
SOURCE = {
    "settings": {"LAYER_IDX": 12, "USE_CHAT_TEMPLATE": True, "MAX_LENGTH": 512},
    "fingerprint": "f" * 64,
    "model_name": "SmolLM2-135M-Instruct",
    "dataset_path": "/home/me/texts.jsonl",
    "inputs": {"dataset": "d" * 64},
    "n_examples": 3,
}
KINDS = ("topk", "matryoshka", "batchtopk", "batch matryoshka", "standard", "jumprelu", "gated")


def tokens(n=200, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) * torch.linspace(0.5, 3, D) + 1


def trained(kind, seed=0, unit=True):
    """An autoencoder with every bias, threshold and magnitude away from 0, in the form that is
    saved."""
    torch.manual_seed(seed)
    architecture = {"matryoshka": "topk", "batch matryoshka": "batchtopk"}.get(kind, kind)
    sae = new_sae(
        {
            "input_dim": D,
            "m_total_neurons": M,
            "k_active_neurons": K,
            "architecture": architecture,
            "prefix_lengths": [10, M] if "matryoshka" in kind else None,
        }
    ).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim < 2 else 1))
        if architecture == "jumprelu":
            sae.threshold.abs_()
        if architecture == "batchtopk":
            sae.threshold.fill_(2.5)
        if unit:
            sae.normalize_decoder_()
    return inference_form(sae, Normalisation())


def saved(folder, kind, name="SAE_test.pt"):
    """(path, sae) of a checkpoint as train_sae.py leaves it."""
    sae, path = trained(kind), folder / name
    settings = {"ARCHITECTURE": kind, "M": M, "K": K}
    metadata = artifacts.new_metadata(
        "sae", settings, {"activations": SOURCE["fingerprint"]}, activations=SOURCE, max_norm=12.5
    )
    save_sae(path, sae, metadata)
    return path, load_sae(path)[0]


def dense(sae, x):
    """(features (n, M), reconstructions (n, d)) by this project's own encode and decode."""
    entries = encode(sae, x)
    features = torch.zeros(len(x), sae.m_total_neurons)
    features[entries.row.long(), entries.column.long()] = entries.value.detach()
    return features, decode(sae, entries).detach()


def assert_same(found, expected):
    """Features and reconstructions equal to 1e-5, or to a millionth of the largest value: sums of
    values of 100 differ by more."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-5, atol=max(1e-5, 1e-6 * float(theirs.abs().max()))
        )
    assert torch.equal(found[0] > 0, expected[0] > 0)


def sae_lens():
    return pytest.importorskip(
        "sae_lens",
        reason="sae-lens is not installed: pip install -r experiments/requirements-bench.txt",
    )


def sparsify():
    if not torch.cuda.is_available():  # with a CUDA build of PyTorch it takes Triton all the same
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    return pytest.importorskip(
        "sparsify",
        reason="eai-sparsify is not installed: pip install -r experiments/requirements-bench.txt",
    )


def dictionary_learning():
    return pytest.importorskip(
        "dictionary_learning",
        reason="dictionary-learning is not installed: pip install --no-deps -r "
        "experiments/requirements-dictionary.txt",
        exc_type=ImportError,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_sae_lens_computes_the_same(tmp_path, kind):
    library = sae_lens()
    path, sae = saved(tmp_path, kind)
    export.export(path, ["saelens"])
    # its load_state_dict is strict
    theirs = library.SAE.load_from_disk(tmp_path / "SAE_test.saelens")
    x = tokens()
    with torch.no_grad():
        features = theirs.encode(x)
        assert_same(dense(sae, x), (features, theirs.decode(features)))
    assert 0 < (features > 0).float().mean() < 1
    assert theirs.cfg.architecture() == {
        "topk": "topk",
        "matryoshka": "topk",
        "standard": "standard",
    }.get(kind, "jumprelu")
    assert (
        theirs.cfg.metadata.hook_name == "blocks.11.hook_resid_post"
        and theirs.cfg.metadata.hf_hook_name == "model.layers.11"
    )
    assert (
        theirs.cfg.metadata.model_name == "SmolLM2-135M-Instruct"
        and theirs.cfg.metadata.prepend_bos is False
    )
    assert theirs.cfg.metadata.fastsae_model_weights.startswith("4-bit (Q4_1), dequantised")
    assert (
        theirs.cfg.metadata.fastsae_max_norm == 12.5
        and "norm above 12.5" in theirs.cfg.metadata.fastsae_tokens
    )
    assert (
        theirs.cfg.metadata.context_size == 512
        and theirs.cfg.metadata.dataset_path == "texts.jsonl"
    )
    if "topk" in (kind, theirs.cfg.architecture()):
        assert theirs.cfg.k == K
    if kind == "batchtopk":
        assert torch.equal(theirs.threshold.data, torch.full((M,), 2.5))


@pytest.mark.parametrize("kind", ["topk", "matryoshka"])
def test_sparsify_computes_the_same(tmp_path, kind):
    library = sparsify()
    path, sae = saved(tmp_path, kind)
    export.export(path, ["sparsify"])
    theirs = library.SparseCoder.load_many(str(tmp_path / "SAE_test.sparsify"), local=True)[
        "layers.11"
    ]
    x = tokens()
    with torch.no_grad():
        found = theirs.encode(x)
        features = torch.zeros(len(x), M).scatter(1, found.top_indices, found.top_acts)
        assert_same(dense(sae, x), (features, theirs(x).sae_out))
    assert theirs.cfg.k == K and theirs.num_latents == M


@pytest.mark.parametrize("kind", KINDS)
def test_dictionary_learning_loads_the_same(tmp_path, kind):
    library = dictionary_learning()
    from dictionary_learning.utils import load_dictionary

    path, sae = saved(tmp_path, kind)
    export.export(path, ["dictionary_learning"])
    theirs, config = load_dictionary(str(tmp_path / "SAE_test.dictionary_learning"), "cpu")
    x = tokens()
    with torch.no_grad():
        features = theirs.encode(x)
        assert_same(dense(sae, x), (features, theirs.decode(features)))
    assert 0 < (features > 0).float().mean() < 1 and library.__version__
    assert type(theirs).__name__ == config["trainer"]["dict_class"] == DICTIONARIES[kind]
    assert config["trainer"]["layer"] == 11 and config["trainer"]["activation_dim"] == D


DICTIONARIES = {
    "topk": "AutoEncoderTopK",
    "matryoshka": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "batch matryoshka": "MatryoshkaBatchTopKSAE",
    "standard": "AutoEncoder",
    "jumprelu": "JumpReluAutoEncoder",
    "gated": "JumpReluAutoEncoder",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_holds_what_its_class_computes(tmp_path, kind):
    """The tensors of the folder put into the classes' definitions, and read again: the same
    autoencoder, written in the same bytes."""
    path, sae = saved(tmp_path, kind)
    export.export(path, ["dictionary_learning"])
    folder, x = tmp_path / "SAE_test.dictionary_learning", tokens()
    state = torch.load(folder / "ae.pt", weights_only=True)
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in dictionary_state(DICTIONARIES[kind]).items()
    }
    assert_same(dense(sae, x), dictionary_features(DICTIONARIES[kind], state, x))
    again, meta = load_sae(folder)
    assert_same(dense(again, x), dense(sae, x))
    assert meta["activations"]["settings"]["LAYER_IDX"] == 12
    assert meta["activations"]["model_name"] == "SmolLM2-135M-Instruct"
    assert meta["settings"]["K"] == (K if "topk" in architecture_of(sae) else None)
    assert again.prefix_lengths == ([10, M] if kind == "batch matryoshka" else None)
    before = (folder / "ae.pt").read_bytes()
    assert export.dictionary_learning_files(*load_sae(path))["ae.pt"] == before


@pytest.mark.parametrize(
    ("point", "submodule", "io"),
    [
        ({}, "resid_post_layer_11", "out"),
        ({"HOOK": "mlp_out"}, "model.layers.11.mlp", "out"),
        ({"HOOK": "attn_out"}, "model.layers.11.self_attn", "out"),
        ({"HOOK": "resid_mid"}, "blocks.11.hook_resid_mid", "in"),
    ],
)
def test_a_dictionary_names_its_place(tmp_path, point, submodule, io):
    source = {**SOURCE, "settings": {**SOURCE["settings"], **point}}
    settings = {"ARCHITECTURE": "topk", "M": M, "K": K}
    metadata = artifacts.new_metadata("sae", settings, {}, activations=source, max_norm=None)
    save_sae(tmp_path / "a.pt", trained("topk"), metadata)
    export.export(tmp_path / "a.pt", ["dictionary_learning"])
    config = json.loads((tmp_path / "a.dictionary_learning" / "config.json").read_text())
    assert config["trainer"]["submodule_name"] == submodule and config["buffer"]["io"] == io
    again = load_sae(tmp_path / "a.dictionary_learning")[1]["activations"]["settings"]
    assert again == {"LAYER_IDX": 12, **point}


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_comes_back(tmp_path, kind):
    """The folders hold exactly the tensors of the format, and reading them gives the same
    autoencoder."""
    path, sae = saved(tmp_path, kind)
    export.export(path, ["saelens"] if architecture_of(sae) != "topk" else ["saelens", "sparsify"])
    names = {"W_enc", "W_dec", "b_enc", "b_dec"} | (
        {"threshold"} if architecture_of(sae) in ("batchtopk", "jumprelu") else set()
    )
    assert set(load_file(tmp_path / "SAE_test.saelens" / "sae_weights.safetensors")) == names
    x = tokens()
    for folder in (tmp_path / "SAE_test.saelens", tmp_path / "SAE_test.sparsify" / "layers.11"):
        if folder.exists():
            again, meta = load_sae(folder)
            assert_same(dense(again, x), dense(sae, x))
            assert (
                meta["activations"]["settings"]["LAYER_IDX"] == 12
                and meta["fingerprint"] == locate(folder).sha256()
            )
            assert meta["settings"]["K"] == (K if architecture_of(sae) == "topk" else None)


def test_sparsify_is_refused_what_it_cannot_hold(tmp_path):
    for kind in ("batchtopk", "standard", "jumprelu", "gated"):
        path, _ = saved(tmp_path, kind, f"SAE_{kind}.pt")
        with pytest.raises(InputError, match="EXPORT: sparsify holds topk only"):
            export.export(path, ["sparsify"])
    assert not list(tmp_path.glob("*.sparsify*"))


def test_an_export_is_whole_or_absent(tmp_path, monkeypatch, capsys):
    """A disk that is full at any operation leaves the old folder or none, and the same command
    writes it then."""
    path, _ = saved(tmp_path, "topk")
    folder, n_operations = tmp_path / "SAE_test.sparsify", 0

    def fail_at(k):
        def watch(*_):
            nonlocal n_operations
            n_operations += 1
            if n_operations == k:
                raise OSError(28, "No space left on device")

        return watch

    for k in range(1, 100):
        n_operations = 0
        with monkeypatch.context() as patch:
            patch.setattr(storage, "watch", fail_at(k))
            try:
                export.export(path, ["sparsify"])
            except OSError:
                assert not list(tmp_path.glob(".*")) and (
                    not folder.exists() or load_sae(folder / "layers.11")
                )
        if n_operations < k:
            break
    assert 12 < k < 99 and load_sae(folder / "layers.11")[0].k_active_neurons == K
    export.export(path, ["sparsify"])
    assert "up to date" in capsys.readouterr().out
    (folder / "layers.11" / "cfg.json").write_text("{}")
    export.export(path, ["sparsify"])
    assert (tmp_path / "SAE_test.sparsify.old-1" / "layers.11" / "cfg.json").read_text() == "{}"
    assert load_sae(folder / "layers.11")[0].k_active_neurons == K


@pytest.mark.parametrize(
    ("settings", "max_norm", "said", "unsaid"),
    [
        (
            {"EXCLUDE_SHARED_PREFIX": True},
            12.5,
            ["the first 24 tokens of each example", "norm above 12.5"],
            [],
        ),
        ({"EXCLUDE_SHARED_PREFIX": False}, 12.5, ["norm above 12.5"], ["the first 24"]),
        (
            {"EXCLUDE_SHARED_PREFIX": True, "USE_TOKENS": "assistant"},
            None,
            ["the first 24", "'assistant'"],
            ["norm"],
        ),
        ({"EXCLUDE_SHARED_PREFIX": False}, None, ["It is for all tokens."], ["No mask"]),
    ],
)
def test_exports_say_which_tokens_they_are_for(tmp_path, settings, max_norm, said, unsaid):
    """In the metadata of every format, which the other libraries keep or skip, and none claims the
    hub's weights. Read again, they are for the same tokens."""
    metadata = artifacts.new_metadata(
        "sae",
        {"ARCHITECTURE": "topk", "M": M, "K": K, **settings},
        {},
        activations={**SOURCE, "n_shared_prefix": 24},
        max_norm=max_norm,
    )
    save_sae(tmp_path / "a.pt", trained("topk"), metadata)
    export.export(tmp_path / "a.pt", export.FORMATS)
    for name in (
        "saelens/cfg.json",
        "sparsify/layers.11/cfg.json",
        "dictionary_learning/config.json",
    ):
        path = tmp_path / f"a.{name}"
        text = path.read_text()
        about, again = json.loads(text)["metadata"], load_sae(path.parent)[1]
        assert again["max_norm"] == max_norm
        assert again["settings"]["EXCLUDE_SHARED_PREFIX"] == settings["EXCLUDE_SHARED_PREFIX"]
        assert again["settings"]["USE_TOKENS"] == settings.get("USE_TOKENS", "all")
        assert about["fastsae_max_norm"] == max_norm and about["fastsae_architecture"] == "topk"
        assert all(part in about["fastsae_tokens"] for part in said)
        assert not any(part in about["fastsae_tokens"] for part in unsaid)
        assert "4-bit (Q4_1), dequantised" in about["fastsae_model_weights"]
        # this project's name for these weights
        assert about.get("model_name", EMBEDDED) == EMBEDDED == embedded.EMBEDDED["name"]
        assert (
            "4-bit" not in described("owner/model")
            and hub_id(EMBEDDED) is None
            and "Q4_1" in embedded.EMBEDDED["member"]
        )


# Imports from SAELens


def saelens_folder(folder, sae, *, keys=(), **config):
    """A SAELens folder of a standard or TopK autoencoder, written here by hand; `keys` are further
    tensors."""
    folder.mkdir(exist_ok=True)
    state = {name: value.detach() for name, value in sae.state_dict().items()}
    save_file(
        {
            name: value.contiguous()
            for name, value in {
                "W_enc": state["encoder.weight"].t(),
                "W_dec": state["decoder.weight"].t(),
                "b_enc": state["neuron_bias"],
                "b_dec": state["input_bias"],
                **dict(keys),
            }.items()
        },
        folder / "sae_weights.safetensors",
    )
    plain = {
        "architecture": "standard",
        "d_in": D,
        "d_sae": M,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
    }
    (folder / "cfg.json").write_text(
        json.dumps(
            {name: value for name, value in {**plain, **config}.items() if value != "absent"}
        )
    )
    return folder


def test_input_without_bias_by_hand(tmp_path):
    sae = trained("standard")
    folder = saelens_folder(tmp_path / "s", sae, apply_b_dec_to_input=False)
    x = tokens()
    features = torch.relu(x @ sae.encoder.weight.t() + sae.neuron_bias)
    assert_same(
        dense(load_sae(folder)[0], x),
        (features.detach(), (features @ sae.decoder.weight.t() + sae.input_bias).detach()),
    )


def test_rescaled_topk_by_hand(tmp_path):
    """Pre-activations times decoder norms decide which K are active; the features returned are
    these products."""
    sae = trained("topk", unit=False)
    folder = saelens_folder(
        tmp_path / "s", sae, architecture="topk", k=K, rescale_acts_by_decoder_norm=True
    )
    x, norms = tokens(), sae.decoder.weight.norm(dim=0)
    value, chosen = (
        ((x - sae.input_bias) @ sae.encoder.weight.t() + sae.neuron_bias) * norms
    ).topk(K, dim=1)
    features = torch.zeros(len(x), M).scatter(1, chosen, value.relu())
    plain = dense(load_sae(saelens_folder(tmp_path / "p", sae, architecture="topk", k=K))[0], x)[0]
    assert ((plain > 0) != (features > 0)).any()  # the norms matter here
    assert_same(
        dense(load_sae(folder)[0], x),
        (
            features.detach(),
            ((features / norms) @ sae.decoder.weight.t() + sae.input_bias).detach(),
        ),
    )


def test_configs_from_before_version_6(tmp_path):
    sae = trained("topk")
    old = {
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
        "hook_layer": 7,
        "hook_point": "blocks.7.hook_resid_pre",
        "model_name": "gpt2-small",
        "normalize_activations": False,
        "metadata": "absent",
    }
    loaded, meta = load_sae(saelens_folder(tmp_path / "s", sae, **old))
    assert (
        architecture_of(loaded) == "topk" and loaded.k_active_neurons == meta["settings"]["K"] == 3
    )
    assert meta["activations"] == {
        "model_name": "gpt2-small",
        "model_revision": None,
        "settings": {"LAYER_IDX": 7},
    }
    keys = {"scaling_factor": torch.full((M,), 2.0)}  # of features on their way to the decoder
    scaled = load_sae(saelens_folder(tmp_path / "f", trained("standard"), keys=keys.items()))[0]
    torch.testing.assert_close(scaled.decoder.weight, 2 * trained("standard").decoder.weight)


def from_sae_lens(library, kind):
    """A module of sae-lens with random weights; the inference ones, and those that training
    keeps."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE as Matryoshka,
        MatryoshkaBatchTopKTrainingSAEConfig as MatryoshkaConfig,
    )

    metadata = library.saes.sae.SAEMetadata(
        model_name="gemma-2-2b", hook_name="blocks.20.hook_resid_post"
    )
    shape = {"d_in": D, "d_sae": M, "metadata": metadata}
    made = {
        "standard": lambda: library.StandardSAE(library.StandardSAEConfig(**shape)),
        "topk": lambda: library.TopKSAE(library.TopKSAEConfig(**shape, k=K)),
        "topk rescaled": lambda: library.TopKSAE(
            library.TopKSAEConfig(**shape, k=K, rescale_acts_by_decoder_norm=True)
        ),
        "jumprelu": lambda: library.JumpReLUSAE(library.JumpReLUSAEConfig(**shape)),
        "scope": lambda: library.JumpReLUSAE(
            library.JumpReLUSAEConfig(**shape, apply_b_dec_to_input=False, dtype="bfloat16")
        ),
        "gated": lambda: library.GatedSAE(library.GatedSAEConfig(**shape)),
        "gated uncentred": lambda: library.GatedSAE(
            library.GatedSAEConfig(**shape, apply_b_dec_to_input=False)
        ),
        "batchtopk": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape, k=K)),
        "matryoshka": lambda: Matryoshka(MatryoshkaConfig(**shape, k=K, matryoshka_widths=[10, M])),
    }
    torch.manual_seed(3)
    module = made[kind]()
    for name, parameter in module.named_parameters():
        parameter.data = (torch.randn(parameter.shape) * (0.5 if parameter.ndim < 2 else 1)).to(
            parameter.dtype
        )
        if name == "threshold":
            parameter.data.abs_()
    return module


@pytest.mark.parametrize(
    "kind", ["standard", "topk", "topk rescaled", "jumprelu", "scope", "gated", "gated uncentred"]
)
def test_what_sae_lens_saves_computes_the_same_here(tmp_path, kind):
    library = sae_lens()
    from_sae_lens(library, kind).save_model(tmp_path / "s")
    theirs, x = library.SAE.load_from_disk(tmp_path / "s", dtype="float32"), tokens()
    ours, meta = load_sae(tmp_path / "s")
    with torch.no_grad():
        features = theirs.encode(x)
        assert 0.01 < (features > 0).float().mean() < 0.99
        assert_same(dense(ours, x), (features, theirs.decode(features)))
    assert (
        meta["activations"]["settings"]["LAYER_IDX"] == 21
        and meta["activations"]["model_name"] == "gemma-2-2b"
    )


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_what_sae_lens_is_still_training(tmp_path, kind):
    """Its own inference form of the same weights must agree with our reading of the training
    form."""
    library = sae_lens()
    module = from_sae_lens(library, kind)
    module.topk_threshold.fill_(4.0)
    module.save_model(tmp_path / "training")
    module.save_inference_model(tmp_path / "inference")
    theirs, x = library.SAE.load_from_disk(tmp_path / "inference"), tokens()
    ours, meta = load_sae(tmp_path / "training")
    with torch.no_grad():
        features = theirs.encode(x)
        assert_same(dense(ours, x), (features, theirs.decode(features)))
    assert meta["settings"]["K"] == K and ours.prefix_lengths == (
        [10, M] if kind == "matryoshka" else None
    )


def test_what_sparsify_saves(tmp_path):
    library = sparsify()
    torch.manual_seed(0)
    theirs = library.SparseCoder(D, library.SparseCoderConfig(num_latents=M, k=K))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    theirs.save_to_disk(tmp_path / "layers.5")
    ours, meta = load_sae(tmp_path / "layers.5")
    x = tokens()
    with torch.no_grad():
        found = theirs.encode(x)
        assert_same(
            dense(ours, x),
            (
                torch.zeros(len(x), M).scatter(1, found.top_indices, found.top_acts),
                theirs(x).sae_out,
            ),
        )
    assert meta["activations"]["settings"]["LAYER_IDX"] == 6 and ours.k_active_neurons == K


# dictionary_learning and Gemma Scope


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dictionary_state(kind):
    """State dict of a class of dictionary_learning."""
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        state = {
            "W_enc": random(D, M),
            "W_dec": random(M, D, seed=1),
            "b_enc": random(M, seed=2),
            "b_dec": random(D, seed=3),
        }
    else:
        bias = {
            "AutoEncoder": "bias",
            "AutoEncoderNew": "decoder.bias",
            "GatedAutoEncoder": "decoder_bias",
        }.get(kind, "b_dec")
        state = {
            "encoder.weight": random(M, D),
            "decoder.weight": random(D, M, seed=1),
            bias: random(D, seed=3),
            "mag_bias" if kind == "GatedAutoEncoder" else "encoder.bias": random(M, seed=2),
        }
    if kind == "GatedAutoEncoder":
        state |= {"gate_bias": random(M, seed=4), "r_mag": random(M, seed=5)}
    if kind == "JumpReluAutoEncoder":
        state["threshold"] = random(M, seed=4).abs()
    if kind in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        state |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(3.0)}
    if kind == "MatryoshkaBatchTopKSAE":
        state["group_sizes"] = torch.tensor([10, 30])
    return state


def dictionary_features(kind, state, x):
    """(features, reconstructions) by the definitions of the classes."""
    w_enc = state["W_enc"] if "W_enc" in state else state["encoder.weight"].t()
    w_dec = state["W_dec"] if "W_dec" in state else state["decoder.weight"].t()
    b_dec = next(
        state[name] for name in ("b_dec", "bias", "decoder.bias", "decoder_bias") if name in state
    )
    h = (x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - b_dec) @ w_enc
    if kind == "GatedAutoEncoder":
        features = (h + state["gate_bias"] > 0) * torch.relu(
            h * state["r_mag"].exp() + state["mag_bias"]
        )
    else:
        pre = torch.relu(h + (state["b_enc"] if "b_enc" in state else state["encoder.bias"]))
        if kind == "AutoEncoderTopK":
            value, chosen = pre.topk(K, dim=1)
            features = torch.zeros_like(pre).scatter(1, chosen, value)
        else:
            features = pre * (pre > state.get("threshold", torch.tensor(0.0)))
    return features, features @ w_dec + b_dec


CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


def dictionary_folder(folder, kind, state=None, **trainer):
    folder.mkdir(exist_ok=True)
    torch.save(state or dictionary_state(kind), folder / "ae.pt")
    trainer = {
        "dict_class": kind,
        "layer": 8,
        "lm_name": "google/gemma-2-2b",
        "submodule_name": "resid_post_layer_8",
        "k": K,
        **trainer,
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


@pytest.mark.parametrize("kind", CLASSES)
def test_dictionary_learning_by_definition(tmp_path, kind):
    folder, x = dictionary_folder(tmp_path / "ae", kind), tokens()
    ours, meta = load_sae(folder)
    expected = dictionary_features(kind, dictionary_state(kind), x)
    assert 0.01 < (expected[0] > 0).float().mean() < 0.99
    for found, value in zip(dense(ours, x), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)
    assert (
        meta["activations"]["settings"]["LAYER_IDX"] == 9
        and meta["activations"]["model_name"] == "google/gemma-2-2b"
    )
    assert ours.prefix_lengths == ([10, 40] if kind.startswith("Matr") else None)
    assert torch.equal(load_sae(folder / "ae.pt")[0].encoder.weight, ours.encoder.weight)
    (folder / "config.json").unlink()
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        with pytest.raises(InputError, match="put config.json beside it"):
            load_sae(folder)
    else:
        assert_same(dense(load_sae(folder)[0], x), dense(ours, x))


@pytest.mark.parametrize("kind", CLASSES)
def test_dictionary_learning_computes_the_same(tmp_path, kind):
    dictionary_learning()
    from dictionary_learning import dictionary as theirs
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    state, more = (
        dictionary_state(kind),
        {"AutoEncoderTopK": (K,), "BatchTopKSAE": (K,), "MatryoshkaBatchTopKSAE": (K, [10, 30])},
    )
    their_class = next(
        getattr(m, kind)
        for m in (theirs, batch_top_k, matryoshka_batch_top_k, top_k)
        if hasattr(m, kind)
    )
    module = their_class(D, M, *more.get(kind, ()))
    module.load_state_dict(state)
    torch.save(module.state_dict(), dictionary_folder(tmp_path / "ae", kind) / "ae.pt")
    x = tokens()
    with torch.no_grad():
        features = module.encode(x)
        for found, value in zip(
            dense(load_sae(tmp_path / "ae")[0], x), (features, module.decode(features)), strict=True
        ):
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)


def test_gemma_scope(tmp_path):
    folder = tmp_path / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    state = dictionary_state("JumpReluAutoEncoder")
    # of another machine
    np.savez(
        folder / "params.npz",
        **{name: value.numpy().astype(">f4") for name, value in state.items()},
    )
    ours, meta = load_sae(folder)
    x = tokens()
    for found, value in zip(
        dense(ours, x), dictionary_features("JumpReluAutoEncoder", state, x), strict=True
    ):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)
    assert meta["activations"]["settings"]["LAYER_IDX"] == 21
    whole = (folder / "params.npz").read_bytes()
    (folder / "params.npz").write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    with pytest.raises(EnvironmentFailure, match="params.npz: damaged"):
        load_sae(folder)


def test_gemma_scope_of_other_places(tmp_path):
    """The MLP's outputs are read; attention's, before they are projected, are refused."""
    state = dictionary_state("JumpReluAutoEncoder")
    for site in ("mlp", "att"):
        folder = tmp_path / f"gemma-scope-2b-pt-{site}" / "layer_20" / "width_16k"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **{name: value.numpy() for name, value in state.items()})
    settings = load_sae(tmp_path / "gemma-scope-2b-pt-mlp/layer_20/width_16k")[1]["activations"]
    assert settings["settings"] == {"LAYER_IDX": 21, "HOOK": "mlp_out"}
    with pytest.raises(InputError, match="params.npz: Gemma Scope's att is not the residual"):
        load_sae(folder)


def gemma_scope_2_folder(folder, **config):
    folder.mkdir(parents=True)
    state = dictionary_state("JumpReluAutoEncoder")
    tensors = {name.replace("W_", "w_"): value.contiguous() for name, value in state.items()}
    save_file(tensors, folder / "params.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", **config}))
    return folder, state


@pytest.mark.parametrize(
    ("names", "config", "place", "model"),
    [
        (
            "resid_post/layer_9_width_16k_l0_small",
            {"hf_hook_point_in": "model.layers.9.output", "model_name": "gemma-v3-1b-pt"},
            {"LAYER_IDX": 10},
            "google/gemma-3-1b-pt",
        ),
        (
            "any",
            {"hf_hook_point_in": "model.layers.9.post_feedforward_layernorm.output"},
            {"LAYER_IDX": 10, "HOOK": "mlp_out"},
            None,
        ),
        ("resid_post_all/layer_3_width_16k_l0_big", {}, {"LAYER_IDX": 4}, None),
        ("mlp_out/layer_3_width_16k_l0_big", {}, {"LAYER_IDX": 4, "HOOK": "mlp_out"}, None),
        ("downloaded", {}, {"LAYER_IDX": None}, None),
    ],
)
def test_gemma_scope_2(tmp_path, names, config, place, model):
    folder, state = gemma_scope_2_folder(tmp_path / "g" / names, **config)
    ours, meta = load_sae(folder)
    x = tokens()
    expected = dictionary_features("JumpReluAutoEncoder", state, x)
    for found, value in zip(dense(ours, x), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)
    assert meta["activations"]["settings"] == place and meta["activations"]["model_name"] == model
    if "HOOK" in place:  # as the module is found in Gemma 3 itself
        assert meta["activations"]["hook_module"] == "post_feedforward_layernorm"


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        (
            "a",
            {"hf_hook_point_in": "model.layers.9.self_attn.o_proj.input"},
            "o_proj.input, not on",
        ),
        (
            "a",
            {
                "hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output",
                "hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output",
            },
            "pre_feedforward_layernorm.output, not on",
        ),
        ("transcoder_all/layer_3_width_16k", {}, "a transcoder or attention's heads, not on"),
        ("attn_out/layer_3_width_16k", {}, "a transcoder or attention's heads, not on"),
        ("a", {"architecture": "topk"}, "architecture 'topk' is not jump_relu"),
        ("a", {"hf_hook_point_in": 9}, "hf_hook_point_in: expected str, got '9'"),
    ],
)
def test_gemma_scope_2_of_other_places(tmp_path, names, config, message):
    folder, _ = gemma_scope_2_folder(tmp_path / names, **config)
    with pytest.raises(InputError, match=message):
        load_sae(folder)


# What is refused

REFUSED = [
    (
        {"normalize_activations": "expected_average_only_in"},
        "normalize_activations .* not in the folder",
    ),
    ({"normalize_activations": "layer_norm"}, "normalize_activations .* own norm"),
    ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations .* own norm"),
    ({"architecture": "temporal"}, "architecture 'temporal' is none of"),
    ({"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu'"),
    ({"reshape_activations": "hook_z"}, "reshape_activations"),
    (
        {"metadata": {"hook_name": "blocks.3.attn.hook_z"}},
        "blocks.3.attn.hook_z', not on the residual stream or what attention or MLP add",
    ),
    (
        {"metadata": {"fastsae_tokens": "some", "fastsae_use_tokens": "mine"}},
        "fastsae_use_tokens 'mine' is none of all, content",
    ),
    (
        {"metadata": {"fastsae_tokens": "some", "fastsae_max_norm": "12"}},
        "fastsae_max_norm: expected float, got '12'",
    ),
    ({"architecture": "topk"}, "cfg.json: k is missing"),
    ({"architecture": "topk", "k": 41}, "k 41 is not from 1 to 40"),
    ({"architecture": "topk", "k": "many"}, "k: expected int, got 'many'"),
    ({"d_in": 13}, r"W_enc has shape \(12, 40\), not \(13, 40\)"),
    ({"d_sae": "absent"}, "d_sae is missing"),
    ({"architecture": "jumprelu"}, "threshold is missing"),
    ({"architecture": "gated"}, "b_mag is missing"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_held_is_named(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        load_sae(saelens_folder(tmp_path / "s", trained("topk"), **config))


@pytest.mark.parametrize(
    ("architecture", "name"), [("topk", "k"), ("matryoshka_batchtopk", "k"), ("topk", "d_in")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_of_a_config_are_finite(tmp_path, architecture, name, value):
    threshold = {} if architecture == "topk" else {"topk_threshold": torch.tensor(0.1)}
    folder = saelens_folder(
        tmp_path / "s",
        trained("topk"),
        keys=threshold.items(),
        **{"architecture": architecture, name: value},
    )
    with pytest.raises(
        InputError, match=rf"cfg.json: {name}: expected (int|float), got '(nan|inf)'"
    ):
        load_sae(folder)


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([1j]), np.array([True])])
def test_arrays_that_hold_no_numbers(tmp_path, value):
    np.savez(tmp_path / "params.npz", W_enc=value)
    with pytest.raises(EnvironmentFailure, match="W_enc holds no numbers"):
        load_sae(tmp_path / "params.npz")


def test_unknown_tensors_and_files(tmp_path):
    folder = saelens_folder(
        tmp_path / "s", trained("standard"), keys={"W_gate": torch.ones(2)}.items()
    )
    with pytest.raises(InputError, match="W_gate: unknown"):
        load_sae(folder)
    saelens_folder(
        tmp_path / "s", trained("standard"), keys={"b_enc": torch.full((M,), torch.nan)}.items()
    )
    with pytest.raises(InputError, match="b_enc holds NaN"):
        load_sae(folder)
    (folder / "sae_weights.safetensors").write_bytes(
        (folder / "sae_weights.safetensors").read_bytes()[:200]
    )
    with pytest.raises(EnvironmentFailure, match="damaged"):
        load_sae(folder)
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(InputError, match="holds no object"):
        load_sae(folder)
    with pytest.raises(InputError, match=r"holds no autoencoder; folders in it are: s\."):
        load_sae(tmp_path)
    with pytest.raises(InputError, match="not found"):
        load_sae(tmp_path / "nowhere")


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["FASTSAE_TEST_CANARY"],)


def test_loading_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSAE_TEST_CANARY", str(tmp_path / "canary"))
    torch.save({"encoder.weight": Payload()}, tmp_path / "ae.pt")
    with pytest.raises(EnvironmentFailure, match="holds more than tensors"):
        load_sae(tmp_path / "ae.pt")
    np.savez(tmp_path / "params.npz", W_enc=np.array([Payload()], object))
    with pytest.raises(EnvironmentFailure, match="not a plain .npz"):
        load_sae(tmp_path / "params.npz")
    assert not (tmp_path / "canary").exists()


def test_damage_of_an_ae_pt(tmp_path):
    dictionary_folder(tmp_path / "ae", "AutoEncoder")
    whole = (tmp_path / "ae" / "ae.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "ae" / "ae.pt") as archive:
        data = max(archive.infolist(), key=lambda info: info.file_size).header_offset + 200
    (tmp_path / "ae" / "ae.pt").write_bytes(
        whole[:data] + bytes([whole[data] ^ 4]) + whole[data + 1 :]
    )
    with pytest.raises(EnvironmentFailure, match="damaged"):
        load_sae(tmp_path / "ae")


def test_width_and_layer_are_checked(tmp_path, capsys):
    path, sae = saved(tmp_path, "topk")
    meta = load_sae(path)[1]
    check_fit(path, sae, meta, "a.npz", SOURCE, D, "SAE_PATH")
    assert capsys.readouterr().out == ""
    other = {**SOURCE, "settings": {"LAYER_IDX": 20}, "model_name": "owner/other"}
    with pytest.raises(
        InputError,
        match=r"SAE_PATH: .* 12 dimensions, a.npz has 13.*\n.*after 12 blocks.*give --layer-idx 12",
    ):
        check_fit(path, sae, meta, "a.npz", other, 13, "SAE_PATH")
    check_fit(
        path,
        sae,
        {**meta, "activations": {"model_name": "x/y", "settings": {"LAYER_IDX": None}}},
        "a.npz",
        other,
        D,
        "SAE_PATH",
    )
    out = capsys.readouterr().out
    assert (
        "was trained on y; the activations are of other" in out
        and "does not say which layer" in out
    )


# Starting to train from one

STARTS = [
    ("topk", "topk"),
    ("batchtopk", "batchtopk"),
    ("jumprelu", "batchtopk"),
    ("standard", "standard"),
    ("jumprelu", "jumprelu"),
    ("jumprelu", "standard"),
    ("gated", "gated"),
    ("gated", "jumprelu"),
]


@pytest.mark.parametrize(
    "normalisation",
    [Normalisation(), Normalisation(torch.arange(float(D)), 0.3)],
    ids=["as they are", "normalised"],
)
@pytest.mark.parametrize(("architecture", "start"), STARTS)
def test_training_starts_where_the_source_is(architecture, start, normalisation):
    """What is saved after no step at all computes what the source does."""
    source, x = trained(start), tokens()
    check_start("path", source, architecture, d=D, m=M, k=K)
    sae = new_sae(
        {"input_dim": D, "m_total_neurons": M, "k_active_neurons": K, "architecture": architecture}
    ).eval()
    start_from(sae, source, normalisation)
    for found, expected in zip(
        dense(inference_form(sae, normalisation), x), dense(source, x), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["jumprelu", "batchtopk"])
def test_rows_of_other_lengths_keep_the_reconstruction(start, capsys):
    source, x = trained(start, unit=False), tokens()
    sae = new_sae(
        {"input_dim": D, "m_total_neurons": M, "k_active_neurons": K, "architecture": "jumprelu"}
    ).eval()
    start_from(sae, source, Normalisation())
    torch.testing.assert_close(sae.decoder.weight.norm(dim=0), torch.ones(M))
    torch.testing.assert_close(dense(sae, x)[1], dense(source, x)[1], rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out == ""


def test_a_start_that_does_not_follow_is_refused():
    with pytest.raises(InputError) as refused:
        check_start("path", trained("topk"), "gated", d=13, m=41, k=5)
    text = str(refused.value)
    assert text.count("INIT_FROM: path ") == 4
    for part in (
        "is topk, from which gated cannot start. give --architecture topk or batchtopk.",
        "give --m 40.",
        "give --k 4.",
        "takes activations of 12 dimensions, these have 13",
    ):
        assert part in text
    with pytest.raises(InputError, match="a threshold of its own for each feature"):
        check_start("path", trained("jumprelu"), "batchtopk", d=D, m=M, k=K)


# Which architecture it is: one answer


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("topk", {"ARCHITECTURE": "topk"}, "topk autoencoder: 40 features of 12 dimensions, K = 4"),
        (
            "matryoshka",
            {"ARCHITECTURE": "topk", "USE_MATRYOSHKA": True, "MATRYOSHKA_PREFIXES": [10, 40]},
            "topk autoencoder: 40 features of 12 dimensions, K = 4, prefixes 10, 40",
        ),
        (
            "topk",
            {"ARCHITECTURE": "topk", "USE_MATRYOSHKA": False, "MATRYOSHKA_PREFIXES": [10, 40]},
            "topk autoencoder: 40 features of 12 dimensions, K = 4",
        ),
        (
            "batchtopk",
            {"ARCHITECTURE": "topk", "USE_BATCH_TOPK": True},
            "batchtopk autoencoder: 40 features of 12 dimensions, K = 4",
        ),
        (
            "standard",
            {"ARCHITECTURE": "standard"},
            "standard autoencoder: 40 features of 12 dimensions",
        ),
        (
            "jumprelu",
            {"ARCHITECTURE": "jumprelu", "JUMPRELU_LOSS": "target"},
            "jumprelu autoencoder: 40 features of 12 dimensions, K = 4",
        ),
        (
            "jumprelu",
            {"ARCHITECTURE": "jumprelu", "JUMPRELU_LOSS": "step"},
            "jumprelu autoencoder: 40 features of 12 dimensions",
        ),
        (
            "gated",
            {"ARCHITECTURE": "gated"},
            "jumprelu (trained as gated) autoencoder: 40 features of 12 dimensions",
        ),
    ],
)
def test_which_architecture_it_is(tmp_path, kind, settings, said):
    """The module, what is printed of it, the model card and an export that comes back say the
    same."""
    sae, settings = trained(kind), {"M": M, "K": K, **settings}
    metadata = artifacts.new_metadata("sae", settings, {}, activations=SOURCE)
    save_sae(tmp_path / "a.pt", sae, metadata)
    loaded, meta = load_sae(tmp_path / "a.pt")
    computes = {"gated": "jumprelu"}.get(
        trained_architecture(settings), trained_architecture(settings)
    )
    assert architecture_of(loaded) == computes == architecture_of(sae)
    assert repr(TrainedSae(loaded, meta)).splitlines()[0] == said
    assert architecture_text(meta["settings"]) == said.partition(" autoencoder")[0]
    export.export(tmp_path / "a.pt", ["saelens"])
    again, meta = load_sae(tmp_path / "a.saelens")
    exported = {"batchtopk": "jumprelu"}.get(computes, computes)
    assert architecture_of(again) == architecture_text(meta["settings"]) == exported
    assert repr(TrainedSae(again, meta)).startswith(f"{exported} autoencoder")


# The scripts

SMALL = small(m=48, k=3, max_norm_ratio=None, batch_size=256)


def test_exporting_what_is_trained_already(tmp_path, write_activations, run_main, capsys):
    tokens, _ = planted_tokens(1000, 16, 48, 3)
    flags, run = [*write_activations(tokens, [10] * 100), *SMALL], tmp_path / "checkpoints" / "test"
    assert run_main("train_sae", *flags) == 0
    before = (run / "SAE_M=48_K=3.pt").read_bytes()
    assert not (run / "SAE_M=48_K=3.saelens").exists()
    capsys.readouterr()
    assert run_main("train_sae", *flags, "--export", "saelens,sparsify") == 0
    assert (
        "up to date" in capsys.readouterr().out and (run / "SAE_M=48_K=3.pt").read_bytes() == before
    )
    x = torch.from_numpy(tokens)
    for folder in ("SAE_M=48_K=3.saelens", "SAE_M=48_K=3.sparsify/layers.11"):
        assert_same(dense(load_sae(run / folder)[0], x), dense(load_sae(run)[0], x))
    assert "## How to load" in (run / "README.md").read_text()
    # other weights under the same name: the folders follow
    assert run_main("train_sae", *flags, "--n-epochs", 1) == 0
    for folder in ("SAE_M=48_K=3.saelens", "SAE_M=48_K=3.sparsify/layers.11"):
        assert_same(dense(load_sae(run / folder)[0], x), dense(load_sae(run)[0], x))
    assert run_main("train_sae", *flags, "--n-epochs", 1, "--architecture=batchtopk") == 0
    assert_same(dense(load_sae(run / "SAE_M=48_K=3.saelens")[0], x), dense(load_sae(run)[0], x))
    assert (
        not (run / "SAE_M=48_K=3.sparsify").exists()
        and (run / "SAE_M=48_K=3.sparsify.old-2").is_dir()
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--export", "sparsify", "--architecture", "jumprelu", "--matryoshka-prefixes=none"],
            "EXPORT: sparsify holds topk only, not jumprelu.",
        ),
        (
            ["--export", "sparsify", "--architecture", "batchtopk"],
            "EXPORT: sparsify holds topk only, not batchtopk.",
        ),
        (["--init-from", "x", "--seed", "0,1"], "SEED: all would start alike, from INIT_FROM."),
        (
            ["--export", "saelens,onnx"],
            "EXPORT: 'onnx' is unknown. choose saelens, sparsify, dictionary_learning.",
        ),
    ],
)
def test_impossible_settings_stop_before_training(run_main, capsys, flags, line):
    with pytest.raises(SystemExit) as stopped:
        run_main("train_sae", *flags)
    assert stopped.value.code == 2 and f"error: {line}" in capsys.readouterr().err


def test_training_goes_on_from_an_export(tmp_path, write_activations, run_main, capsys):
    tokens, _ = planted_tokens(1000, 16, 48, 3)
    flags = [*write_activations(tokens, [10] * 100), *SMALL]
    run, tuned = tmp_path / "checkpoints" / "test", tmp_path / "checkpoints" / "tuned"
    assert (
        run_main(
            "train_sae", *flags, "--n-epochs", 20, "--learning-rate", 1e-2, "--export", "saelens"
        )
        == 0
    )
    start, more = (
        run / "SAE_M=48_K=3.saelens",
        ["--run-name", "tuned", "--n-epochs", 1, "--learning-rate", 1e-6],
    )
    assert run_main("train_sae", *flags, *more, "--init-from", start) == 0
    before, after = (
        json.loads((folder / "metrics.json").read_text())["normalized_mse"]
        for folder in (run, tuned)
    )
    assert after == pytest.approx(before, rel=1e-3)
    meta = load_sae(tuned)[1]
    assert (
        meta["inputs"]["init_from"] == locate(start).sha256()
        and "INIT_FROM" not in meta["settings"]
    )
    capsys.readouterr()
    assert (
        run_main("train_sae", *flags, *more, "--init-from", start) == 0
        and "up to date" in capsys.readouterr().out
    )
    assert (
        run_main("train_sae", *flags, *more) == 0
        and "changed: init_from changed" in capsys.readouterr().out
    )
    # what this run writes, and its folder: each time what it started from at first
    own = tuned / "SAE_M=48_K=3.pt"
    made_from = locate(own).sha256()
    for n, init_from in enumerate((own, own, tuned, tuned)):
        assert run_main("train_sae", *flags, *more, "--init-from", init_from) == 0
        assert load_sae(tuned)[1]["inputs"]["init_from"] == made_from != locate(own).sha256()
        assert ("up to date" in capsys.readouterr().out) == (n > 0)
    weights = start / "sae_weights.safetensors"
    state = load_file(weights)
    state["W_dec"][3], state["b_enc"][3] = 0, -1000  # a feature that was taken out
    save_file(state, weights)
    assert run_main("train_sae", *flags, *more[:-1], 1e-2, "--init-from", start) == 0
    assert np.isfinite(json.loads((tuned / "metrics.json").read_text())["normalized_mse"])
    assert run_main("train_sae", *flags, *more, "--m", 40, "--init-from", start) == 2
    assert "give --m 48" in capsys.readouterr().err


def test_stage_3_reads_an_import(tmp_path, planted, run_main, capsys):
    """The run's own autoencoder, exported and read again as a foreign one, gives the same table."""
    checkpoint = next((tmp_path / "checkpoints" / "test").glob("SAE*.pt"))
    export.export(checkpoint, ["sparsify"])

    def table(*more):
        assert run_main("interpret_sae", *planted, "--n-top-neurons", 0, *more) == 0
        with open(tmp_path / "interpretations.csv", newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    own, folder = table(), checkpoint.with_suffix(".sparsify") / "layers.11"
    capsys.readouterr()
    assert table("--sae-path", folder) == own
    out = capsys.readouterr().out
    assert "(topk, 20 features): normalised MSE 0." in out and "changed: checkpoint changed" in out
    assert "from sparsify writes" in (tmp_path / "interpretations.html").read_text()
    run_main("interpret_sae", *planted, "--n-top-neurons", 0, "--sae-path", folder)
    assert "up to date" in capsys.readouterr().out
    folder.rename(folder.with_name("layers.3"))
    assert (
        run_main(
            "interpret_sae",
            *planted,
            "--n-top-neurons",
            0,
            "--sae-path",
            folder.with_name("layers.3"),
        )
        == 2
    )
    assert "was trained after 4 blocks" in capsys.readouterr().err
