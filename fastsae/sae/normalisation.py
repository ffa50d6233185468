"""What is done to activations before training, and undone in the weights that are saved."""

import math
from dataclasses import dataclass

import torch

from fastsae.sae import Autoencoder, architectures


@dataclass
class Normalisation:
    """What is done to activations before training: (x - mean) * scale. It is folded into the saved
    weights."""

    mean: torch.Tensor | None = None  # (d,)
    scale: float = 1.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(x - mean) * scale of activations x (n, d)."""
        if self.mean is not None:
            x = x - self.mean
        return x if self.scale == 1 else x * self.scale


def choose_normalisation(kind: str, sample: torch.Tensor) -> Normalisation:
    """none; mean: subtract the mean of `sample` (n, d); norm: the mean length becomes sqrt(d), as
    in SAELens; both."""
    mean = sample.mean(0) if kind in ("mean", "both") else None
    centred = sample if mean is None else sample - mean
    length = float(torch.linalg.vector_norm(centred, dim=1).double().mean())
    by_length = kind in ("norm", "both") and length > 0
    return Normalisation(mean, math.sqrt(sample.shape[1]) / length if by_length else 1.0)


@torch.no_grad()
def inference_weights(sae: Autoencoder, normalisation: Normalisation) -> dict[str, torch.Tensor]:
    """The state dict of an autoencoder that takes activations as they are, and whose features are
    those of `sae` / scale.

    `sae` takes normalised activations. With features divided by the scale, both weight matrices
    stay and only the biases and thresholds change.
    """
    state = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    state = architectures.of(sae).inference_state(state)
    for name in ("neuron_bias", "input_bias", "threshold"):
        state[name] = state[name] / normalisation.scale
    if normalisation.mean is not None:
        state["input_bias"] = state["input_bias"] + normalisation.mean
    return state
