"""What values a setting may have, as the comment on its line begins: `[1..99]` or `{mean, max}`.

A square bracket includes the bound, a round one does not, and a bound may be left out:
`K: int = 8  # [1..] active features per token`.
"""

import re
from typing import Any, NamedTuple

from fastsae.settings.kinds import shown

INTERVAL = re.compile(r"([\[(])([^\s,.]*(?:\.\d+)?)\.\.([^\s,\]]*)\]\s*")
CHOICES = re.compile(r"\{([^{}]+)\}\s*")
SMALLEST = 1e-12  # of what is above 0: less is 0 in float32, or no time at all
LARGEST_INT, LARGEST_FLOAT = 2**53 - 1, 1e12  # where no bound is given: exact everywhere


class Limits(NamedTuple):
    """An interval or a list of choices, of each item where a setting has several."""

    low: float | None = None
    high: float | None = None
    above: bool = False  # than `low`, which is then no value itself
    choices: tuple[str, ...] = ()


def limits_of(comment: str) -> tuple[Limits, str]:
    """(the limits that a comment begins with, the rest of it)."""
    if found := INTERVAL.match(comment):
        low, high = (bound(text) for text in found.group(2, 3))
        return Limits(low, high, found[1] == "("), comment[found.end() :]
    if found := CHOICES.match(comment):
        names = tuple(name.strip() for name in found[1].split(","))
        return Limits(choices=names), comment[found.end() :]
    return Limits(), comment


def bound(text: str) -> float | None:
    """The number of a bound, `2**26` included; None where there is none. ValueError for a word."""
    if not text:
        return None
    base, power, exponent = text.partition("**")
    if power:
        return int(base) ** int(exponent)
    return int(base) if re.fullmatch(r"-?\d+", base) else float(base)


def in_words(limits: Limits) -> str:
    """The limits as `--help` gives them; empty where there are none."""
    if limits.choices:
        return ", ".join(limits.choices)
    low, high = limits.low, limits.high
    if high is not None and high > LARGEST_FLOAT:  # a bound of the arithmetic
        high = None
    if limits.above:
        return f"above {low}" + f" to {high}" * (high is not None)
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f"{low} or more" if low is not None else f"{high} or less" if high is not None else ""


def each(value: Any) -> tuple:
    """The values of a setting that may be none, one or several."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def problems_with(name: str, value: Any, limits: Limits) -> list[str]:
    """A line with its remedy for each of a setting's values that is not within its limits."""
    wrong = [reason for one in each(value) if (reason := outside(one, limits))]
    return [f"{name}: {reason}." for reason in wrong]


def outside(one: Any, limits: Limits) -> str | None:
    """What is wrong with one value and what to give instead; None if nothing is."""
    if limits.choices and one not in limits.choices:
        return f"{shown(one)} is unknown. choose {', '.join(limits.choices)}"
    if isinstance(one, (str, bool)):
        return None
    low, high = limits.low, limits.high
    if low is not None and limits.above and one <= low:
        return f"{shown(one)} is not above {low}. give more than {low}"
    least = low if not limits.above or low is None else low + SMALLEST
    if least is not None and one < least:
        return f"{shown(one)} is below {least}. give {least} or more"
    if high is not None:
        return f"{shown(one)} is above {high}. give {high} or less" if one > high else None
    largest = LARGEST_INT if isinstance(one, int) else LARGEST_FLOAT
    return (
        f"{shown(one)} is beyond {largest}. give a smaller number" if abs(one) > largest else None
    )
