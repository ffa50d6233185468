"""From the errors on each held-out dialogue to FAST's measures, their intervals, and what each
factor has to do with them.

Everything is resampled together: the same dialogues, and the same seeds, for all cells. A measure
is log2 of an error, so a difference of 1 is twice the error.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from experiments.shared.factors import Cell, at, gap_parts, variance_shares
from experiments.shared.fast_tokens import SETS
from experiments.shared.statistics import bootstrap_counts, draw_seeds, interval, widened

N_BOOTSTRAP = 1000
ATTENTION = ("alone", "apart", "whole")  # in blocks: apart, no dialogue sees another
KEPT = ("dropped", "kept")
ON = ("alone", "whole")  # how the held-out dialogues are read
FACTORS = ("attention", "openings", "sinks", "measured on")
LEVELS = (ATTENTION, KEPT, KEPT, ON)
# (name, from, to), cells without how they are measured: FAST and BT(F) as the paper trains them, as
# this project's stages do by default, and from the second's FAST to the first's BT(F)
GAPS = (
    ("the paper's", (0, 1, 1), (2, 1, 1)),
    ("this project's", (0, 0, 0), (2, 1, 0)),
    ("both", (0, 0, 0), (2, 1, 1)),
)


# {(source, openings, sinks, seed): {how the dialogues are read: {set of tokens: (n_dialogues,)}}}
Errors: TypeAlias = Mapping[tuple, Mapping[str, Mapping[str, Sequence[float]]]]
# {how the dialogues are read: {"counts": ..., "spread": ...}}, of `Tested`
About: TypeAlias = Mapping[str, Mapping[str, Any]]


class Measure(NamedTuple):
    """An error: of which tokens, and what it is divided by."""

    tokens: str
    normalised: bool  # by their squared distances from the mean; else FAST's mean of means


MEASURES = {
    "normalised MSE, without openings and sinks": Measure(SETS[2], True),
    "MSE": Measure(SETS[0], False),
    "MSE, without openings and sinks": Measure(SETS[2], False),
    "MSE_st": Measure(f"{SETS[0]}, special", False),
    "MSE_st, without sinks": Measure(f"{SETS[1]}, special", False),
    "MSE_st, without openings and sinks": Measure(f"{SETS[2]}, special", False),
}


class Resampled:
    """Weights of the dialogues and choices of the seeds in each resample; the first is all of
    them."""

    def __init__(self, n_dialogues: int, n_seeds: int) -> None:
        counts = bootstrap_counts(n_dialogues, N_BOOTSTRAP)
        self.weights = np.concatenate([np.ones((1, n_dialogues), np.int64), counts])
        drawn = draw_seeds(n_seeds, N_BOOTSTRAP, 0)
        self.seeds = np.concatenate([np.arange(n_seeds)[None], drawn])
        self.n_seeds = n_seeds

    def errors(
        self, measure: Measure, errors: np.ndarray, about: Mapping[str, Any], d: int
    ) -> np.ndarray:
        """log2 of a measure in each resample of the dialogues: (n, ...) from sums of squared errors
        (..., n_dialogues); about: the `counts` and `spread` of the dialogues."""
        counts = np.asarray(about["counts"][measure.tokens], float)
        if measure.normalised:
            spread = np.asarray(about["spread"][measure.tokens])
            value = (errors @ self.weights.T) / (self.weights @ spread)
        else:
            there = counts > 0  # a dialogue may have no such token
            means = errors[..., there] / (counts[there] * d)
            weights = self.weights[:, there]
            value = (means @ weights.T) / weights.sum(1)
        return np.log2(np.moveaxis(value, -1, 0))

    def with_seeds(self, y: np.ndarray) -> np.ndarray:
        """y (n, ..., n_seeds) with the seeds drawn in each resample in their place."""
        index = self.seeds.reshape(len(self.seeds), *[1] * (y.ndim - 2), self.n_seeds)
        return np.take_along_axis(y, np.broadcast_to(index, y.shape), -1)

    def estimate(self, of_dialogues: np.ndarray, of_both: np.ndarray) -> dict[str, Any]:
        """A value with its interval, from (n,) in which dialogues, or dialogues and seeds, were
        resampled; the seeds' part is widened where they are few."""
        drawn = widened(of_dialogues[1:], of_both[1:], self.n_seeds)
        return {"value": float(of_dialogues[0]), "interval": interval(drawn)}


def gaps(y: np.ndarray, resampled: Resampled) -> list[dict[str, Any]]:
    """The GAPS of a measure, y (n, *LEVELS, n_seeds), each with its steps, on either way of reading
    the held-out dialogues."""
    both = resampled.with_seeds(y).mean(-1)
    plain = y.mean(-1)
    return [
        {"gap": name, "measured on": ON[on], **one_gap(plain, both, start, end, on, resampled)}
        for name, start, end in GAPS
        for on in range(len(ON))
    ]


