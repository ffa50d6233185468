"""How well categories of examples can be read from a few columns of a matrix, or from all of them.

k-sparse probing (arXiv 2502.16681): of every category the k columns are chosen on one half of the
examples, a logistic regression on them is fitted there, and its AUC is measured on the other half.
The choice is that of the sae-probes package: columns in units of their mean over the examples where
they are not 0, by the difference of their means inside and outside the category. A dense probe is
one ridge regression for all categories on all columns.

Several half splits give an interval. They share examples, so the spread of their figures alone
would be too small: see `estimate`.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.special import expit
from scipy.stats import rankdata, t as student

from fastsae.interpretation.categories import Matrix, first_half
from fastsae.interpretation.significance import auc_of_rank_sums
from fastsae.runtime.stops import stop_if_asked

KS = (1, 2, 5, 16)
KINDS = ("random tokens", "random directions")  # of dictionaries that nobody trained, see nulls.py
PENALTIES = np.logspace(-1, 5, 7)  # of the dense probe, on columns of unit variance
LEAST_TEXTS = 4  # of a category, or either half would have one
MOST_CATEGORIES = 64  # probed, the commonest
TOGETHER = 16  # categories whose regressions are fitted at a time
TOLERANCE, MOST_STEPS = 1e-3, 30  # of a logistic regression: the AUC is the measure


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"value": self.value, "interval": [self.low, self.high]}


def estimate(
    values: Sequence[float] | np.ndarray,
    least: float = -np.inf,
    most: float = np.inf,
    *,
    independent: bool = False,
) -> Estimate | None:
    """The mean of a figure over half splits (n_splits,), with a 95 % interval; None if none is
    finite. The figure cannot be below `least` or above `most`, nor can the interval.

    Splits share examples. Their variance is multiplied by 1 / n + n_held_out / n_finding, here
    1 / n + 1 (Nadeau and Bengio 2003, the corrected resampled t-test), and Student's t taken with
    n - 1 degrees of freedom. Of values that are `independent`, as those of features, the variance
    of the mean is 1 / n of theirs.
    """
    found = np.asarray([value for value in values if np.isfinite(value)], np.float64)
    if not len(found):
        return None
    mean, n = float(found.mean()), len(found)
    if n < 2:
        return Estimate(mean, least, most)
    share = 1 / n + (not independent)
    half = float(student.ppf(0.975, n - 1) * np.sqrt(share * found.var(ddof=1)))
    return Estimate(mean, max(mean - half, least), min(mean + half, most))


def probed_categories(labels: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The categories (their numbers) that have LEAST_TEXTS different texts and are not all, the
    MOST_CATEGORIES commonest."""
    pairs = np.unique(np.column_stack([labels, texts])[labels >= 0], axis=0)
    counts = np.bincount(pairs[:, 0]) if len(pairs) else np.zeros(0, int)
    n_texts = len(np.unique(texts))
    possible = np.flatnonzero((counts >= LEAST_TEXTS) & (counts <= n_texts - LEAST_TEXTS))
    return np.sort(possible[np.argsort(-counts[possible], kind="stable")][:MOST_CATEGORIES])


def half_splits(
    labels: np.ndarray, n_categories: int, texts: np.ndarray, seed: int, n_splits: int
) -> list[np.ndarray]:
    """[(n,) bool, the finding half] of each split: half of every category, copies of a text on one
    side."""
    return [first_half(labels, n_categories, seed + i, texts) for i in range(n_splits)]


def ranking(columns: Matrix, inside: np.ndarray) -> np.ndarray:
    """(n_categories, n_columns): by how much the mean of each column inside a category differs from
    that outside, columns in units of their mean over the examples where they are not 0.

    columns (n, p), dense or sparse; inside (n_categories, n) bool.
    """
    columns = sparse.csr_matrix(columns)
    n_nonzero = np.asarray((columns != 0).sum(0)).ravel()
    unit = np.asarray(abs(columns).sum(0)).ravel() / np.maximum(n_nonzero, 1)
    member = sparse.csr_matrix(inside.astype(np.float64))
    sums = np.asarray((member @ columns).todense())
    rest = np.asarray(columns.sum(0)).ravel() - sums
    n_inside = inside.sum(1, keepdims=True)
    n_outside = inside.shape[1] - n_inside
    difference = sums / np.maximum(n_inside, 1) - rest / np.maximum(n_outside, 1)
    return difference / np.maximum(unit, 1e-12)


