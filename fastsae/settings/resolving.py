"""Settings from files, preset and flags: what `config.resolve` does."""

import os
import sys
from pathlib import Path
from typing import Any

from fastsae.settings import kinds
from fastsae.settings.declarations import (
    CORE,
    default_of,
    home_of,
    read_source,
    refuse,
    settings_in,
    shipped,
    strangers,
)
from fastsae.settings.flags import parse_flags
from fastsae.settings.help_page import help_text
from fastsae.settings.rules import check_values, complete
from fastsae.settings.suggestions import nearest_name
from fastsae.settings.values import Settings

EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
PATH_SETTINGS = (
    "DATASET_PATH",
    "ACTIVATIONS_PATH",
    "OUTPUT_DIR",
    "CACHE_DIR",
    "INIT_FROM",
    "SAE_PATH",
)


def resolve(project: Path, presets: Any, scripts: tuple, argv: list[str] | None = None) -> Settings:
    """Settings of config.py and of `scripts`: flags beat constants that were edited, these beat the
    preset, and the preset beats what is shipped.

    Prints --help and exits 0, or prints every problem at once and exits 2.
    """
    stages = [name for name in CORE if name not in ("config.py", "run_pipeline.py")]
    own = [Path(path) for path in scripts if len(scripts) == 1 or Path(path).name not in stages]
    script = own[-1] if own else project / "run_pipeline.py"
    declared = read_files([project / "config.py", *map(Path, scripts)], script)
    refuse(check_presets(presets, declared, project))
    given, problems = parse_flags(
        declared,
        sys.argv[1:] if argv is None else argv,
        script,
        show_help=lambda every: print_help(
            help_text(declared, presets, script, project, every=every)
        ),
    )
    unread = {problem.split(":")[0] for problem in problems}  # no other value stands in for them
    preset = given.get("PRESET", declared["PRESET"]["value"])
    if not isinstance(preset, str) or preset not in presets:
        problems.append(
            f"PRESET: there is no preset {kinds.shown(preset)}. choose {' or '.join(presets)}."
        )
        preset = next(iter(presets))
    values, source = {}, {}
    for name, setting in declared.items():
        if name in given:
            values[name], source[name] = given[name], "flag"
        elif setting["has_value"] and (name not in presets[preset] or is_edited(name, setting)):
            values[name], source[name] = setting["value"], setting["file"]
        else:
            values[name], source[name] = presets[preset][name], f"preset {preset}"
        base = Path.cwd() if source[name] == "flag" else project  # where the user is, or the file
        values[name] = absolute(name, values[name], base)
    wrong = [name for name in declared if not kinds.has_type(values[name], declared[name]["type"])]
    problems += [wrong_type(name, values[name], declared[name], source[name]) for name in wrong]
    right = {
        name: kinds.as_type(value, declared[name]["type"])
        for name, value in values.items()
        if name not in wrong
    }
    problems += check_values(
        complete({name: value for name, value in right.items() if name not in unread}),
        {name: setting["limits"] for name, setting in declared.items()},
    )
    refuse(problems)
    completed = complete(right)
    for name, value in right.items():
        if value in (None, kinds.AUTO) and completed[name] != value:
            source[name] = "follows"
    return Settings(
        completed,
        source,
        {name: each["file"] for name, each in declared.items()},
        complete(defaults_of(declared, project)),
        project,
        right,
    )


def read_files(paths: list[Path], script: Path) -> dict[str, dict[str, Any]]:
    """{NAME: setting} of all files; prints what cannot be read and exits 2."""
    declared, problems = {}, []
    for path in paths:
        settings, found = settings_in(path)
        declared.update(settings)
        problems += found
    if script.name == "run_pipeline.py" and script.exists():  # it has none of its own
        problems += strangers(read_source(script), script)
    refuse(problems)
    return declared


