"""Checkpoints in the layouts of other libraries: SAELens, sparsify and dictionary_learning.
tests/formats/test_formats.py loads them with these libraries.

The formulas are the same in all, features = activation(W (x - b_dec) + b_enc), so that exporting
only renames and transposes (dictionary_learning's JumpReLU apart, which has no b_dec in front). An
architecture's file says what each library calls it, and what SAELens has besides these four
tensors.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastsae.formats.load import (
    architecture_of,
    architecture_text,
    meant_tokens,
    with_chat_template,
)
from fastsae.lm.hook_points import HookPoint
from fastsae.lm.names import hub_id, short_name, weights_note
from fastsae.runtime import artifacts, storage
from fastsae.runtime.errors import InputError
from fastsae.settings.architectures import ARCHITECTURES
from fastsae.settings.dataset_names import HUB, hub_name

FORMATS = ("saelens", "sparsify", "dictionary_learning")
# whose layout this is; SAELens drops the metadata of what calls itself older than 6
SAELENS_VERSION = "6.54.12"


def export(path: str | Path, kinds: Iterable[str]) -> None:
    """Write the checkpoint at `path` beside itself as `<stem>.saelens/`,
    `<stem>.sparsify/layers.<block>/` and `<stem>.dictionary_learning/`.

    Each appears complete or not at all, and is left alone where it already has this content. Raises
    InputError if a format cannot hold the architecture.
    """
    from fastsae.formats.load import load_sae

    sae, meta = load_sae(path)
    for kind in kinds:
        check_export(kind, architecture_of(sae))
        files = _WRITERS[kind](sae, meta)
        folder = folder_of(path, kind)
        if holds(folder, files):
            print(f"up to date: {folder}")
        else:
            storage.write_folder(folder, files)
            print(f"wrote {folder}")


def bring_up_to_date(path: str | Path, kinds: Iterable[str]) -> None:
    """`export`, also to the formats of an earlier run: a folder with other weights must not stand
    beside the checkpoint.

    One whose format cannot hold what the checkpoint is now gets an `.old-n` name.
    """
    from fastsae.formats.load import load_sae

    kinds, earlier = (
        tuple(kinds),
        [kind for kind in FORMATS if kind not in kinds and folder_of(path, kind).is_dir()],
    )
    if "sparsify" in earlier and not can_hold("sparsify", architecture_of(load_sae(path)[0])):
        storage.set_folder_aside(folder_of(path, earlier.pop(earlier.index("sparsify"))))
    if kinds or earlier:
        export(path, (*kinds, *earlier))


def holds(folder: Path, files: dict[str, bytes]) -> bool:
    """True if the folder has exactly these `{name: bytes}`."""
    there = (
        {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        if folder.is_dir()
        else set()
    )
    return there == set(files) and all(
        artifacts.file_sha256(folder / name) == hashlib.sha256(content).hexdigest()
        for name, content in files.items()
    )


def folder_of(path: str | Path, kind: str) -> Path:
    """Where the export of the checkpoint at `path` goes."""
    return Path(path).with_suffix(f".{kind}")


def check_export(kind: str, architecture: str) -> None:
    """InputError if the format `kind`, one of FORMATS, cannot hold the architecture."""
    if kind not in FORMATS:
        raise InputError(f"EXPORT: {kind!r} is unknown. choose {' or '.join(FORMATS)}.")
    if not can_hold(kind, architecture):
        held = [name for name in ARCHITECTURES if can_hold(kind, name)]
        raise InputError(
            f"EXPORT: {kind} holds {' and '.join(held)} only, not {architecture}. "
            f"leave {kind} out, or train with --architecture {' or '.join(held)}."
        )


def can_hold(kind: str, architecture: str) -> bool:
    """Whether the format `kind`, one of FORMATS, has a name for what the architecture computes."""
    return getattr(ARCHITECTURES[architecture], kind) is not None


def saelens_files(sae: Any, meta: dict) -> dict[str, bytes]:
    """{name: bytes} of a folder that `sae_lens.SAE.load_from_disk` reads."""
    from safetensors.torch import save

    from fastsae.sae import architectures

    architecture = architectures.of(sae)
    state = _state(sae)
    tensors = {
        "W_enc": state["encoder.weight"].t(),
        "W_dec": state["decoder.weight"].t(),
        "b_enc": state["neuron_bias"],
        "b_dec": state["input_bias"],
    }
    own_tensors, own_config = architecture.saelens(sae, state)
    tensors |= own_tensors
    config = {
        "architecture": architecture.about.saelens,
        "d_in": sae.input_dim,
        "d_sae": sae.m_total_neurons,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": saelens_metadata(meta),
        **own_config,
    }
    weights = save({name: value.contiguous().clone() for name, value in tensors.items()})
    return {"cfg.json": _json(config), "sae_weights.safetensors": weights}


def saelens_metadata(meta: dict) -> dict[str, Any]:
    """What SAELens keeps of where an autoencoder belongs. Local files and folders are named without
    their path."""
    source = meta["activations"]
    settings = source["settings"]
    hook_point = HookPoint.of_activations(source)
    return {
        "sae_lens_version": SAELENS_VERSION,
        "model_name": hub_id(source["model_name"]) or short_name(source["model_name"]),
        "hook_name": hook_point.transformer_lens,
        # hooks of transformers are on outputs
        "hf_hook_name": None if hook_point.is_input else hook_point.hugging_face,
        "hook_head_index": None,
        # a chat template writes its own
        "prepend_bos": not with_chat_template(source),
        "context_size": settings.get("MAX_LENGTH") or settings.get("BLOCK_LENGTH"),
        "dataset_path": dataset_name(source["dataset_path"]),
        **own_metadata(meta),
    }


def own_metadata(meta: dict) -> dict[str, Any]:
    """What no other library has a field for: the architecture, the weights of the model, the tokens
    it is for."""
    about = {
        "fingerprint": meta["fingerprint"],
        "architecture": architecture_text(meta["settings"]),
        "model_weights": weights_note(meta["activations"]["model_name"]),
        **meant_tokens(meta),
    }
    return {f"fastsae_{name}": value for name, value in about.items()}


def sparsify_files(sae: Any, meta: dict) -> dict[str, bytes]:
    """{name: bytes} of a folder whose `layers.<block>` sparsify's `load_from_disk` reads."""
    from safetensors.torch import save

    state = _state(sae)
    tensors = {
        "encoder.weight": state["encoder.weight"],
        "encoder.bias": state["neuron_bias"],
        "W_dec": state["decoder.weight"].t(),
        "b_dec": state["input_bias"],
    }
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.m_total_neurons // sae.input_dim),
        "normalize_decoder": True,
        "num_latents": sae.m_total_neurons,
        "k": sae.k_active_neurons,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.input_dim,
        "metadata": own_metadata(meta),
    }
    weights = save({name: value.contiguous().clone() for name, value in tensors.items()})
    point = HookPoint.of_activations(meta["activations"])
    if point.is_input:
        raise InputError(
            f"EXPORT: sparsify names its folders by modules' outputs, and {point.kind} is none. "
            "leave sparsify out."
        )
    layer = point.sparsify
    return {f"{layer}/cfg.json": _json(config), f"{layer}/sae.safetensors": weights}


