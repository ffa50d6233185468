"""JumpReLU: every pre-activation above a threshold learned for each feature (arXiv 2407.14435),
trained with an L0 penalty (FAST, arXiv 2506.07691, eq. 4 to 6) or towards an L0 (Gemma Scope 2)."""

from typing import Any

import torch

from fastsae.sae import Autoencoder
from fastsae.sae.architectures.base import (
    Architecture,
    Penalty,
    State,
    pre_activations,
    saelens_threshold,
    squared_error,
)
from fastsae.settings.architectures import About


class JumpReLU(Architecture):
    """Learns `threshold` (M,)."""

    about = About(
        name="jumprelu",
        does="every pre-activation above its feature's threshold",
        starts_from=("jumprelu", "batchtopk", "standard"),
        aims_at_k=True,
        coefficient="L0_COEFFICIENT",
        weight=6.0,
        saelens="jumprelu",
        dictionary_learning="JumpReluAutoEncoder",
    )

    def prepare(self, sae: Autoencoder) -> None:
        """A threshold for each feature, 0."""
        del sae.threshold  # a buffer, one for all
        sae.threshold = torch.nn.Parameter(torch.zeros_like(sae.neuron_bias))

    @torch.no_grad()
    def start(self, sae: Autoencoder, sample: torch.Tensor) -> None:
        """One threshold for all, above which K features fire per token of `sample` (n, d)."""
        pre = torch.relu(pre_activations(sae, sample))  # (n, M)
        n_active = min(sae.k_active_neurons * len(sample), pre.numel() - 1)
        sae.threshold.fill_(pre.flatten().topk(n_active + 1, sorted=False).values.min())

    def constrain(self, sae: Autoencoder) -> None:
        """No threshold below 0, where negative pre-activations would pass."""
        sae.threshold.data.clamp_(min=0)

    def loss(
        self, sae: Autoencoder, x: torch.Tensor, penalty: Penalty
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error + coefficient * L0, or with target_l0 the square of the L0's distance from
        it."""
        features, l0 = Jump.apply(pre_activations(sae, x), sae.threshold, penalty.bandwidth)
        target = penalty.target_l0
        excess = l0 if target is None else 2 / target * (l0 - target).square()  # (B,)
        return squared_error(sae, features, x) + penalty.coefficient * excess.mean(), features

    def begin_at(self, sae: Autoencoder, bias: torch.Tensor, threshold: torch.Tensor) -> None:
        """The thresholds themselves."""
        sae.threshold.copy_(threshold.expand_as(sae.threshold))

    def saelens(self, sae: Autoencoder, state: State) -> tuple[State, dict]:
        """JumpReLU's thresholds."""
        return saelens_threshold(sae, state), {}


class Jump(torch.autograd.Function):
    """JumpReLU and L0 of pre-activations (B, M): (features (B, M), L0 of each token (B,)).

    Straight-through gradients for the thresholds alone, with a rectangular kernel of width
    `bandwidth` around each (arXiv 2407.14435, eq. 11 and 12); the pre-activations get the gradient
    of the features that fire.
    """

    @staticmethod
    def forward(
        ctx: Any, pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(features (B, M), L0 (B,)) of pre-activations (B, M) and thresholds (M,)."""
        fires = pre > threshold
        ctx.save_for_backward(pre, threshold, fires)
        ctx.bandwidth = bandwidth
        return pre * fires, fires.sum(1, dtype=pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Gradients of pre-activations (B, M) and thresholds (M,), from those of features and
        L0."""
        grad_features, grad_l0 = grad
        pre, threshold, fires = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        grad_threshold = (
            -(near * (threshold * grad_features + grad_l0[:, None])).sum(0) / ctx.bandwidth
        )
        return grad_features * fires, grad_threshold, None


ARCHITECTURE = JumpReLU()
