"""Files that stages hand to each other: written whole or not at all, verified when read, reused
only if they match.

Every artifact carries its own metadata, `{"format", "stage", "settings", "inputs", "fingerprint",
...}`. The fingerprint is the sha256 of what decides the content (format, stage, settings, inputs),
so equal fingerprints mean that the work is already done.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import lzma
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np

from fastsae.runtime import masking
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.runtime.machine_errors import cause_in_machine
from fastsae.runtime.storage import (  # noqa: F401
    append_line,
    committed,
    end_here,
    from_json,
    keep_aside,
    read_lines,
    set_aside,
    to_json,
    write_json,
    write_text,
)
from fastsae.settings.values import Settings

FORMAT = 1
CHUNK_BYTES = 1 << 22
# What zipfile, its decompressors and NumPy raise for bytes that make no archive or no array. Of an
# OSError it is damage only where the machine is not its cause (bz2 raises one without a number).
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    KeyError,
    ValueError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    OSError,
)


def fingerprint(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """sha256 (hex) of what decides a stage's output; `settings`, `inputs`: JSON-able dicts."""
    content = {"format": FORMAT, "stage": stage, "settings": settings, "inputs": inputs}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def new_metadata(
    stage: str, settings: Mapping[str, Any], inputs: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """The metadata block of a new artifact; `more` is recorded but decides nothing."""
    return {
        "format": FORMAT,
        "stage": stage,
        "settings": settings,
        "inputs": inputs,
        "fingerprint": fingerprint(stage, settings, inputs),
        "versions": library_versions(),
        **more,
    }


def library_versions() -> dict[str, str]:
    """{package: version} of the libraries that decide what a stage computes."""
    from importlib import metadata

    names = ("torch", "transformers", "numpy", "hypothesaes")
    return {name: metadata.version(name) for name in names}


def write_settings(beside: Path | str, settings: Settings) -> None:
    """Record all settings of the run that makes the result at `beside`, in `<its
    stem>.settings.json`; secrets are masked."""
    text = masking.of_environment()(json.dumps(settings.record(), indent=1, ensure_ascii=False))
    # by the result's name: who claims the result sweeps what a killed run left of this too
    write_text(Path(beside).with_suffix(".settings.json"), text + "\n")


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first few settings and inputs in which two metadata blocks differ, as 'LAYER_IDX 12 ->
    20, ...'."""
    found = []
    for part in ("settings", "inputs"):
        before, after = old.get(part, {}), new.get(part, {})
        for name in sorted(set(before) | set(after)):
            a, b = (json.loads(json.dumps(side.get(name, "absent"))) for side in (before, after))
            if a != b:
                found.append(
                    f"{name} {str(a)[:40]} -> {str(b)[:40]}"
                    if part == "settings"
                    else f"{name} changed"
                )
    if old.get("format") != new.get("format"):
        found.append("file format changed")
    return ", ".join(found[:5]) or "unknown difference"


def file_sha256(path: Path | str) -> str:
    """sha256 (hex) of a file, read CHUNK_BYTES at a time. OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def matches(
    path: Path | str, metadata: Mapping[str, Any], read: Callable[[Any], Mapping[str, Any]]
) -> bool:
    """True if the artifact at `path` is already what `metadata` describes. Otherwise says what
    differs, if one is there.

    `read(path)` returns the metadata inside the artifact; an unreadable artifact counts as one that
    does not match.
    """
    if not Path(path).exists():
        return False
    try:
        found = read(path)
    except EnvironmentFailure as error:
        print(f"not reused: {error}")
        return False
    if found.get("fingerprint") == metadata["fingerprint"]:
        print(f"up to date: {path}")
        return True
    print(f"changed: {difference(found, metadata)}")
    return False


# Activations (.npz)


def write_npz(path: Path | str, arrays: Mapping[str, Any], *, keep_old: bool = False) -> None:
    """Write `{name: array or (shape, dtype, iterator of row blocks)}` as an uncompressed .npz,
    streaming the iterators.

    Member dates are fixed, so equal content gives equal bytes.
    """
    with (
        committed(path, keep_old=keep_old) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        for name, value in arrays.items():
            _add_member(archive, file, name, value)


def _add_member(archive, file, name, value):
    """Add an array, or (shape, dtype, blocks), to the archive that is written to `file`."""
    shape, dtype, blocks = (
        value if isinstance(value, tuple) else (value.shape, value.dtype, [value])
    )
    header = _member_header(name, shape, dtype, file.tell())
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        member.write(header)
        for block in blocks:
            # no copy of the whole
            member.write(np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8).data)


def _member_header(name, shape, dtype, at):
    """The .npy header of a member that begins at `at` in the file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header,
        {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": shape,
        },
    )
    # after the zip's own header of the member
    return _aligned(header.getvalue(), at + _zip_header_size(name))


