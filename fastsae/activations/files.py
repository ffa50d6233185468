"""Activations of stage 1 as other stages read them: one .npz or numbered shards, their rows mapped
rather than loaded."""

import json
import mmap
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.activations import compression, foreign
from fastsae.runtime.artifacts import CHUNK_BYTES, read_npz, refusing_damage
from fastsae.runtime.digests import Held
from fastsae.runtime.errors import EnvironmentFailure, InputError

MAKER = "extract_activations.py"
PER_EXAMPLE = ("seq_lengths", "example_ids")
PER_TOKEN = ("token_ids", "token_kind", "token_role")


def shard_path(path: Path | str, number: int, n_shards: int) -> Path:
    """Where shard `number` (from 1) of `n_shards` of the activations file `path` lies: `path`
    itself if there is only one."""
    path = Path(path)
    return (
        path
        if n_shards == 1
        else path.with_name(f"{path.stem}-{number:05}-of-{n_shards:05}{path.suffix}")
    )


def find_shards(path: Path | str) -> list[Path]:
    """The files that hold the activations of `path`, in order; [] if there are none, or not all."""
    path = Path(path)
    if path.is_file():
        return [path]
    # those that were set aside end in .old-1
    found = sorted(
        p
        for p in path.parent.glob(f"{path.stem}-*{path.suffix}")
        if re.fullmatch(r"\d+-of-\d+", p.stem.removeprefix(f"{path.stem}-"))
    )
    if not found:
        return []
    n = int(found[-1].stem.split("-")[-1])
    expected = [shard_path(path, i, n) for i in range(1, n + 1)]
    return expected if all(p.is_file() for p in expected) else []


def read_metadata(path: Path | str) -> dict[str, Any]:
    """The metadata of the activations file `path`, whole or in shards; all shards must be of one
    run."""
    from fastsae.runtime.artifacts import read_npz_metadata

    if foreign.is_foreign(path):
        return foreign.read_metadata(path)
    shards = find_shards(path)
    metadata = [read_npz_metadata(p) for p in shards or [Path(path)]]
    if len({m["fingerprint"] for m in metadata}) > 1 or any(
        m.get("n_shards", 1) != len(shards) for m in metadata if shards
    ):
        raise EnvironmentFailure(f"{path}: its shards are of different runs. run {MAKER} again.")
    return metadata[0]


def is_there(path: Path | str, fingerprint: str) -> bool:
    """Whether the file `path`, or all of its shards, is there with this fingerprint."""
    try:
        return bool(find_shards(path)) and read_metadata(path)["fingerprint"] == fingerprint
    except (InputError, EnvironmentFailure):  # replaced just now
        return False


def open_activations(path: Path | str) -> dict[str, Any]:
    """The members of an activations file as a dict, `activations` (n_tokens, d_model) mapped from
    the disk and never loaded whole; what is packed in 8 bits is float16 when it is indexed.

    Every byte is checked against its CRC once, here. Raises as `read_npz`.
    """
    if foreign.is_foreign(path):
        return foreign.open_activations(path)
    shards = find_shards(path)
    if not shards:
        raise InputError(f"{path}: not found. run {MAKER} first, or check --output-dir.")
    held = Held(shards)  # their members are read one after the other, and must be of one run
    metadata = read_metadata(path)
    small = [read_npz(p, [*PER_EXAMPLE, *PER_TOKEN], made_by=MAKER) for p in shards]
    data: dict[str, Any] = {
        name: np.concatenate([s[name] for s in small]) for name in (*PER_EXAMPLE, *PER_TOKEN)
    }
    rows = [_mapped_rows(p) for p in shards]
    held.require_unchanged()
    data["activations"] = rows[0] if len(rows) == 1 else ShardedRows(rows)
    data["metadata"] = np.array(json.dumps(metadata, ensure_ascii=False))
    if len(data["activations"]) != data["seq_lengths"].sum() or len(data["token_ids"]) != len(
        data["activations"]
    ):
        raise EnvironmentFailure(f"{path}: its members do not fit each other. run {MAKER}.")
    return data


def _mapped_rows(path):
    """The rows of one file, mapped; what packs them is read."""
    rows = map_member(path, "activations")
    if rows.dtype != np.int8:
        return rows
    return _packed(path, rows, read_npz(path, compression.MEMBERS, made_by=MAKER))


def rows_of(path: Path | str, members: Mapping[str, np.ndarray]) -> np.ndarray:
    """The rows (n_tokens, d_model) of a file of which all members were read, unpacked where they
    are in 8 bits. EnvironmentFailure if what packs them is not there, or not of them."""
    rows = members["activations"]
    if rows.dtype != np.int8:
        return rows
    return _packed(path, rows, members)[:]


def _packed(path, rows, members):
    with refusing_damage(path, MAKER):
        return compression.PackedRows(rows, members)


def map_member(path: Path | str, name: str) -> np.memmap:
    """An uncompressed member of an .npz as a read-only mapped array, after a CRC check of its bytes
    (numpy cannot: numpy#5976)."""
    with refusing_damage(path, MAKER):
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, fortran, dtype = read_header(member)
                in_member = member.tell()
                while member.read(CHUNK_BYTES):  # zipfile compares the CRC at the end
                    pass
            if dtype.hasobject or fortran or not dtype.isnative:
                raise ValueError(f"{name} is not a plain array of this machine's byte order")
            if info.file_size != in_member + dtype.itemsize * int(np.prod(shape)):
                raise ValueError(f"{name} has another size than its header says")
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            lengths = file.read(4)
        start = (
            info.header_offset
            + 30
            + int.from_bytes(lengths[:2], "little")
            + int.from_bytes(lengths[2:], "little")
        )
        return np.memmap(path, dtype, "r", start + in_member, shape)


def release(activations: Any) -> None:
    """Let the system take back the memory of mapped rows that were read: it would count as ours."""
    for part in getattr(activations, "parts", []):
        release(part)
    if isinstance(activations, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        activations._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined] # numpy keeps it to itself


class ShardedRows:
    """Rows of several mapped arrays under one numbering; indexing gives plain arrays in memory."""

    def __init__(self, parts: Sequence[np.ndarray | compression.PackedRows]) -> None:
        self.parts = parts
        self.starts = np.concatenate([[0], np.cumsum([len(p) for p in parts])])  # (n_shards + 1,)
        self.shape = (int(self.starts[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype
        self.ndim = parts[0].ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """A slice, a row number, an array of row numbers or a mask."""
        if isinstance(index, (int, np.integer)):
            return self[np.array([index])][0]
        rows = np.arange(len(self))[index] if isinstance(index, slice) else np.asarray(index)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        rows = np.where(rows < 0, rows + len(self), rows)
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"rows 0 to {len(self) - 1} exist")
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)  # (rows asked for, d_model)
        for i in np.unique(shard):
            here = shard == i
            out[here] = self.parts[i][rows[here] - self.starts[i]]
        return out
