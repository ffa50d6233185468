"""Five-shot detection without a language model: do five examples of a feature tell where else it
fires?

Of the five strongest examples of the finding half the mean of the residual stream is taken, and
tokens of the other half are ranked by their cosine with it: tokens where the feature fires strongly
against as many where it is silent, *the same tokens*, so that the context has to tell. 0.5 is
chance. A feature is a function of the stream, hence even one that nobody trained is above 0.5: the
figure is read beside that of random directions that fire as often.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from fastsae.interpretation.evidence import Evidence
from fastsae.interpretation.firings import Firings, finding_half
from fastsae.interpretation.rules import STRONG
from fastsae.interpretation.significance import auc_of_rank_sums, score_interval

N_SHOTS = 5  # examples, of as many texts
MAX_PAIRS = 40  # tokens that fire, of as many texts, and as many silent ones
LEAST_PAIRS = 5  # fewer give no figure
N_RANDOM = 64  # random directions
N_MIXED = 256  # tokens of which a random direction is a random sum
BLOCK = 8192  # tokens read at a time
FIGURES = ("detection_auc", "detection_auc_low", "detection_auc_high", "n_detection")


class Detection(NamedTuple):
    """auc (M,): of each feature, nan where it could not be tested; random (n,): of random
    directions."""

    auc: np.ndarray
    random: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Means, for the tables' first line; {} where nothing could be tested."""
        auc, random = (values[np.isfinite(values)] for values in self)
        if not len(auc) or not len(random):
            return {}
        return {
            "n_detection": len(auc),
            "mean_detection_auc": float(auc.mean()),
            "mean_detection_auc_random": float(random.mean()),
        }


