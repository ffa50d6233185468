"""What files hold: digests of their whole content, remembered for large ones, and files that must
not change meanwhile.

A remembered digest counts as long as size, inode, time of change and time of the last change of the
inode (ctime, which no program can set back) are the same. It lies in a folder of the cache, so a
second look at gigabytes takes no time.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from fastsae.runtime import storage
from fastsae.runtime.artifacts import file_sha256
from fastsae.runtime.errors import EnvironmentFailure

REMEMBERED_FROM = 1 << 24  # bytes; smaller files are read each time
# seconds without a change before a digest is remembered: the coarsest clock of a file system
SETTLED = 2.0


def state_of(path: Path | str) -> list[int]:
    """What changes whenever the content of a file does: size, inode, mtime and ctime in ns. OSError
    if there is none."""
    found = os.stat(path)
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def content_sha256(path: Path | str, memory: Path) -> str:
    """sha256 (hex) of a file; that of a large one is remembered in the folder `memory` while its
    state stays the same."""
    path = Path(path).resolve()
    began, state = time.time(), state_of(path)
    note = memory / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    large = state[0] >= REMEMBERED_FROM
    if large and (digest := _remembered(note, state)):
        return digest
    digest = file_sha256(path)
    if state_of(path) != state:
        raise _replaced(path)
    if large and began - state[3] / 1e9 > SETTLED:
        # a cache that takes no files: it is read again next time
        with contextlib.suppress(OSError):
            storage.write_json(note, {"state": state, "sha256": digest})
    return digest


def _remembered(note, state):
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        known = found["state"] == state and re.fullmatch("[0-9a-f]{64}", found["sha256"])
        return found["sha256"] if known else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


class Held:
    """Files as they are when this is made. `require_unchanged` is for after they were read, to know
    that all was of one time."""

    def __init__(self, paths: Iterable[Path | str]) -> None:
        self.states = {Path(path): _state_or_none(path) for path in paths}

    def require_unchanged(self) -> None:
        """EnvironmentFailure if a file was replaced, edited or removed since, even by what had been
        there before."""
        for path, state in self.states.items():
            if _state_or_none(path) != state:
                raise _replaced(path)


class _Hashed(io.RawIOBase):
    """A file opened for reading, and the digest of what was read of it."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def readable(self):
        return True

    def readinto(self, buffer):
        n = self.file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:n])
        return n


@contextlib.contextmanager
def reading(path: Path | str, sha256: str | None = None) -> Iterator[BinaryIO]:
    """The file, opened for reading its bytes. EnvironmentFailure at the end of the `with` block if
    they have another digest.

    What the block left unread is read for that; a block that raises is not held up.
    """
    with open(path, "rb", buffering=0) as file:
        hashed = _Hashed(file)
        reader = io.BufferedReader(hashed, 1 << 16)
        yield reader
        if sha256 is not None:
            while reader.read(1 << 20):
                pass
            if hashed.digest.hexdigest() != sha256:
                raise _replaced(path)


def _state_or_none(path):
    try:
        return state_of(path)
    except FileNotFoundError:
        return None


def _replaced(path):
    return EnvironmentFailure(f"{path}: was replaced or changed while this run read it. run again.")
