"""Readers of the autoencoders that other libraries write: SAELens, sparsify, dictionary_learning,
Gemma Scope.

Each returns `Parts`, or raises InputError where these could not hold exactly what the files say.
"""

import re
from pathlib import Path

import numpy as np
import torch

from fastsae.formats.parts import Config, Parts, Tensors, read_config, read_safetensors
from fastsae.lm.hook_points import HookPoint
from fastsae.runtime import artifacts
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.sae.architectures.gated import as_jumprelu

SAELENS = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")
DICTIONARY_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)
HYPOTHESAES_CONFIG = (
    "input_dim",
    "m_total_neurons",
    "k_active_neurons",
    "aux_k",
    "multi_k",
    "dead_neuron_threshold_steps",
    "prefix_lengths",
    "use_batch_topk",
)


def layer_of_hook(name: str | None, where: Path) -> int | None:
    """LAYER_IDX of a hook's name; None if there is no name. InputError if it is another place than
    the residual stream."""
    if not name:
        return None
    if hook_point := HookPoint.parse(name):
        return hook_point.layer
    raise InputError(
        f"{where}: was trained on {name[:80]!r}, not on the residual stream. "
        "only residual-stream autoencoders fit here."
    )


def read_saelens(path: Path) -> Parts:
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
    if architecture not in SAELENS:
        cfg.refuse("architecture", f"is none of {', '.join(SAELENS)}. choose another autoencoder")
    if function not in ("relu", "topk"):
        raise InputError(
            f"{cfg.path}: activation_fn {function[:60]!r} is not relu or topk. "
            "choose another autoencoder."
        )
    check_input_form(cfg)
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
        "layer": layer_of_hook(hook, cfg.path),
        "hook_name": hook,
        "model_name": more.get("model_name") or cfg.values.get("model_name"),
    }
    return parts


def check_input_form(cfg: Config) -> None:
    """Refuse inputs that are changed token by token, or by numbers that are not in the folder."""
    kind = cfg.values.get("normalize_activations")
    if kind in ("expected_average_only_in", True, "covariance_whitening"):
        cfg.refuse(
            "normalize_activations",
            "needs numbers that are not in the folder. "
            "load it with SAELens' from_pretrained, which folds "
            "them into the weights, and save it with save_model",
        )
    if kind not in (None, False, "none"):
        cfg.refuse(
            "normalize_activations",
            "scales each token by its own norm, which no linear encoder holds. "
            "choose another autoencoder",
        )
    if cfg.get("reshape_activations", str, "none") != "none":
        cfg.refuse(
            "reshape_activations",
            "is for attention heads, not for the residual stream. choose another autoencoder",
        )
    if cfg.values.get("transcode") or cfg.values.get("skip_connection"):
        cfg.refuse(
            "transcode" if cfg.values.get("transcode") else "skip_connection",
            "makes it a transcoder. choose an autoencoder",
        )


def read_activation(parts, weights, cfg, kwargs):
    """The biases, threshold and k of a SAELens architecture; decoder norms that it multiplies the
    features with are folded."""
    m, architecture = len(parts.w_dec), parts.architecture
    if architecture == "gated":
        parts.b_enc = weights.take("b_mag", m)
        gates_as_jumprelu(parts, weights.take("b_gate", m), weights.take("r_mag", m))
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
        check_k(parts, cfg)
    if in_training:
        parts.architecture, parts.threshold = "batchtopk", weights.take("topk_threshold")
        parts.k = max(1, round(cfg.get("k", float, 1.0)))
        parts.prefixes = prefixes_of(cfg.get("matryoshka_widths", list), m, cfg)
    if cfg.get("rescale_acts_by_decoder_norm", bool, in_training) and architecture in (
        "topk",
        "batchtopk",
        "matryoshka_batchtopk",
    ):
        parts.unit_rows()  # the threshold is already that of features times norms


def check_k(parts, cfg):
    if not 1 <= parts.k <= len(parts.w_enc):
        raise InputError(
            f"{cfg.path}: k {parts.k} is not from 1 to {len(parts.w_enc)}. "
            "get another copy of the file."
        )


