"""The three dense architectures: standard (ReLU + L1), JumpReLU and Gated, trained by autograd
through the forward pass below.

All three are kept in the module of HypotheSAEs: encoder (M, d), neuron_bias (M,), decoder (d, M)
with rows of length 1, input_bias (d,). JumpReLU learns `threshold` (M,); Gated learns `gate_bias`
(M,) and `log_magnitude` (M,) besides. At inference each is "every pre-activation above its
threshold" (0 for standard), which `autoencoder.encode` computes for BatchTopK already.

The losses are SAELens' (tests/sae/test_architectures.py compares them): squared error summed over
the d dimensions, mean over tokens, plus the penalty per token. Their coefficients therefore mean
the same only for activations of the same length: see Normalisation.
"""

import math
from dataclasses import dataclass

import torch

from fastsae.runtime import distributed

DENSE = ("standard", "jumprelu", "gated")


def prepare(sae, architecture):
    """Give a fresh `hypothesaes.sae.SparseAutoencoder` the parameters of its architecture."""
    sae.architecture = architecture
    if architecture == "jumprelu":
        del sae.threshold
        sae.threshold = torch.nn.Parameter(torch.zeros_like(sae.neuron_bias))
    elif architecture == "gated":
        sae.gate_bias = torch.nn.Parameter(torch.zeros_like(sae.neuron_bias))
        sae.log_magnitude = torch.nn.Parameter(torch.zeros_like(sae.neuron_bias))


class Jump(torch.autograd.Function):
    """JumpReLU and L0 of pre-activations (B, M): (features (B, M), L0 of each token (B,)).

    Straight-through gradients for the thresholds alone, with a rectangular kernel of width
    `bandwidth` around each (arXiv 2407.14435, eq. 11 and 12); the pre-activations get the gradient
    of the features that fire.
    """

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        fires = pre > threshold
        ctx.save_for_backward(pre, threshold, fires)
        ctx.bandwidth = bandwidth
        return pre * fires, fires.sum(1, dtype=pre.dtype)

    @staticmethod
    def backward(ctx, grad_features, grad_l0):
        pre, threshold, fires = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        grad_threshold = (
            -(near * (threshold * grad_features + grad_l0[:, None])).sum(0) / ctx.bandwidth
        )
        return grad_features * fires, grad_threshold, None


def standard_loss(sae, x, *, sparsity, **_):
    """Squared error + sparsity * L1 (FAST, eq. 1 to 3)."""
    features = torch.relu(sae.encoder(x - sae.input_bias) + sae.neuron_bias)  # (B, M)
    return _squared_error(sae, features, x) + sparsity * features.sum(1).mean(), features


def jumprelu_loss(sae, x, *, sparsity, bandwidth, target_l0):
    """Squared error + sparsity * L0 (FAST, eq. 4 to 6), or with target_l0 the square of the L0's
    distance from it (Gemma Scope 2)."""
    features, l0 = Jump.apply(
        sae.encoder(x - sae.input_bias) + sae.neuron_bias, sae.threshold, bandwidth
    )
    penalty = l0 if target_l0 is None else 2 / target_l0 * (l0 - target_l0).square()
    return _squared_error(sae, features, x) + sparsity * penalty.mean(), features


def gated_loss(sae, x, *, sparsity, **_):
    """Squared error + sparsity * L1 of the gates + squared error of the gates' own reconstruction
    (arXiv 2404.16014, eq. 8).

    The gates' reconstruction goes through a frozen decoder, as in the paper (SAELens trains the
    decoder on it too).
    """
    projection = sae.encoder(x - sae.input_bias)  # (B, M)
    gate = projection + sae.gate_bias
    features = (gate > 0) * torch.relu(projection * sae.log_magnitude.exp() + sae.neuron_bias)
    opened = torch.relu(gate)
    by_gates = opened @ sae.decoder.weight.detach().t() + sae.input_bias.detach()
    loss = (
        _squared_error(sae, features, x)
        + sparsity * opened.sum(1).mean()
        + (by_gates - x).square().sum(1).mean()
    )
    return loss, features


