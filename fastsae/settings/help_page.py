"""The page that `--help` prints."""

import ast
import os
import re
import textwrap
from pathlib import Path
from typing import Any

from fastsae.settings import kinds
from fastsae.settings.flags import flag_name, is_switch

WIDTH, COLUMN = 100, 32
EXIT_CODES = """\
exit codes: 0 done; 1 a bug; 2 bad input or setting; 3 disk, network, rights or a damaged file;
            4 done, with features unlabelled; 130, 143 interrupted"""


def help_text(
    declared: dict[str, dict], presets: dict[str, dict], script: Path, project: Path
) -> str:
    """The script's first paragraph and examples, every setting, the exit codes."""
    about = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    lines = [
        f"usage: python {os.path.relpath(script, project)} [--setting value ...]",
        "",
        *textwrap.wrap(" ".join(about.split("\n\n")[0].split()), WIDTH),
    ]
    for name, setting in declared.items():
        if (heading := f"settings of {setting['file']}:") not in lines:
            lines += ["", heading]
        lines += about_setting(name, setting, presets)
    examples = [line[2:] for line in about.split("\n") if line.startswith("    ")]
    return "\n".join(
        [
            *lines,
            "",
            "Edit a setting at the top of its file, or give its flag for one "
            "run. Tuples take commas.",
            "",
            "examples:",
            *examples,
            "",
            EXIT_CODES,
        ]
    )


def about_setting(name: str, setting: dict[str, Any], presets: dict[str, dict]) -> list[str]:
    """The lines on one setting: its flag, its comment, its default."""
    kind = re.sub(r"tuple\[(\w+), \.\.\.\]", r"\1,\1,...", kinds.base_of(setting["type"])).upper()
    if is_switch(setting["type"]):
        flag = f"  --{flag_name(name)} | --no-{flag_name(name)}"
    else:
        flag = f"  --{flag_name(name)} {kind}" + "|none" * setting["type"].endswith(" | None")
    defaults = (
        {"": setting["value"]}
        if setting["has_value"]
        else {f"{preset}: ": values.get(name) for preset, values in presets.items()}
    )
    default = "; ".join(f"{preset}{kinds.as_typed(value)}" for preset, value in defaults.items())
    above = []
    if len(flag) > COLUMN - 2:
        above, flag = [flag], ""
    text = textwrap.fill(
        f"{setting['comment']} [{default}]",
        WIDTH,
        break_on_hyphens=False,
        initial_indent=flag.ljust(COLUMN),
        subsequent_indent=" " * COLUMN,
    )
    return [*above, *text.split("\n")]