def prefixes_of(widths, m, where, name="matryoshka_widths"):
    """Matryoshka prefixes from a list of lengths, the whole appended where it is left out; None
    without any."""
    if not widths:
        return None
    widths = [*widths, m] if widths[-1] != m else list(widths)
    if not all(isinstance(n, int) and n > 0 for n in widths) or any(
        a >= b for a, b in zip(widths, widths[1:])
    ):
        raise InputError(
            f"{where.path}: {name} {str(widths)[:60]} do not rise to {m}. "
            "get another copy of the file."
        )
    return widths


def gates_as_jumprelu(parts, gate_bias, log_magnitude):
    """A gated encoder as the JumpReLU one it equals; `b_enc` is its b_mag."""
    parts.w_enc, parts.threshold = as_jumprelu(parts.w_enc, parts.b_enc, gate_bias, log_magnitude)
    parts.architecture = "jumprelu"


def read_sparsify(path: Path) -> Parts:
    """`Parts` of sparsify's sae.safetensors and cfg.json (TopK only); the layer is the folder's
    name."""
    cfg, weights, folder = (
        read_config(path.with_name("cfg.json")),
        read_safetensors(path),
        path.resolve().parent,
    )
    if cfg.get("activation", str, "topk") != "topk":
        cfg.refuse("activation", "is not topk. choose another autoencoder")
    if cfg.values.get("signed"):
        cfg.refuse("signed", "lets features be negative. choose another autoencoder")
    check_input_form(cfg)
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
    check_k(parts, cfg)
    weights.finish()
    hook = folder.name if re.search(r"(layers|h)[._]\d", folder.name) else None
    parts.about = {
        "format": "sparsify",
        "layer": layer_of_hook(hook, folder),
        "hook_name": hook,
        "model_name": None,
    }
    return parts


def read_gemma_scope(path: Path) -> Parts:
    """`Parts` of Gemma Scope's params.npz (JumpReLU without b_dec in front, arXiv 2408.05147); the
    layer stands in the folders' names."""
    weights = Tensors(
        path,
        {
            name: torch.from_numpy(value.astype(np.float32))
            for name, value in artifacts.read_foreign_npz(path).items()
        },
    )
    w_enc = weights.take("W_enc", None, None)
    d, m = w_enc.shape
    parts = Parts(
        w_enc.t().contiguous(),
        weights.take("W_dec", m, d),
        weights.take("b_enc", m),
        weights.take("b_dec", d),
        "jumprelu",
        weights.take("threshold", m),
    )
    weights.finish()
    hook_point = HookPoint.of_gemma_scope(str(path.resolve()))
    parts.about = {
        "format": "gemma scope",
        "layer": hook_point and hook_point.layer,
        "hook_name": None,
        "model_name": None,
    }
    return parts.centre_input()


def read_torch(path: Path) -> Parts:
    """`Parts` of a file of torch.save: HypotheSAEs' `{"config", "state_dict"}`, or
    dictionary_learning's tensors by name."""
    values = artifacts.read_foreign_checkpoint(path)
    if isinstance(values, dict) and isinstance(values.get("meta"), dict) and "config" in values:
        raise EnvironmentFailure(
            f"{path}: is a checkpoint of this project without its checksum: "
            "damaged, or saved again. get another "
            "copy, or run train_sae.py."
        )
    if isinstance(values, dict) and {"config", "state_dict"} <= set(values):
        return read_hypothesaes(path, values)
    if (
        not isinstance(values, dict)
        or not values
        or not all(isinstance(value, torch.Tensor) for value in values.values())
    ):
        raise InputError(
            f"{path}: holds {type(values).__name__}, "
            "not an autoencoder of HypotheSAEs or the named tensors of "
            "dictionary_learning. give the file that the library wrote."
        )
    return read_dictionary_learning(path, values)


