"""A design of factors, every combination measured: what each factor adds to the gap between two
cells, and how much of all differences between the cells it explains.

A measure is an array with an axis for each factor, (..., levels of factor 0, levels of factor 1,
...); what stands before these axes, resamples for example, is kept.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Cell = tuple[int, ...]  # a level of each factor


class Step(NamedTuple):
    """What a factor adds on the way from one level to the next, in logarithms or whatever the
    measure is in."""

    factor: int
    start: int
    end: int
    mean: np.ndarray  # over all orders in which the factors can change (Shapley's value)
    first: np.ndarray  # as the only change
    last: np.ndarray  # after all others


def gap_parts(y: np.ndarray, start: Cell, end: Cell) -> list[Step]:
    """The steps of the factors that differ between two cells; their `mean`s add up to
    y[end] - y[start].

    A factor that changes by several levels takes them one after the other, and has a step for
    each. `first` and `last` differ where factors act together (an interaction).
    """
    changing = [f for f in range(len(start)) if start[f] != end[f]]
    steps = []
    for factor in changing:
        others = [f for f in changing if f != factor]
        way = 1 if end[factor] > start[factor] else -1
        for level in range(start[factor], end[factor], way):
            by_subset = {
                subset: _change(y, start, end, subset, factor, level, level + way)
                for subset in _subsets(others)
            }
            mean = sum(
                _weight(len(subset), len(changing)) * change for subset, change in by_subset.items()
            )
            first, last = by_subset[()], by_subset[tuple(others)]
            steps.append(Step(factor, level, level + way, np.asarray(mean), first, last))
    return steps


def _change(y, start, end, subset, factor, before, after):
    """What one step changes where the factors of `subset` are at their end already."""
    now = [end[f] if f in subset else start[f] for f in range(len(start))]

    def value(level):
        return at(y, tuple(level if f == factor else now[f] for f in range(len(now))))

    return value(after) - value(before)


def at(y: np.ndarray, cell: Cell) -> np.ndarray:
    """y (..., *levels) in one cell, (...)."""
    index: tuple[Any, ...] = (..., *cell)
    return y[index]


def _weight(n_before: int, n: int) -> float:
    """The share of the orders of n factors in which given n_before ones come before a given one."""
    return math.factorial(n_before) * math.factorial(n - n_before - 1) / math.factorial(n)


def _subsets(items: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for size in range(len(items) + 1):
        yield from itertools.combinations(items, size)


def variance_shares(y: np.ndarray, n_factors: int) -> dict[tuple[int, ...], np.ndarray]:
    """{factors: (...) share of the sum of squares of y about its mean} for each factor alone, for
    each set of factors acting together, and for () what the repetitions differ by.

    y: (..., one axis a factor, n_repetitions); all cells have as many repetitions. Shares add up
    to 1.
    """
    axes = tuple(range(-1 - n_factors, -1))
    n_cells_and_seeds = int(np.prod(y.shape[-1 - n_factors :]))
    total = np.square(y - y.mean((*axes, -1), keepdims=True)).sum((*axes, -1))
    cells = y.mean(-1, keepdims=True)
    effects: dict[tuple[int, ...], np.ndarray] = {}
    shares: dict[tuple[int, ...], np.ndarray] = {}
    shares[()] = np.square(y - cells).sum((*axes, -1)) / total
    for factors in _subsets(range(n_factors)):
        rest = tuple(axes[f] for f in range(n_factors) if f not in factors)
        effect = cells.mean(rest, keepdims=True) if rest else cells
        effect = effect - sum(effects[lower] for lower in effects if set(lower) < set(factors))
        effects[factors] = effect
        if factors:
            n_each = n_cells_and_seeds // math.prod(effect.shape[a] for a in axes)
            shares[factors] = n_each * np.square(effect).sum((*axes, -1)) / total
    return shares
