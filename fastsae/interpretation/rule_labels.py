"""The labels of stage 3 without a language model: a rule for every feature, found on half of the
texts, with its precision, recall and F1 on the other half and the F1 of another feature's rule."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastsae.data.token_text import TokenTexts
from fastsae.interpretation import rules
from fastsae.interpretation.evidence import Evidence
from fastsae.interpretation.firings import Firings, finding_half
from fastsae.interpretation.rule_words import in_words
from fastsae.interpretation.token_properties import ConditionTable, TokenRun, condition_table

LEAST_STRONG = 3  # tokens of the finding half; a feature with fewer shows no pattern
LEAST_TOKENS = 3  # of which a condition holds; rarer ones are in no rule
NO_RULE = "no simple rule found"
TOO_RARE = "fires too rarely for a rule"


FIGURES = ("label_precision", "label_recall", "label_f1")  # columns of the tables


class RuleLabels(NamedTuple):
    """What the rules are worth on the testing half. f1 (M,): nan without a rule, or where the
    feature fires strongly on no token there; other (M,): the F1 of another feature's rule."""

    f1: np.ndarray
    other: np.ndarray
    n_tested: int

    def summary(self) -> dict[str, Any]:
        """For the tables' first line: means over the features that can be tested, 0 without a
        rule."""
        if not self.n_tested:
            return {"n_with_rule": 0}
        return {
            "n_with_rule": int(np.isfinite(self.f1).sum()),
            "n_rule_tested": self.n_tested,
            "mean_label_f1": float(np.nansum(self.f1) / self.n_tested),
            "mean_label_f1_other_rule": float(np.nansum(self.other) / self.n_tested),
        }


class Halves:
    """The tokens that count, in two halves by their text.

    find, test: the conditions of each half's tokens; find_tokens, test_tokens: their numbers among
    the tokens of all examples, ascending.
    """

    def __init__(self, evidence: Evidence, firings: Firings, seed: int) -> None:
        s = evidence.statistics
        table, tokens = seen_conditions(evidence, firings)
        self._first = np.repeat(
            finding_half(evidence.text_numbers, seed), np.diff(evidence.offsets)
        )
        self._row = np.full(len(s.kept), -1, np.int64)  # the place of each token in its half
        parts = []
        for side in (True, False):
            place = np.flatnonzero(s.kept[tokens] & (self._first[tokens] == side))
            self._row[tokens[place]] = np.arange(len(place))
            parts.append((table.rows(place), tokens[place]))
        (self.find, self.find_tokens), (self.test, self.test_tokens) = parts
        self._fires = firings.by_feature(s.m)
        self._maximum = s.maximum

    def strong(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """(finding half, testing half): places of the tokens where a feature fires strongly."""
        start, token, value = self._fires
        span = slice(start[feature], start[feature + 1])
        where = token[span][value[span] > rules.STRONG * self._maximum[feature]]
        first = self._first[where]
        return self._row[where[first]], self._row[where[~first]]


def add_rules(
    rows: list[dict[str, Any]],
    evidence: Evidence,
    firings: Firings,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> RuleLabels:
    """Give each row that is alive its rule as label, as sentence and as data, with its figures.

    `progress(n)` is called with the features done.
    """
    halves = Halves(evidence, firings, seed)
    own = rules.own_conditions(halves.find)
    strong: dict[int, np.ndarray] = {}  # of the testing half, by feature
    fired: dict[int, np.ndarray] = {}  # where its rule fires there
    for row in rows:
        j = row["feature"]
        row.update(dict.fromkeys(("rule", "rule_data", *FIGURES)))
        if progress:
            progress(1)
        if row["status"] == "dead":
            continue
        where, strong[j] = halves.strong(j)
        alternatives, f1 = rules.find_rule(halves.find, where, own)
        if len(where) < LEAST_STRONG:
            row["label"] = TOO_RARE
        elif f1 < rules.LEAST_F1:
            row["label"] = NO_RULE
        else:
            row["rule_data"] = rules.as_rule(halves.find, alternatives)
            row["label"] = row["rule"] = in_words(row["rule_data"])
            fired[j] = rules.tokens_of_any(halves.test, alternatives)
    return measure(rows, strong, fired, seed)


def measure(
    rows: list[dict[str, Any]],
    strong: Mapping[int, np.ndarray],
    fired: Mapping[int, np.ndarray],
    seed: int,
) -> RuleLabels:
    """Put into the rows what their rules are worth, and compare with the next feature's rule in a
    random order.

    strong, fired: {feature: tokens of the testing half}, ascending, where the feature fires
    strongly, and where its rule does.
    """
    f1, other = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    order = [j for j in np.random.default_rng((seed, 8)).permutation(len(rows)) if j in fired]
    for j, neighbour in zip(order, [*order[1:], *order[:1]]):
        found = rules.score(common(fired[j], strong[j]), len(fired[j]), len(strong[j]))
        rows[j].update(zip(FIGURES, found))
        if found.f1 is None:
            continue
        f1[j] = found.f1
        if neighbour != j:
            n_both = common(fired[neighbour], strong[j])
            other[j] = rules.score(n_both, len(fired[neighbour]), len(strong[j])).f1
    return RuleLabels(f1, other, sum(len(tokens) > 0 for tokens in strong.values()))


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many numbers two sets share."""
    return int(np.isin(a, b, assume_unique=True).sum())


def seen_conditions(evidence: Evidence, firings: Firings) -> tuple[ConditionTable, np.ndarray]:
    """(conditions of the tokens of the examples that `firings` holds, (n,) these tokens)."""
    data, tokens = evidence.data, np.flatnonzero(firings.seen)
    texts_of = TokenTexts(evidence.tokenizer)
    unique, text = np.unique(data["token_ids"][tokens], return_inverse=True)
    run = TokenRun(
        texts=[texts_of([i])[0] for i in unique.tolist()],
        text=text,
        example=np.repeat(
            np.arange(len(firings.examples)), np.diff(evidence.offsets)[firings.examples]
        ),
        kind=data["token_kind"][tokens].astype(np.int64),
        role=data["token_role"][tokens].astype(np.int64),
        category=[evidence.examples[i].label for i in firings.examples],
    )
    return condition_table(run, LEAST_TOKENS), tokens