def _zip_header_size(name):
    return 30 + len(f"{name}.npy") + 20


def first_member_start(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Where in an .npz the data of its first member begin."""
    return _zip_header_size(name) + len(_member_header(name, shape, dtype, 0))


def complete_npz(
    file: BinaryIO, first: tuple[str, tuple[int, ...], str, int], others: Mapping[str, np.ndarray]
) -> None:
    """Write around the data of the first member, which are in `file` already, what makes it the
    .npz that `write_npz` would have written.

    first: (name, shape, dtype, CRC-32 of the data) of that member. others: the members after it.
    """
    name, shape, dtype, crc = first
    header = _member_header(name, shape, dtype, 0)
    n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    start = _zip_header_size(name) + len(header)
    around = _Around(start, start + n_bytes)
    with zipfile.ZipFile(around, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        info = zipfile.ZipInfo(f"{name}.npy")
        with archive.open(info, "w", force_zip64=True) as member:
            member.write(header)
        info.CRC = joined_crc32(zlib.crc32(header), crc, n_bytes)
        info.file_size = info.compress_size = len(header) + n_bytes
        around.seek(0)
        around.write(info.FileHeader(zip64=True))
        archive.start_dir = around.seek(around.end)
        for other, value in others.items():
            _add_member(archive, around, other, value)
    # only now, when it is whole: zipfile also ends an archive whose making failed
    file.seek(0)
    file.write(around.before.getvalue())
    file.seek(around.end)
    file.write(around.after.getvalue())
    end_here(file)  # an earlier try may have written more


class _Around:
    """In memory what is written to a file before the byte `start` and from the byte `end` on."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end, self.at = start, end, 0
        self.before, self.after = io.BytesIO(), io.BytesIO()

    def write(self, data: Any) -> int:
        part = self.after if self.at >= self.end else self.before
        part.seek(self.at - self.end if self.at >= self.end else self.at)
        n = part.write(data)
        self.at += n
        return n

    def seek(self, at: int, whence: int = 0) -> int:
        self.at = at
        return at

    def tell(self) -> int:
        return self.at

    def seekable(self) -> bool:
        return True

    def flush(self) -> None:
        """Nothing is elsewhere."""


def joined_crc32(first: int, second: int, n_bytes: int) -> int:
    """The CRC-32 of two pieces of data one after the other, from those of each; the second piece
    has `n_bytes`.

    A CRC is a remainder of polynomials over GF(2), here with bit 31 for x^0: the first one times
    x^(8 n_bytes), plus the second.
    """
    return _times(_shift(n_bytes), first) ^ second


@functools.lru_cache(4096)
def _shift(n_bytes):
    """x^(8 n_bytes); examples have few lengths, and there may be millions of them."""
    shift, power = 1 << 31, 1 << 23  # x^0 and x^8
    while n_bytes:
        if n_bytes & 1:
            shift = _times(shift, power)
        power, n_bytes = _times(power, power), n_bytes >> 1
    return shift


def _times(a, b):
    """The product of two such polynomials, modulo that of CRC-32."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product


def _aligned(header, offset):
    """The header of a .npy with blanks added, so that at `offset` in a file its data begin at a
    multiple of 64: readers map them."""
    pad = -(offset + len(header)) % 64
    return (
        header[:8]
        + (len(header) - 10 + pad).to_bytes(2, "little")
        + header[10:-1]
        + b" " * pad
        + b"\n"
    )


def read_npz(
    path: Path | str, members: Sequence[str] | None = None, *, made_by: str
) -> dict[str, np.ndarray]:
    """Read members of an .npz (all by default) with CRC checks and no pickle; `made_by` is named in
    the remedy.

    Raises InputError if the file is missing, EnvironmentFailure if it is damaged or foreign.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: not found. run {made_by} first, or check --output-dir.")
    with refusing_damage(path, made_by), zipfile.ZipFile(path) as archive:
        names = members or [name.removesuffix(".npy") for name in archive.namelist()]
        return {
            name: _array(archive, archive.getinfo(f"{name}.npy"), path.stat().st_size)
            for name in names
        }


@contextlib.contextmanager
def refusing_damage(path: Path | str, made_by: str) -> Iterator[None]:
    """Whatever reading a damaged or foreign .npz raises becomes one line with the command that
    makes it anew.

    Errors of the machine pass: of the OSErrors only EINVAL is damage, a place that no file has.
    """
    try:
        yield
    except KeyError as error:
        name = str(error).split("'")[1] if "'" in str(error) else error
        raise EnvironmentFailure(
            f"{path}: has no member {name}, so it is not a file of this project. run {made_by}."
        ) from None
    except DAMAGE as error:
        if is_of_machine(error):
            raise
        raise EnvironmentFailure(_npz_damage(path, error, made_by)) from None


def is_of_machine(error: BaseException) -> bool:
    """Whether the machine, not the file's content, is the cause of one of DAMAGE."""
    of_content = getattr(error, "errno", None) in (None, errno.EINVAL)
    return not of_content or cause_in_machine(error, missing=False) is not None


def _npz_damage(path, error, made_by):
    return f"{path}: damaged or foreign ({_brief(error)}). run {made_by}."


def read_foreign_npz(path: Path | str) -> dict[str, np.ndarray]:
    """The arrays of numbers of another project's .npz, its checksums looked at, without pickles.
    EnvironmentFailure if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {bad}")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        if text := [name for name, value in found.items() if value.dtype.kind not in "fiu"]:
            raise ValueError(f"{text[0]} holds no numbers")
        return found
    except DAMAGE as error:
        if is_of_machine(error):
            raise
        raise EnvironmentFailure(
            f"{path}: damaged, or not a plain .npz ({_brief(error)}). get another copy."
        ) from None


def _array(archive, info, file_size):
    """The array of an .npy member. All of it is read, so its checksum covers the header too
    (np.load stops where a damaged header says the data ends, and checks nothing then)."""
    if info.file_size > file_size:
        raise ValueError("a member is larger than the file")
    content = bytearray(info.file_size)
    with archive.open(info) as member:
        done, view = 0, memoryview(content)
        while n := member.readinto(view[done:]):
            done += n
        if done < len(content) or member.read(1):
            raise EOFError("a member is not of its size")
    stream = io.BytesIO(content[:1024])
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("written by another program")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or fortran_order:
        raise ValueError("holds Python objects")
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape)


def read_npz_metadata(
    path: Path | str, *, made_by: str = "extract_activations.py"
) -> dict[str, Any]:
    """The `metadata` member of an activations file, as a dict."""
    return metadata_of(read_npz(path, ["metadata"], made_by=made_by), path, made_by)


def metadata_of(
    arrays: Mapping[str, Any], path: Path | str, made_by: str = "extract_activations.py"
) -> dict[str, Any]:
    """The metadata among the members that `read_npz` gave."""
    try:
        return _checked_metadata(from_json(str(arrays["metadata"])), path, made_by)
    except ValueError:
        return _checked_metadata(None, path, made_by)


def _checked_metadata(value, path, made_by):
    if isinstance(value, dict) and value.get("format") == FORMAT and "fingerprint" in value:
        return value
    raise EnvironmentFailure(
        f"{path}: its metadata is not of this version of the project. run {made_by}."
    )


# Checkpoints (.pt)


def write_checkpoint(
    path: Path | str, checkpoint: Mapping[str, Any], *, keep_old: bool = True
) -> None:
    """`torch.save` of a dict of plain values and tensors. Equal content gives equal bytes."""
    import torch

    with committed(path, keep_old=keep_old) as file:
        sealed = _Sealed(file)  # the archive's inner names do not depend on the path this way
        torch.save(checkpoint, cast(IO[bytes], sealed))
        sealed.end()


class _Sealed:
    """What `torch.save` writes goes to a file, and its sha256 to the end of that: a state as large
    as half of the memory can be saved.

    The last two bytes are held back. They are the length of the zip's comment, 0, in the place of
    which the seal comes. What goes wrong is raised by `end`: of an exception in between PyTorch
    makes one of its own, about positions.
    """

    def __init__(self, file: Any) -> None:
        self.file, self.held, self.sha256 = file, b"", hashlib.sha256()
        self.failed: BaseException | None = None

    def write(self, content: Any) -> int:
        """Write all but the last two bytes so far."""
        view = memoryview(content).cast("B")
        if len(view) < 2:
            whole = self.held + view.tobytes()
            self._pass_on(whole[:-2])
            self.held = whole[-2:]
        else:
            self._pass_on(self.held)
            self._pass_on(view[:-2])
            self.held = view[-2:].tobytes()
        return len(view)

    def flush(self) -> None:
        """Nothing: `end` comes last."""

    def end(self) -> None:
        """Write the seal."""
        if self.failed is not None:
            raise self.failed
        self.file.write(_seal(self.sha256))

    def _pass_on(self, content):
        if self.failed is not None:
            return
        try:
            self._written(content)
        except BaseException as error:
            self.failed = error

    def _written(self, content):
        self.sha256.update(content)
        self.file.write(content)


def _seal(sha256):
    """The end of a checkpoint file: its sha256 as the zip archive's comment, which other readers
    skip.

    The archive's own CRCs are not enough: PyTorch never looks at them, and they do not cover the
    archive's headers.
    """
    return struct.pack("<H", 64) + sha256.hexdigest().encode()


def is_sealed(content: bytes) -> bool:
    """Whether a file, or the last bytes of one, ends as `write_checkpoint` ends its files, true or
    damaged."""
    return (
        content[-66:-64] == struct.pack("<H", 64)
        and re.fullmatch(b"[0-9a-f]{64}", content[-64:]) is not None
    )


def read_checkpoint(path: Path | str, *, made_by: str = "train_sae.py") -> Any:
    """A checkpoint's dict, after checking the sha256 of the whole file, and without running pickled
    code."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: not found. run {made_by} first, or check --output-dir.")
    content = path.read_bytes()
    if not is_sealed(content):
        raise EnvironmentFailure(
            f"{path}: is not a checkpoint of this project, or only part of one. run {made_by}."
        )
    if content[-66:] != _seal(hashlib.sha256(memoryview(content)[:-66])):
        raise EnvironmentFailure(f"{path}: damaged, its checksum is another. run {made_by}.")
    try:
        return _load_tensors(content)
    except pickle.UnpicklingError as error:
        raise EnvironmentFailure(
            f"{path}: is not a plain checkpoint ({_brief(error)}). run {made_by}."
        ) from None


