"""Which tokens an autoencoder is trained and examined on, and the split of examples into training and validation."""
import numpy as np

from fastsae.examples import ROLES, SHARED_PREFIX


def token_norms(activations, block=65536):
    """(n_tokens, d) array of any float type -> (n_tokens,) float32 norms, a block at a time."""
    norms = np.empty(len(activations), np.float32)
    for start in range(0, len(activations), block):
        norms[start:start + block] = np.linalg.norm(activations[start:start + block].astype(np.float32), axis=1)
    return norms


def usable_tokens(norms, kind, *, exclude_shared_prefix, max_norm_ratio, max_norm=None):
    """((n_tokens,) bool, max_norm): tokens left after dropping the shared prefix and attention sinks.

    Sinks are tokens with norms above `max_norm`, by default `max_norm_ratio` times the median of the others (None = no bound).
    """
    keep = kind != SHARED_PREFIX if exclude_shared_prefix else np.ones(len(kind), bool)
    if max_norm is None and max_norm_ratio is not None:
        max_norm = float(max_norm_ratio * np.median(norms[keep])) if keep.any() else 0.0
    return (keep if max_norm is None else keep & (norms <= max_norm)), max_norm


def chosen_tokens(use, kind, role):
    """(n_tokens,) bool: all tokens, those not written by the chat template, or those of the assistant's own text."""
    return {"all": np.ones(len(kind), bool), "content": kind == 0, "assistant": (kind == 0) & (role == ROLES.index("assistant"))}[use]


def split_examples(n_examples, validation_fraction, seed):
    """(n_examples,) bool, True for validation: at least one example on each side, chosen by the seed alone."""
    n_validation = min(max(1, round(n_examples * validation_fraction)), n_examples - 1)
    chosen = np.random.default_rng(seed).permutation(n_examples)[:n_validation]
    validation = np.zeros(n_examples, bool)
    validation[chosen] = True
    return validation
