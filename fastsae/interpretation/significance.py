"""Which of many measured AUCs are above chance: a permutation test of each, and a bound on the
share of false ones; intervals of AUCs and correlations."""

from typing import Any

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


def auc_of_rank_sums(sums: Any, n_inside: Any, n_outside: Any) -> Any:
    """The AUC from the sum of the ranks, ties averaged, of those inside: the probability that one
    inside is above one outside, ties counting half. nan where a side is empty; arrays broadcast."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums - n_inside * (n_inside + 1) / 2) / (n_inside * n_outside)


def score_interval(auc: Any, n_inside: Any, n_outside: Any) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of the 95 % intervals of AUCs (k,) from so many inside and outside, each (k,) or
    one number.

    The score interval of Newcombe (2006, method 5): all values from which the AUC measured is at
    most 1.96 standard errors away, that of each value being Hanley and McNeil's. It stays within 0
    and 1, and has a width where the AUC is 0 or 1.
    """
    auc = np.asarray(auc, np.float64)
    extra = (n_inside + n_outside) / 2 - 1

    def standard_error(value):
        spread = 1 + extra * ((1 - value) / (2 - value) + value / (1 + value))
        return np.sqrt(value * (1 - value) * spread / (n_inside * n_outside))

    ends = []
    for end in (0.0, 1.0):
        near, far = auc.copy(), np.full_like(auc, end)  # inside the interval, and beyond it
        for _ in range(40):
            middle = (near + far) / 2
            within = np.abs(auc - middle) <= 1.96 * standard_error(middle)
            near, far = np.where(within, middle, near), np.where(within, far, middle)
        ends.append(near)
    return ends[0], ends[1]


def auc_intervals(columns: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(k, 2) `score_interval` of the AUC of each column (n, k) for inside (n,) bool, nan where a
    side is empty."""
    from scipy.stats import rankdata

    n_in, n_out = int(inside.sum()), int((~inside).sum())
    if not n_in or not n_out:
        return np.full((columns.shape[1], 2), np.nan)
    auc = auc_of_rank_sums(rankdata(columns, axis=0)[inside].sum(0), n_in, n_out)
    return np.stack(score_interval(auc, n_in, n_out), axis=1)


def correlation_intervals(
    columns: np.ndarray, target: np.ndarray, seed: int, n_draws: int = 500, block: int = 50
) -> np.ndarray:
    """(k, 2) 95 % intervals of the correlation of each column (n, k) with the target (n,), of a
    bootstrap over rows; nan where a column is constant in every resample.

    Not Fisher's: features are 0 in most texts, far from a normal distribution.
    """
    columns = columns - columns.mean(0, dtype=np.float64)
    target = target - target.mean()
    generator, n, found = np.random.default_rng((seed, 12)), len(target), []
    for start in range(0, n_draws, block):
        size = min(block, n_draws - start)
        weight = generator.multinomial(n, np.full(n, 1 / n), size) / n  # (draws, n)
        mean, of_target = weight @ columns, (weight @ target)[:, None]
        together = weight @ (columns * target[:, None]) - mean * of_target
        spread = (weight @ columns**2 - mean**2) * (weight @ target**2 - of_target[:, 0] ** 2)[
            :, None
        ]
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(np.where(spread > 1e-24, together / np.sqrt(spread), np.nan))
    draws = np.concatenate(found)
    result = np.full((columns.shape[1], 2), np.nan)
    known = ~np.isnan(draws).all(0)
    result[known] = np.nanquantile(draws[:, known], (0.025, 0.975), axis=0).T
    return result