def _load_tensors(content):
    """What `torch.save` wrote, if it is plain values and tensors; no pickled code runs.

    Whatever else PyTorch raises than an error of the machine says only that it cannot be read:
    UnpicklingError.
    """
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that it then refuses
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        if cause := cause_in_machine(error, missing=False):
            raise cause from None
        raise pickle.UnpicklingError(_brief(error)) from None


def read_foreign_checkpoint(path: Path | str) -> Any:
    """What another project saved with `torch.save`, without running pickled code; its checksums,
    which PyTorch ignores, are looked at.

    Raises EnvironmentFailure if it is damaged or holds more than plain values and tensors.
    """
    content = Path(path).read_bytes()
    try:
        if content.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if (bad := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {bad}")
    except DAMAGE as error:
        if is_of_machine(error):
            raise
        raise EnvironmentFailure(
            f"{path}: damaged, or a part of a file ({_brief(error)}). get another copy."
        ) from None
    try:
        return _load_tensors(content)
    except pickle.UnpicklingError as error:
        raise EnvironmentFailure(
            f"{path}: holds more than tensors and plain values, or nothing that PyTorch reads "
            f"({_brief(error)}), and no pickled code is run. save its state_dict alone."
        ) from None


def read_checkpoint_metadata(path: Path | str) -> dict[str, Any]:
    """The `meta` of a checkpoint of train_sae.py, or EnvironmentFailure if it cannot be read."""
    checkpoint = read_checkpoint(path)
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    return _checked_metadata(meta, path, "train_sae.py")


def _brief(error):
    text = (str(error) or type(error).__name__).splitlines()[0][:120]
    # it may name a damaged archive's member
    return text if text.isprintable() else repr(text)[1:-1]
