"""sparsify: cfg.json and sae.safetensors, TopK only."""

import os
import re
from pathlib import Path

from fastsae.formats.parts import (
    Parts,
    about_tokens,
    place_of_hook,
    read_config,
    read_safetensors,
    refuse_other_inputs,
)


def read(path: Path) -> Parts:
    """`Parts` of sparsify's sae.safetensors and cfg.json (TopK only); the layer is the folder's
    name."""
    cfg, weights, folder = (
        read_config(path.with_name("cfg.json")),
        read_safetensors(path),
        # not where a link leads: the hub's cache holds links to files without such names
        Path(os.path.abspath(path)).parent,
    )
    if cfg.get("activation", str, "topk") != "topk":
        cfg.refuse("activation", "is not topk. choose another autoencoder")
    if cfg.values.get("signed"):
        cfg.refuse("signed", "lets features be negative. choose another autoencoder")
    refuse_other_inputs(cfg)
    d = cfg.need("d_in", int)
    m = cfg.get("num_latents", int) or d * cfg.need("expansion_factor", int)
    w_enc, w_dec = weights.take("encoder.weight", m, d), weights.take("W_dec", m, d)
    parts = Parts(
        w_enc,
        w_dec,
        weights.take("encoder.bias", m),
        weights.take("b_dec", d),
        "topk",
        k=cfg.need("k", int),
    )
    parts.require_k(cfg.path)
    weights.finish()
    hook = folder.name if re.search(r"(layers|h)[._]\d", folder.name) else None
    parts.about = {
        "format": "sparsify",
        **place_of_hook(hook, folder),
        "hook_name": hook,
        "model_name": None,
        **about_tokens(cfg),
    }
    return parts
