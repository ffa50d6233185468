"""Features that predict a target: chosen on one half of the examples, measured on the other, beside
what needs no features."""

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix

from fastsae.interpretation.categories import (
    Matrix,
    auc_matrix,
    correlations,
    dense_blocks,
    first_half,
)
from fastsae.interpretation.probing import KINDS, estimate, ridge_predictions
from fastsae.interpretation.significance import auc_intervals, correlation_intervals
from fastsae.runtime.packages import postpone_init
from fastsae.runtime.stops import stop_if_asked

if TYPE_CHECKING:
    from fastsae.interpretation.nulls import Untrained

# version of the selection: 1 was HypotheSAEs' own separation_score, without a least support; 2 had
# no intervals
METHOD_VERSION = 3
LASSO_FEATURES = 4096  # lasso sees at most so many, those of largest correlation
LEAST_SUPPORT = 10  # texts of the finding half, firing or silent; fewer are not evidence
N_SPLITS = 4  # half splits of the comparison with what needs no features
PENALTIES = np.logspace(-1, 5, 13)  # of the ridge regressions, on columns of unit variance


def finding_half(target: np.ndarray, seed: int, texts: np.ndarray | None = None) -> np.ndarray:
    """(n,) bool: the half on which features are chosen; of each value for a target of 0 and 1.
    Copies of a text share a side."""
    texts = np.arange(len(target)) if texts is None else texts
    if is_binary(target):
        return first_half(target.astype(int), 2, seed, texts)
    return np.random.default_rng(seed).permutation(texts.max() + 1)[texts] % 2 == 0


def is_binary(target: np.ndarray) -> bool:
    """Whether a target (n,) holds only 0 and 1."""
    return set(np.unique(target)) <= {0, 1}


