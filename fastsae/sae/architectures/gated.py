"""Gated: one product decides which features fire, and scaled by a learned factor how strongly
(arXiv 2404.16014); kept as the JumpReLU one it equals."""

import torch

from fastsae.sae import Autoencoder
from fastsae.sae.architectures.base import (
    Architecture,
    Penalty,
    State,
    saelens_threshold,
    squared_error,
)
from fastsae.sae.products import product
from fastsae.settings.architectures import About


class Gated(Architecture):
    """Learns `gate_bias` (M,) and `log_magnitude` (M,)."""

    about = About(
        name="gated",
        does="trained as a gated autoencoder, kept as the JumpReLU one it equals",
        starts_from=("jumprelu", "standard"),
        saved_as="jumprelu",
        saelens="jumprelu",
        dictionary_learning="JumpReluAutoEncoder",
        # neither K nor a threshold limits what fires
        fresh_length=0.2,
    )

    def prepare(self, sae: Autoencoder) -> None:
        """Gates that open as the magnitudes do."""
        sae.gate_bias = torch.nn.Parameter(torch.zeros_like(sae.neuron_bias))
        sae.log_magnitude = torch.nn.Parameter(torch.zeros_like(sae.neuron_bias))

    def loss(
        self, sae: Autoencoder, x: torch.Tensor, penalty: Penalty
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error + coefficient * L1 of the gates + squared error of the gates' own
        reconstruction (arXiv 2404.16014, eq. 8).

        The gates' reconstruction goes through a frozen decoder, as in the paper (SAELens trains the
        decoder on it too).
        """
        projection = product(x - sae.input_bias, sae.encoder.weight)  # (B, M)
        gate = projection + sae.gate_bias
        features = (gate > 0) * torch.relu(projection * sae.log_magnitude.exp() + sae.neuron_bias)
        opened = torch.relu(gate)
        by_gates = product(opened, sae.decoder.weight.detach()) + sae.input_bias.detach()
        loss = (
            squared_error(sae, features, x)
            + penalty.coefficient * opened.sum(1).mean()
            + (by_gates - x).square().sum(1).mean()
        )
        return loss, features

    def inference_state(self, state: State) -> State:
        """JumpReLU, the gates' offsets moved into the thresholds."""
        state = dict(state)
        state["encoder.weight"], state["threshold"] = as_jumprelu(
            state["encoder.weight"],
            state["neuron_bias"],
            state.pop("gate_bias"),
            state.pop("log_magnitude"),
        )
        return state

    def begin_at(self, sae: Autoencoder, bias: torch.Tensor, threshold: torch.Tensor) -> None:
        """Magnitudes are the projections, gates open above the threshold."""
        sae.log_magnitude.zero_()
        sae.gate_bias.copy_(bias - threshold)

    def saelens(self, sae: Autoencoder, state: State) -> tuple[State, dict]:
        """JumpReLU's thresholds."""
        return saelens_threshold(sae, state), {}


def as_jumprelu(
    weight: torch.Tensor, bias: torch.Tensor, gate_bias: torch.Tensor, log_magnitude: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(encoder rows (M, d), thresholds (M,)) of the JumpReLU autoencoder that a gated one equals;
    the bias (M,), of the magnitudes, stays.

    With h = W (x - b_dec), the gate is open where the magnitude's pre-activation exp(r) h + b
    exceeds b - exp(r) gate_bias.
    """
    magnitude = log_magnitude.exp()
    return weight * magnitude[:, None], torch.relu(bias - magnitude * gate_bias)


ARCHITECTURE = Gated()
