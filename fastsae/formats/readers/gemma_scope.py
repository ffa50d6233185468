"""Gemma Scope: params.npz, JumpReLU without b_dec in front (arXiv 2408.05147)."""

import os
from pathlib import Path

import numpy as np
import torch

from fastsae.formats.parts import Parts, Tensors, about_place
from fastsae.lm.hook_points import HookPoint
from fastsae.runtime.errors import InputError


def holds(values: dict[str, np.ndarray]) -> bool:
    """Whether these arrays are Gemma Scope's, perhaps not all of them."""
    return bool({"W_enc", "W_dec", "threshold"} & set(values))


def read(path: Path, values: dict[str, np.ndarray]) -> Parts:
    """`Parts` of the arrays by name; the layer stands in the folders' names."""
    weights = Tensors(
        path, {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}
    )
    parts = parts_of(weights, "W_enc", "W_dec")
    try:
        hook_point = HookPoint.of_gemma_scope(os.path.abspath(path))
    except ValueError as error:
        raise InputError(
            f"{path}: Gemma Scope's {error} is not the residual stream or what the MLP adds to it. "
            "choose one of -res or -mlp."
        ) from None
    parts.about = {
        "format": "gemma scope",
        **about_place(hook_point),
        "hook_name": None,
        "model_name": None,
    }
    return parts.centre_input()


def parts_of(weights: Tensors, encoder: str, decoder: str) -> Parts:
    """`Parts` of the five arrays of a JumpReLU, of which two are named `encoder` (d, M) and
    `decoder` (M, d). InputError where one is missing, misshapen or unknown."""
    w_enc = weights.take(encoder, None, None)
    d, m = w_enc.shape
    parts = Parts(
        w_enc.t().contiguous(),
        weights.take(decoder, m, d),
        weights.take("b_enc", m),
        weights.take("b_dec", d),
        "jumprelu",
        weights.take("threshold", m),
    )
    weights.finish()
    return parts
