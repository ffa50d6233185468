"""BatchTopK: the K * B largest pre-activations of a batch of B tokens while training, everything
above one learned threshold otherwise (arXiv 2412.06410). `sparse_step` has its loss."""

import torch

from fastsae.sae import Autoencoder
from fastsae.sae.architectures.base import Architecture, State, saelens_threshold
from fastsae.settings.architectures import About


class BatchTopK(Architecture):
    about = About(
        name="batchtopk",
        does="every pre-activation above one threshold, learned so that K are active on average",
        starts_from=("batchtopk", "topk", "jumprelu"),
        picks_k=True,
        aims_at_k=True,
        coefficient=None,
        in_hypothesaes=True,
        saelens="jumprelu",
        dictionary_learning="BatchTopKSAE",
    )

    def begin_at(self, sae: Autoencoder, bias: torch.Tensor, threshold: torch.Tensor) -> None:
        """One threshold for all, the largest."""
        sae.threshold.copy_(threshold.max())

    def saelens(self, sae: Autoencoder, state: State) -> tuple[State, dict]:
        """JumpReLU with the same threshold for all."""
        return saelens_threshold(sae, state), {}


ARCHITECTURE = BatchTopK()
