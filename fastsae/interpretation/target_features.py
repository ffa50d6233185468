"""Features that predict a target: chosen on one half of the examples, measured on the other, beside
what needs no features."""

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix

from fastsae.activations.files import release
from fastsae.interpretation.categories import (
    Matrix,
    auc_matrix,
    correlations,
    dense_blocks,
    first_half,
)
from fastsae.runtime.packages import postpone_init
from fastsae.runtime.stops import stop_if_asked

if TYPE_CHECKING:
    from fastsae.interpretation.evidence import Evidence

# version of the selection; 1 was HypotheSAEs' own separation_score, without a least support
METHOD_VERSION = 2
LASSO_FEATURES = 4096  # lasso sees at most so many, those of largest correlation
LEAST_SUPPORT = 10  # texts of the finding half, firing or silent; fewer are not evidence
COMPARED_EXAMPLES = 4000  # ridge regressions see at most so many, drawn at random
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
    AUC, n_firing.

    pooled: CSR (n_examples, M); target (n_examples,) of 0 and 1, or of numbers. Features are
    selected on one half of the examples, each text counted once; correlation and, for 0 and 1, AUC
    are of the other half. method: separation_score, correlation, or lasso (HypotheSAEs'). texts:
    numbers, equal where texts are (None: all differ).
    """
    texts = np.arange(len(target)) if texts is None else texts
    binary, first = is_binary(target), finding_half(target, seed, texts)
    # all that differ are copies of one text
    if len(np.unique(target[first])) < 2 or len(np.unique(target[~first])) < 2:
        return []
    once = np.flatnonzero(first)
    once = once[np.sort(np.unique(texts[once], return_index=True)[1])]
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
    testing = pooled[~first].tocsc()[:, candidates[chosen]].toarray()
    held_out = correlations(testing, target[~first]) if len(chosen) else []
    aucs = (
        auc_matrix(testing, target[~first].astype(int), 2)[1]
        if binary and len(chosen)
        else [None] * len(chosen)
    )
    fires = fires[candidates]
    return [
        {
            "feature": int(candidates[j]),
            "score": float(scores[j]),
            "held_out_correlation": finite(r),
            "held_out_auc": finite(auc),
            "n_firing": int(fires[j]),
        }
        for j, r, auc in zip(chosen, held_out, aucs)
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


def mean_activations(
    activations: Any, offsets: np.ndarray, kept: np.ndarray, examples: Sequence[int] | np.ndarray
) -> np.ndarray:
    """(n, d) float32: the mean activation over the kept tokens of each of `examples`."""
    means = np.empty((len(examples), activations.shape[1]), np.float32)
    for row, example in enumerate(examples):
        stop_if_asked()
        start, stop = offsets[example], offsets[example + 1]
        means[row] = np.asarray(activations[start:stop], np.float32)[kept[start:stop]].mean(0)
        release(activations)
    return means


def held_out_scores(
    sources: Mapping[str, Matrix], target: np.ndarray, first: np.ndarray
) -> dict[str, dict[str, Any]]:
    """{name: {"n_columns", "held_out"}}: ridge regression on each source's columns, fitted on one
    half, measured on the other.

    Args: sources {name: (n, p) dense or CSR}; target (n,); first (n,) bool, the finding half, which
    also chooses the penalty. held_out: AUC for a target of 0 and 1, else R2; None without columns.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score, roc_auc_score
    from sklearn.preprocessing import StandardScaler

    result = {}
    for name, columns in sources.items():
        stop_if_asked()
        held_out = None
        if columns.shape[1]:
            scaler = StandardScaler(with_mean=isinstance(columns, np.ndarray)).fit(columns[first])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of columns that are constant in this half
                model = RidgeCV(PENALTIES).fit(scaler.transform(columns[first]), target[first])
            predicted = model.predict(scaler.transform(columns[~first]))
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
    found: Sequence[Mapping[str, Any]],
    target: np.ndarray,
    examples: np.ndarray,
    evidence: "Evidence",
    seed: int,
    texts: np.ndarray,
) -> dict[str, Any] | None:
    """What the selected features explain of the target on the held-out half, beside all features
    and what needs none.

    pooled: CSR (n, M) of `examples` (n,), with target (n,) and texts (n,); found:
    `select_features`' result; evidence: a `feature_evidence.Evidence`. The halves are those of the
    selection.
    """
    first = finding_half(target, seed, texts)
    some = np.sort(np.random.default_rng((seed, 6)).permutation(len(target))[:COMPARED_EXAMPLES])
    if min(len(np.unique(target[some][side])) for side in (first[some], ~first[some])) < 2:
        return None

    read = [evidence.text_read(example) for example in examples[some]]
    features = pooled[some].toarray()
    sources = {
        "selected features": features[:, [entry["feature"] for entry in found]],
        "all features": features,
        "activations themselves": mean_activations(
            evidence.data["activations"], evidence.offsets, evidence.statistics.kept, examples[some]
        ),
        "bag of words": word_counts(read, first[some]),
    }
    return {
        "measure": "AUC" if is_binary(target) else "R2",
        "n_finding": int(first[some].sum()),
        "n_held_out": int((~first[some]).sum()),
        "sources": held_out_scores(sources, target[some], first[some]),
    }