def aucs(scores: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(n_categories,) AUC of scores (n, n_categories) for inside (n_categories, n) bool, column by
    column; ties count half, nan where a side is empty."""
    ranks = rankdata(scores, axis=0)
    n_inside = inside.sum(1).astype(np.float64)
    n_outside = inside.shape[1] - n_inside
    return auc_of_rank_sums((ranks * inside.T).sum(0), n_inside, n_outside)


def sparse_probe(
    columns: Matrix, inside: np.ndarray, first: np.ndarray, ks: Sequence[int] = KS
) -> np.ndarray:
    """(len(ks), n_categories) AUC on the held-out half of k-sparse probes fitted on the other.

    Args: columns (n, p), dense or sparse; inside (n_categories, n) bool; first (n,) bool, the
    finding half.
    """
    finding, testing = columns[first], columns[~first]
    found_in, tested_in = inside[:, first], inside[:, ~first]
    result = np.full((len(ks), len(inside)), np.nan)
    if not columns.shape[1]:
        return result
    worth = ranking(finding, found_in)  # (n_categories, p)
    best = np.argsort(-np.abs(worth), axis=1, kind="stable")[:, : max(ks)]
    signs = np.sign(np.take_along_axis(worth, best[:, :1], axis=1))
    chosen, place = np.unique(best, return_inverse=True)
    place = place.reshape(best.shape)
    for start in range(0, len(inside), TOGETHER):
        stop_if_asked()
        some = slice(start, start + TOGETHER)
        # (n_categories, n, k) of each half
        fit_on, apply_to = (
            dense_columns(side, chosen)[:, place[some]].swapaxes(0, 1)
            for side in (finding, testing)
        )
        for i, k in enumerate(ks):
            if k == 1:  # a regression on one column orders examples as the column does
                scores = signs[some] * apply_to[:, :, 0]
            else:
                scores = logistic_scores(fit_on[:, :, :k], found_in[some], apply_to[:, :, :k])
            result[i, some] = aucs(scores.T, tested_in[some])
    return result


def dense_columns(columns: Matrix, chosen: np.ndarray) -> np.ndarray:
    """(n, len(chosen)) these columns of a matrix, dense or sparse."""
    if isinstance(columns, np.ndarray):
        return columns[:, chosen]
    return columns.tocsc()[:, chosen].toarray()


def logistic_scores(fit_on: np.ndarray, inside: np.ndarray, apply_to: np.ndarray) -> np.ndarray:
    """(n_categories, n) log-odds of `apply_to` (n_categories, n, k) by logistic regressions of
    `inside` (n_categories, m) bool on `fit_on` (n_categories, m, k), columns in units of their
    standard deviation; 0 for a category that has all examples or none."""
    centre, scale = fit_on.mean(1, keepdims=True), fit_on.std(1, keepdims=True)
    scale = np.where(scale > 0, scale, 1)
    weights = np.zeros((len(inside), fit_on.shape[2]))
    mixed = np.flatnonzero(inside.any(1) & ~inside.all(1))
    units = (fit_on[mixed] - centre[mixed]) / scale[mixed]
    weights[mixed] = logistic_weights(units, inside[mixed])
    return np.matmul((apply_to - centre) / scale, weights[:, :, None])[:, :, 0]


def logistic_weights(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(n_categories, k) weights of logistic regressions of inside (n_categories, m) bool on x
    (n_categories, m, k), with an intercept and half the squared length of the weights as penalty:
    those of scikit-learn's LogisticRegression(solver="newton-cholesky", tol=TOLERANCE).

    Thousands of fits this small are made, and scikit-learn looks at its arguments ten times as long
    as it computes. Here all categories take their Newton steps together.
    """
    n_categories, n, k = x.shape
    design = np.concatenate([x, np.ones((n_categories, n, 1))], axis=2, dtype=np.float64)
    target = inside.astype(np.float64)
    penalty = np.append(np.full(k, 1 / n), 0.0)

    def loss(rows, weights):
        odds = _times(design[rows], weights)
        fit = (np.logaddexp(0, odds) - target[rows] * odds).mean(1)
        return fit + (penalty * weights**2).sum(1) / 2

    weights = np.zeros((n_categories, k + 1))
    now, moved = np.full(n_categories, np.log(2)), np.full(n_categories, np.inf)
    for _ in range(MOST_STEPS):
        chance = expit(_times(design, weights))
        gradient = _times(design.swapaxes(1, 2), chance - target) / n + penalty * weights
        at_end = (np.abs(gradient).max(1) <= TOLERANCE) & (moved <= TOLERANCE)
        going = np.flatnonzero(~at_end)
        if not len(going):
            break
        some, spread = design[going], chance[going] * (1 - chance[going]) / n
        curvature = (some * spread[:, :, None]).swapaxes(1, 2) @ some
        curvature += np.diag(penalty + 1e-12)
        step = np.linalg.solve(curvature, gradient[going][:, :, None])[:, :, 0]
        worth = (gradient[going] * step).sum(1)  # what a whole step promises, twice
        value = loss(going, weights[going] - step)
        for _ in range(20):  # shorter until it keeps a part of the promise
            long = np.flatnonzero(value > now[going] - worth / 2**11)
            if not len(long):
                break
            step[long], worth[long] = step[long] / 2, worth[long] / 2
            value[long] = loss(going[long], weights[going[long]] - step[long])
        weights[going] -= step
        now[going], moved[going] = value, (step * _times(curvature, step)).sum(1) / 2
    return weights[:, :-1]


def _times(matrices, vectors):
    """(n, a) the products of matrices (n, a, b) with vectors (n, b)."""
    return np.matmul(matrices, vectors[:, :, None])[:, :, 0]


def dense_probe(columns: Matrix, inside: np.ndarray, first: np.ndarray) -> np.ndarray:
    """(n_categories,) AUC on the held-out half of ridge regressions of all categories on all
    columns, fitted on the other half, which chooses their penalty too; arguments as in
    `sparse_probe`."""
    if not columns.shape[1]:
        return np.full(len(inside), np.nan)
    stop_if_asked()
    predicted = ridge_predictions(columns, inside.T.astype(np.float64), first, PENALTIES)
    return aucs(predicted.reshape(-1, len(inside)), inside[:, ~first])


def ridge_predictions(
    columns: Matrix, target: np.ndarray, first: np.ndarray, penalties: np.ndarray
) -> np.ndarray:
    """Predictions for the held-out half, (n_held_out,) or (n_held_out, n_targets), of a ridge
    regression of target (n,) or (n, n_targets) on columns (n, p) of unit variance, fitted on the
    half `first` (n,), which chooses one of `penalties` too."""
    from sklearn.linear_model import RidgeCV

    fit_on, apply_to = scaled(columns, first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns that are constant in this half
        return np.asarray(RidgeCV(penalties).fit(fit_on, target[first]).predict(apply_to))


def scaled(columns: Matrix, first: np.ndarray) -> tuple[Matrix, Matrix]:
    """(finding half, held-out half) of columns (n, p), float64, in units of their standard
    deviation on the finding half; sparse ones stay sparse."""
    mean = np.asarray(columns[first].mean(0, dtype=np.float64)).ravel()
    if sparse.issparse(columns):
        square = np.asarray(columns[first].astype(np.float64).power(2).mean(0)).ravel()
        scale = np.sqrt(np.maximum(square - mean**2, 0))
    else:
        scale = columns[first].std(0, dtype=np.float64)
    scale = np.where(scale > 1e-9 * np.abs(mean), scale, 1)
    if sparse.issparse(columns):
        shrink = sparse.diags(1 / scale)
        return (columns[first] @ shrink).tocsr(), (columns[~first] @ shrink).tocsr()
    return (columns[first] - mean) / scale, (columns[~first] - mean) / scale
