"""Bootstrap intervals of the studies: resampled examples, and seeds where there are few of them."""

from collections.abc import Sequence

import numpy as np


def bootstrap_counts(n: int, n_draws: int, seed: int = 0) -> np.ndarray:
    """How often each of `n` examples is drawn in each resample: (n_draws, n) int64, rows sum to n.

    `counts @ sums` gives the resampled sums of a statistic whose sums per example are (n,).
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_draws)


def interval(draws: np.ndarray) -> list[float]:
    """[low, high] of the middle 95 % of the draws."""
    return [float(value) for value in np.quantile(draws, (0.025, 0.975))]


def interval_of_finite(draws: np.ndarray) -> list[float] | None:
    """`interval` of the draws that are finite: some resamples hold no token. None if none is."""
    finite = draws[np.isfinite(draws)]
    return interval(finite) if len(finite) else None


def draw_seeds(n_seeds: int, n_draws: int, stream: int) -> np.ndarray:
    """(n_draws, n_seeds) numbers of seeds, drawn with replacement; a stream of its own for each
    sample that is to be independent."""
    return np.random.default_rng((1, stream)).integers(0, n_seeds, (n_draws, n_seeds))


def seed_factor(n_seeds: int) -> float:
    """How far the seeds' part of a bootstrap has to be widened, since so few seeds vary less among
    each other than all would.

    Their spread is that of Student's t with n - 1 degrees of freedom, and the bootstrap's variance
    is (n - 1) / n of the right one.
    """
    from scipy.stats import t

    if n_seeds <= 1:
        return 1.0
    return float(t.ppf(0.975, n_seeds - 1) / 1.96 * np.sqrt(n_seeds / (n_seeds - 1)))


def widened(of_examples: np.ndarray, of_both: np.ndarray, n_seeds: int) -> np.ndarray:
    """Draws (n_draws,) in which examples and seeds were resampled, the seeds' part widened by
    `seed_factor`.

    of_examples, of_both: (n_draws,), of resampled examples alone and of both.
    """
    return of_examples + seed_factor(n_seeds) * (of_both - of_examples)


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """95 % interval of the mean of a few values, by Student's t; None of a single one."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return [float(np.mean(values)) - half, float(np.mean(values)) + half]
