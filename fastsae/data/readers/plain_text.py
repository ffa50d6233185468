"""A plain text as examples: a text a line, or a text a paragraph.

TEXT_FIELD `line` or `paragraph` says which. Otherwise the file's beginning does: paragraphs, where
at least every twentieth of its first lines is an empty one between texts, and lines elsewhere.
"""

import contextlib
import json
import re
from collections.abc import Iterator

from fastsae.data import compression
from fastsae.data.compression import content
from fastsae.data.readers import Row, Source
from fastsae.data.readers.lines import LONGEST, text_lines
from fastsae.runtime.errors import InputError
from fastsae.settings.dataset_names import SAMPLE_BY, TEXT

LINES_A_GAP = 20  # of a text in paragraphs, at most so many lines for each empty one


def sample_by(path: str, text_field: str = TEXT) -> str:
    """line or paragraph: what an example is. InputError for another TEXT_FIELD than these."""
    if text_field in SAMPLE_BY:
        return text_field
    if text_field != TEXT:
        raise InputError(
            f"TEXT_FIELD: a .txt has no field {text_field!r}. set --text-field line or paragraph, "
            "or leave it out."
        )
    head = compression.head(path).decode("utf-8-sig", errors="ignore")
    lines = [bool(line.strip()) for line in re.split("\r\n?|\n", head.strip())]
    n_gaps = sum(not one and other for one, other in zip(lines, lines[1:]))
    return "paragraph" if n_gaps * LINES_A_GAP >= len(lines) > 0 < n_gaps else "line"


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Iterator[Row]]:
    """The texts, numbered by the lines where they begin."""
    by = sample_by(source.path, source.text_field)
    with (
        content(source.path, source.sha256) as file,
        contextlib.closing(text_lines(source.path, file)) as lines,
    ):
        yield _numbered(
            source, _paragraphs(source.path, lines) if by == "paragraph" else _lines(lines)
        )


def _numbered(source, texts):
    for n, (number, text) in enumerate(texts):
        if n == 0:
            _refuse_json(source.path, text)
        yield Row(number, {source.text_field: text})


def _lines(lines):
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line.rstrip("\r\n")


def _paragraphs(path, lines):
    """Lines up to an empty one, joined as they stand."""
    found: list[str] = []
    begins = size = 0
    for number, line in enumerate(lines, 1):
        if line.strip():
            begins = begins if found else number
            found.append(line.rstrip("\r\n"))
            size += len(line)
            if size > LONGEST:
                raise InputError(
                    f"{path}:{begins}: begins a paragraph of more than {LONGEST:,} characters. "
                    "break it up, or set --text-field line."
                )
        elif found:
            yield begins, "\n".join(found)
            found, size = [], 0
    if found:
        yield begins, "\n".join(found)


def _refuse_json(path, first):
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(first.split("\n", 1)[0]), dict):
            raise InputError(
                f"{path}: is JSON, not plain text. give it a name that ends in .jsonl."
            )
