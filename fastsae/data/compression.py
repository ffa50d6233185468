"""Compressed files as what they hold, a piece at a time: gzip, bzip2, xz by the standard library,
zstd by an optional package. The content tells which, not the name."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastsae.runtime.digests import reading
from fastsae.runtime.errors import EnvironmentFailure, InputError

HEAD = 1 << 16  # bytes that tell what a file is
# bytes of a zstd file decompressed at a time: a frame can grow 30,000-fold, so 128 MB at most
ZSTD_PIECE = 1 << 12
ZSTD_WINDOW = 1 << 31  # bytes, the largest a frame may ask for (zstd --long=31)


class Compression(NamedTuple):
    """How a kind of compressed file begins, is opened and can be decompressed by hand."""

    name: str
    beginning: bytes
    opened: Callable[[Any], Any]
    command: str  # NAME stands for the file


class _Zstd(io.RawIOBase):
    """What a zstd file holds. EOFError where its last frame is cut off, which the package's own
    reader takes for the end."""

    def __init__(self, file):
        try:
            import zstandard
        except ImportError:
            raise EnvironmentFailure(
                "DATASET_PATH: a file that is compressed by zstd needs the zstandard package. "
                "run: pip install zstandard."
            ) from None
        self.file, self.rest, self.begun = file, b"", False
        self.damage = zstandard.ZstdError
        self.new = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj
        self.frame, self.waiting = self.new(), memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.waiting:
            piece, self.rest = self.rest or self.file.read(ZSTD_PIECE), b""
            if not piece:
                if self.begun:
                    raise EOFError("it ends within a frame")
                return 0
            try:
                self.waiting = memoryview(self.frame.decompress(piece))
            except self.damage as error:
                raise EOFError(str(error)) from None
            self.begun = not self.frame.eof
            if self.frame.eof:
                self.rest, self.frame = self.frame.unused_data, self.new()
        n = min(len(buffer), len(self.waiting))
        buffer[:n], self.waiting = self.waiting[:n], self.waiting[n:]
        return n


COMPRESSIONS = (
    Compression(
        "gzip", b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file), "gzip -dc NAME > data.jsonl"
    ),
    Compression("bzip2", b"BZh", bz2.BZ2File, "bzip2 -dc NAME > data.jsonl"),
    Compression("xz", b"\xfd7zXZ\0", lzma.LZMAFile, "xz -dc NAME > data.jsonl"),
    Compression(
        "zstd",
        b"\x28\xb5\x2f\xfd",
        lambda file: io.BufferedReader(_Zstd(file), HEAD),
        "zstd -dc NAME > data.jsonl",
    ),
)


def compression_of(beginning: bytes) -> Compression | None:
    """How a file that begins so is compressed; None if it is not."""
    for kind in COMPRESSIONS:
        if beginning.startswith(kind.beginning) and (kind.name != "bzip2" or _is_bzip2(beginning)):
            return kind
    return None


def _is_bzip2(beginning):
    """Text can begin with BZh, too."""
    return beginning[3:4].isdigit() and beginning[4:10] in (b"1AY&SY", b"\x17rE8P\x90")


@contextlib.contextmanager
def content(path: Path | str, sha256: str | None = None) -> Iterator[Any]:
    """What a file holds, decompressed, opened for reading its bytes.

    sha256: as `digests.reading`, of the file as it lies there. InputError where a compressed file
    is damaged or cut off, EnvironmentFailure where a package is missing for it.
    """
    with reading(path, sha256) as file:
        assert isinstance(file, io.BufferedReader)
        kind = compression_of(file.peek(16)[:16])
        if kind is None:
            yield file
            return
        with _damage_named(path, kind), kind.opened(file) as held:
            yield held


@contextlib.contextmanager
def _damage_named(path, kind):
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, kind, error) from None
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise _damaged(path, kind, error) from None


def _damaged(path, kind, error):
    what = str(error).splitlines()[0][:100] if str(error) else "it ends too soon"
    return InputError(
        f"{path}: is compressed by {kind.name}, and damaged or cut off ({what.rstrip('.')}). "
        "copy or make it again."
    )


def head(path: Path | str) -> bytes:
    """The first HEAD bytes of what a file holds."""
    with content(path) as file:
        return file.read(HEAD)
