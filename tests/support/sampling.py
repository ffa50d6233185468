"""Which points the quick run tries: fewer points of every test, not fewer tests.

`--exhaustive` tries all of them. Without it the choice moves on by one each day, so that all are
tried over some weeks; TEST_DAY=<number> repeats the choice of another day (a run prints its own).
"""

import os
from collections.abc import Hashable, Sequence
from datetime import date

exhaustive = False  # set by conftest.py from --exhaustive
day = int(os.environ.get("TEST_DAY") or date.today().toordinal())


def cores() -> set[int]:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def points(
    candidates: Sequence, n: int | None = None, kinds: Sequence[Hashable] = (), thinned: int = 1
) -> list:
    """The points to try: all of them, or in the quick run about `n` at even distances, or the
    first, the last and one of each kind.

    `kinds` has the kind of each candidate, in their order; without it `n` is needed. The quick
    run's choice depends on `day`: of a kind with 30 points each comes around once in 30 days.
    `thinned`: even --exhaustive tries one of so many only, others every day, where a point takes
    seconds.
    """
    candidates = list(candidates)
    if exhaustive or not candidates:
        return candidates[day % thinned :: thinned]
    if not kinds:
        step = max(1, len(candidates) // n)
        return candidates[day % step :: step][:n]
    assert len(kinds) == len(candidates)
    chosen = {0, len(candidates) - 1}
    for kind in dict.fromkeys(kinds):
        places = [i for i, each in enumerate(kinds) if each == kind]
        chosen.add(places[day % len(places)])
    return [candidates[i] for i in sorted(chosen)]
