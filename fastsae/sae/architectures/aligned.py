"""Aligned training: batchtopk, each encoder row kept at an inner product of 1 with its decoder row
(arXiv 2605.18629, which names the constraint), so that a feature reads along what it writes.

The row used is the learned one moved along the decoder's unit row to where the constraint holds,
the nearest such point, and gradients go through the move.
"""

import torch

from fastsae.sae import Autoencoder
from fastsae.sae.architectures.base import Architecture, State, Step
from fastsae.settings.architectures import About


class Aligned(Architecture):
    about = About(
        name="aligned",
        does="every pre-activation above one threshold, learned so that K are active on average; "
        "trained with each encoder row at an inner product of 1 with its decoder row",
        # whether another's rows satisfy the constraint is not asked
        starts_from=(),
        picks_k=True,
        aims_at_k=True,
        coefficient=None,
        saved_as="batchtopk",
        saelens="jumprelu",
        dictionary_learning="BatchTopKSAE",
    )
    by_kernels = False

    def around(self, step: Step) -> Step:
        """`step` with the moved rows as the encoder, and its gradients through the move."""

        def aligned_step(
            sae: Autoencoder, x: torch.Tensor, dead: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            rows, decoder = sae.encoder.weight.data, sae.decoder.weight.detach()
            sae.encoder.weight.data = aligned(rows, decoder)
            found = step(sae, x, dead)
            gradient = sae.encoder.weight.grad  # (M, d) of the moved rows
            sae.encoder.weight.data = rows
            assert gradient is not None and sae.decoder.weight.grad is not None
            directions = decoder.t()  # (M, d)
            product = (rows * directions).sum(1, keepdim=True)  # (M, 1)
            along = (gradient * directions).sum(1, keepdim=True)
            sae.decoder.weight.grad += ((1 - product) * gradient - along * rows).t()
            sae.encoder.weight.grad = gradient - along * directions
            return found

        return aligned_step

    def inference_state(self, state: State) -> State:
        """Batchtopk, with the moved encoder rows as the weights."""
        moved = aligned(state["encoder.weight"], state["decoder.weight"])
        return {**state, "encoder.weight": moved}


def aligned(encoder: torch.Tensor, decoder: torch.Tensor) -> torch.Tensor:
    """(M, d) encoder rows moved along the columns of the decoder (d, M), which have length 1, to an
    inner product of 1 with them."""
    directions = decoder.t()  # (M, d)
    product = (encoder * directions).sum(1, keepdim=True)  # (M, 1)
    return encoder + (1 - product) * directions


ARCHITECTURE = Aligned()
