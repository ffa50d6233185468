"""Labels without a language model: rules that say on which tokens a feature fires, found on half of
the texts and tested on the other half.

A feature *fires strongly* on a token if its activation there is above STRONG of its maximum. A rule
is data, {"any": [[[property, [value, ...]], ...], ...]}: it fires where all conditions of one of
its alternatives hold (see `token_properties`). It is searched for by its F1 on the finding half:
single conditions, pairs of conditions, and unions of these, each only where it adds enough. What a
rule is worth is its precision, recall and F1 on the other half, which nothing was chosen on.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastsae.interpretation.token_properties import ConditionTable, TokenRun, condition_table, key

STRONG = 0.3  # of a feature's maximum
LEAST_F1 = 0.3  # on the finding half; below, no rule is given
MAX_ALTERNATIVES = 8  # conditions joined by "or", tokens counted one by one
N_SINGLE, N_PARENTS, N_PAIRS = 48, 10, 8  # candidates: alone; refined by a second; pairs of each
# What an alternative has to add to F1: another value of conditions that are there, or a new kind.
# More where the kind is harder to say or to believe.
GAIN_VALUE, GAIN_KIND = 0.006, 0.015
GAIN_LETTERS, GAIN_CONTEXT = 0.015, 0.02  # more for beginnings and endings, for what stands before
GAIN_PAIR = 0.03  # what a second condition has to add to F1 over the first alone
MAX_KINDS = 4
# properties of a token's own text; two of them are not put together, but for the shape
OWN = {
    "quotation",
    "token",
    "class",
    "forms",
    "begins",
    "ends",
    "word",
    "position in word",
    "template",
}
LETTERS = {"begins", "ends", "word"}
MAX_PARENT = 60  # times the strong tokens: a condition on more tokens is not refined
# what an alternative is named by comes first
ORDER = (
    "token",
    "quotation",
    "class",
    "forms",
    "word",
    "begins",
    "ends",
    "template",
    "shape",
    "position in word",
    "inside",
    "role",
    "category",
    "sentence place",
    "turn place",
    "previous",
    "previous class",
    "previous shape",
    "recent",
    "sentence",
)
Rule = dict[str, Any]
Alternative = tuple[int, ...]  # numbers of conditions that hold together


class Score(NamedTuple):
    """What a rule is worth on a set of tokens; each None where it cannot be said."""

    precision: float | None
    recall: float | None
    f1: float | None


def score(n_both: int, n_rule: int, n_strong: int) -> Score:
    """Precision, recall and F1 from counts of tokens: of both, where the rule fires, where the
    feature does strongly."""
    if not n_strong:
        return Score(None, None, None)
    return Score(
        n_both / n_rule if n_rule else None, n_both / n_strong, 2 * n_both / (n_rule + n_strong)
    )


def fires(rule: Rule, tokens: TokenRun | ConditionTable) -> np.ndarray:
    """(n_tokens,) bool: where a rule fires on tokens, of any text."""
    table = tokens if isinstance(tokens, ConditionTable) else condition_table(tokens)
    result = np.zeros(len(table), bool)
    for alternative in rule["any"]:
        both = np.ones(len(table), bool)
        for name, values in alternative:
            one = np.zeros(len(table), bool)
            for value in values:
                number = table.number_of.get(key(name, value))
                if number is not None:
                    one[table.tokens(number)] = True
            both &= one
        result |= both
    return result


def find_rule(
    table: ConditionTable, strong: np.ndarray, own: np.ndarray
) -> tuple[list[Alternative], float]:
    """(alternatives, F1 on these tokens) of the best rule found for a feature.

    table: of the finding half's tokens; strong: the numbers of those where it fires strongly;
    own (n_conditions,) bool: of `own_conditions`.
    """
    if not len(strong):
        return [], 0.0
    return best_union(table, strong, candidates(table, strong, own))


def own_conditions(table: ConditionTable) -> np.ndarray:
    """(n_conditions,) bool: those that a token's own text decides."""
    return np.array([name in OWN for name, _ in table.names], bool)


def candidates(table: ConditionTable, strong: np.ndarray, own: np.ndarray) -> list[Alternative]:
    """Single conditions and pairs that may be part of a rule."""
    both = np.bincount(table.conditions(strong), minlength=len(table.names))
    sure = np.maximum(both - 1, 0)  # what one token shows is no pattern
    f1 = 2 * sure / (len(strong) + table.counts)
    singles = largest(f1, N_SINGLE)
    found: dict[Alternative, float] = {(int(i),): f1[i] for i in singles if f1[i] > 0}
    near = np.where(table.counts <= MAX_PARENT * len(strong) + 100, sure, 0)
    for parent in largest(near / np.sqrt(np.maximum(table.counts, 1)), N_PARENTS).tolist():
        tokens = table.tokens(parent)
        inside = tokens[np.isin(tokens, strong, assume_unique=True)]
        if len(inside) < 2:
            continue
        n_both = np.bincount(table.conditions(inside), minlength=len(table.names))
        n_all = np.bincount(table.conditions(tokens), minlength=len(table.names))
        pair_f1 = 2 * np.maximum(n_both - 1, 0) / (len(strong) + n_all)
        pair_f1[n_all == len(tokens)] = 0  # implied by the first
        if own[parent]:
            pair_f1[own] = 0
        for child in largest(pair_f1, N_PAIRS).tolist():
            if pair_f1[child] > max(f1[parent], f1[child]) + GAIN_PAIR * f1[parent] + 0.002:
                found[tuple(sorted((parent, child)))] = pair_f1[child]
    return list(found)


