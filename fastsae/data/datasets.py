"""Datasets: their examples one at a time, whatever they lie in (`readers`); and deduplication."""

import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.data import file_kinds, readers
from fastsae.data.compression import content, head
from fastsae.data.readers import Source, place
from fastsae.data.readers.folder_digests import dataset_sha256
from fastsae.data.readers.lines import line_of_error
from fastsae.data.rows import Example, example_of
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.settings.dataset_names import HUB

__all__ = ["Deduplicator", "Example", "identity", "place", "read_dataset", "stream_examples"]

MAX_REPORTED = 10  # kinds of bad rows
MAX_BAD_ROWS = 1000  # read in order to count them
PIECE_CHARACTERS = 1 << 16  # of a plain text, tokenised at a time
GRAMS_AT_ONCE = 1 << 13  # n-grams hashed at a time


def read_dataset(
    path: Path | str, *, only_lines: Iterable[int] | None = None, **how: Any
) -> list[Example]:
    """A list of the examples that `stream_examples` yields, or of those with the given line
    numbers."""
    if only_lines is None:
        return list(stream_examples(path, **how))
    wanted = set(map(int, only_lines))
    last = max(wanted, default=0)
    return [
        example
        for example in stream_examples(path, last_line=last, **how)
        if example.line in wanted
    ]


def stream_examples(
    path: Path | str, *, sha256: str | None = None, **how: Any
) -> Iterator[Example]:
    """Yield the examples of a dataset in order. Raises InputError naming file and line for up to
    ten bad rows, at the end.

    how: `text_field`, `label_field`, `max_examples`, `last_line`. EnvironmentFailure if what was
    read has not the content `sha256`, where that is given: it was replaced since it was looked at.
    """
    fields = {name: how.pop(name) for name in ("text_field", "label_field") if name in how}
    source = Source(str(path), sha256, **fields)
    with readers.opened(source) as rows:
        yield from _examples(source, rows, **how)


def _examples(source, rows, *, max_examples=None, last_line=math.inf):
    """The examples that rows (`readers.Row`) hold."""
    n, bad = 0, BadRows(source.path)
    for number, row, line in rows:
        if number > last_line:
            return
        if max_examples is not None and n >= max_examples:
            break
        try:
            if isinstance(row, ValueError):
                raise row
            example = example_of(number, row, source.text_field, source.label_field)
        except ValueError as error:
            bad.add(number, str(error), line)
            if bad.enough():
                break
            continue
        n += 1
        yield example
    if bad.kinds:
        if not n and readers.format_of(source.path) == "json":
            file_kinds.refuse_shape(source.path)
        raise InputError(*bad.lines())
    require_two(n, source.path)


class BadRows:
    """What is wrong with rows, a line for each kind: its first row, and how many there are."""

    def __init__(self, path: Path | str) -> None:
        self.path, self.kinds, self.n = path, {}, 0

    def add(self, number: int, message: str, line: int | None = None) -> None:
        """Count a bad row: its number, `what. remedy.`, and its line if that is not its number."""
        kind = re.sub(r"\([^)]*\)|'[^']*'|\[\d+\]|\d+", "", message)
        found = self.kinds.setdefault(kind, [(number, line), message, 0, (number, line)])
        found[2:] = found[2] + 1, (number, line)
        self.n += 1

    def enough(self) -> bool:
        """Whether there are so many that no more need be read."""
        return len(self.kinds) > MAX_REPORTED or self.n >= MAX_BAD_ROWS

    def lines(self) -> list[str]:
        """`file:line: what (and so many more). remedy.`"""
        lines = []
        for first, message, n_rows, last in list(self.kinds.values())[:MAX_REPORTED]:
            what, _, remedy = message.partition(". ")
            least = "at least " if self.enough() else ""
            more = (
                f" (and {least}{n_rows - 1} more like it, the last "
                f"{place(self.path, *last, short=True)})"
                if n_rows > 1
                else ""
            )
            lines.append(f"{place(self.path, *first)}: {what}{more}. {remedy}")
        return lines + [f"{self.path}: more bad rows follow. fix these first."] * (
            len(self.kinds) > MAX_REPORTED
        )


