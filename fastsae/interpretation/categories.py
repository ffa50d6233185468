"""Evidence from a dataset's own labels: how well one feature alone separates one category of
examples from the rest."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from scipy import sparse
from scipy.stats import rankdata

from fastsae.interpretation.significance import above_chance, auc_of_rank_sums, rank_sum_p_values
from fastsae.runtime.errors import InputError

if TYPE_CHECKING:
    from fastsae.interpretation.statistics import Statistics

Matrix: TypeAlias = np.ndarray | sparse.csr_matrix | sparse.csc_matrix

BLOCK = 1024  # features whose pooled values are dense at a time
SHUFFLED_FEATURES = 2048  # at most so many features stand for all in the permutation baseline


def auc_matrix(pooled: np.ndarray, labels: np.ndarray, n_categories: int) -> np.ndarray:
    """AUC of every feature for every category against the rest, (n_categories, M); nan where a
    category is empty or is all.

    pooled: (n_examples, M); labels: (n_examples,) category numbers, -1 where an example is of the
    rest only. Ties count half.
    """
    sums, inside = rank_sums(rankdata(pooled, axis=0), labels, n_categories)
    inside = inside[:, None].astype(np.float64)
    return auc_of_rank_sums(sums, inside, len(labels) - inside)


def rank_sums(
    ranks: np.ndarray, labels: np.ndarray, n_categories: int
) -> tuple[np.ndarray, np.ndarray]:
    """((n_categories, M) sums of the ranks (n_examples, M) of each category's examples,
    (n_categories,) how many these are)."""
    own = np.flatnonzero(labels >= 0)
    member = sparse.csr_matrix(
        (np.ones(len(own)), (labels[own], own)), shape=(n_categories, len(labels))
    )
    return member @ ranks, np.bincount(labels[own], minlength=n_categories)


def first_half(
    labels: np.ndarray, n_categories: int, seed: int, texts: np.ndarray | None = None
) -> np.ndarray:
    """(n_examples,) bool: half of each category, drawn by the seed; odd ones go to either side in
    turn.

    texts: (n_examples,) numbers; examples of one number have equal texts and go to one side (None:
    all differ).
    """
    generator = np.random.default_rng(seed)
    texts = np.arange(len(labels)) if texts is None else texts
    side = np.full(int(texts.max(initial=-1)) + 1, -1)  # of each text
    for category in (*range(n_categories), -1):
        members = np.unique(texts[labels == category])
        members = generator.permutation(members[side[members] < 0])
        half = len(members) // 2 + (category % 2) * (len(members) % 2)
        side[members[:half]], side[members[half:]] = 1, 0
    return side[texts] == 1


def best_category(
    pooled: Matrix,
    labels: np.ndarray,
    n_categories: int,
    seed: int,
    texts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(category number (M,), AUC (M,)), the first two of `category_above_chance`."""
    return category_above_chance(pooled, labels, n_categories, seed, texts)[:2]


