"""What a training run cannot do: have more memory than there is, or go on without a finite loss."""

from collections.abc import Mapping
from typing import Any

from fastsae.runtime.errors import InputError
from fastsae.runtime.memory import memory_of
from fastsae.settings.architectures import ARCHITECTURES
from fastsae.training.usual import D_MODEL, learning_rate

COPIES = 5  # of the weights: themselves, the best so far, gradients, Adam's two moments


def bytes_needed(m: int, d: int, n_autoencoders: int = 1) -> int:
    """Bytes of encoder and decoder, (M, d) float32 each, and of what training keeps beside them.

    Activations and a batch's features come on top, so that less than this is never enough.
    """
    return 2 * m * d * 4 * COPIES * n_autoencoders


def require_memory(m: int, d: int, n_autoencoders: int, device: str) -> None:
    """InputError that names M where the weights alone are more than the device holds."""
    needed, there = bytes_needed(m, d, n_autoencoders), memory_of(device)
    if there is not None and needed > there:
        several = f" times {n_autoencoders} autoencoders" if n_autoencoders > 1 else ""
        raise InputError(
            f"M: {m:,} features of {d:,} dimensions{several} take {needed / 1e9:,.1f} GB to train, "
            f"{device} has {there / 1e9:,.1f} GB. lower --m"
            + (", or train fewer at a time." if several else ".")
        )


def cause_of_divergence(values: Mapping[str, Any]) -> str:
    """The setting to blame for a loss that is not finite: the one furthest above what is usual."""
    architecture = ARCHITECTURES[values["ARCHITECTURE"]]
    rate = learning_rate(values["ARCHITECTURE"], values["M"], D_MODEL, values["BATCH_SIZE"])
    usual = {"LEARNING_RATE": rate}
    if architecture.coefficient:
        usual["SPARSITY_COEFFICIENT"] = architecture.weight
    return max(usual, key=lambda name: values[name] / usual[name])


def no_finite_loss(values: Mapping[str, Any], epoch: int, of: str = "") -> InputError:
    """What to raise after an epoch without a finite loss; `of` names the one of several."""
    name = cause_of_divergence(values)
    flag = name.lower().replace("_", "-")
    return InputError(
        f"{name}: the loss{f' of {of}' * bool(of)} is not a number after epoch {epoch}. "
        f"lower --{flag}{', or leave this one out' * bool(of)}."
    )
