"""HypotheSAEs: what `SparseAutoencoder.save` writes, `{"config", "state_dict"}` by torch.save."""

from pathlib import Path
from typing import Any

import torch

from fastsae.formats.parts import Config, Parts, Tensors, prefixes_of
from fastsae.runtime.errors import InputError
from fastsae.sae.autoencoder import CONFIG_NAMES


def holds(values: Any) -> bool:
    """Whether a file that holds `values` is one of HypotheSAEs."""
    return isinstance(values, dict) and {"config", "state_dict"} <= set(values)


def read(path: Path, values: dict) -> Parts:
    """`Parts` of TopK or BatchTopK, with prefixes or without.

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
    if unknown := sorted(map(str, set(config) - set(CONFIG_NAMES))):
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
    parts.require_k(cfg.path)
    if is_batch:
        parts.threshold = weights.take("threshold")
    weights.drop("threshold", "steps_since_activation")
    weights.finish()
    parts.prefixes = prefixes_of(
        cfg.get("prefix_lengths", list), m, cfg.path, name="prefix_lengths"
    )
    parts.about = {"format": "hypothesaes", "layer": None, "hook_name": None, "model_name": None}
    return parts
