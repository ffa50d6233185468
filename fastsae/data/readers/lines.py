"""The lines of a text in UTF-8, whatever ends them, with errors that name the line."""

import io
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from fastsae.data import file_kinds
from fastsae.data.compression import content, head
from fastsae.runtime.errors import InputError

LONGEST = 1 << 24  # characters of one text: more is a quote or a line that never ends


def text_lines(path: str, file: BinaryIO) -> Generator[str]:
    """Lines with their ends as they stand in the file: \\n, \\r\\n or \\r.

    InputError names the line that is not UTF-8, holds a NUL or is longer than LONGEST.
    """
    number = 0
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        while line := text.readline(LONGEST):
            number += 1
            if "\0" in line:
                if (beginning := head(path)).count(0) * 4 > len(beginning):  # UTF-16 or 32
                    raise file_kinds.not_utf8(path, beginning, number)
                raise InputError(
                    f"{path}:{number}: holds a NUL byte, which no text does. remove it, or convert "
                    "the file to UTF-8."
                )
            if len(line) == LONGEST and line[-1] not in "\r\n":
                raise InputError(
                    f"{path}:{number}: has a line of more than {LONGEST:,} characters. break it up."
                )
            yield line
    except UnicodeDecodeError as error:
        raise file_kinds.not_utf8(path, error.object, line_of_error(path)) from None
    finally:
        text.detach()  # the file is closed by who opened it


def line_of_error(path: Path | str) -> int:
    """The first line that is not UTF-8; which the decoder, far ahead of the reader, cannot say."""
    number = 1
    with content(path) as file:
        for line in file:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                break
            number += 1
    return number
