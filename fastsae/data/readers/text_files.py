"""A folder of .txt files: each is one example."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fastsae.data.compression import content
from fastsae.data.readers import Row, Source
from fastsae.data.readers.folder_digests import unchanged
from fastsae.data.readers.lines import LONGEST, text_lines
from fastsae.settings.folders import text_files


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Iterator[Row]]:
    """The files' texts in the order of their names, numbered from 1."""
    with unchanged(source.path, source.sha256):
        yield _rows(source)


def _rows(source):
    for number, name in enumerate(text_files(source.path), 1):
        path = Path(source.path) / name
        with content(path) as file, contextlib.closing(text_lines(str(path), file)) as lines:
            text, size = [], 0
            for line in lines:
                text.append(line)
                size += len(line)
                if size > LONGEST:
                    break
        if size > LONGEST:
            yield Row(
                number, ValueError(f"has more than {LONGEST:,} characters. cut it into several.")
            )
        else:
            yield Row(number, {source.text_field: "".join(text).strip("\r\n")})