def dictionary_learning_files(sae: Any, meta: dict) -> dict[str, bytes]:
    """{name: bytes} of a folder that `dictionary_learning.utils.load_dictionary` reads.

    k is part of its TopK and BatchTopK; of the others only their tensors tell what fires.
    """
    import torch

    name, tensors = _dictionary(sae)
    source = meta["activations"]
    settings, point = source["settings"], HookPoint.of_activations(source)
    config = {
        "trainer": {
            "dict_class": name,
            "activation_dim": sae.input_dim,
            "dict_size": sae.m_total_neurons,
            **({"k": sae.k_active_neurons} if "k" in tensors else {}),
            "layer": point.block,
            "lm_name": hub_id(source["model_name"]) or short_name(source["model_name"]),
            "submodule_name": point.dictionary_learning,
            "device": "cpu",
        },
        "buffer": {
            "d_submodule": sae.input_dim,
            "io": "in" if point.is_input else "out",
            "ctx_len": settings.get("MAX_LENGTH") or settings.get("BLOCK_LENGTH"),
        },
        "metadata": own_metadata(meta),
    }
    weights = io.BytesIO()
    torch.save({name: value.contiguous().clone() for name, value in tensors.items()}, weights)
    return {"ae.pt": weights.getvalue(), "config.json": _json(config)}


def _dictionary(sae):
    """(class of dictionary_learning, its tensors by name) of an autoencoder."""
    import torch

    state = _state(sae)
    name = ARCHITECTURES[architecture_of(sae)].dictionary_learning
    if name == "JumpReluAutoEncoder":
        from fastsae.sae.architectures.base import saelens_threshold

        # x goes into its encoder as it is
        shift = state["encoder.weight"].double() @ state["input_bias"].double()  # (M,)
        return name, {
            "W_enc": state["encoder.weight"].t(),
            "W_dec": state["decoder.weight"].t(),
            "b_enc": (state["neuron_bias"].double() - shift).float(),
            "b_dec": state["input_bias"],
            **saelens_threshold(sae, state),
        }
    tensors = {
        "encoder.weight": state["encoder.weight"],
        "decoder.weight": state["decoder.weight"],
        "encoder.bias": state["neuron_bias"],
        "bias" if name == "AutoEncoder" else "b_dec": state["input_bias"],
    }
    if name == "AutoEncoder":
        return name, tensors
    tensors["k"] = torch.tensor(sae.k_active_neurons, dtype=torch.int)
    # -1 where there is none: its TopK keeps one too, for an inference that it does not use
    tensors["threshold"] = state["threshold"] if name == "BatchTopKSAE" else torch.tensor(-1.0)
    if name == "BatchTopKSAE" and sae.prefix_lengths:
        sizes = torch.tensor(sae.prefix_lengths).diff(prepend=torch.tensor([0]))
        return "MatryoshkaBatchTopKSAE", {
            "W_enc": tensors.pop("encoder.weight").t(),
            "W_dec": tensors.pop("decoder.weight").t(),
            "b_enc": tensors.pop("encoder.bias"),
            **tensors,
            "group_sizes": sizes,
        }
    return name, tensors


_WRITERS = {
    "saelens": saelens_files,
    "sparsify": sparsify_files,
    "dictionary_learning": dictionary_learning_files,
}


def dataset_name(path: str) -> str:
    """owner/name of a hub dataset, the file's name of a local one."""
    return hub_name(path).name if path.startswith(HUB) else short_name(path)


def _state(sae):
    return {name: value.detach().cpu().float() for name, value in sae.state_dict().items()}


def _json(value):
    return (json.dumps(value, indent=2) + "\n").encode()
