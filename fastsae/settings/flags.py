"""Flags: `--layer-idx 18`, `--m=512`, `--use-matryoshka`, `--no-use-matryoshka`."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsae.settings import kinds
from fastsae.settings.declarations import home_of
from fastsae.settings.suggestions import listed, nearest


def flag_name(name: str) -> str:
    """`LAYER_IDX` as `layer-idx`."""
    return name.lower().replace("_", "-")


def is_switch(kind: str) -> bool:
    """Whether a setting's flag takes no value."""
    return kinds.base_of(kind) == "bool"


def parse_flags(
    declared: dict[str, dict],
    argv: list[str],
    script: str | Path,
    *,
    show_help: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, Any], list[str]]:
    """({NAME: value} of the flags in `argv`, problems). At `--help` calls `show_help` and exits 0.

    A flag whose value cannot be read is left out, and its name begins a line of `problems`.
    """
    names = {f"--{flag_name(name)}": name for name in declared}
    switches = {
        f"{prefix}{flag_name(name)}": (name, prefix == "--")
        for name, setting in declared.items()
        if is_switch(setting["type"])
        for prefix in ("--", "--no-")
    }
    given: dict[str, Any] = {}
    problems, words = [], list(argv)
    while words:
        flag, joined, text = words.pop(0).partition("=")
        if flag in ("-h", "--help"):
            show_help()
            sys.exit(0)
        followed = bool(words) and not words[0].startswith("--") and not joined  # `-1` is a value
        if flag in switches and joined:
            bare = flag.removeprefix("--").removeprefix("no-")
            problems.append(f"command line: {flag} takes no value. give --{bare}, or --no-{bare}.")
        elif flag in switches:
            name, given[name] = switches[flag]
        elif flag not in names:
            problems.append(no_such_flag(flag, declared, script))
            if flag.startswith("-") and followed:
                words.pop(0)
        else:
            name = names[flag]
            kind = declared[name]["type"]
            example = f"for example {flag} {kinds.example_of(kind, declared[name]['value'])}."
            if not joined and not followed:
                problems.append(f"{name}: no value is given. {example}")
                continue
            text = text if joined else words.pop(0)
            try:
                given[name] = kinds.parse(text, kind)
            except ValueError:
                problems.append(
                    f"{name}: expected {kinds.expectation(kind)}, "
                    f"got {kinds.shown(text)}. {example}"
                )
    return given, problems


def no_such_flag(flag: str, declared: dict[str, dict], script: str | Path) -> str:
    """What to say of a flag that the script does not have."""
    word = flag.strip("-").lower().replace("_", "-")
    name = word.upper().replace("-", "_")
    home = home_of(name) or home_of(name.removeprefix("NO_"))
    if home and name not in declared and name.removeprefix("NO_") not in declared:
        return (
            f"{flag}: no such setting of {os.path.basename(script)}, but of {home}. leave it "
            "out here, or start run_pipeline.py, which takes the flags of all stages."
        )
    near = nearest(word, [flag_name(each) for each in declared])
    if word.startswith("no-"):
        switches = [flag_name(each) for each in declared if is_switch(declared[each]["type"])]
        negated = [f"no-{each}" for each in nearest(word.removeprefix("no-"), switches)]
        near = negated or near
    if not near:
        return f"{flag}: no such setting. see --help for all of them."
    return (
        f"{flag}: no such setting. perhaps {listed([f'--{each}' for each in near])} is meant; "
        "--help lists all."
    )


def as_flags(name: str, value: Any) -> str:
    """A setting's value as one argument of a command line."""
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{flag_name(name)}"
    return f"--{flag_name(name)}={kinds.as_typed(value)}"