def largest(values: np.ndarray, n: int) -> np.ndarray:
    """Numbers of the n largest values above 0, largest first, ties by number."""
    there = np.flatnonzero(values > 0)
    if len(there) > n:
        bound = np.partition(values[there], len(there) - n)[len(there) - n]
        there = there[values[there] >= bound]
    return there[np.argsort(-values[there], kind="stable")][:n]


def tokens_of(table: ConditionTable, alternative: Alternative) -> np.ndarray:
    """The tokens on which all conditions of an alternative hold."""
    first, *others = sorted((table.tokens(i) for i in alternative), key=len)
    for tokens in others:  # ascending, as the first
        place = np.minimum(np.searchsorted(tokens, first), len(tokens) - 1)
        first = first[tokens[place] == first]
    return first


def tokens_of_any(table: ConditionTable, alternatives: Sequence[Alternative]) -> np.ndarray:
    """The tokens on which one of the alternatives holds, ascending."""
    return np.unique(np.concatenate([tokens_of(table, one) for one in alternatives]))


def best_union(
    table: ConditionTable, strong: np.ndarray, pool: list[Alternative]
) -> tuple[list[Alternative], float]:
    """(alternatives, F1): a union of candidates, grown greedily by F1."""
    if not pool:
        return [], 0.0
    lists = [tokens_of(table, one) for one in pool]
    touched, where = np.unique(np.concatenate(lists), return_inverse=True)
    covers = np.zeros((len(touched), len(pool)), np.float32)
    covers[where, np.repeat(np.arange(len(pool)), [len(one) for one in lists])] = 1
    is_strong = np.isin(touched, strong, assume_unique=True).astype(np.float32)
    kinds = [kind_of(table, one) for one in pool]
    best, best_f1 = [], 0.0
    alone = 2 * (is_strong @ covers) / (len(strong) + covers.sum(0))
    alone = alone - np.array([cost(kind) for kind in kinds])
    for start in largest(alone, 3).tolist():
        grown = grow(covers, is_strong, len(strong), kinds, start)
        kept, f1 = without_idle(covers, is_strong, len(strong), grown)
        if f1 > best_f1:
            best, best_f1 = kept, f1
    return [pool[i] for i in best], best_f1


def grow(
    covers: np.ndarray, is_strong: np.ndarray, n_strong: int, kinds: Sequence[tuple], start: int
) -> list[int]:
    """Columns of covers (n_touched, n), added to the first one while each adds what it has to."""
    chosen, covered = [start], covers[:, start] > 0
    costs = np.array([cost(kind) for kind in kinds])
    more = GAIN_VALUE + np.where([kind[0] in LETTERS for kind in kinds], costs, 0)
    f1 = 2 * float(is_strong @ covered) / (n_strong + covered.sum())
    while len(chosen) < MAX_ALTERNATIVES:
        free = (~covered).astype(np.float32)
        new_strong, new = (free * is_strong) @ covers, free @ covers
        both, size = float(is_strong @ covered), covered.sum()
        after = 2 * (both + np.maximum(new_strong - 1, 0)) / (n_strong + size + new)
        have = {kinds[i] for i in chosen}
        there = np.array([kind in have for kind in kinds])
        gain = after - f1 - np.where(there, more, costs if len(have) < MAX_KINDS else 1)
        i = int(np.argmax(gain))
        if gain[i] <= 0:
            break
        chosen.append(i)
        covered |= covers[:, i] > 0
        f1 = 2 * float(is_strong @ covered) / (n_strong + covered.sum())
    return chosen


def without_idle(
    covers: np.ndarray, is_strong: np.ndarray, n_strong: int, chosen: list[int]
) -> tuple[list[int], float]:
    """(columns, F1) without those that what came later made idle."""

    def f1_of(columns):
        covered = covers[:, columns].any(1)
        return 2 * float(is_strong @ covered) / (n_strong + covered.sum())

    f1 = f1_of(chosen)
    for i in list(chosen):
        rest = [other for other in chosen if other != i]
        if rest and f1_of(rest) > f1 - GAIN_VALUE / 2:
            chosen, f1 = rest, f1_of(rest)
    return chosen, f1


def cost(kind: tuple) -> float:
    """What a new kind of alternative has to add to F1."""
    others = len(kind) - 1 + (kind[0] not in OWN and kind[0] != "shape")
    return GAIN_KIND + GAIN_LETTERS * (kind[0] in LETTERS) + GAIN_CONTEXT * others


def kind_of(table: ConditionTable, alternative: Alternative) -> tuple:
    """What an alternative shares with those that can be said in one breath: its first property, and
    of pairs the other condition."""
    names = sorted((table.names[i] for i in alternative), key=lambda name: ORDER.index(name[0]))
    return (names[0][0], *names[1:])


def as_rule(table: ConditionTable, alternatives: Sequence[Alternative]) -> Rule:
    """The rule as data; alternatives that differ in one property's values only are joined."""
    found: list[list[tuple[str, list[str]]]] = []
    for one in alternatives:
        names = sorted((table.names[i] for i in one), key=lambda name: ORDER.index(name[0]))
        new = [(name, [value]) for name, value in names]
        for old in found:
            differ = [i for i, (a, b) in enumerate(zip(old, new)) if a != b]
            if len(old) == len(new) and len(differ) == 1:
                (name, values), (other, added) = old[differ[0]], new[differ[0]]
                if name == other:
                    values.extend(added)
                    break
        else:
            found.append(new)
    return {"any": [[[name, values] for name, values in one] for one in found]}
