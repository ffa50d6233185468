"""How alike two sets of directions are, and the directions that a study compares with: random,
principal, of a Fourier basis."""

from collections.abc import Sequence

import numpy as np


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (n, d) of length 1; rows of zeros stay zeros."""
    rows = np.asarray(rows, np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m) cosines of rows (n, d) and (m, d)."""
    return unit(a) @ unit(b).T


def absolute_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m) |cosine| of rows (n, d) and (m, d): for directions whose sign means nothing, as those
    of PCA or of a sine."""
    return np.abs(cosines(a, b))


def absolute_correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m) |Pearson correlation| of columns of (tokens, n) and (tokens, m); 0 for a column that
    does not vary."""
    return absolute_cosines((a - a.mean(0)).T, (b - b.mean(0)).T)


def mean_max(similarity: np.ndarray) -> float:
    """Mean over the rows of (n, m) of their largest entry: each row may take a column that another
    one takes too."""
    return float(similarity.max(1, initial=0).mean())


def matched_mean(similarity: np.ndarray) -> float:
    """Mean entry of the best one-to-one matching of rows and columns (Hungarian algorithm): the MCC
    of identifiability studies.

    With fewer columns than rows the rows left over count as 0.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return float(similarity[rows, columns].sum() / len(similarity))


def found_by_all(sets: list[np.ndarray], threshold: float) -> float:
    """Share of the directions of one set that have one with a cosine above `threshold` in every
    other set; mean over the sets."""
    shares = []
    for i, reference in enumerate(sets):
        best = [cosines(reference, other).max(1) for j, other in enumerate(sets) if j != i]
        shares.append((np.min(best, axis=0) > threshold).mean())
    return float(np.mean(shares))


def random_directions(m: int, d: int, seed: int | np.random.Generator) -> np.ndarray:
    """(m, d) unit rows, all directions equally likely; a generator given as `seed` goes on."""
    return unit(np.random.default_rng(seed).standard_normal((m, d)))


def random_like(x: np.ndarray, m: int, seed: int) -> np.ndarray:
    """(m, d) unit rows drawn from the normal distribution with the covariance of the rows of x (n,
    d): they crowd where x does."""
    generator = np.random.default_rng(seed)
    return unit(generator.standard_normal((m, len(x))) @ (x - x.mean(0)))


def principal_directions(x: np.ndarray, m: int) -> np.ndarray:
    """(min(m, d), d) principal directions of the rows of x (n, d), the widest first."""
    centred = np.asarray(x, np.float64) - x.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    return vectors.T[np.argsort(-values)[:m]]


def fourier_power(table: np.ndarray) -> np.ndarray:
    """(p // 2,) share of the variance over the rows of `table` (p, d) at the frequencies 1 to p //
    2."""
    power = np.square(np.abs(np.fft.rfft(np.asarray(table, np.float64), axis=0)[1:])).sum(1)
    return power / power.sum()


def key_frequencies(table: np.ndarray, share: float) -> list[int]:
    """The fewest frequencies (from 1, strongest first) that hold at least `share` of the variance
    of `table` (p, d)."""
    power = fourier_power(table)
    order = np.argsort(-power)
    n = int(np.searchsorted(np.cumsum(power[order]), share)) + 1
    return [int(k) + 1 for k in order[:n]]


def fourier_directions(table: np.ndarray, frequencies: Sequence[int]) -> np.ndarray:
    """(2 F, d) unit rows: where cos(2 pi k n / p) and sin(2 pi k n / p) point in `table` (p, d),
    for each frequency k in turn."""
    return unit(waves(len(table), frequencies).T @ np.asarray(table, np.float64))


def waves(p: int, frequencies: Sequence[int]) -> np.ndarray:
    """(p, 2 F) cosine and sine of each frequency at 0 to p - 1."""
    angles = 2 * np.pi * np.outer(np.arange(p), frequencies) / p  # (p, F)
    return np.stack([np.cos(angles), np.sin(angles)], 2).reshape(p, -1)


def lengths_in_planes(directions: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(2 F, m): how much of each unit row of `found` (m, d) lies in the plane of each pair of rows
    of `directions` (2 F, d).

    Each plane has two rows, so that a matching gives it two columns. Unlike a cosine this does not
    depend on the phase from which a plane's cosine and sine are counted.
    """
    # (d, 2) each
    planes = [np.linalg.qr(directions[i : i + 2].T)[0] for i in range(0, len(directions), 2)]
    lengths = np.stack([np.linalg.norm(unit(found) @ plane, axis=1) for plane in planes])  # (F, m)
    return np.repeat(lengths, 2, axis=0)
