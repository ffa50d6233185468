"""The types that settings can have, by annotation: `int`, `tuple[int, ...]`, `str | None`."""

import re
import sys
from typing import Any

PLAIN = ("bool", "int", "float", "str")
EXAMPLES = {
    "int": "8",
    "float": "0.5",
    "tuple[int, ...]": "8,16",
    "tuple[float, ...]": "0.5,2",
    "tuple[str, ...]": "saelens",
}
AUTO = "auto"  # of a setting that then follows from others
LARGEST_FLOAT = sys.float_info.max
LONGEST = 60  # characters of a value that a message repeats


def is_known(kind: str) -> bool:
    """Whether `kind` is a type that settings can have."""
    one = r"(int|float|str)"
    forms = rf"bool|{one}|tuple\[{one}, \.\.\.\]|(?P<it>{one}) \| tuple\[((?P=it)|int), \.\.\.\]"
    return re.fullmatch(rf"({forms})( \| None)?", kind) is not None


def base_of(kind: str) -> str:
    """The type less its `| None`."""
    return kind.removesuffix(" | None")


def one_or_several(kind: str) -> tuple[str, str] | None:
    """("int", "tuple[int, ...]") of `int | tuple[int, ...]`; None of any other type.

    Of `str | tuple[int, ...]` the one is AUTO.
    """
    one, _, several = base_of(kind).partition(" | ")
    return (one, several) if several else None


def item_of(kind: str) -> str:
    """The type of a tuple's items."""
    return kind.removeprefix("tuple[").removesuffix(", ...]")


def parse(text: str, kind: str) -> Any:
    """A flag's text as a value of type `kind`; ValueError if it is none."""
    if kind.endswith(" | None"):
        if text.lower() == "none":
            return None
        kind = base_of(kind)
    if both := one_or_several(kind):  # a comma at the end makes a tuple of one
        if both[0] == "str":
            return text if text == AUTO else parse(text, both[1])
        return parse(text, both["," in text])
    if kind.startswith("tuple["):
        return tuple(parse(part, item_of(kind)) for part in text.removesuffix(",").split(","))
    return {"int": int, "float": float, "str": str}[kind](text)


def has_type(value: Any, kind: str) -> bool:
    """Whether a value is of type `kind`; an int passes for a float, a list for a tuple."""
    if kind.endswith(" | None"):
        return value is None or has_type(value, base_of(kind))
    if both := one_or_several(kind):
        one = value == AUTO if both[0] == "str" else has_type(value, both[0])
        return one or has_type(value, both[1])
    if kind.startswith("tuple["):
        return isinstance(value, (tuple, list)) and all(
            has_type(each, item_of(kind)) for each in value
        )
    if kind == "float":
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) <= LARGEST_FLOAT
    return type(value).__name__ == kind


def as_type(value: Any, kind: str) -> Any:
    """A value of type `kind` in its one form: a float for 1, a tuple for a list."""
    if value is None:
        return None
    if both := one_or_several(kind):
        return as_type(value, both[isinstance(value, (tuple, list))])
    if base_of(kind).startswith("tuple["):
        return tuple(as_type(each, item_of(base_of(kind))) for each in value)
    return float(value) if base_of(kind) == "float" else value


def expectation(kind: str) -> str:
    """The type in a message: `int`, `float or none`, `a tuple of int`."""
    base = base_of(kind)
    if both := one_or_several(base):
        one = AUTO if both[0] == "str" else both[0]
        return f"{one} or {expectation(both[1])}" + " or none" * kind.endswith(" | None")
    words = f"a tuple of {item_of(base)}" if base.startswith("tuple[") else base
    return words + " or none" * kind.endswith(" | None")


def metavar(kind: str) -> str:
    """What `--help` shows for a flag's value: `INT`, `INT,INT,...|none`."""
    if both := one_or_several(kind):
        numbers = f"{item_of(both[1])}[,{item_of(both[1])}...]".upper()
        word = f"{AUTO}|" * (both[0] == "str")
        return f"{word}{numbers}" + "|none" * kind.endswith(" | None")
    base = re.sub(r"tuple\[(\w+), \.\.\.\]", r"\1,\1,...", base_of(kind)).upper()
    return base + "|none" * kind.endswith(" | None")


def as_typed(value: Any) -> str:
    """A value in the form in which a flag takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def example_of(kind: str, value: Any) -> str:
    """What a flag of this type could be given, from the value declared."""
    if isinstance(value, tuple):
        return as_typed(value)
    return EXAMPLES.get(base_of(kind), as_typed(value))


def shown(value: Any) -> str:
    """A value as a message repeats it: its repr, cut."""
    try:
        text = printable(repr(value))
    except ValueError:  # an int of more digits than Python writes
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]}...{text[-10:]}"


def printable(text: str) -> str:
    """The text with what does not print as escapes: no line is forged, no control sequence sent."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
