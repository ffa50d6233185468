"""SAELens: cfg.json and sae_weights.safetensors, of version 6 or before."""

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
    read_safetensors,
    refuse_other_inputs,
)
from fastsae.runtime.errors import InputError

ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")


def read(path: Path) -> Parts:
    """`Parts` of SAELens' sae_weights.safetensors and cfg.json, version 6 or before, of an
    inference or a training module."""
    cfg, weights = read_config(path.with_name("cfg.json")), read_safetensors(path)
    more = cfg.values["metadata"] if isinstance(cfg.values.get("metadata"), dict) else {}
    kwargs = (
        cfg.values["activation_fn_kwargs"]
        if isinstance(cfg.values.get("activation_fn_kwargs"), dict)
        else {}
    )
    function = cfg.get("activation_fn_str", str) or cfg.get("activation_fn", str, "relu")
    architecture = "topk" if function == "topk" else cfg.get("architecture", str, "standard")
    if architecture not in ARCHITECTURES:
        cfg.refuse(
            "architecture", f"is none of {', '.join(ARCHITECTURES)}. choose another autoencoder"
        )
    if function not in ("relu", "topk"):
        raise InputError(
            f"{cfg.path}: activation_fn {function[:60]!r} is not relu or topk. "
            "choose another autoencoder."
        )
    refuse_other_inputs(cfg)
    d, m = cfg.need("d_in", int), cfg.need("d_sae", int)
    w_enc = weights.take("W_enc", d, m).t().contiguous()
    parts = Parts(
        w_enc, weights.take("W_dec", m, d), torch.zeros(m), weights.take("b_dec", d), architecture
    )
    read_activation(parts, weights, cfg, kwargs)
    # of features, after the encoder, in old fine-tuned ones
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in weights:
            parts.w_dec = parts.w_dec * weights.take(name, m)[:, None]
    weights.finish()
    if not cfg.get("apply_b_dec_to_input", bool, True):
        parts.centre_input()
    hook = next(
        (
            source.get(name)
            for source in (more, cfg.values)
            for name in ("hook_name", "hook_point")
            if source.get(name)
        ),
        None,
    )
    if hook is not None and not isinstance(hook, str):
        raise InputError(
            f"{cfg.path}: hook_name: expected str, got {str(hook)[:60]!r}. "
            "get another copy of the file."
        )
    parts.about = {
        "format": "saelens",
        **place_of_hook(hook, cfg.path),
        "hook_name": hook,
        "model_name": more.get("model_name") or cfg.values.get("model_name"),
        **about_tokens(cfg),
    }
    return parts


def read_activation(parts: Parts, weights: Tensors, cfg: Config, kwargs: dict[str, Any]) -> None:
    """The biases, threshold and k of a SAELens architecture; decoder norms that it multiplies the
    features with are folded."""
    m, architecture = len(parts.w_dec), parts.architecture
    if architecture == "gated":
        parts.b_enc = weights.take("b_mag", m)
        parts.apply_gates(weights.take("b_gate", m), weights.take("r_mag", m))
        return
    parts.b_enc = weights.take("b_enc", m)
    in_training = architecture in ("batchtopk", "matryoshka_batchtopk")
    if architecture == "jumprelu":
        parts.threshold = (
            weights.take("log_threshold", m).exp()
            if "log_threshold" in weights
            else weights.take("threshold", m)
        )
    if architecture == "topk":
        if kwargs.get("signed"):
            raise InputError(
                f"{cfg.path}: activation_fn_kwargs signed: features may be negative. "
                "choose another autoencoder."
            )
        parts.k = Config(cfg.path, {"k": cfg.values.get("k", kwargs.get("k"))}).need("k", int)
        parts.require_k(cfg.path)
    if in_training:
        parts.architecture, parts.threshold = "batchtopk", weights.take("topk_threshold")
        parts.k = max(1, round(cfg.get("k", float, 1.0)))
        parts.prefixes = prefixes_of(cfg.get("matryoshka_widths", list), m, cfg.path)
    if cfg.get("rescale_acts_by_decoder_norm", bool, in_training) and architecture in (
        "topk",
        "batchtopk",
        "matryoshka_batchtopk",
    ):
        parts.unit_rows()  # the threshold is already that of features times norms
