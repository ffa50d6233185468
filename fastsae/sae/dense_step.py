"""A training step of the architectures that choose no largest K, by autograd through a dense
forward pass.

The losses are SAELens' (tests/sae/test_architectures.py compares them): squared error summed over
the d dimensions, mean over tokens, plus the penalty per token. Their coefficients therefore mean
the same only for activations of the same length: see `normalisation.Normalisation`.
"""

from collections.abc import Iterable

import torch

from fastsae.runtime import distributed
from fastsae.sae import Autoencoder, architectures
from fastsae.sae.architectures.base import Penalty


def dense_step(
    sae: Autoencoder,
    x: torch.Tensor,
    dead: torch.Tensor | None,
    *,
    sparsity: float,
    bandwidth: float,
    target_l0: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill `.grad` of all parameters for one batch x (B, d), as `sparse_step` does for the TopK
    family: (loss, fired (M,))."""
    sae.zero_grad(set_to_none=True)
    architecture = architectures.of(sae)
    architecture.constrain(sae)
    loss, features = architecture.loss(sae, x, Penalty(sparsity, bandwidth, target_l0))
    # means over the slices of the batch become parts of the mean over all of it
    if distributed.together():
        loss = loss * (len(x) / int(distributed.total(torch.tensor([len(x)]))))
    loss.backward()
    return loss.detach(), (features.detach() > 0).any(0)


@torch.no_grad()
def validation_loss(
    sae: Autoencoder,
    x_blocks: Iterable[torch.Tensor],
    *,
    sparsity: float,
    bandwidth: float,
    target_l0: int | None,
) -> float:
    """The loss on the tokens of `x_blocks`, (B, d) each, normalised as in training."""
    total, n = 0.0, 0
    architecture = architectures.of(sae)
    architecture.constrain(sae)  # as the next step would
    penalty = Penalty(sparsity, bandwidth, target_l0)
    for x in x_blocks:
        total += float(architecture.loss(sae, x, penalty)[0]) * len(x)
        n += len(x)
    return total / n