def require_two(n: int, path: Path | str) -> None:
    """InputError unless there is an example to train on and one to validate."""
    if n < 2:
        raise InputError(
            f"{path}: has {n} example{'s' * (n != 1)}. at least 2 are needed, "
            "one to train on and one to validate."
        )


def stream_text(path: Path | str, sha256: str | None = None) -> Iterator[Example]:
    """Yield pieces of a plain UTF-8 text as examples, cut at line ends; `line` counts the pieces.
    sha256: as `stream_examples`."""
    file_kinds.refuse_foreign(path, head(path), "text")
    piece, size, n = [], 0, 0
    try:
        with content(path, sha256) as raw:
            file = io.TextIOWrapper(raw, encoding="utf-8-sig")
            while line := file.readline(PIECE_CHARACTERS):
                piece.append(line)
                size += len(line)
                if size >= PIECE_CHARACTERS:
                    n += 1
                    yield Example(n, [{"role": "user", "content": "".join(piece)}], is_text=True)
                    piece, size = [], 0
            file.detach()
    except UnicodeDecodeError as error:
        raise file_kinds.not_utf8(path, error.object, line_of_error(path)) from None
    if size:
        yield Example(n + 1, [{"role": "user", "content": "".join(piece)}], is_text=True)


def identity(path: Path | str) -> tuple[str, Path | str]:
    """(what decides a dataset's content, as text; the path to read it by, a hub dataset's revision
    pinned). InputError, before anything is read, for what is no dataset."""
    if readers.format_of(path) == "hub":
        from fastsae.data.readers.hub import pinned

        found = pinned(str(path))
        return found, found
    return dataset_sha256(path), path


def require_same(path: Path | str, sha256: str) -> None:
    """EnvironmentFailure if a dataset is not the one whose content `identity` gave; one of the hub
    is pinned."""
    if not str(path).startswith(HUB) and dataset_sha256(path) != sha256:
        raise EnvironmentFailure(
            f"{path}: was replaced or changed while this run read it. run again."
        )


class Deduplicator:
    """Says whether an example shares `n` words in a row with one that it let pass before (FAST
    drops such examples; n = 20).

    Remembers 64-bit hashes, 8 bytes a word, in sorted runs that double in length; so two different
    n-grams are taken for one with a chance of about 1e-11 a look-up among a hundred million.
    """

    def __init__(self, n: int) -> None:
        self.n, self.runs, self.n_dropped = n, [], 0
        # (n,) wraps around, as is meant
        self.powers = np.cumprod(np.full(n, 0x9E3779B97F4A7C15, np.uint64))

    def is_new(self, example: Example) -> bool:
        """Whether no earlier example shares n words in a row with this one, which is then kept."""
        grams = self._grams(" ".join(message["content"] for message in example.messages).lower())
        if not len(grams):
            return True
        for run in self.runs:
            if (run[np.minimum(np.searchsorted(run, grams), len(run) - 1)] == grams).any():
                self.n_dropped += 1
                return False
        self.runs.append(grams)
        while len(self.runs) > 1 and len(self.runs[-2]) <= 2 * len(self.runs[-1]):
            self.runs[-2:] = [np.sort(np.concatenate(self.runs[-2:]), kind="stable")]
        return True

    def _grams(self, text):
        """Sorted hashes of the n-grams of a text; so many at a time that a long text takes little
        memory besides."""
        words = (match.group() for match in re.finditer(r"\S+", text))
        found, rest = [], np.zeros(0, np.uint64)
        while hashed := [
            blake2b(word.encode(), digest_size=8).digest()
            for word in itertools.islice(words, GRAMS_AT_ONCE)
        ]:
            word = np.concatenate([rest, np.frombuffer(b"".join(hashed), "<u8")])
            if len(word) >= self.n:
                found.append(
                    np.unique(
                        (np.lib.stride_tricks.sliding_window_view(word, self.n) * self.powers).sum(
                            1, dtype=np.uint64
                        )
                    )
                )
            rest = word[max(0, len(word) - self.n + 1) :]
        return np.unique(np.concatenate(found)) if found else rest[:0]
