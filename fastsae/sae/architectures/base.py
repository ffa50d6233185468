"""What training, saving and exporting ask of an architecture.

All architectures are kept in the module of HypotheSAEs: encoder (M, d), neuron_bias (M,), decoder
(d, M) with columns of length 1, input_bias (d,), threshold. At inference each is either the K
largest pre-activations of a token or every pre-activation above the threshold (0 for ReLU), which
`autoencoder.encode` computes: only training, the start and other libraries' layouts differ.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastsae.sae import Autoencoder
from fastsae.sae.products import product
from fastsae.settings.architectures import About

State = dict[str, torch.Tensor]  # of `sae.state_dict()`
# fills the gradients of a batch: step(sae, x (B, d), dead (M,) bool) -> (loss, fired (M,))
Step = Callable[[Autoencoder, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Penalty:
    """How a loss keeps features few.

    coefficient: its weight beside the squared error; bandwidth: the width around a threshold in
    which it gets gradients; target_l0: the number of active features to aim at, None = no such aim.
    """

    coefficient: float
    bandwidth: float
    target_l0: int | None


class Architecture:
    """The answers of an architecture that adds nothing to HypotheSAEs' module; a file overrides
    what is its own."""

    about: About
    by_kernels = True  # whether `kernel_step` trains it on CUDA, if it picks K

    def prepare(self, sae: Autoencoder) -> None:
        """Give a fresh `hypothesaes.sae.SparseAutoencoder` the parameters of its own, if any."""

    def start(self, sae: Autoencoder, sample: torch.Tensor) -> None:
        """Set these parameters from a sample (n, d), the encoder's rows being of length 1."""

    def constrain(self, sae: Autoencoder) -> None:
        """Bring parameters back into their range, before each step and before the loss is
        measured."""

    def loss(
        self, sae: Autoencoder, x: torch.Tensor, penalty: Penalty
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, features (B, M)) of a batch x (B, d), for autograd.

        The squared error summed over the d dimensions, mean over tokens, plus
        `penalty.coefficient` times the penalty per token. Not asked of an architecture with
        `about.picks_k`.
        """
        raise NotImplementedError(f"{self.about.name} is trained by sparse_step")

    def around(self, step: Step) -> Step:
        """The step that trains it, made of the one that trains those that pick K."""
        return step

    def inference_state(self, state: State) -> State:
        """The weights of the architecture `about.form` that computes the same."""
        return state

    def begin_at(self, sae: Autoencoder, bias: torch.Tensor, threshold: torch.Tensor) -> None:
        """Set the parameters of its own so that `sae` fires where W h + bias (M,) is above
        `threshold` (M,) or 0-d; the weights and neuron_bias stand already."""

    def saelens(self, sae: Autoencoder, state: State) -> tuple[State, dict]:
        """(tensors, settings) that SAELens has for `about.saelens` besides weights and biases."""
        return {}, {}


def pre_activations(sae: Autoencoder, x: torch.Tensor) -> torch.Tensor:
    """(B, M) of a batch x (B, d)."""
    return product(x - sae.input_bias, sae.encoder.weight) + sae.neuron_bias


def squared_error(sae: Autoencoder, features: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of the reconstruction from features (B, M): summed over dimensions, mean over tokens."""
    reconstruction = product(features, sae.decoder.weight) + sae.input_bias
    return (reconstruction - x).square().sum(1).mean()


def saelens_threshold(sae: Autoencoder, state: State) -> State:
    """A pre-activation counts above max(threshold, 0) here, and above both in SAELens."""
    return {"threshold": torch.relu(state["threshold"]).expand(sae.m_total_neurons)}
