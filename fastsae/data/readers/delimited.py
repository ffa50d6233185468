"""Tables of separated values (CSV, TSV): a header with names, then a row for each example.

Quoting is as spreadsheets and pandas write it: a cell that holds the separator, a quote or a line
end stands in quotes, a quote in it is doubled. A cell is its text as it stands: `007` stays `007`.
"""

import contextlib
import csv
import json
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from fastsae.data.compression import content
from fastsae.data.readers import Row, Source
from fastsae.data.readers.lines import LONGEST, text_lines
from fastsae.data.rows import shown
from fastsae.runtime.errors import InputError
from fastsae.settings import dataset_names

HEADER_LINES = 64  # at most, of a header whose names hold line ends
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Iterator[Row]]:
    """The rows with the columns that are asked for; numbered from 1 after the header, empty lines
    not counted, as pandas does."""
    with (
        content(source.path, source.sha256) as file,
        contextlib.closing(text_lines(source.path, file)) as lines,
        _long_cells(),
    ):
        yield _rows(source, lines)


@contextlib.contextmanager
def _long_cells():
    """csv takes cells up to 131,072 characters unless set otherwise, for the whole process."""
    before = csv.field_size_limit(min(LONGEST, sys.maxsize))
    try:
        yield
    finally:
        csv.field_size_limit(before)


class Header(NamedTuple):
    """How a table is read: what separates its cells, its columns, and where the fields that are
    asked for stand, {field: column}."""

    separator: str
    names: list[str]
    wanted: dict[str, int]


def _rows(source, lines):
    header = None
    numbered = _Counted(lines)
    first = next((line for line in numbered if line.strip()), None)
    if first is None:
        return
    _refuse_json(source.path, first)
    header = _header(source, first, numbered)
    reader = csv.reader(numbered, delimiter=header.separator, strict=True)
    number = 0
    while True:
        begins = numbered.n + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _bad_quotes(source.path, number + 1, begins, error, header.separator) from None
        if cells:
            number += 1
            yield Row(number, _fields(cells, header), begins)


class _Counted:
    """Lines, and how many of them were taken."""

    def __init__(self, lines):
        self.lines, self.n = lines, 0

    def __iter__(self):
        return self

    def __next__(self):
        line = next(self.lines)
        self.n += 1
        return line


def _header(source, first, more):
    """The Header by the first line, which goes on in `more` where a quote is open.

    What separates the cells is the first of SEPARATORS, that of the file's name before others, by
    which the line names TEXT_FIELD.
    """
    own = "\t" if dataset_names.ending(source.path) in dataset_names.TSV else ","
    lines = [first]
    while True:
        tried, is_open = _parsed(lines, dict.fromkeys((own, *SEPARATORS)))
        for separator, names in tried.items():
            if (column := _column(names, source.text_field)) is not None:
                wanted = {source.text_field: column}
                label = _column(names, source.label_field)
                wanted |= {} if label is None else {source.label_field: label}
                _refuse_doubles(source, names, wanted)
                return Header(separator, names, wanted)
        if not is_open or len(lines) == HEADER_LINES or (line := next(more, None)) is None:
            break
        lines.append(line)
    names = max(tried.values(), key=len, default=[first.strip()])
    listed = ", ".join(shown(name) for name in names[:8])
    raise InputError(
        f"{source.path}:1: has no column {shown(source.text_field)} (its first line: {listed}). "
        "name the column of the texts with --text-field, or write a first line with the columns' "
        "names."
    )


def _parsed(lines, separators):
    """({separator: cells of the first row}, whether a quote is still open by one of them)."""
    tried, is_open = {}, False
    for separator in separators:
        try:
            tried[separator] = next(csv.reader(lines, delimiter=separator, strict=True))
        except csv.Error as error:
            is_open |= "end of data" in str(error)
    return tried, is_open


def _column(names, field):
    """Where a column stands: by its name, or by that less the spaces around it. None: nowhere."""
    for known in (names, [name.strip() for name in names]):
        if field in known:
            return known.index(field)
    return None


def _refuse_doubles(source, names, wanted):
    for name, column in wanted.items():
        if names.count(names[column]) > 1:
            raise InputError(
                f"{source.path}:1: has several columns {shown(name)}. give them different names."
            )


def _fields(cells, header):
    """The fields asked for, or a ValueError for a row of another length."""
    if len(cells) != len(header.names):
        return ValueError(
            f"has {len(cells)} cells, the header {len(header.names)}. put cells that hold "
            f"{SEPARATORS[header.separator]} or line ends in quotes, or remove the row."
        )
    return {name: cells[column] for name, column in header.wanted.items()}


def _bad_quotes(path, number, line, error, separator):
    what = str(error)
    if "field larger" in what:
        what = f"a cell of more than {LONGEST:,} characters; perhaps a quote is never closed"
    elif "end of data" in what:
        what = "a quote is opened and never closed"
    return InputError(
        f"{path}: row {number} (line {line}): bad quotes ({shown(what, 80)}). put a cell that "
        f"holds quotes, {SEPARATORS[separator]} or line ends in quotes, and double those in it."
    )


def _refuse_json(path, first):
    try:
        is_json = isinstance(json.loads(first), dict | list)
    except (ValueError, RecursionError):
        is_json = re.match(r'\s*(\[\s*(\{|\[|"|$)|\{\s*("|$))', first) is not None
    if is_json:
        raise InputError(f"{path}: is JSON, not a table. give it a name that ends in .jsonl.")
