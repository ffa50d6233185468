"""Checkpoints in the layouts of other libraries: SAELens and sparsify.
tests/formats/test_formats.py loads them with these libraries.

The formulas are the same in all three, features = activation(W (x - b_dec) + b_enc), so that
exporting only renames and transposes. An architecture's file says what each library calls it, and
what it has besides these four tensors.
"""

import hashlib
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

FORMATS = ("saelens", "sparsify")
# whose layout this is; SAELens drops the metadata of what calls itself older than 6
SAELENS_VERSION = "6.54.12"


def export(path: str | Path, kinds: Iterable[str]) -> None:
    """Write the checkpoint at `path` beside itself as `<stem>.saelens/` and
    `<stem>.sparsify/layers.<block>/`.

    Each appears complete or not at all, and is left alone where it already has this content. Raises
    InputError if a format cannot hold the architecture.
    """
    from fastsae.formats.load import load_sae

    sae, meta = load_sae(path)
    for kind in kinds:
        check_export(kind, architecture_of(sae))
        files = (saelens_files if kind == "saelens" else sparsify_files)(sae, meta)
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
    """InputError if the format `kind`, saelens or sparsify, cannot hold the architecture."""
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
    state = {name: value.detach().cpu().float() for name, value in sae.state_dict().items()}
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

    state = {name: value.detach().cpu().float() for name, value in sae.state_dict().items()}
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


def dataset_name(path: str) -> str:
    """owner/name of a hub dataset, the file's name of a local one."""
    return path.removeprefix("hf:").split("@")[0] if path.startswith("hf:") else short_name(path)


def _json(value):
    return (json.dumps(value, indent=2) + "\n").encode()
