"""TopK: the K largest pre-activations of each token (arXiv 2406.04093), with prefixes Matryoshka
(arXiv 2503.17547). `sparse_step` has its loss."""

from fastsae.sae import Autoencoder
from fastsae.sae.architectures.base import Architecture, State
from fastsae.settings.architectures import About


class TopK(Architecture):
    about = About(
        name="topk",
        does="the K largest pre-activations of each token, those below 0 left out",
        starts_from=("topk",),
        picks_k=True,
        aims_at_k=True,
        coefficient=None,
        in_hypothesaes=True,
        saelens="topk",
        sparsify="topk",
        dictionary_learning="AutoEncoderTopK",
    )

    def saelens(self, sae: Autoencoder, state: State) -> tuple[State, dict]:
        """K; HypotheSAEs keeps decoder rows at length 1, so nothing is to be rescaled."""
        return {}, {"k": sae.k_active_neurons, "rescale_acts_by_decoder_norm": False}


ARCHITECTURE = TopK()
