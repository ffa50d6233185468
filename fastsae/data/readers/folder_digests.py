"""What decides the content of a dataset of several files: their names, their order and their
bytes."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from fastsae.runtime.artifacts import file_sha256
from fastsae.runtime.digests import Held
from fastsae.runtime.errors import EnvironmentFailure
from fastsae.settings import folders


def files_of(path: Path | str) -> list[Path]:
    """The files that a dataset is read from, in their order: itself, if it is no folder."""
    if not os.path.isdir(path):
        return [Path(path)]
    return [Path(path) / name for name in folders.data_files(path)]


def dataset_sha256(path: Path | str) -> str:
    """sha256 (hex) of a file; of a folder, that of its files' names and digests."""
    if not os.path.isdir(path):
        return file_sha256(path)
    names = [os.fsencode(file.relative_to(path)).hex() for file in files_of(path)]
    found = [[name, file_sha256(file)] for name, file in zip(names, files_of(path))]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


@contextlib.contextmanager
def unchanged(path: Path | str, sha256: str | None) -> Iterator[None]:
    """EnvironmentFailure if a dataset has not the content `sha256`, or is changed in this block.

    For what is not read from its beginning to its end, whose bytes cannot be hashed on the way.
    """
    if sha256 is None:
        yield
        return
    held = Held(files_of(path))
    if dataset_sha256(path) != sha256:
        raise EnvironmentFailure(
            f"{path}: was replaced or changed while this run read it. run again."
        )
    yield
    held.require_unchanged()
