"""JSON, one object a line; or one array, which is read whole."""

import contextlib
import json
from collections.abc import Iterator

from fastsae.data import file_kinds
from fastsae.data.compression import content
from fastsae.data.readers import Row, Source
from fastsae.runtime.errors import InputError


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Iterator[Row]]:
    """The rows, numbered by their lines, or by their places in an array."""
    with content(source.path, source.sha256) as file:
        yield _rows(source.path, file)


def _rows(path, file):
    is_array = None
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise file_kinds.not_utf8(path, error.object, number) from None
        if is_array is None and text.strip():
            is_array = text.lstrip()[0] == "["
            if is_array:
                yield from _array(text + _decoded(file.read(), path, number), path, number)
                return
        if text.strip():
            yield Row(number, _parsed(text))


def _decoded(data, path, lines_before):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = lines_before + 1 + data[: error.start].count(b"\n")
        raise file_kinds.not_utf8(path, data[error.start : error.start + 64], line) from None


def _array(text, path, first_line):
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno + first_line - 1}: bad JSON ({error.msg}, "
            f"column {error.colno}). correct the array."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:1: bad JSON ({error}). correct the array.") from None
    for number, item in enumerate(items, 1):
        yield Row(number, item)


def _parsed(line):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return ValueError(
            f"bad JSON ({error.msg}, column {error.colno}). each line must be one JSON object."
        )
    except (ValueError, RecursionError) as error:
        return ValueError(
            f"bad JSON ({str(error).split(';')[0]}). each line must be one JSON object."
        )
