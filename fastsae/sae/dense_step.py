"""A training step of the architectures that choose no largest K, by autograd through a dense
forward pass; on a CPU a block of rows at a time, whose features stay in the cache.

The losses are SAELens' (tests/sae/test_architectures.py compares them): squared error summed over
the d dimensions, mean over tokens, plus the penalty per token. Their coefficients therefore mean
the same only for activations of the same length: see `normalisation.Normalisation`.
"""

from collections.abc import Iterable

import torch

from fastsae.sae import Autoencoder, architectures
from fastsae.sae.architectures.base import Penalty
from fastsae.sae.sparse_step import BLOCK_ROWS, rows_of_all


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
    penalty, n_all = Penalty(sparsity, bandwidth, target_l0), rows_of_all(x)
    total = x.new_zeros(())
    fired = torch.zeros(sae.m_total_neurons, dtype=torch.bool, device=x.device)
    # gradients of the blocks add up
    for block in x.split(max(len(x), 1) if x.is_cuda else BLOCK_ROWS):
        loss, features = architecture.loss(sae, block, penalty)
        # the mean over a block becomes its part of the mean over the batch of all processes
        loss = loss * (len(block) / n_all)
        loss.backward()
        total += loss.detach()
        fired |= (features.detach() > 0).any(0)
    return total, fired


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
