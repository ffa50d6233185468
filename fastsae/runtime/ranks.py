"""Which of several processes this one is: the reader of RANK, WORLD_SIZE and their LOCAL_ twins.

torchrun sets all four. A launcher that sets RANK and WORLD_SIZE alone, as for one process on each
machine, is understood too; SLURM's own variables are not read, because a batch script sees them
with one process as well as with many.
"""

import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fastsae.runtime.errors import InputError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
REMEDY = "start the stage with torchrun, which sets them all, or unset them (unset {})."


class Ranks(NamedTuple):
    """This process is `rank` of `size`, and `local_rank` of the `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def current(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The Ranks that `environment` describes; 0 of 1 where it holds none of the variables.

    InputError for values other than whole numbers, for half a set, and for a rank that is not
    below its size. A lone RANK=0 is refused like any half: whoever set it meant several processes,
    and each of them would take the whole work for its own.
    """
    given = {name: environment[name] for name in NAMES if name in environment}
    if not given:
        return Ranks()
    remedy = REMEDY.format(" ".join(given))
    for name, text in given.items():
        if not re.fullmatch("[0-9]{1,6}", text):
            raise InputError(
                f"{name}: expected a whole number below a million, got {ascii(text)}. {remedy}"
            )
    for name in ("RANK", "WORLD_SIZE"):
        if name not in given:
            raise InputError(
                f"{name}: is not set, although {' and '.join(given)} "
                f"{'is' if len(given) == 1 else 'are'}. {remedy}"
            )
    numbers = {name: int(text) for name, text in given.items()}
    local_rank = numbers.get("LOCAL_RANK", 0)
    ranks = Ranks(
        numbers["RANK"],
        numbers["WORLD_SIZE"],
        local_rank,
        numbers.get("LOCAL_WORLD_SIZE", local_rank + 1),
    )
    for name, size_name in (
        ("RANK", "WORLD_SIZE"),
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("LOCAL_RANK", "WORLD_SIZE"),
    ):
        if numbers.get(name, 0) >= numbers.get(size_name, ranks.local_size):
            raise InputError(
                f"{name}: {numbers.get(name, 0)} is not below {size_name}="
                f"{numbers[size_name]}. {remedy}"
            )
    if ranks.local_size > ranks.size:
        raise InputError(
            f"LOCAL_WORLD_SIZE: {ranks.local_size} is above WORLD_SIZE={ranks.size}. {remedy}"
        )
    return ranks


def listed(numbers: Iterable[int]) -> str:
    """`rank 1`, or `ranks 1, 2 and 5`, a dozen of them at most."""
    names = [str(number) for number in sorted(numbers)]
    if len(names) > 12:
        names = [*names[:11], f"{len(names) - 11} others"]
    first, last = names[:-1], names[-1]
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"


class Waiting:
    """Says on stderr for whom this process waits: after FIRST_WORD seconds, then every EVERY."""

    FIRST_WORD, EVERY = 5.0, 60.0

    def __init__(self) -> None:
        self.next = time.monotonic() + self.FIRST_WORD

    def say(self, whom: str, what: str) -> None:
        """To be called again and again; prints `waiting for rank 1 to ...` when it is time."""
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + self.EVERY
            print(f"waiting for {whom} {what}.", file=sys.stderr, flush=True)


def require_one_process(what: str, remedy: str) -> None:
    """InputError where several processes were started for what one process does alone."""
    if (size := current().size) > 1:
        raise InputError(
            f"WORLD_SIZE: {size} processes were started, but {what} is the work of one. {remedy}"
        )
