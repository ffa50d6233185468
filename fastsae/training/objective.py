"""What a training minimises, from its settings: the autoencoder to build, how activations are
normalised, and the function that fills the gradients of a batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastsae.formats.load import trained_architecture
from fastsae.sae.autoencoder import reference_step
from fastsae.sae.dense_step import dense_step
from fastsae.sae.sparse_step import sparse_step
from fastsae.settings.architectures import ARCHITECTURES, About

Values = Mapping[str, Any]  # of the settings of a training, by name
Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]  # (sae, x, dead) -> (loss, fired)


def about(values: Values) -> About:
    """The architecture that is trained."""
    return ARCHITECTURES[trained_architecture(values)]


def sae_config(d_in: int, values: Values) -> dict[str, Any]:
    """What `autoencoder.new_sae` builds from; HypotheSAEs counts dead features in steps."""
    prefixes = list(values["MATRYOSHKA_PREFIXES"]) if values["USE_MATRYOSHKA"] else None
    aux_k = values["AUX_K"]
    return {
        "input_dim": d_in,
        "m_total_neurons": values["M"],
        "k_active_neurons": values["K"],
        "prefix_lengths": prefixes,
        "aux_k": min(2 * values["K"], values["M"]) if aux_k is None else aux_k,
        # the settings' own object, as in the metadata: a checkpoint's bytes depend on that
        "architecture": trained_architecture(values),
        "dead_neuron_threshold_steps": -(-values["DEAD_AFTER_TOKENS"] // values["BATCH_SIZE"]),
    }


def normalisation(values: Values) -> str:
    """none, mean, norm or both.

    Coefficients need activations of a known length; the TopK family's loss is relative, and
    HypotheSAEs takes them as they are.
    """
    if values["NORMALIZE_ACTIVATIONS"] != "auto":
        return values["NORMALIZE_ACTIVATIONS"]
    return "none" if about(values).picks_k else "norm"


def step_function(values: Values, n_done: int) -> Step:
    """The function that fills the gradients of the batch after `n_done` others:
    `step(sae, x, dead) -> (loss, fired)`."""
    if not about(values).picks_k:
        n_warmup = values["SPARSITY_WARMUP_STEPS"]
        warmup = min(1.0, (n_done + 1) / n_warmup) if n_warmup else 1.0
        return functools.partial(dense_step, **penalty(values, warmup))
    if values["ENGINE"] == "reference":
        return functools.partial(reference_step, aux_coef=values["AUX_COEF"])
    select = getattr(torch, values["SELECT_DTYPE"])
    return functools.partial(sparse_step, aux_coef=values["AUX_COEF"], select=select)


def penalty(values: Values, warmup: float = 1.0) -> dict[str, Any]:
    """What the losses of the architectures that pick no K take."""
    return {
        "sparsity": values[about(values).coefficient] * warmup,
        "bandwidth": values["JUMPRELU_BANDWIDTH"],
        "target_l0": values["K"] if values["JUMPRELU_LOSS"] == "target" else None,
    }
