"""Activations that another program wrote: an array (n, d) in a .npy or .npz, every row an example,
with no texts and no tokens. Read where it lies, never loaded whole and never unpickled.

An .npz can hold `groups` (n,) beside it: rows of one group go to one part of the split. Of several
arrays one is named: `file.npz:name`.
"""

import contextlib
import functools
import os
import re
import tokenize
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.runtime import artifacts
from fastsae.runtime.artifacts import CHUNK_BYTES, file_sha256
from fastsae.runtime.digests import state_of
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.settings.values import foreign_file

# besides DAMAGE, what numpy raises for a header that makes no sense
OF_HEADERS = (TypeError, KeyError, SyntaxError, tokenize.TokenError, UserWarning)
GROUPS = ("groups", "group")
IN_MEMORY = 1 << 30  # bytes of a compressed array, which cannot be read in place
OF_STAGE_1 = r"activations_layer\d+[^/]*\.npz$"  # how its files are called
REMEDY = "save it with numpy.save or numpy.savez as an array (rows, width) of float32"


class ForeignRows:
    """The rows (n, d) of somebody's array; indexing gives float16 as it is and other floats as
    float32. `parts`: what is mapped."""

    def __init__(self, rows: np.ndarray, *, bfloat16: bool) -> None:
        self.parts, self.bfloat16 = [rows], bfloat16
        self.shape, self.ndim = rows.shape, 2
        self.dtype = np.dtype(np.float16 if rows.dtype == np.float16 else np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """A slice, a row number, an array of row numbers or a mask."""
        found = np.asarray(self.parts[0][index])
        if self.bfloat16:  # the upper half of a float32
            return (found.astype("<u2").astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # infinity is refused by who reads
            return found.astype(self.dtype, copy=False)


def is_foreign(path: Path | str) -> bool:
    """Whether this names an array of another program rather than a file of stage 1.

    Where stage 1 writes, nothing else is meant. Of an archive that is damaged or none at all the
    name decides: only stage 1 calls its files activations_layer12.npz.
    """
    file, member = foreign_file(str(path))
    if file.endswith(".npy") or member:
        return True
    if re.search(rf"(^|/)activations/{OF_STAGE_1}", file):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            names = set(archive.namelist())
    except artifacts.DAMAGE as error:  # is said by who reads it
        return not (artifacts.is_of_machine(error) or re.search(rf"(^|/){OF_STAGE_1}", file))
    return not {"metadata.npy", "seq_lengths.npy"} & names


def read_metadata(path: Path | str) -> dict[str, Any]:
    """Metadata in the form of stage 1's, of an array whose model, layer and texts are not known."""
    file, _ = foreign_file(str(path))
    digest = _digest(file, tuple(_state(file)))
    rows, _ = _arrays(path)
    return artifacts.new_metadata(
        "activations",
        {"LAYER_IDX": None, "ARRAY": _shown_member(path)},
        {"dataset": digest, "model": None},
        model_name=None,
        model_revision=None,
        dataset_path=str(path),
        foreign=True,
        n_examples=len(rows),
        n_tokens=len(rows),
        d_model=rows.shape[1],
    )


def open_activations(path: Path | str) -> dict[str, Any]:
    """The members that a file of stage 1 has, for an array: every row an example of one token.

    Besides `groups` (n,), numbers from 0: rows of one number belong together. Raises InputError
    for what is no array (n, d) of floats, EnvironmentFailure where the file is damaged.
    """
    metadata = read_metadata(path)
    rows, groups = _arrays(path)
    n = len(rows)
    return {
        "activations": rows,
        "seq_lengths": np.ones(n, np.int32),
        "example_ids": np.arange(1, n + 1, dtype=np.int32),
        "token_ids": np.zeros(n, np.int32),
        "token_kind": np.zeros(n, np.uint8),
        "token_role": np.zeros(n, np.uint8),
        "groups": np.arange(n) if groups is None else groups,
        "metadata": np.array(artifacts.to_json(metadata)),
    }


@functools.lru_cache(8)
def _digest(file, state):
    """Of the file in that state, so that it is read once in a run."""
    digest = file_sha256(file)
    if tuple(_state(file)) != state:
        raise EnvironmentFailure(
            f"{file}: was replaced or changed while this run read it. run again."
        )
    return digest


def _state(file):
    try:
        return state_of(file)
    except FileNotFoundError:
        raise InputError(f"ACTIVATIONS_PATH: {file} is not a file. give a .npy or .npz.") from None


def _shown_member(path):
    return foreign_file(str(path))[1]


def _arrays(path):
    """(ForeignRows, numbers of the groups or None)."""
    file, member = foreign_file(str(path))
    with _damage_named(file):
        if file.endswith(".npy"):
            with open(file, "rb") as opened:
                shape, fortran, dtype = _header(opened)
                start = opened.tell()
            _require_rows(file, shape, fortran, dtype)
            if os.path.getsize(file) != start + dtype.itemsize * shape[0] * shape[1]:
                raise ValueError("has another size than its header says")
            return _as_rows(file, np.memmap(file, dtype, "r", start, shape)), None
        with zipfile.ZipFile(file) as archive:
            return _of_archive(file, member, archive)


@contextlib.contextmanager
def _damage_named(file):
    """Whatever reading a damaged array raises as one line; errors of the machine pass."""
    try:
        with warnings.catch_warnings():  # of a header that only Python 2 or damage writes
            warnings.simplefilter("error", UserWarning)
            yield
    except (*artifacts.DAMAGE, *OF_HEADERS) as error:
        if artifacts.is_of_machine(error):
            raise
        what = (str(error) or type(error).__name__).splitlines()[0][:150]
        raise InputError(
            f"{file}: cannot be read as an array ({_printable(what).rstrip('.')}). "
            f"copy it again, or {REMEDY}."
        ) from None


def _of_archive(file, member, archive):
    headers = {}
    for name in archive.namelist():
        if name.endswith(".npy"):
            with archive.open(name) as opened:
                headers[name.removesuffix(".npy")] = _header(opened)
    chosen = member or _only_rows(file, headers)
    if chosen not in headers:
        listed = ", ".join(_described(name, *header) for name, header in headers.items())
        raise InputError(f"{file}: has no array {_printable(chosen)}. it has: {listed[:300]}.")
    shape, fortran, dtype = headers[chosen]
    _require_rows(f"{file}:{chosen}", shape, fortran, dtype)
    rows = _as_rows(file, _member(file, archive, f"{chosen}.npy"))
    groups = next((name for name in GROUPS if name in headers and name != chosen), None)
    if groups is None:
        return rows, None
    shape, _, dtype = headers[groups]
    if shape != (len(rows),) or dtype.hasobject:
        raise InputError(
            f"{file}: its {groups} are {_described('', *headers[groups]).strip()}. give a number "
            f"or a short text for each of the {len(rows):,} rows, or take them out."
        )
    with archive.open(f"{groups}.npy") as opened:
        values = np.lib.format.read_array(opened, allow_pickle=False)
    return rows, np.unique(values, return_inverse=True)[1]


def _only_rows(file, headers):
    """The name of the one array (n, d) of floats; InputError where there are more or none."""
    found = [
        name
        for name, (shape, _, dtype) in headers.items()
        if len(shape) == 2 and (dtype.kind == "f" or _is_bfloat16(dtype)) and name not in GROUPS
    ]
    others = [name for name in headers if name not in GROUPS]
    if len(found) == 1 or (not found and len(others) == 1):
        return (found or others)[0]
    listed = ", ".join(_described(name, *header) for name, header in headers.items())
    if not found:
        raise InputError(
            f"{file}: holds no array (rows, width) of floats: {listed[:300]}. {REMEDY}."
        )
    raise InputError(
        f"{file}: holds several arrays: {listed[:300]}. name one: --activations-path "
        f"{file}:{_printable(found[0])}."
    )


def _member(file, archive, name):
    """An array of an .npz: mapped where it lies, or if it is compressed and small, read. Its CRC is
    compared in either case."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        if info.file_size > IN_MEMORY:
            raise InputError(
                f"{file}: is compressed, and so cannot be read in place. save it with numpy.savez "
                "instead of numpy.savez_compressed."
            )
        with archive.open(info) as opened:
            return np.lib.format.read_array(opened, allow_pickle=False)
    with archive.open(info) as opened:
        shape, _, dtype = _header(opened)
        in_member = opened.tell()
        while opened.read(CHUNK_BYTES):  # zipfile compares the CRC at the end
            pass
    if info.file_size != in_member + dtype.itemsize * shape[0] * shape[1]:
        raise ValueError("has another size than its header says")
    with open(file, "rb") as opened:
        opened.seek(info.header_offset + 26)
        lengths = opened.read(4)
    start = info.header_offset + 30
    start += int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return np.memmap(file, dtype, "r", start + in_member, shape)


def _header(opened):
    """(shape, whether it is stored column by column, dtype) of a .npy. ValueError if it is none."""
    version = np.lib.format.read_magic(opened)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format")
    return read(opened)


def _is_bfloat16(dtype):
    """numpy has none: they are saved as two bytes of no type, or as their bits."""
    return dtype in (np.dtype("V2"), np.dtype("u2"))


def _require_rows(where, shape, fortran, dtype):
    """InputError unless these are rows of floats, one after the other."""
    what, remedy = None, REMEDY
    if dtype.hasobject:
        what = "holds Python objects, which are never unpickled"
    elif len(shape) == 3:
        what = f"has three dimensions {shape}"
        remedy = "join the tokens of all examples: x.reshape(-1, x.shape[-1]), less the padding"
    elif len(shape) != 2:
        what = f"has the shape {shape}"
    elif dtype.kind != "f" and not _is_bfloat16(dtype):
        what = f"holds {_printable(str(dtype))[:60]}, not floats"
    elif dtype.kind == "f" and dtype.itemsize > 8:
        what = f"holds {dtype}"
    elif shape[0] < 2 or shape[1] < 2:
        what = f"has the shape {shape}: at least two rows and two columns are needed"
    elif fortran:
        what = "is stored column by column (Fortran's order)"
        remedy = "save numpy.ascontiguousarray(x)"
    if what:
        raise InputError(f"{where}: {what}. {remedy}.")


def _as_rows(file, rows):
    """ForeignRows; two-byte values without a float's type are taken for bfloat16 where they are
    numbers as activations can be."""
    bfloat16 = _is_bfloat16(rows.dtype)
    if bfloat16:
        found = ForeignRows(rows.view("<u2"), bfloat16=True)
        some = np.abs(found[:: max(1, len(found) // 256)])
        if not (np.isfinite(some).all() and 1e-8 < np.median(some) < 1e6):
            raise InputError(
                f"{file}: holds {rows.dtype}, whose bits are no bfloat16 of activations. {REMEDY}."
            )
        return found
    return ForeignRows(rows, bfloat16=False)


def _described(name, shape, _, dtype):
    return f"{_printable(name)[:60]} {tuple(shape)} {_printable(str(dtype))[:40]}"


def _printable(text):
    return re.sub(r"[^\x20-\x7e]", "?", text)