def least_support(target: np.ndarray) -> int:
    """In how many texts a feature must fire, or be silent, before these count as evidence.

    LEAST_SUPPORT, less where the smaller side of a target of 0 and 1, or a tenth of the texts, is
    less, but 3: the mean of fewer is noise.
    """
    smaller = min((target == 0).sum(), (target == 1).sum()) if is_binary(target) else len(target)
    return max(3, int(min(LEAST_SUPPORT, smaller, len(target) // 10)))


def supported(pooled: Any, least: int, silence: bool) -> np.ndarray:
    """(M,) bool: whether each column of sparse `pooled` (n_texts, M) fires in `least` rows; with
    `silence`, is also 0 in as many."""
    fires = np.asarray((pooled > 0).sum(0)).ravel()
    return (fires >= least) & ((pooled.shape[0] - fires >= least) | (not silence))


def without_few_silent(pooled: Any, least: int) -> csc_matrix:
    """CSC `pooled` (n_texts, M) where 0 counts as a column's mean over the others if fewer than
    `least` rows are 0.

    Such a feature may be ranked by how strongly it fires, as the dense ones of long texts are, but
    not by a few texts on which it does not.
    """
    silent = pooled.shape[0] - np.asarray((pooled > 0).sum(0)).ravel()
    rows, columns, values = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0)]
    for j in np.flatnonzero((silent > 0) & (silent < least) & (silent < pooled.shape[0])):
        column = pooled[:, [j]].toarray().ravel()
        rows.append(np.flatnonzero(column <= 0))
        columns.append(np.full(silent[j], j))
        values.append(np.full(silent[j], column[column > 0].mean(dtype=np.float64)))
    where = np.concatenate(rows), np.concatenate(columns)
    return (pooled + csc_matrix((np.concatenate(values), where), shape=pooled.shape)).tocsc()


def separation_scores(pooled: Matrix, target: np.ndarray, n_top: int) -> np.ndarray:
    """(M,) mean target of the n_top rows where each column is largest and above 0, less the mean of
    the rows where it is 0.

    Args: pooled (n, M) non-negative, dense or CSR; target (n,). Of equal values the earlier rows
    count as larger. nan for a column that is never 0, or always. After HypotheSAEs (arXiv
    2502.04382), whose own function changes between versions.
    """
    scores = []
    for block in dense_blocks(pooled):
        order = np.argsort(-block, axis=0, kind="stable")[:n_top]  # (n_top, columns)
        inside = np.take_along_axis(block, order, axis=0) > 0
        silent = block == 0
        with np.errstate(invalid="ignore", divide="ignore"):
            scores.append(
                (target[order] * inside).sum(0) / inside.sum(0) - target @ silent / silent.sum(0)
            )
    return np.concatenate(scores)


def select_features(
    pooled: Any,
    target: np.ndarray,
    n_select: int,
    method: str,
    seed: int,
    texts: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Features that predict a target, best first: dicts of feature, score, held-out correlation and
    AUC, held_out_low and held_out_high, n_firing.

    pooled: CSR (n_examples, M); target (n_examples,) of 0 and 1, or of numbers. Features are
    selected on one half of the examples, each text counted once; correlation and, for 0 and 1, AUC
    are of the other half, and the 95 % interval is of the AUC where there is one. method:
    separation_score, correlation, or lasso (HypotheSAEs'). texts: numbers, equal where texts are
    (None: all differ).
    """
    texts = np.arange(len(target)) if texts is None else texts
    binary, first = is_binary(target), finding_half(target, seed, texts)
    # all that differ are copies of one text
    if len(np.unique(target[first])) < 2 or len(np.unique(target[~first])) < 2:
        return []
    once, others = (each_text_once(texts, side) for side in (first, ~first))
    choosing, found = pooled[once].tocsc(), target[once]
    least = least_support(found)
    ranked = supported(choosing, least, silence=method == "separation_score")
    fires = np.asarray((choosing > 0).sum(0)).ravel()
    choosing = choosing if method == "separation_score" else without_few_silent(choosing, least)
    correlation = correlations(choosing, found)
    candidates = np.flatnonzero(~np.isnan(correlation) & ranked)
    if not len(candidates):
        return []
    if method == "lasso":
        candidates = np.sort(
            candidates[np.argsort(-np.abs(correlation[candidates]), kind="stable")[:LASSO_FEATURES]]
        )
        scores = lasso_coefficients(
            choosing[:, candidates].toarray(), found, min(n_select, len(candidates)), binary
        )
    elif method == "separation_score":
        scores = separation_scores(choosing[:, candidates], found, max(1, min(100, len(once) // 4)))
    else:
        scores = correlation[candidates]
    usable = np.flatnonzero(np.isfinite(scores) & (scores != 0))
    chosen = usable[np.argsort(-np.abs(scores[usable]), kind="stable")][:n_select]
    testing = pooled[others].tocsc()[:, candidates[chosen]].toarray()
    fires = fires[candidates]
    return [
        {
            "feature": int(candidates[j]),
            "score": float(scores[j]),
            **measured,
            "n_firing": int(fires[j]),
        }
        for j, measured in zip(chosen, held_out_figures(testing, target[others], binary, seed))
    ]


def each_text_once(texts: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Numbers of the examples of a side (n,) bool, in order, of each text (n,) the first."""
    rows = np.flatnonzero(side)
    return rows[np.sort(np.unique(texts[rows], return_index=True)[1])]


def held_out_figures(
    testing: np.ndarray, target: np.ndarray, binary: bool, seed: int
) -> list[dict[str, float | None]]:
    """Of each column (n, k) its correlation with the target (n,), its AUC where that is of 0 and 1,
    and the 95 % interval of the AUC, or of the correlation where there is none."""
    if not testing.shape[1]:
        return []
    inside = target == 1
    aucs = auc_matrix(testing, inside.astype(int), 2)[1] if binary else [None] * testing.shape[1]
    intervals = (
        auc_intervals(testing, inside) if binary else correlation_intervals(testing, target, seed)
    )
    return [
        {
            "held_out_correlation": finite(r),
            "held_out_auc": finite(auc),
            "held_out_low": finite(low),
            "held_out_high": finite(high),
        }
        for r, auc, (low, high) in zip(correlations(testing, target), aucs, intervals)
    ]


def lasso_coefficients(
    pooled: np.ndarray, target: np.ndarray, n_select: int, binary: bool
) -> np.ndarray:
    """(p,) coefficients of HypotheSAEs' lasso with n_select of them, 0 for the others."""
    # it prints, and warns of convergence
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        postpone_init("hypothesaes")
        from hypothesaes.select_neurons import select_neurons

        chosen, scores = select_neurons(
            pooled, target, n_select, method="lasso", classification=binary
        )
    coefficients = np.zeros(pooled.shape[1])
    coefficients[chosen] = scores
    return coefficients


def finite(value: float | None) -> float | None:
    """The number, or None for nan, infinity and None."""
    return None if value is None or not np.isfinite(value) else float(value)


def held_out_scores(
    sources: Mapping[str, Matrix], target: np.ndarray, first: np.ndarray
) -> dict[str, dict[str, Any]]:
    """{name: {"n_columns", "held_out"}}: ridge regression on each source's columns, fitted on one
    half, measured on the other.

    Args: sources {name: (n, p) dense or CSR}; target (n,); first (n,) bool, the finding half, which
    also chooses the penalty. held_out: AUC for a target of 0 and 1, else R2; None without columns.
    """
    from sklearn.metrics import r2_score, roc_auc_score

    result = {}
    for name, columns in sources.items():
        stop_if_asked()
        held_out = None
        if columns.shape[1]:
            predicted = ridge_predictions(columns, target, first, PENALTIES)
            held_out = finite(
                (roc_auc_score if is_binary(target) else r2_score)(target[~first], predicted)
            )
        result[name] = {"n_columns": int(columns.shape[1]), "held_out": held_out}
    return result


def word_counts(texts: Sequence[str], first: np.ndarray) -> csr_matrix:
    """CSR (n, words): 1 + log of how often each text holds each word that at least two texts of the
    finding half hold."""
    from sklearn.feature_extraction.text import CountVectorizer

    counts = CountVectorizer(token_pattern=r"(?u)\w+", min_df=2)
    try:
        counts.fit([text for text, is_first in zip(texts, first) if is_first])
    except ValueError:  # no word is in two texts
        return csr_matrix((len(texts), 0))
    found = counts.transform(texts).astype(np.float64).tocsr()
    found.data = 1 + np.log(found.data)
    return found


def compare(
    pooled: Any,
    target: np.ndarray,
    examples: np.ndarray,
    texts: np.ndarray,
    untrained: "Untrained",
    read_text: Callable[[int], str],
    *,
    n_select: int,
    method: str,
    pooling: str,
    seed: int,
) -> dict[str, Any] | None:
    """What the selected features explain of the target on the held-out half, beside as many of
    random tokens, all features and what needs none; None without two values in either half.

    pooled: CSR (n, M) of `examples` (n,), with target (n,) and texts (n,). Of the examples those
    are used that `untrained` pooled. Selection and regression are repeated on N_SPLITS half splits,
    the first of which is that of the selection; lasso, which is slow, on that alone.
    """
    places = {int(example): i for i, example in enumerate(untrained.examples)}
    rows = np.array([i for i, e in enumerate(examples) if int(e) in places], np.int64)
    here = np.array([places[int(e)] for e in examples[rows]], np.int64)
    features, target, texts = pooled[rows], target[rows], texts[rows]
    draws = [getattr(each, pooling)[here] for each in untrained.pooled.get(KINDS[0], [])]
    stream, read = untrained.stream[here], [read_text(int(e)) for e in examples[rows]]
    found: dict[str, list[dict[str, Any]]] = {}
    sizes = []
    for i in range(1 if method == "lasso" else N_SPLITS):
        first = finding_half(target, seed + i, texts)
        if min(len(np.unique(target[side])) for side in (first, ~first)) < 2:
            continue
        selected = [("selected features", features)]
        selected += [("as many of random tokens", draws[i % len(draws)])] if draws else []
        sources: dict[str, Matrix] = {}
        for name, columns in selected:
            chosen = select_features(columns, target, n_select, method, seed + i, texts)
            sources[name] = columns[:, [entry["feature"] for entry in chosen]].toarray()
        sources["all features"] = features.toarray()
        sources["activations themselves"] = stream
        sources["bag of words"] = word_counts(read, first)
        for name, entry in held_out_scores(sources, target, first).items():
            found.setdefault(name, []).append(entry)
        sizes.append((int(first.sum()), int((~first).sum())))
    if not sizes:
        return None
    return {
        "measure": "AUC" if is_binary(target) else "R2",
        "n_finding": sizes[0][0],
        "n_held_out": sizes[0][1],
        "n_splits": len(sizes),
        "sources": {
            name: over_splits(entries, 0 if is_binary(target) else -np.inf)
            for name, entries in found.items()
        },
    }


def over_splits(entries: Sequence[Mapping[str, Any]], least: float) -> dict[str, Any]:
    """One entry of several of `held_out_scores`: the mean, its interval over half splits (None for
    one split) between `least` and 1, and the columns of the first."""
    values = [entry["held_out"] for entry in entries if entry["held_out"] is not None]
    found = estimate(values, least, 1)
    return {
        "n_columns": entries[0]["n_columns"],
        "held_out": None if found is None else found.value,
        "interval": None if found is None or len(values) < 2 else [found.low, found.high],
    }
