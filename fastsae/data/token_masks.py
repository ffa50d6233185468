"""Which tokens an autoencoder is trained and examined on, and the split of examples into three
parts."""

import hashlib

import numpy as np

from fastsae.data.tokenization import ROLES, SHARED_PREFIX


def token_norms(activations: np.ndarray, block: int = 65536) -> np.ndarray:
    """(n_tokens, d) array of any float type -> (n_tokens,) float32 norms, a block at a time."""
    norms = np.empty(len(activations), np.float32)
    for start in range(0, len(activations), block):
        norms[start : start + block] = np.linalg.norm(
            activations[start : start + block].astype(np.float32), axis=1
        )
    return norms


def usable_tokens(
    norms: np.ndarray,
    kind: np.ndarray,
    *,
    exclude_shared_prefix: bool,
    max_norm_ratio: float | None,
    max_norm: float | None = None,
    deciding: np.ndarray | None = None,
) -> tuple[np.ndarray, float | None]:
    """((n_tokens,) bool, max_norm): tokens left after dropping the shared prefix and attention
    sinks.

    Sinks are tokens with norms above `max_norm`, by default `max_norm_ratio` times the median of
    the others (None = no bound). deciding: (n_tokens,) bool, the tokens of which that median is
    (None: all; if none of them is left after the prefix, all too).
    """
    keep = kind != SHARED_PREFIX if exclude_shared_prefix else np.ones(len(kind), bool)
    if max_norm is None and max_norm_ratio is not None:
        of = keep if deciding is None or not (keep & deciding).any() else keep & deciding
        max_norm = float(max_norm_ratio * np.median(norms[of])) if keep.any() else 0.0
    return (keep if max_norm is None else keep & (norms <= max_norm)), max_norm


def chosen_tokens(use: str, kind: np.ndarray, role: np.ndarray) -> np.ndarray:
    """(n_tokens,) bool: all tokens, those not written by the chat template, or those of the
    assistant's own text."""
    return {
        "all": np.ones(len(kind), bool),
        "content": kind == 0,
        "assistant": (kind == 0) & (role == ROLES.index("assistant")),
    }[use]


TRAIN, VALIDATION, TEST = 0, 1, 2  # what an example is for


def text_numbers(token_ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(n_examples,) int: examples of one number are the same tokens, numbered in the order they
    come.

    Args: token_ids (n_tokens,); offsets (n_examples + 1,), where each example begins and ends.
    """
    numbers, result = {}, np.empty(len(offsets) - 1, np.int64)
    for i, (start, stop) in enumerate(zip(offsets, offsets[1:])):
        content = np.ascontiguousarray(token_ids[start:stop], np.int64).tobytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()  # so long texts are not kept
        result[i] = numbers.setdefault(digest, len(numbers))
    return result


def split_examples(n_examples: int, validation_fraction: float, seed: int) -> np.ndarray:
    """(n_examples,) bool, True for validation: at least one example on each side.

    Drawn by the seed alone.
    """
    return split_texts(np.arange(n_examples), validation_fraction, 0.0, seed) == VALIDATION


def split_texts(
    texts: np.ndarray, validation_fraction: float, test_fraction: float, seed: int
) -> np.ndarray:
    """(n_examples,) TRAIN, VALIDATION or TEST, a function of the arguments alone.

    Args: texts (n_examples,), numbers from 0 of the examples' texts. Examples with one text go to
    one part: a copy in training would make its reconstruction look like one of unseen text.

    Validation has at least one text and training too. The test part has round(test_fraction times
    the number of texts), hence none where there are few, and the same validation examples are
    drawn with and without it. Where all examples have one text they are split as if they differed.
    """
    n = int(texts.max()) + 1
    if n < 2:
        texts, n = np.arange(len(texts)), len(texts)
    n_validation = min(max(1, round(n * validation_fraction)), n - 1)
    n_test = min(round(n * test_fraction), n - 1 - n_validation)
    order = np.random.default_rng(seed).permutation(n)
    part = np.full(n, TRAIN, np.int8)  # of each text
    part[order[:n_validation]] = VALIDATION
    part[order[n_validation : n_validation + n_test]] = TEST
    return part[texts]
