"""Where each feature fires, token by token, in as many examples as can be held, and the two halves
of their texts: one to find labels on, one to test them on."""

import numpy as np

MAX_TOKENS = 1 << 18  # of the examples that are looked at; beyond, a random part of them
MAX_ENTRIES = 1 << 23  # activations held, 12 bytes each; fewer tokens where K is large
HALF_SEED = 3  # the language model's labels are found and tested on the same halves


def finding_half(text_numbers: np.ndarray, seed: int) -> np.ndarray:
    """(n_examples,) bool: half of the texts, drawn by the seed; copies of a text go to one half.

    text_numbers: (n_examples,), equal for equal texts.
    """
    _, text = np.unique(text_numbers, return_inverse=True)
    n = int(text.max(initial=-1)) + 1
    order = np.random.default_rng((seed, HALF_SEED)).permutation(n)
    finding = np.zeros(n, bool)
    finding[order[: (n + 1) // 2]] = True
    return finding[text]


class Firings:
    """Activations of features on the tokens of some examples, filled by `statistics.collect`.

    examples: numbers of these, ascending: all, or a random choice of about MAX_TOKENS tokens.
    """

    def __init__(self, lengths: np.ndarray, k: int, seed: int) -> None:
        n_tokens = min(MAX_TOKENS, MAX_ENTRIES // max(1, k))
        order = np.random.default_rng((seed, 6)).permutation(len(lengths))
        n = max(2, int(np.searchsorted(np.cumsum(lengths[order]), n_tokens, "right")))
        self.examples = np.sort(order[:n])
        chosen = np.zeros(len(lengths), bool)
        chosen[self.examples] = True
        self.seen = np.repeat(chosen, lengths)  # (n_tokens,) bool
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._sorted: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def add(self, token: np.ndarray, feature: np.ndarray, value: np.ndarray) -> None:
        """Activations (nnz,) of features (nnz,) on tokens (nnz,), numbered over all examples."""
        inside = self.seen[token]
        self._parts.append(
            (
                token[inside].astype(np.int64),
                feature[inside].astype(np.int32),
                value[inside].astype(np.float32),
            )
        )

    def by_feature(self, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(start (M + 1,), token (nnz,), value (nnz,)): feature j fires on the tokens
        token[start[j] : start[j + 1]], ascending."""
        if self._sorted is None:
            token, feature, value = (np.concatenate(part) for part in zip(*self._parts))
            order = np.lexsort((token, feature))
            start = np.concatenate([[0], np.cumsum(np.bincount(feature, minlength=m))])
            self._sorted = start, token[order], value[order]
            self._parts = []
        return self._sorted
