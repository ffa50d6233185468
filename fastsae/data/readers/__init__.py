"""Readers of datasets: a file for each kind of source, entered in FORMATS.

A reader has `opened(source)`, a context in which there is an iterator of `Row`s, one at a time; on
leaving it what was read has the content that was looked at, or EnvironmentFailure says that it was
replaced. Bad rows are ValueErrors in their place; what makes all rows bad is an InputError.
Importing this module loads no reader and no optional package.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastsae.data import compression, file_kinds
from fastsae.runtime.errors import InputError
from fastsae.settings import dataset_names, folders
from fastsae.settings.dataset_names import HUB, TEXT


class Row(NamedTuple):
    """A row as it is read. number: what leads back to it, from 1; content: its fields, or a
    ValueError that says what is wrong with it; line: where it begins, if that is not its number."""

    number: int
    content: Any
    line: int | None = None


@dataclass(frozen=True)
class Source:
    """What is read: a dataset path, the sha256 that its content must have (None: any), and the
    fields that are asked for."""

    path: str
    sha256: str | None = None
    text_field: str = TEXT
    label_field: str | None = None


@dataclass(frozen=True)
class Format:
    """What is known of a format before its reader is loaded.

    name: for messages and docs. reader: the module. number: what the number of a row counts.
    """

    name: str
    reader: str
    number: str


# the registry; in a file's name the endings of `dataset_names` tell which, or how it begins
FORMATS = {
    "json": Format("JSON lines or a JSON array", "json_rows", "line"),
    "csv": Format("CSV", "delimited", "row"),
    "tsv": Format("TSV", "delimited", "row"),
    "text": Format("plain text", "plain_text", "line"),
    "texts": Format("a folder of .txt files", "text_files", "file"),
    "parquet": Format("Parquet", "arrow_tables", "row"),
    "arrow": Format("Arrow or Feather", "arrow_tables", "row"),
    "tables": Format("a folder of Parquet tables", "arrow_tables", "row"),
    "saved": Format("a folder saved by datasets", "arrow_tables", "row"),
    "hub": Format("a dataset of the hub", "hub", "row"),
}
ENDINGS = {
    **dict.fromkeys(dataset_names.CSV, "csv"),
    **dict.fromkeys(dataset_names.TSV, "tsv"),
    **dict.fromkeys(dataset_names.PLAIN, "text"),
}
BEGINNINGS = ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow"))


def format_of(path: Path | str) -> str:
    """The name in FORMATS of what a dataset path stands for.

    InputError, with what makes rows of it, for a folder or file of another kind.
    """
    if str(path).startswith(HUB):
        return "hub"
    if os.path.isdir(path):
        if found := folders.folder_format(path):
            return found
        raise InputError("DATASET_PATH: {} {}. {}.".format(path, *folders.folder_advice(path)))
    with open(path, "rb") as file:
        start = file.read(16)
    for beginning, name in BEGINNINGS:
        if start.startswith(beginning):
            return name
    found = ENDINGS.get(dataset_names.ending(path), "json")
    file_kinds.refuse_foreign(path, compression.head(path), found)
    return found


def opened(source: Source) -> AbstractContextManager[Iterator[Row]]:
    """The rows of a source, by the reader of its format."""
    form = FORMATS[format_of(source.path)]
    reader = importlib.import_module(f"{__name__}.{form.reader}")
    return reader.opened(source)


def place(path: Path | str, number: int, line: int | None = None, *, short: bool = False) -> str:
    """How errors name a row: `file:line`, or what its number counts. short: without the path."""
    found = "json"
    with contextlib.suppress(InputError, OSError):
        found = format_of(path)
    counts = FORMATS[found].number
    if found == "json" and _is_array(path):
        counts = "item"
    if counts == "line":
        return f"line {number}" if short else f"{path}:{number}"
    if counts == "file" and not short:
        names = folders.text_files(path)
        return str(Path(path) / names[number - 1]) if number <= len(names) else str(path)
    name = f"{counts} {number}" + (f" (line {line})" if line else "")
    return name if short else f"{path}: {name}"


def _is_array(path):
    with contextlib.suppress(InputError, OSError):
        return compression.head(path).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return False
