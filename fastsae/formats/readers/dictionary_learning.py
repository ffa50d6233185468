"""dictionary_learning: a state dict by torch.save (ae.pt), config.json beside it."""

from pathlib import Path
from typing import Any

import torch

from fastsae.formats.parts import (
    Config,
    Parts,
    Tensors,
    about_tokens,
    place_of_hook,
    prefixes_of,
    read_config,
)
from fastsae.lm.hook_points import HookPoint
from fastsae.runtime.errors import InputError

CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


def holds(values: Any) -> bool:
    """Whether a file that holds `values` is one of dictionary_learning: tensors by name."""
    return (
        isinstance(values, dict)
        and bool(values)
        and all(isinstance(value, torch.Tensor) for value in values.values())
    )


def read(path: Path, values: dict) -> Parts:
    """`Parts` of dictionary_learning's state dict (ae.pt), with its config.json beside it where
    there is one."""
    weights, config_path = Tensors(path, values), path.with_name("config.json")
    config, trainer = Config(config_path, {}), Config(config_path, {})
    if path.name == "ae.pt" and config_path.is_file():
        config = read_config(config_path)
        trainer = Config(config_path, config.need("trainer", dict))
    kind = trainer.get("dict_class", str) or class_of_tensors(weights)
    if kind not in CLASSES:
        trainer.refuse("dict_class", f"is none of {', '.join(CLASSES)}. choose another autoencoder")
    parts = dictionary_parts(kind, weights, trainer)
    weights.finish()
    hook, layer = trainer.get("submodule_name", str), trainer.get("layer", int)
    if layer is not None and layer < 0:
        trainer.refuse("layer", "is below 0. get another copy of the file")
    named = hook and not hook.startswith("resid_post")
    parts.about = {
        "format": "dictionary_learning",
        **(place_of_hook(hook, trainer.path) if named else {}),
        "layer": None if layer is None else HookPoint.of_block(layer).layer,
        "hook_name": hook,
        "model_name": trainer.get("lm_name", str),
        **about_tokens(config),
    }
    return parts


def class_of_tensors(weights: Tensors) -> str:
    """The class whose tensors these are, where they tell."""
    if "gate_bias" in weights:
        return "GatedAutoEncoder"
    if "group_sizes" in weights:
        return "MatryoshkaBatchTopKSAE"
    if "k" in weights:
        if "threshold" in weights:
            raise InputError(
                f"{weights.path}: may be AutoEncoderTopK or BatchTopKSAE, whose tensors are alike. "
                "put config.json beside it."
            )
        return "AutoEncoderTopK"
    if "W_enc" in weights:
        return "JumpReluAutoEncoder"
    return "AutoEncoderNew" if "decoder.bias" in weights else "AutoEncoder"


def dictionary_parts(kind: str, weights: Tensors, trainer: Config) -> Parts:
    """`Parts` of one of the CLASSES."""
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        w_enc = weights.take("W_enc", None, None).t().contiguous()
        m, d = w_enc.shape
        parts = Parts(
            w_enc,
            weights.take("W_dec", m, d),
            weights.take("b_enc", m),
            weights.take("b_dec", d),
            "jumprelu",
        )
    else:
        w_enc = weights.take("encoder.weight", None, None)
        m, d = w_enc.shape
        names = {
            "AutoEncoder": ("encoder.bias", "bias"),
            "AutoEncoderNew": ("encoder.bias", "decoder.bias"),
            "GatedAutoEncoder": ("mag_bias", "decoder_bias"),
        }.get(kind, ("encoder.bias", "b_dec"))
        parts = Parts(
            w_enc,
            weights.take("decoder.weight", d, m).t().contiguous(),
            weights.take(names[0], m),
            weights.take(names[1], d),
            "standard",
        )
    if kind == "GatedAutoEncoder":
        parts.apply_gates(weights.take("gate_bias", m), weights.take("r_mag", m))
    elif kind == "JumpReluAutoEncoder":
        parts.threshold = weights.take("threshold", m)
    elif kind not in ("AutoEncoder", "AutoEncoderNew"):
        parts.architecture = "topk" if kind == "AutoEncoderTopK" else "batchtopk"
        parts.k = int(weights.take("k")) if "k" in weights else trainer.need("k", int)
        parts.require_k(weights.path)
        parts.threshold = None if kind == "AutoEncoderTopK" else weights.take("threshold")
        weights.drop("threshold")  # AutoEncoderTopK keeps one, which its own encode does not use
        if kind == "MatryoshkaBatchTopKSAE":
            parts.prefixes = prefixes_of(
                weights.take("group_sizes", None).cumsum(0).int().tolist(), m, weights.path
            )
    return parts.centre_input() if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else parts
