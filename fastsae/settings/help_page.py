"""The pages that `--help` and `--help-all` print."""

import argparse
import ast
import os
import textwrap
from pathlib import Path
from typing import Any

from fastsae.settings import kinds
from fastsae.settings.flags import make_parser
from fastsae.settings.limits import in_words

WIDTH, COLUMN = 100, 32
MAIN, CONSTANTS = "Main settings", "Constants"  # headings in the files
EXIT_CODES = """\
exit codes: 0 done; 1 a bug; 2 bad input or setting; 3 disk, network, rights or a damaged file;
            4 done, with features unlabelled; 130, 143 interrupted"""


class Page(argparse.HelpFormatter):
    """100 columns, a switch as `--quiet | --no-quiet`, words whole."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=COLUMN, width=WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return " | ".join(action.option_strings)
        return super()._format_action_invocation(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def help_text(
    declared: dict[str, dict],
    presets: dict[str, dict],
    script: Path,
    project: Path,
    *,
    every: bool = False,
) -> str:
    """What the script does, its main settings or `every` one, its examples, the exit codes."""
    about = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    own = {name for name, setting in declared.items() if setting["group"] in ("", MAIN)}
    shown = {
        name: {**setting, "help": about_setting(name, setting, presets).replace("%", "%%")}
        for name, setting in declared.items()
        if every or name in own
    }
    parser = make_parser(
        shown,
        formatter_class=Page,
        usage=f"{command_of(script, project)} [--setting value ...]",
        description=" ".join(about.split("\n\n")[0].split()),
    )
    more = len(declared) - len(shown)
    examples = [line[2:] for line in about.split("\n") if line.startswith("    ")]
    lines = [
        parser.format_help().rstrip(),
        "",
        *[f"{more} more settings: --help-all"] * (more > 0),
        "Edit a setting at the top of its file, or give its flag for one run. Tuples take commas.",
        "",
        "examples:",
        *examples,
        "",
        EXIT_CODES,
    ]
    return "\n".join(lines)


def command_of(script: Path, project: Path) -> str:
    """How a script is run from the project's folder; one in a package is run as a module."""
    path = os.path.relpath(script, project)
    if os.path.exists(os.path.join(os.path.dirname(os.path.abspath(script)), "__init__.py")):
        return f"python -m {path.removesuffix('.py').replace(os.sep, '.')}"
    return f"python {path}"


def about_setting(name: str, setting: dict[str, Any], presets: dict[str, dict]) -> str:
    """What a setting means, its limits and its default."""
    defaults = {"": setting["value"]} if setting["has_value"] else {}
    for preset, values in presets.items():
        if name in values or not setting["has_value"]:
            defaults[f"{preset}: "] = values.get(name)
    default = "; ".join(f"{preset}{kinds.as_typed(value)}" for preset, value in defaults.items())
    limits = in_words(setting["limits"])
    return f"{setting['comment']}{f' ({limits})' if limits else ''} [{default}]"


def markdown_table(declared: dict[str, dict], preset: dict[str, Any]) -> str:
    """The table of docs/settings.md: a heading for each group, a row for each setting."""
    lines: list[str] = []
    heading = None
    for name, setting in declared.items():
        if heading != (heading := f"## `{setting['file']}`: {setting['group'].lower()}"):
            lines += [
                "",
                heading,
                "",
                "| setting | default | allowed | meaning |",
                "|---|---|---|---|",
            ]
        default = setting["value"] if setting["has_value"] else preset[name]
        text = kinds.as_typed(default) + " (by preset)" * (not setting["has_value"])
        meaning = setting["comment"].replace("|", "or")
        allowed = in_words(setting["limits"])
        lines.append(f"| `{name}` | {text} | {allowed} | {meaning} |")
    return "\n".join(lines[1:])
