"""Which of many measured AUCs are above chance: a permutation test of each, and a bound on the
share of false ones."""

import numpy as np

# false discovery rate: expected share of chance findings among those that are called above chance
LEVEL = 0.05


def rank_sum_p_values(ranks: np.ndarray, n_inside: np.ndarray, rank_sums: np.ndarray) -> np.ndarray:
    """(M,) one-sided p-values of rank sums under a random choice of the examples inside.

    Args: ranks (n, M), each column's ranks over n examples, ties averaged; n_inside (M,), how many
    examples the sum is over; rank_sums (M,). The null distribution is that of the sum over n_inside
    of the n ranks, drawn without replacement (a permutation of the labels); its mean, variance and
    skewness are exact, its tail that of the Pearson type III distribution with these, which keeps
    to the exact tail where a feature fires in few examples and the normal distribution does not.
    """
    from scipy.stats import pearson3

    n = len(ranks)
    inside = np.asarray(n_inside, np.float64)
    centred = ranks - ranks.mean(0)
    second, third = (centred**2).mean(0), (centred**3).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = second * inside * (n - inside) / (n - 1)
        moment = third * inside * (n - inside) * (n - 2 * inside) / ((n - 1) * (n - 2))
        # half a step of continuity: the sum moves by at least the smallest gap between ranks
        z = (rank_sums - inside * ranks.mean(0) - 0.5 * smallest_gap(ranks)) / np.sqrt(variance)
        skewness = moment / variance**1.5
    usable = (variance > 0) & np.isfinite(z) & np.isfinite(skewness)
    p = np.ones(ranks.shape[1])
    p[usable] = pearson3.sf(z[usable], skewness[usable])
    return np.clip(np.nan_to_num(p, nan=1.0), 0, 1)


def smallest_gap(ranks: np.ndarray) -> np.ndarray:
    """(M,) least difference between two different ranks of a column; 0 where all are equal."""
    steps = np.diff(np.sort(ranks, axis=0), axis=0)
    return np.where(
        (steps > 0).any(0), np.where(steps > 0, steps, np.inf).min(0, initial=np.inf), 0
    )


def above_chance(p_values: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """(M,) bool: p-values that the Benjamini-Hochberg procedure accepts at this false discovery
    rate; nan never is."""
    p_values = np.asarray(p_values, np.float64)
    known = np.flatnonzero(~np.isnan(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    passed = np.flatnonzero(
        p_values[order] <= level * np.arange(1, len(order) + 1) / max(len(order), 1)
    )
    accepted = np.zeros(len(p_values), bool)
    if len(passed):
        accepted[order[: passed[-1] + 1]] = True
    return accepted