def check_presets(presets: Any, declared: dict[str, dict], project: Path) -> list[str]:
    """A line for each name in a preset that cannot be set there, or that a preset leaves open.

    A preset sets at least the settings that are declared without a value.
    """
    if (
        not isinstance(presets, dict)
        or not presets
        or not all(
            isinstance(name, str) and isinstance(each, dict) for name, each in presets.items()
        )
    ):
        return [
            "PRESETS: expected a dict of dicts, {name: {SETTING: value}}. "
            "write it in config.py like the two that are shipped."
        ]
    problems = []
    open_names = [name for name, setting in declared.items() if not setting["has_value"]]
    for preset, values in presets.items():
        problems += [
            f"PRESETS: {preset!r} does not set {name}. add it in config.py, or give "
            f"{name} a value in {declared[name]['file']}."
            for name in open_names
            if name not in values
        ]
        for name in values:
            problem = not_for_presets(name, declared)
            problems += [f"PRESETS: {preset!r} sets {problem}"] if problem else []
    return problems


def not_for_presets(name: Any, declared: dict[str, dict]) -> str | None:
    """What is wrong with a preset setting this name; None if nothing is."""
    if name == "PRESET":
        return "PRESET, which is what names it. leave it out."
    if home_of(name) or name in declared:
        return None
    near = nearest_name(str(name), [each for file in CORE for each in shipped().get(file, {})])
    remedy = f"perhaps {near} is meant" if near else "leave it out"
    return f"{name!r}, which is not a setting. {remedy}."


def is_edited(name: str, setting: dict[str, Any]) -> bool:
    """Whether a constant has another value than it is shipped with."""
    about = shipped().get(setting["file"], {}).get(name)
    return about is None or kinds.as_type(setting["value"], setting["type"]) != default_of(about)


def absolute(name: str, value: Any, base: Path) -> Any:
    """A path setting's value as seen from `base`; any other value as it is.

    MODEL_NAME is a path where it looks like one or names a folder there, and not the embedded
    model.
    """
    if (
        name == "MODEL_NAME"
        and isinstance(value, str)
        and value.strip()
        and value != EMBEDDED_MODEL
    ):
        path = os.path.join(base, os.path.expanduser(value))
        looks = value.startswith((".", "/", "~")) or value.endswith(".gguf")
        if looks or os.path.isdir(path):
            return os.path.realpath(path) if ".." in value else os.path.abspath(path)
    is_path = name in PATH_SETTINGS and isinstance(value, str) and value
    if not is_path or value.startswith(("hf:", "saelens:")):
        return value
    return os.path.join(base, os.path.expanduser(value))


def wrong_type(name: str, value: Any, setting: dict[str, Any], source: str) -> str:
    """What to say of a value of another type than the setting's."""
    kind = kinds.expectation(setting["type"])
    if isinstance(value, float) and kinds.base_of(setting["type"]) == "float":
        kind = f"a finite {kind}"
    remedy = {"flag": "give another value"}.get(source, f"edit it in {setting['file']}")
    if source.startswith("preset"):
        remedy = "edit it in PRESETS of config.py"
    if not isinstance(value, tuple) and kinds.has_type((value,), kinds.base_of(setting["type"])):
        remedy += f", for example `({kinds.shown(value)},)`"
    elif isinstance(value, float) and value.is_integer() and kind.startswith("int"):
        remedy += f", for example {kinds.shown(int(value))}"
    return f"{name}: expected {kind}, got {kinds.shown(value)}. {remedy}."


def defaults_of(declared: dict[str, dict], project: Path) -> dict[str, Any]:
    """{NAME: default} as the project ships them, of a file that it does not list as declared."""
    defaults = {}
    for name, setting in declared.items():
        about = shipped().get(setting["file"], {}).get(name)
        value = default_of(about) if about else setting["value"]
        defaults[name] = absolute(name, value, project)
    return defaults


def print_help(text: str) -> None:
    """Print the page; a reader that leaves early, as `head` does, is no error."""
    try:
        print(*text.split("\n"), sep="\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
