"""How well an autoencoder reconstructs activations, summed over whole sets of tokens (never a mean
of batch ratios)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastsae.activations.files import release
from fastsae.runtime.stops import stop_if_asked
from fastsae.sae import Autoencoder
from fastsae.sae.autoencoder import decode, encode

BATCH = 4096
IN_ALL = ("mse", "normalized_mse", "explained_variance", "l0", "mse_template_tokens", "n_tokens")


@torch.no_grad()
def evaluate(
    sae: Autoencoder,
    activations: Any,
    rows: np.ndarray,
    example_of_row: np.ndarray,
    special: np.ndarray,
    errors: np.ndarray | None = None,
) -> dict[str, Any]:
    """Metrics of `sae` on the given rows of `activations`.

    Args: activations (n_tokens, d) CPU tensor or (mapped) array; rows (n,) the tokens to use;
    example_of_row (n_tokens,) example numbers; special (n_tokens,) bool, the tokens that count for
    mse_template_tokens (stage 2: every token that the chat template wrote, which is more than the
    control tokens and role names of the paper's MSE_st); errors (n_tokens,), to be filled at the
    rows given with the squared error of each, summed over dimensions.

    `mse` is FAST's (arXiv 2506.07691, eq. 7): squared error per dimension, the mean over the tokens
    of an example, then over examples. `normalized_mse` is the sum of squared errors over the sum of
    squared distances from the tokens' mean.
    """
    sums = _sums(sae, activations, rows)
    if errors is not None:
        errors[rows] = sums.squared
    per_dimension = sums.squared / activations.shape[1]
    normalised = float(sums.squared.sum() / sums.variance)
    examples, is_special = example_of_row[rows], special[rows]
    return {
        "mse": _per_example_mean(per_dimension, examples),
        "normalized_mse": normalised,
        "explained_variance": 1 - normalised,
        "l0": sums.n_active / len(rows),
        "dead_fraction": 1 - sums.fired_fraction,
        "mse_template_tokens": _per_example_mean(per_dimension[is_special], examples[is_special]),
        "cosine_similarity": sums.cosine / len(rows),
        "prefix_normalized_mse": {
            str(end): float(squared / sums.variance)
            for end, squared in zip(_prefixes(sae), sums.prefix_squared)
        },
        "n_tokens": len(rows),
        "n_special_tokens": int(is_special.sum()),
    }


@dataclass
class _Sums:
    """What one pass over n tokens adds up."""

    squared: np.ndarray  # (n,) squared error of each token, summed over dimensions
    prefix_squared: np.ndarray  # (n_prefixes,) the same from each prefix, summed over tokens
    cosine: float  # of tokens and reconstructions
    n_active: int  # features, over all tokens
    fired_fraction: float  # of the features
    variance: float  # squared distances from the tokens' mean


def _sums(sae: Autoencoder, activations: Any, rows: np.ndarray) -> _Sums:
    device, m, d = sae.input_bias.device, sae.m_total_neurons, activations.shape[1]
    prefixes = _prefixes(sae)
    squared, prefix_squared = np.empty(len(rows)), np.zeros(len(prefixes))
    cosine, n_active = 0.0, 0
    fired = torch.zeros(m, dtype=torch.bool, device=device)
    total, total_squared = torch.zeros(d, dtype=torch.float64), 0.0
    for start in range(0, len(rows), BATCH):
        stop_if_asked()
        x = torch.as_tensor(activations[rows[start : start + BATCH]]).to(device).float()  # (B, d)
        release(activations)
        entries = encode(sae, x)
        reconstruction = decode(sae, entries)
        error = (reconstruction - x).square().sum(1)  # (B,)
        squared[start : start + len(x)] = error.double().cpu().numpy()
        prefix_squared += [
            float((error if end == m else _prefix_error(sae, entries, end, x)).double().sum())
            for end in prefixes
        ]
        cosine += float(torch.cosine_similarity(reconstruction, x).double().sum())
        n_active += len(entries.value)
        fired[entries.column] = True
        wide = x.double()  # summed where the data are: a row of 2,304 dimensions is 18 kB
        total += wide.sum(0).cpu()
        total_squared += float(wide.square().sum())
    variance = max(total_squared - float(total.square().sum()) / len(rows), 1e-30)
    fired_fraction = float(fired.double().mean())
    return _Sums(squared, prefix_squared, cosine, n_active, fired_fraction, variance)


def _prefixes(sae: Autoencoder) -> list[int]:
    """The lengths of the prefixes, the whole last."""
    return sae.prefix_lengths or [sae.m_total_neurons]


def _prefix_error(sae, entries, end, x):
    return (decode(sae, entries.keep(entries.column < end)) - x).square().sum(1)


def _per_example_mean(values, example):
    """The mean over examples of each one's mean value; None without values."""
    if not len(values):
        return None
    _, inverse, counts = np.unique(example, return_inverse=True, return_counts=True)
    return float(np.mean(np.bincount(inverse, values) / counts))


def measured_on(metrics: Mapping[str, Any]) -> str:
    """The part of the examples that the figures are of; without a test part: validation."""
    return metrics.get("measured_on", "validation")
