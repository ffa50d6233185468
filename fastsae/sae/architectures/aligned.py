"""Aligned training: standard, each encoder row kept at an inner product of 1 with its decoder row
(arXiv 2605.18629, which names the constraint), so that a feature reads along what it writes.

Here the row is the learned one moved along the decoder's unit row to where the constraint holds,
the nearest such point, and gradients go through the move.
"""

import torch

from fastsae.sae import Autoencoder
from fastsae.sae.architectures.base import Architecture, Penalty, State, squared_error
from fastsae.sae.products import product
from fastsae.settings.architectures import About


class Aligned(Architecture):
    about = About(
        name="aligned",
        does="ReLU, trained with each encoder row at an inner product of 1 with its decoder row",
        # whether another's rows satisfy the constraint is not asked
        starts_from=(),
        saved_as="standard",
        saelens="standard",
        dictionary_learning="AutoEncoder",
    )

    def loss(
        self, sae: Autoencoder, x: torch.Tensor, penalty: Penalty
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error + coefficient * L1, the features from the moved encoder rows."""
        rows = aligned(sae.encoder.weight, sae.decoder.weight)
        features = torch.relu(product(x - sae.input_bias, rows) + sae.neuron_bias)  # (B, M)
        l1 = features.sum(1).mean()
        return squared_error(sae, features, x) + penalty.coefficient * l1, features

    def inference_state(self, state: State) -> State:
        """Standard, with the moved encoder rows as the weights."""
        moved = aligned(state["encoder.weight"], state["decoder.weight"])
        return {**state, "encoder.weight": moved}


def aligned(encoder: torch.Tensor, decoder: torch.Tensor) -> torch.Tensor:
    """(M, d) encoder rows moved along the columns of the decoder (d, M), which have length 1, to an
    inner product of 1 with them."""
    directions = decoder.t()  # (M, d)
    product = (encoder * directions).sum(1, keepdim=True)  # (M, 1)
    return encoder + (1 - product) * directions


ARCHITECTURE = Aligned()
