"""The resolved settings of one run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastsae.settings import dataset_names, kinds
from fastsae.settings.flags import as_flags, flag_name

PROJECT = Path(__file__).resolve().parents[2]
WIDTH, LONGEST = 150, 60  # columns of a line; characters of one value
LONGEST_NAME = 200  # bytes of a folder's name; file systems take 255, locks and versions need some
SHOWN = "FASTSAE_SETTINGS_SHOWN"  # in the environment: settings are not printed again
RANK = {"flag": 0, "preset": 2, "follows": 3}  # the order in which sources are printed; files are 1


def run_name_of(dataset_path: str) -> str:
    """The name of a run on a dataset: its file's, or a hub dataset's with its revision.

    It is always one proper folder's name: never empty, `.` or `..`, nor longer than files' names
    may be with what is put before and after them.
    """
    name = dataset_names.stem(dataset_path)
    # no control sequence, no half character
    name = "".join(c if c.isprintable() else "_" for c in name)
    if len(name.encode()) > LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"
    return name if name.strip(". ") else "dataset"


def activations_stem(layer: int, hook: str = "resid_post") -> str:
    """The name, without its ending, of the files of a layer's activations."""
    return f"activations_layer{layer}{'' if hook == 'resid_post' else f'_{hook}'}"


def foreign_file(path: str) -> tuple[str, str | None]:
    """(the file, the array that is named in it) of an ACTIVATIONS_PATH: `a.npz:x`, `a.npy`."""
    if os.path.exists(path):
        return path, None
    file, separator, member = path.rpartition(":")
    return (file, member) if separator and file.endswith(".npz") else (path, None)


class Settings:
    """The settings of one run, frozen: `settings.M`, `settings.source["M"]`, `settings.values`.

    `source` is "flag", "preset demo" or the file's name, `owner` the file that declares a setting,
    `defaults` the values that the project ships, `typed` the values as they were given: `values`
    has in addition what follows from them, and the first of several.
    """

    def __init__(
        self,
        values: dict[str, Any],
        source: dict[str, str],
        owner: dict[str, str],
        defaults: dict[str, Any] | None = None,
        project: Path = PROJECT,
        typed: dict[str, Any] | None = None,
    ):
        self.__dict__.update(
            typed=MappingProxyType(dict(values if typed is None else typed)),
            values=MappingProxyType(dict(values)),
            source=MappingProxyType(dict(source)),
            owner=MappingProxyType(dict(owner)),
            project=project,
            defaults=MappingProxyType(dict(defaults or {})),
        )

    def __reduce__(self):
        """Copies and pickles are made from the parts: a mapping proxy has no copy of its own."""
        return Settings, (
            dict(self.values),
            dict(self.source),
            dict(self.owner),
            dict(self.defaults),
            self.project,
            dict(self.typed),
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"settings are frozen; give --{flag_name(name)} instead")

    def replace(self, **values: Any) -> Settings:
        """These settings with other `values`, for one of several autoencoders."""
        return Settings(
            {**self.values, **values},
            dict(self.source),
            dict(self.owner),
            dict(self.defaults),
            self.project,
            {**self.typed, **values},
        )

    def select(self, names: Iterable[str]) -> dict[str, Any]:
        """The named settings as a JSON-able dict."""
        return {name: list(v) if isinstance(v := self.values[name], tuple) else v for name in names}

    @property
    def output_dir(self) -> Path:
        """The folder of everything a run writes."""
        return Path(self.OUTPUT_DIR) if self.OUTPUT_DIR else self.project

    @property
    def activations_path(self) -> Path:
        """The activations of LAYER_IDX and HOOK, or those of another program."""
        if self.values.get("ACTIVATIONS_PATH"):
            return Path(self.ACTIVATIONS_PATH)
        stem = activations_stem(self.LAYER_IDX, self.values.get("HOOK", "resid_post"))
        return self.output_dir / "activations" / f"{stem}.npz"

    @property
    def run_dir(self) -> Path:
        """The folder of what stage 2 writes."""
        named = self.DATASET_PATH
        if self.values.get("ACTIVATIONS_PATH"):
            named = os.path.splitext(foreign_file(self.ACTIVATIONS_PATH)[0])[0]
        return self.output_dir / "checkpoints" / (self.RUN_NAME or run_name_of(named))

    def flags_for(self, script: str) -> list[str]:
        """The flags of this run that `script` understands, as command-line arguments."""
        return [
            as_flags(name, value)
            for name, value in self.typed.items()
            if self.source.get(name) == "flag" and self.owner[name] in ("config.py", script)
        ]

    def record(self) -> dict[str, dict[str, Any]]:
        """{NAME: {"value", "from"}} of every setting as it was given, for a JSON file.

        "from" is flag, preset demo, follows (from others), default, or the file that was edited.
        """
        found = {}
        for name, source in self.source.items():
            follows = source == "follows"
            value = (self.values if follows else self.typed)[name]
            unchanged = source == self.owner[name] and value == self.defaults.get(name, value)
            found[name] = {
                "value": list(value) if isinstance(value, tuple) else value,
                "from": "default" if unchanged else source,
            }
        return found

    def show(self) -> None:
        """Print what differs from the defaults, unless QUIET is on or what started this process,
        as `run_pipeline.py` does, has shown it (the variable SHOWN)."""
        if not self.QUIET and SHOWN not in os.environ:
            print(*self.describe().split("\n"), sep="\n", flush=True)

    def describe(self) -> str:
        """What differs from the defaults, and where to find the rest: three lines at most."""
        by_source: dict[str, list[str]] = {}
        for name in self.source:
            value = (self.values if self.source[name] == "follows" else self.typed)[name]
            if name not in self.defaults or value != self.defaults[name]:
                by_source.setdefault(self.source[name], []).append(f"{name}={brief(value)}")
        rest = "--help-all lists all; *.settings.json beside the results has them"
        if not by_source:
            return f"settings: all at their defaults ({rest})"
        order = sorted(by_source, key=lambda source: (RANK.get(source.split()[0], 1), source))
        items = [
            (f"({source}) " if i == 0 else "") + item
            for source in order
            for i, item in enumerate(by_source[source])
        ]
        return "\n".join([*in_two_lines(items), f"  all others at their defaults ({rest})"])


def brief(value: Any) -> str:
    """A value as a flag takes it, cut, and without anything that a terminal would obey."""
    text = kinds.printable(kinds.as_typed(value))
    return text if len(text) <= LONGEST else f"{text[:20]}...{text[-LONGEST + 23 :]}"


def in_two_lines(items: list[str]) -> list[str]:
    """The items in a row after `settings: `, two lines at most, then `and n more`."""
    lines = ["settings:"]
    for number, item in enumerate(items):
        left = len(items) - number
        ending = f" and {left} more"
        room = WIDTH - (len(ending) if len(lines) == 2 and left > 1 else 0)
        if len(lines[-1]) + 2 + len(item) > room:
            if len(lines) == 2:
                lines[-1] += ending
                break
            lines.append(" ")
        lines[-1] += f" {item}" + "," * (number < len(items) - 1)
    return lines