def add_detection(
    rows: list[dict[str, Any]],
    evidence: Evidence,
    firings: Firings,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> Detection:
    """Give each row its AUC with an interval and the number of tokens that fire in it, None where
    it cannot be tested. `progress(n)` is called with the features done."""
    tested = Tested(evidence, firings, seed)
    start, token, value = firings.by_feature(evidence.m)
    maximum, auc = evidence.statistics.maximum, np.full(evidence.m, np.nan)
    n_pairs = np.zeros(evidence.m, np.int64)
    counts: dict[int, tuple[int, int]] = {}  # tokens where it fires, and where strongly
    for row in rows:
        j = row["feature"]
        span = slice(start[j], start[j + 1])
        strong = value[span] > STRONG * maximum[j]
        auc[j], n_pairs[j] = tested.auc(token[span], value[span], strong, (9, j))
        if n_pairs[j]:
            counts[j] = (len(strong), int(strong.sum()))
        if progress:
            progress(1)
    low, high = score_interval(auc, np.maximum(n_pairs, 1), np.maximum(n_pairs, 1))
    for row in rows:
        j = row["feature"]
        found: list[Any] = [None] * len(FIGURES)
        if n_pairs[j]:
            found = [float(auc[j]), float(low[j]), float(high[j]), int(n_pairs[j])]
        row.update(zip(FIGURES, found))
    return Detection(auc, random_aucs(tested, counts, seed))


class Tested:
    """The tokens of both halves, and what is asked of a feature there."""

    def __init__(self, evidence: Evidence, firings: Firings, seed: int) -> None:
        self.seed = seed
        self.stream = evidence.data["activations"]
        # (n_tokens,) of all examples
        self.text = np.repeat(evidence.text_numbers, np.diff(evidence.offsets))
        self.first = np.repeat(finding_half(evidence.text_numbers, seed), np.diff(evidence.offsets))
        self.ids = np.asarray(evidence.data["token_ids"])
        self.used = np.flatnonzero(firings.seen & evidence.statistics.kept)
        testing = self.used[~self.first[self.used]]
        # the testing half's tokens by their id
        self.by_id = testing[np.argsort(self.ids[testing], kind="stable")]
        self.sorted_ids = self.ids[self.by_id]
        total = np.zeros(self.stream.shape[1])
        for block in np.split(self.used, range(BLOCK, len(self.used), BLOCK)):
            total += np.asarray(self.stream[block], np.float64).sum(0)
        self.mean = (total / max(len(self.used), 1)).astype(np.float32)

    def auc(
        self, token: np.ndarray, value: np.ndarray, strong: np.ndarray, number: tuple[int, int]
    ) -> tuple[float, int]:
        """(AUC, pairs of tokens) of a feature that fires on the tokens (n,), ascending, with values
        (n,), and strongly where `strong` is true; (nan, 0) without evidence.

        number: the seed of its draws.
        """
        draw = np.random.default_rng((self.seed, *number))
        first = self.first[token]
        order = np.argsort(-value[first], kind="stable")
        shots = one_of_each(self.text, token[first][order])[:N_SHOTS]
        there = draw.permutation(token[~first & strong])
        positive = one_of_each(self.text, there)
        silent = [
            draw.permutation(self._silent(i, token))[:n]
            for i, n in zip(*np.unique(self.ids[positive], return_counts=True))
        ]
        # a token that is silent nowhere tells nothing about its context
        keep = []
        for i, tokens in zip(np.unique(self.ids[positive]), silent):
            keep.append(positive[self.ids[positive] == i][: len(tokens)])
        pairs = sum(map(len, silent))
        if len(shots) < N_SHOTS or pairs < LEAST_PAIRS:
            return float("nan"), 0
        chosen = draw.permutation(pairs)[:MAX_PAIRS]
        yes, no = np.concatenate(keep)[chosen], np.concatenate(silent)[chosen]
        shown = self.directions(shots).mean(0)
        return auc_of(self.directions(yes) @ shown, self.directions(no) @ shown), len(chosen)

    def _silent(self, token_id, token):
        """The testing half's tokens of an id on which the feature does not fire."""
        a, b = np.searchsorted(self.sorted_ids, (token_id, token_id + 1))
        same = self.by_id[a:b]
        return same[~np.isin(same, token, assume_unique=True)]

    def directions(self, tokens: np.ndarray) -> np.ndarray:
        """(n, d) the residual stream of tokens less its mean, at length 1."""
        x = np.asarray(self.stream[tokens], np.float32) - self.mean
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


def random_aucs(tested: Tested, counts: dict[int, tuple[int, int]], seed: int) -> np.ndarray:
    """(n,) AUCs of random directions that fire on as many tokens as features do.

    counts: {feature: (tokens where it fires, where strongly)}. A direction is a random sum of
    centred tokens, which has the stream's covariance.
    """
    draw = np.random.default_rng((seed, 10))
    like = draw.permutation(np.array(sorted(counts), np.int64))[:N_RANDOM]
    if not len(like):
        return np.zeros(0)
    mixed = draw.permutation(tested.used)[:N_MIXED]
    x = np.asarray(tested.stream[np.sort(mixed)], np.float32) - tested.mean
    directions = x.T @ draw.standard_normal((len(x), len(like))).astype(np.float32)  # (d, n)
    values = np.concatenate(
        [
            (np.asarray(tested.stream[block], np.float32) - tested.mean) @ directions
            for block in np.split(tested.used, range(BLOCK, len(tested.used), BLOCK))
        ]
    )  # (n_tokens, n)
    found = []
    for i, j in enumerate(like):
        n_fires, n_strong = counts[int(j)]
        order = np.argsort(-values[:, i], kind="stable")[:n_fires]
        strong = np.zeros(n_fires, bool)
        strong[:n_strong] = True
        by_place = np.argsort(order)
        at = order[by_place]
        found.append(tested.auc(tested.used[at], values[at, i], strong[by_place], (11, i))[0])
    return np.array(found)


def one_of_each(group: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The first token of each group, in the order given; group (n_tokens,) of all."""
    _, first = np.unique(group[tokens], return_index=True)
    return tokens[np.sort(first)]


def auc_of(positive: np.ndarray, negative: np.ndarray) -> float:
    """The probability that a positive score is above a negative one; ties count half."""
    n = len(positive)
    ranks = rankdata(np.concatenate([positive, negative]))[:n]
    return float(auc_of_rank_sums(ranks.sum(), n, len(negative)))