def one_gap(
    plain: np.ndarray, both: np.ndarray, start: Cell, end: Cell, on: int, resampled: Resampled
) -> dict[str, Any]:
    """The gap between two cells and its steps, from means over seeds (n, *LEVELS) of the resamples
    of dialogues, and of dialogues and seeds."""
    pairs = [(part, gap_parts(part, (*start, on), (*end, on))) for part in (plain, both)]
    totals = [at(part, (*end, on)) - at(part, (*start, on)) for part in (plain, both)]
    total = resampled.estimate(*totals)
    clear = min(total["interval"]) > 0 or max(total["interval"]) < 0
    steps = []
    for step, other in zip(*(found for _, found in pairs)):
        row = {
            "factor": FACTORS[step.factor],
            "from": LEVELS[step.factor][step.start],
            "to": LEVELS[step.factor][step.end],
            **resampled.estimate(step.mean, other.mean),
            "first": float(step.first[0]),
            "last": float(step.last[0]),
            "interaction": resampled.estimate(step.last - step.first, other.last - other.first),
        }
        if clear:
            shares = (step.mean / totals[0], other.mean / totals[1])
            row["share"] = resampled.estimate(*shares)
        steps.append(row)
    return {"total": total, "steps": steps}


def shares(y: np.ndarray, resampled: Resampled) -> list[dict[str, Any]]:
    """What each factor, and factors together, have of the sum of squares of a measure, y (n,
    *LEVELS, n_seeds), largest first; "seeds" is what is left."""
    plain = variance_shares(y, len(FACTORS))
    both = variance_shares(resampled.with_seeds(y), len(FACTORS))
    rows = [
        {
            "factors": [FACTORS[f] for f in factors] or ["seeds"],
            "share": float(share[0]),
            "interval": interval(both[factors][1:]),
        }
        for factors, share in plain.items()
    ]
    return sorted(rows, key=lambda row: -row["share"])


def table_of(
    errors: Errors,
    about: About,
    seeds: Sequence[int],
    d: int,
    resampled: Resampled,
    measure: Measure,
) -> np.ndarray:
    """(n, *LEVELS, n_seeds) of one layer: log2 of a measure in each resample of the dialogues; d:
    the dimensions of the stream."""
    columns = []
    for on in ON:
        stacked = np.array(
            [
                [
                    [
                        [errors[a, o, s, seed][on][measure.tokens] for seed in seeds]
                        for s in range(len(KEPT))
                    ]
                    for o in range(len(KEPT))
                ]
                for a in ATTENTION
            ]
        )
        columns.append(resampled.errors(measure, stacked, about[on], d))
    return np.stack(columns, -2)


class Group(NamedTuple):
    """The cells that differ in the seed alone."""

    source: str
    openings: int
    sinks: int


def errors_of_groups(
    errors: Errors, about: About, seeds: Sequence[int], d: int, resampled: Resampled
) -> dict[Group, dict[str, Any]]:
    """{Group: {"measures": {measure: {how the dialogues are read: log2 with its interval}}}}."""
    found: dict[Group, dict[str, Any]] = {}
    for group in dict.fromkeys(Group(*cell[:3]) for cell in errors):
        measures: dict[str, Any] = {}
        for name, measure in MEASURES.items():
            for on in ON:
                y = values_of(errors, about, seeds, d, resampled, measure, group, on)
                both = resampled.with_seeds(y).mean(-1)
                measures.setdefault(name, {})[on] = resampled.estimate(y.mean(-1), both)
        found[group] = {"measures": measures}
    return found


def values_of(
    errors: Errors,
    about: About,
    seeds: Sequence[int],
    d: int,
    resampled: Resampled,
    measure: Measure,
    group: Group,
    on: str,
) -> np.ndarray:
    """(n, n_seeds) log2 of a measure of one group of cells in each resample of the dialogues."""
    stacked = np.array([errors[(*group, seed)][on][measure.tokens] for seed in seeds])
    return resampled.errors(measure, stacked, about[on], d)


def text_gaps(
    errors: Errors,
    about: About,
    seeds: Sequence[int],
    d: int,
    resampled: Resampled,
    texts: Sequence[str],
) -> list[dict[str, Any]]:
    """By how much the error of each plain text's autoencoders is above that of the dialogues'
    blocks (openings kept), with sinks and without, log2 with intervals."""
    rows = []
    for text in texts:
        for sinks in range(len(KEPT)):
            for name, measure in MEASURES.items():
                pairs = [
                    values_of(errors, about, seeds, d, resampled, measure, group, ON[0])
                    for group in (Group(text, 1, sinks), Group(ATTENTION[2], 1, sinks))
                ]
                gap = pairs[0] - pairs[1]
                both = resampled.with_seeds(gap).mean(-1)
                where = {"text": text, "sinks": KEPT[sinks], "measure": name}
                rows.append({**where, **resampled.estimate(gap.mean(-1), both)})
    return rows