def _squared_error(sae, features, x):
    return (sae.decoder(features) + sae.input_bias - x).square().sum(1).mean()


LOSSES = {"standard": standard_loss, "jumprelu": jumprelu_loss, "gated": gated_loss}


def dense_step(sae, x, dead, *, sparsity, bandwidth, target_l0):
    """Fill `.grad` of all parameters for one batch x (B, d), as `sparse_step` does for the TopK
    family: (loss, fired (M,))."""
    sae.zero_grad(set_to_none=True)
    if sae.architecture == "jumprelu":
        # below 0 the gate would let negative pre-activations through
        sae.threshold.data.clamp_(min=0)
    loss, features = LOSSES[sae.architecture](
        sae, x, sparsity=sparsity, bandwidth=bandwidth, target_l0=target_l0
    )
    # means over the slices of the batch become parts of the mean over all of it
    if distributed.together():
        loss = loss * (len(x) / int(distributed.total(torch.tensor([len(x)]))))
    loss.backward()
    return loss.detach(), (features.detach() > 0).any(0)


@torch.no_grad()
def validation_loss(sae, x_blocks, **options):
    """The loss on the tokens of `x_blocks`, (B, d) each, normalised as in training; `options` as
    for `dense_step`."""
    total, n = 0.0, 0
    if sae.architecture == "jumprelu":
        sae.threshold.clamp_(min=0)  # as the next step would
    for x in x_blocks:
        total += float(LOSSES[sae.architecture](sae, x, **options)[0]) * len(x)
        n += len(x)
    return total / n


@torch.no_grad()
def start_threshold(sae, sample):
    """JumpReLU's thresholds at the start: one value, above which K features fire per token of
    `sample` (n, d)."""
    pre = torch.relu(sae.encoder(sample - sae.input_bias) + sae.neuron_bias)  # (n, M)
    n_active = min(sae.k_active_neurons * len(sample), pre.numel() - 1)
    sae.threshold.fill_(pre.flatten().topk(n_active + 1, sorted=False).values.min())


@dataclass
class Normalisation:
    """What is done to activations before training: (x - mean) * scale. It is folded into the saved
    weights."""

    mean: torch.Tensor | None = None  # (d,)
    scale: float = 1.0

    def __call__(self, x):
        if self.mean is not None:
            x = x - self.mean
        return x if self.scale == 1 else x * self.scale


def choose_normalisation(kind, sample):
    """none; mean: subtract the mean of `sample` (n, d); norm: the mean length becomes sqrt(d), as
    in SAELens; both."""
    mean = sample.mean(0) if kind in ("mean", "both") else None
    centred = sample if mean is None else sample - mean
    length = float(torch.linalg.vector_norm(centred, dim=1).double().mean())
    return Normalisation(
        mean,
        math.sqrt(sample.shape[1]) / length if kind in ("norm", "both") and length > 0 else 1.0,
    )


@torch.no_grad()
def inference_weights(sae, normalisation):
    """The state dict of an autoencoder that takes activations as they are, and whose features are
    those of `sae` / scale.

    `sae` takes normalised activations. With features divided by the scale, both weight matrices
    stay and only the biases and thresholds change. A Gated one becomes the JumpReLU one it equals:
    its gate is open where the magnitude's pre-activation exp(r) h + b exceeds b - exp(r) gate_bias.
    """
    state = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    if sae.architecture == "gated":
        magnitude = state.pop("log_magnitude").exp()
        state["encoder.weight"] = state["encoder.weight"] * magnitude[:, None]
        state["threshold"] = torch.relu(state["neuron_bias"] - magnitude * state.pop("gate_bias"))
    for name in ("neuron_bias", "input_bias", "threshold"):
        state[name] = state[name] / normalisation.scale
    if normalisation.mean is not None:
        state["input_bias"] = state["input_bias"] + normalisation.mean
    return state
