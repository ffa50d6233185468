"""One of the project's scripts with other values of constants of the code, for what compares them.

    python -m experiments.shared.constants fastsae.training.objective.INIT_DIRECTIONS=data \\
        train_sae.py --m 512

Arguments before the script are MODULE.NAME=VALUE; the constant must exist. The script runs as from
the command line and ends with its exit code.
"""

import ast
import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any


def set_constant(assignment: str) -> None:
    """Set `module.NAME=value`, or `module.Class.NAME=value`.

    Raises AttributeError where there is no such constant.
    """
    place, _, text = assignment.partition("=")
    owner, name = place.rsplit(".", 1)
    holder = find(owner)
    getattr(holder, name)
    setattr(holder, name, value_of(text))


@contextlib.contextmanager
def other_values(assignments: Iterable[str]) -> Iterator[None]:
    """Within, the constants have these values, as of `set_constant`; then their own again."""
    before = []
    try:
        for assignment in assignments:
            owner, name = assignment.partition("=")[0].rsplit(".", 1)
            before.append((find(owner), name, getattr(find(owner), name)))
            set_constant(assignment)
        yield
    finally:
        for holder, name, value in reversed(before):
            setattr(holder, name, value)


def find(place: str) -> Any:
    """The module, or the class in a module, of that dotted name."""
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError:
        module, _, name = place.rpartition(".")
        return getattr(importlib.import_module(module), name)


def value_of(text: str) -> Any:
    """A number, None and the like; any other text as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> int:
    """Set the constants named, then run the script; returns its exit code."""
    from fastsae.runtime.stage import run_stage

    given = sys.argv[1:]
    first = next((i for i, word in enumerate(given) if word.endswith(".py")), None)
    if first is None:
        print(__doc__)
        return 0 if given in (["-h"], ["--help"]) else 2
    script = importlib.import_module(given[first].removesuffix(".py"))
    for assignment in given[:first]:
        set_constant(assignment)
    sys.argv = [str(script.__file__), *given[first + 1 :]]
    return run_stage(script.main)


if __name__ == "__main__":
    sys.exit(main())
