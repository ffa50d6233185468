"""Flags: `--layer-idx 18`, `--m=512`, `--quiet`, `--no-quiet`; read by argparse.

All that is wrong with a command line is said at once, where argparse would stop at the first.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fastsae.settings import declarations, kinds
from fastsae.settings.declarations import RENAMED, SEVERAL, home_of
from fastsae.settings.suggestions import listed, nearest


def flag_name(name: str) -> str:
    """`LAYER_IDX` as `layer-idx`."""
    return name.lower().replace("_", "-")


def is_switch(kind: str) -> bool:
    """Whether a setting's flag takes no value."""
    return kinds.base_of(kind) == "bool"


class Parser(argparse.ArgumentParser):
    """A parser that never ends the process; what it cannot read its caller has looked for."""

    def error(self, message: str) -> NoReturn:
        """ValueError, so that all problems of a command line are reported at once."""
        raise ValueError(message)


def make_parser(declared: dict[str, dict], **more: Any) -> Parser:
    """A parser with a flag for each setting, in the groups of the files, without defaults.

    Values stay text: `kinds.parse` turns them into values of the setting's type.
    """
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS, **more)
    groups: dict[tuple[str, str], Any] = {}
    for name, setting in declared.items():
        key = setting["file"], setting["group"]
        if key not in groups:
            title = f"{setting['group'] or 'Settings'} ({setting['file']})"
            groups[key] = parser.add_argument_group(title)
        how: dict[str, Any] = {"dest": name, "help": setting.get("help")}
        if is_switch(setting["type"]):
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["metavar"] = kinds.metavar(setting["type"])
        groups[key].add_argument(f"--{flag_name(name)}", **how)
    return parser


def parse_flags(
    declared: dict[str, dict],
    argv: list[str],
    script: str | Path,
    *,
    show_help: Callable[[bool], Any] = lambda every: None,
) -> tuple[dict[str, Any], list[str]]:
    """({NAME: value} of the flags in `argv`, problems).

    At `--help` and `--help-all` calls `show_help(whether all settings are asked for)` and exits 0.
    A flag whose value cannot be read is left out, and its name begins a line of `problems`.
    """
    names = {f"--{flag_name(name)}": name for name in declared}
    words, problems = readable(declared, names, argv)
    if asked := [word for word in words if word in ("-h", "--help", "--help-all")]:
        show_help("--help-all" in asked)
        sys.exit(0)
    found, unknown = make_parser(declared).parse_known_args(words)
    given: dict[str, Any] = {}
    for name, text in vars(found).items():
        kind, flag = declared[name]["type"], f"--{flag_name(name)}"
        try:
            given[name] = text if is_switch(kind) else kinds.parse(text, kind)
        except ValueError:
            problems.append(
                f"{name}: expected {kinds.expectation(kind)}, got {kinds.shown(text)}. "
                f"{example_of(flag, declared[name])}"
            )
    for before, word in zip(["", *unknown], unknown):
        if word.startswith("-") or not before.startswith("-") or "=" in before:
            problems.append(no_such_flag(word.partition("=")[0], declared, script))
    return given, problems


def readable(
    declared: dict[str, dict], names: dict[str, str], argv: list[str]
) -> tuple[list[str], list[str]]:
    """(words that argparse reads as they are meant, problems of those left out).

    A value that begins with a dash (`--d -x`) goes to its flag, whatever it looks like.
    """
    switches = {flag for flag, name in names.items() if is_switch(declared[name]["type"])}
    words: list[str] = []
    problems, left = [], list(argv)
    while left:
        word = left.pop(0)
        flag, joined, _ = word.partition("=")
        positive = flag.replace("--no-", "--", 1) if flag not in names else flag
        if positive in switches and joined:
            bare = positive.removeprefix("--")
            problems.append(f"command line: {flag} takes no value. give --{bare}, or --no-{bare}.")
        elif flag not in names or flag in switches or joined:
            words.append(word)
        elif left and not left[0].startswith("--"):
            words.append(f"{flag}={left.pop(0)}")
        else:
            example = example_of(flag, declared[names[flag]])
            problems.append(f"{names[flag]}: no value is given. {example}")
    return words, problems


def example_of(flag: str, setting: dict[str, Any]) -> str:
    """What a flag could be given, as a remedy."""
    return f"for example {flag} {kinds.example_of(setting['type'], setting['value'])}."


def no_such_flag(flag: str, declared: dict[str, dict], script: str | Path) -> str:
    """What to say of a flag that the script does not have."""
    word = flag.strip("-").lower().replace("_", "-")
    name = word.upper().replace("-", "_")
    if remedy := instead_of(name) or instead_of(name.removeprefix("NO_")):
        return f"{flag}: not a setting any more. {remedy}."
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
        return f"{flag}: no such setting. see --help-all for all of them."
    return (
        f"{flag}: no such setting. perhaps {listed([f'--{each}' for each in near])} is meant; "
        "--help-all lists all."
    )


def instead_of(name: str) -> str | None:
    """What to give on the command line in place of a former setting; None of any other name."""
    if name in RENAMED:
        return f"give {as_flags(*RENAMED[name])}"
    return declarations.instead_of(name)


def as_flags(name: str, value: Any) -> str:
    """A setting's value as one argument of a command line."""
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{flag_name(name)}"
    alone = name in SEVERAL.values() and isinstance(value, tuple) and len(value) == 1
    return f"--{flag_name(name)}={kinds.as_typed(value)}" + "," * alone