def category_above_chance(
    pooled: Matrix,
    labels: np.ndarray,
    n_categories: int,
    seed: int,
    texts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(category number (M,), AUC (M,), bool (M,)): chosen on one half of the examples, measured on
    the other, and above chance there.

    pooled: (n_examples, M), dense or CSR; labels as in `auc_matrix`, texts as in `first_half`.
    Features and categories without evidence give AUC nan. Above chance: a one-sided permutation
    test of each AUC, copies of a text counted once, with at most `significance.LEVEL` false ones
    expected among all that pass (Benjamini-Hochberg).
    """
    first = first_half(labels, n_categories, seed, texts)
    once = np.flatnonzero(~first)
    if texts is not None:  # the first example of each text of the testing half
        once = once[np.sort(np.unique(texts[once], return_index=True)[1])]
    chosen, auc, p_values = [], [], []
    for block in dense_blocks(pooled):
        choosing = auc_matrix(block[first], labels[first], n_categories)
        testing = auc_matrix(block[~first], labels[~first], n_categories)
        choosing[np.isnan(choosing) | np.isnan(testing)] = -1
        best = choosing.argmax(0)
        value = testing[best, np.arange(block.shape[1])]
        value[choosing.max(0) < 0] = np.nan
        chosen.append(best)
        auc.append(value)
        ranks = rankdata(block[once], axis=0)
        sums, inside = rank_sums(ranks, labels[once], n_categories)
        p = rank_sum_p_values(ranks, inside[best], sums[best, np.arange(len(best))])
        p_values.append(np.where(np.isnan(value), np.nan, p))
    aucs = np.concatenate(auc)
    return np.concatenate(chosen), aucs, above_chance(np.concatenate(p_values)) & (aucs > 0.5)


def dense_blocks(pooled: Matrix) -> Iterator[np.ndarray]:
    """Dense column blocks of a matrix (n, M), dense or CSR."""
    columns = pooled if isinstance(pooled, np.ndarray) else pooled.tocsc()
    for start in range(0, pooled.shape[1], BLOCK):
        block = columns[:, start : start + BLOCK]
        yield block if isinstance(block, np.ndarray) else block.toarray()


def shuffled_aucs(
    pooled: Matrix,
    labels: np.ndarray,
    n_categories: int,
    seed: int,
    texts: np.ndarray | None = None,
    repeats: int = 10,
) -> tuple[np.ndarray, np.ndarray]:
    """((repeats, n) AUCs, (repeats, n) bool): what `category_above_chance` finds under shuffled
    labels.

    Of all features, or of SHUFFLED_FEATURES of them drawn at random.

    Copies of a text keep one label, its first one's: shuffled apart they would average to an AUC of
    0.5 more often than chance does.
    """
    generator = np.random.default_rng((seed, 1))
    _, first, of_text = np.unique(
        np.arange(len(labels)) if texts is None else texts, return_index=True, return_inverse=True
    )
    if pooled.shape[1] > SHUFFLED_FEATURES:
        pooled = pooled[:, np.sort(generator.permutation(pooled.shape[1])[:SHUFFLED_FEATURES])]
    found = [
        category_above_chance(
            pooled, generator.permutation(labels[first])[of_text], n_categories, seed + i, texts
        )[1:]
        for i in range(repeats)
    ]
    aucs, named = (np.stack(part) for part in zip(*found))
    return aucs, named


def number_labels(labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(names, (n,) number of each label's name): names that one label alone has are left out, and
    their number is -1."""
    names, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(counts > 1)
    new = np.full(len(names), -1)
    new[shared] = np.arange(len(shared))
    return names[shared], new[numbers]


class Categories(NamedTuple):
    """Which category each feature separates best. `named` (M,) bool: above chance, so that the
    tables name it.

    auc (M,) of all features, nan without evidence; shuffled, shuffled_named (repeats, n) the same
    under shuffled labels.
    """

    auc: np.ndarray
    named: np.ndarray
    shuffled: np.ndarray
    shuffled_named: np.ndarray

    def summary(self, bound: float) -> dict[str, Any]:
        """Counts for the tables' first line: of the table's rows, and as many of them as there
        would be under shuffled labels."""
        m, known = len(self.auc), self.auc[~np.isnan(self.auc)]
        return {
            "auc_bound": bound,
            "n_with_category": int(self.named.sum()),
            "n_with_category_shuffled": float(self.shuffled_named.mean() * m),
            "n_above_auc_bound": int((self.named & (self.auc > bound)).sum()),
            "n_above_auc_bound_shuffled": float(
                (self.shuffled_named & (self.shuffled > bound)).mean() * m
            ),
            "median_category_auc": float(np.median(known)) if len(known) else None,
        }


def add_categories(
    rows: list[dict[str, Any]],
    statistics: "Statistics",
    labels: Sequence[str | None] | None,
    pooling: str,
    seed: int,
    texts: np.ndarray | None = None,
) -> Categories | None:
    """Give each row whose feature fires, and separates a category above chance, that category and
    its AUC; `Categories` or None.

    labels: one per example, None where it has none, or None instead of the list; texts:
    (n_examples,) as in `first_half`. pooling: max or mean, the one that is tested;
    `category_auc_max` and `category_auc_mean` hold both.
    """
    labels = [labels[i] for i in statistics.pooled_examples] if labels else []
    known = np.array([label is not None for label in labels], bool)
    names, numbers = number_labels([label for label in labels if label is not None])
    if not len(names) or (numbers == numbers[0]).all():
        return None
    texts = None if texts is None else texts[statistics.pooled_examples][known]
    pooled = {"max": statistics.pooled_max[known], "mean": statistics.pooled_mean[known]}
    found = {
        how: category_above_chance(matrix, numbers, len(names), seed, texts)
        for how, matrix in pooled.items()
    }
    chosen, auc, named = found[pooling]
    if np.isnan(auc).all():  # no category has two examples, one for either half
        return None
    named = named & np.array([row["status"] != "dead" for row in rows])
    for j in np.flatnonzero(named):
        rows[j].update(
            best_category=str(names[chosen[j]]),
            category_auc=float(auc[j]),
            **{f"category_auc_{how}": _number(aucs[j]) for how, (_, aucs, _) in found.items()},
        )
    return Categories(auc, named, *shuffled_aucs(pooled[pooling], numbers, len(names), seed, texts))


def target_numbers(values: Sequence[str], field: str, value: str | None) -> np.ndarray:
    """The target (n,): 1 where a field has the value named and 0 elsewhere, or without a value the
    field's numbers."""
    if value is not None:
        target = np.array([v == value for v in values], float)
        if not 2 <= target.sum() <= len(target) - 2:
            some = ", ".join(sorted(set(values))[:8])
            raise InputError(
                f"TARGET_VALUE: {int(target.sum())} of {len(values)} examples have {field} = "
                f"{value}. choose one of: {some}."
            )
        return target
    try:
        target = np.array([float(v) for v in values])
    except ValueError:
        raise InputError(
            f"TARGET_FIELD: {field} holds texts, not numbers. name one of them with --target-value."
        ) from None
    if len(target) < 4 or not np.isfinite(target).all() or np.ptp(target) == 0:
        raise InputError(
            f"TARGET_FIELD: {field} needs at least four finite numbers that differ. "
            "name another field."
        )
    if set(np.unique(target)) == {0, 1} and not 2 <= target.sum() <= len(target) - 2:
        raise InputError(
            f"TARGET_FIELD: {int(target.sum())} of {len(values)} examples have {field} = 1. "
            "at least 2 must have 1 and 2 must have 0; name another field."
        )
    return target


def correlations(pooled: Matrix, target: np.ndarray) -> np.ndarray:
    """Pearson correlation (M,) of each column of a matrix, dense or sparse, with the target; nan
    where either is constant."""
    parts = []
    centred = target - target.mean()
    for block in dense_blocks(pooled if isinstance(pooled, np.ndarray) else pooled.tocsr()):
        block = block - block.mean(0, dtype=np.float64)
        norm = np.sqrt((block**2).sum(0) * (centred**2).sum())
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append(np.where(norm > 1e-12, centred @ block / norm, np.nan))
    return np.concatenate(parts)


def _number(value):
    return None if value is None or not np.isfinite(value) else float(value)