def read_hypothesaes(path: Path, values: dict) -> Parts:
    """`Parts` of what HypotheSAEs' `SparseAutoencoder.save` writes: TopK or BatchTopK, with
    prefixes or without.

    multi_k and aux_k are terms of the loss: at inference they change nothing. A file of before
    BatchTopK has no threshold.
    """
    config, state = values["config"], values["state_dict"]
    if (
        set(values) != {"config", "state_dict"}
        or not isinstance(config, dict)
        or not isinstance(state, dict)
        or not all(isinstance(value, torch.Tensor) for value in state.values())
    ):
        raise InputError(
            f"{path}: is not as HypotheSAEs saves: a dict of settings and one of tensors. "
            "give the file that it wrote."
        )
    if unknown := sorted(map(str, set(config) - set(HYPOTHESAES_CONFIG))):
        raise InputError(
            f"{path}: config holds {', '.join(unknown)[:80]}, which HypotheSAEs does not write. "
            "convert it with SAELens."
        )
    cfg, weights = Config(path, config), Tensors(path, state)
    d, m, k = (cfg.need(name, int) for name in ("input_dim", "m_total_neurons", "k_active_neurons"))
    is_batch = cfg.get("use_batch_topk", bool, False)
    parts = Parts(
        weights.take("encoder.weight", m, d),
        weights.take("decoder.weight", d, m).t().contiguous(),
        weights.take("neuron_bias", m),
        weights.take("input_bias", d),
        "batchtopk" if is_batch else "topk",
        k=k,
    )
    check_k(parts, cfg)
    if is_batch:
        parts.threshold = weights.take("threshold")
    weights.drop("threshold", "steps_since_activation")
    weights.finish()
    parts.prefixes = prefixes_of(cfg.get("prefix_lengths", list), m, cfg, name="prefix_lengths")
    parts.about = {"format": "hypothesaes", "layer": None, "hook_name": None, "model_name": None}
    return parts


def read_dictionary_learning(path: Path, values: dict) -> Parts:
    """`Parts` of dictionary_learning's state dict (ae.pt), with its config.json beside it where
    there is one."""
    weights, config_path = Tensors(path, values), path.with_name("config.json")
    trainer = Config(config_path, {})
    if path.name == "ae.pt" and config_path.is_file():
        trainer = Config(config_path, read_config(config_path).need("trainer", dict))
    kind = trainer.get("dict_class", str) or class_of_tensors(weights)
    if kind not in DICTIONARY_CLASSES:
        trainer.refuse(
            "dict_class", f"is none of {', '.join(DICTIONARY_CLASSES)}. choose another autoencoder"
        )
    parts = dictionary_parts(kind, weights, trainer)
    weights.finish()
    hook, layer = trainer.get("submodule_name", str), trainer.get("layer", int)
    if layer is not None and layer < 0:
        trainer.refuse("layer", "is below 0. get another copy of the file")
    if hook and not hook.startswith("resid_post"):
        layer_of_hook(hook, trainer.path)
    parts.about = {
        "format": "dictionary_learning",
        "layer": None if layer is None else HookPoint.of_block(layer).layer,
        "hook_name": hook,
        "model_name": trainer.get("lm_name", str),
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
    """`Parts` of one of the DICTIONARY_CLASSES."""
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
        gates_as_jumprelu(parts, weights.take("gate_bias", m), weights.take("r_mag", m))
    elif kind == "JumpReluAutoEncoder":
        parts.threshold = weights.take("threshold", m)
    elif kind not in ("AutoEncoder", "AutoEncoderNew"):
        parts.architecture = "topk" if kind == "AutoEncoderTopK" else "batchtopk"
        parts.k = int(weights.take("k")) if "k" in weights else trainer.need("k", int)
        check_k(parts, weights)
        parts.threshold = None if kind == "AutoEncoderTopK" else weights.take("threshold")
        weights.drop("threshold")  # AutoEncoderTopK keeps one, which its own encode does not use
        if kind == "MatryoshkaBatchTopKSAE":
            parts.prefixes = prefixes_of(
                weights.take("group_sizes", None).cumsum(0).int().tolist(), m, weights
            )
    return parts.centre_input() if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else parts


READERS = {  # by `Source.kind`; each takes the path of the weights
    "saelens": read_saelens,
    "sparsify": read_sparsify,
    "torch": read_torch,
    "gemma scope": read_gemma_scope,
}
