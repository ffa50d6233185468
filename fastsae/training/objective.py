"""What a training minimises and where it starts, from its settings: the autoencoder to build, how
activations are normalised, and the function that fills the gradients of a batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastsae.formats.load import trained_architecture
from fastsae.sae import kernel_step
from fastsae.sae.architectures import REGISTRY
from fastsae.sae.autoencoder import reference_step
from fastsae.sae.dense_step import dense_step
from fastsae.sae.sparse_step import sparse_step
from fastsae.settings.architectures import ARCHITECTURES, About
from fastsae.training.dead_features import MOST_AT_ONCE

# Constants that decide weights, recorded beside the settings.
AUX_COEF = 1 / 32  # weight of the loss of AUX_K
JUMPRELU_BANDWIDTH = 1.0  # width around its threshold in which a pre-activation moves the threshold
JUMPRELU_LOSS = "target"  # its penalty: target: (L0 - K) squared * 2 / K; step: L0
CLIP_GRAD: float | None = 1.0  # bound of the gradient's norm; None = no bound
LR_DECAY_FRACTION = 1.0  # last part of all steps, over which the learning rate falls
# decoder rows at the start, b_dec (of a sample), and encoder rows / decoder rows; None = by least
# squares. `initialise` has the choices; HypotheSAEs' are xavier, median and 1
INIT_DIRECTIONS, INIT_CENTRE = "mixed", "median"
INIT_ENCODER_SCALE: float | None = None
RECORDED = (
    "AUX_COEF",
    "JUMPRELU_BANDWIDTH",
    "JUMPRELU_LOSS",
    "CLIP_GRAD",
    "LR_DECAY_FRACTION",
    "INIT_DIRECTIONS",
    "INIT_CENTRE",
    "INIT_ENCODER_SCALE",
)
# auto: a step from the active features only, by kernels on CUDA where they can be used; sparse: the
# same as sparse products everywhere; reference: HypotheSAEs' dense code, their slow twin
ENGINE = "auto"

Values = Mapping[str, Any]  # of the settings of a training, by name
Step = Callable[..., tuple[torch.Tensor, ...]]  # see `TrainingRun.step`


def constants() -> dict[str, Any]:
    """The constants of the code that decide weights, by name."""
    return {name: globals()[name] for name in RECORDED}


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


def step_function(values: Values, n_done: int, device: str) -> Step:
    """The function that fills the gradients of the batch after `n_done` others on `device`:
    `step(sae, x, dead) -> (loss, fired)`, or what `kernel_step` returns."""
    if not about(values).picks_k:
        n_warmup = values["SPARSITY_WARMUP_STEPS"]
        warmup = min(1.0, (n_done + 1) / n_warmup) if n_warmup else 1.0
        return functools.partial(dense_step, **penalty(values, warmup))
    architecture = REGISTRY[about(values).name]
    if ENGINE == "reference":
        return architecture.around(functools.partial(reference_step, aux_coef=AUX_COEF))
    select = getattr(torch, values["SELECT_DTYPE"])
    if ENGINE == "auto" and architecture.by_kernels and kernel_step.usable(device):
        return functools.partial(
            kernel_step.kernel_step, aux_coef=AUX_COEF, select=select, most_dead=MOST_AT_ONCE
        )
    return architecture.around(functools.partial(sparse_step, aux_coef=AUX_COEF, select=select))


def penalty(values: Values, warmup: float = 1.0) -> dict[str, Any]:
    """What the losses of the architectures that pick no K take."""
    coefficient = about(values).coefficient
    return {
        "sparsity": values[coefficient] * warmup if coefficient else 0.0,
        "bandwidth": JUMPRELU_BANDWIDTH,
        "target_l0": values["K"] if JUMPRELU_LOSS == "target" else None,
    }
