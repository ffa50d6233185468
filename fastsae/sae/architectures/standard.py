"""Standard: ReLU, trained with an L1 penalty (FAST, arXiv 2506.07691, eq. 1 to 3)."""

import torch

from fastsae.sae import Autoencoder
from fastsae.sae.architectures.base import Architecture, Penalty, pre_activations, squared_error
from fastsae.settings.architectures import About


class Standard(Architecture):
    about = About(
        name="standard",
        does="ReLU",
        starts_from=("standard",),
        in_hypothesaes=True,
        saelens="standard",
        dictionary_learning="AutoEncoder",
        # neither K nor a threshold limits what fires
        fresh_length=0.2,
    )

    def loss(
        self, sae: Autoencoder, x: torch.Tensor, penalty: Penalty
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error + coefficient * L1."""
        features = torch.relu(pre_activations(sae, x))  # (B, M)
        l1 = features.sum(1).mean()
        return squared_error(sae, features, x) + penalty.coefficient * l1, features


ARCHITECTURE = Standard()
