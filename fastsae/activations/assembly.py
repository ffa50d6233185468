"""A layer's file, or its shards, while stage 1 works: each row is written where it will lie in the
end, so the disk needs room for the result once."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fastsae.activations.files import map_member, shard_path
from fastsae.runtime import artifacts, storage
from fastsae.runtime.errors import EnvironmentFailure, InputError

MEMBER = "activations"
MAKER = "extract_activations.py"


class RowMoves(Protocol):
    """Where rows of another order lie in the finished file (`planning.Moves`)."""

    def runs(self, first_row: int, n_rows: int) -> list[tuple[int, int]]:
        """[(first row in the file, number of rows)] of the given rows."""

    def rows_of_examples(self, first: int, last: int) -> np.ndarray:
        """(n,) the rows of a range of the file's examples in the order in which they come."""


class Assembly:
    """The unfinished files of one layer, under names that nobody reads, in the folder of an
    unfinished run.

    Several processes fill them at once, each its own rows. What is in place is known by the notes
    that are written afterwards (`extraction.extract_parts`), with the checksums of the rows, so the
    bytes are never read again to be finished.

    Args: path, where the result will lie; row_starts (n_shards + 1,), the first row of each shard
    and the number of rows; folder and plan, for the names of unfinished files; fingerprint, by
    which a finished one is known after a kill between two shards; moves, of rows that come in
    another order than that of the result, in which the arguments of all methods count then.
    """

    def __init__(
        self,
        path: Path,
        row_starts: Sequence[int],
        *,
        d_model: int,
        storage_dtype: str,
        folder: Path,
        plan: str,
        fingerprint: str,
        moves: RowMoves | None = None,
    ) -> None:
        self.path, self.moves = path, moves
        self.starts = np.asarray(row_starts, np.int64)
        self.d_model, self.dtype = d_model, np.dtype(storage_dtype)
        self.fingerprint = fingerprint
        n = len(self.starts) - 1
        self.targets = [shard_path(path, i, n) for i in range(1, n + 1)]
        self.growing = [folder / f"rows-{plan}-{target.name}" for target in self.targets]
        self._finished: dict[int, bool] = {}

    def pieces(self, first_row: int, n_rows: int) -> list[tuple[int, int, int]]:
        """[(shard, first row in it, number of rows)] that the given rows are spread over."""
        if self.moves is None:
            return self._neighbours(first_row, n_rows)
        return [
            piece for run in self.moves.runs(first_row, n_rows) for piece in self._neighbours(*run)
        ]

    def _neighbours(self, first_row, n_rows):
        """`pieces` of rows that are neighbours in the result."""
        found, end = [], first_row + n_rows
        first_shard = int(np.searchsorted(self.starts, first_row, side="right")) - 1
        for shard in range(first_shard, len(self.targets)):
            a, b = max(first_row, int(self.starts[shard])), min(end, int(self.starts[shard + 1]))
            if a >= end:
                break
            found.append((shard, a - int(self.starts[shard]), b - a))
        return found

    def place(self, first_row: int, rows: np.ndarray) -> list[int]:
        """Write rows (n, d_model), of which the first is `first_row` of the result; returns the
        CRC-32 of each piece. They are on the disk afterwards."""
        rows = np.ascontiguousarray(rows, self.dtype)
        checksums, at = [], 0
        by_shard: dict[int, list[tuple[int, memoryview]]] = {}  # (place in the file, content)
        for shard, row, n in self.pieces(first_row, len(rows)):
            content = rows[at : at + n].reshape(-1).view(np.uint8).data
            at += n
            checksums.append(zlib.crc32(content))
            by_shard.setdefault(shard, []).append((self._offset(shard, row), content))
        for shard, contents in by_shard.items():
            if not self._is_finished(shard):
                with storage.growing(self.growing[shard]) as file:
                    for offset, content in contents:
                        file.seek(offset)
                        file.write(content)
        return checksums

    def holds(self, first_row: int, n_rows: int) -> bool:
        """Whether there is a file, unfinished or finished, with room for these rows in it."""
        ends: dict[int, int] = {}  # rows of each shard that there must be room for
        for shard, row, n in self.pieces(first_row, n_rows):
            ends[shard] = max(ends.get(shard, 0), row + n)
        return all(
            self._is_finished(shard)
            or (
                self.growing[shard].is_file()
                and self.growing[shard].stat().st_size >= self._offset(shard, end)
            )
            for shard, end in ends.items()
        )

    def finish(self, shard: int, checksum: int, others: Mapping[str, np.ndarray]) -> Path:
        """Add the members after the rows and give the file its name; what lay there is kept aside.

        checksum: of all rows of the shard.
        """
        target = self.targets[shard]
        if self._is_finished(shard):  # by a run that was killed afterwards
            return target
        shape = (int(self.starts[shard + 1] - self.starts[shard]), self.d_model)
        with storage.growing(self.growing[shard]) as file:
            artifacts.complete_npz(file, (MEMBER, shape, self.dtype.name, checksum), others)
        storage.put_in_place(self.growing[shard], target, keep_old=True)
        self._finished[shard] = True
        return target

    def checksums(self, placed: Sequence[tuple[int, int, Sequence[int]]]) -> list[int]:
        """The CRC-32 of each shard's rows from (first row, number of rows, CRC-32 of each piece) of
        all that was placed."""
        pieces = [
            (*piece, int(checksum))
            for first_row, n_rows, checksums in placed
            for piece, checksum in zip(self.pieces(first_row, n_rows), checksums, strict=True)
        ]
        total = [0] * len(self.targets)
        for shard, _, n, checksum in sorted(pieces):
            n_bytes = n * self.d_model * self.dtype.itemsize
            total[shard] = artifacts.joined_crc32(total[shard], checksum, n_bytes)
        return total

    def _offset(self, shard: int, row: int) -> int:
        shape = (int(self.starts[shard + 1] - self.starts[shard]), self.d_model)
        start = artifacts.first_member_start(MEMBER, shape, self.dtype.name)
        return start + row * self.d_model * self.dtype.itemsize

    def _is_finished(self, shard: int) -> bool:
        """Whether a run that was killed afterwards gave this shard its name."""
        if shard not in self._finished:
            self._finished[shard] = not self.growing[shard].exists() and self._is_this(shard)
        return self._finished[shard]

    def _is_this(self, shard: int) -> bool:
        """Whether the file under the final name is this one, and every byte of it as it was."""
        try:
            found = artifacts.read_npz_metadata(self.targets[shard], made_by=MAKER)
            map_member(self.targets[shard], MEMBER)
        except (InputError, EnvironmentFailure):
            return False
        place = (found.get("shard"), found.get("n_shards"))
        return found["fingerprint"] == self.fingerprint and place == (shard + 1, len(self.targets))
