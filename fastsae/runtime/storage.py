"""Where files are written, and nowhere else: whole or not at all, by one run at a time. Tests look
for any other way.

Each operation that changes the disk first calls `watch(operation, path)`. It does nothing; tests
put a function there that counts, fails as a full disk does, or kills the process, at each operation
in turn.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fastsae.runtime import ranks, stops
from fastsae.runtime.errors import EnvironmentFailure

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.S)
SCRATCH = ".scratch-"
# a file system without locks, as some network ones
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)
LOOKS = 3  # tries of a lock that is held for a moment
MAX_LINE = 1 << 26  # bytes of a line that is read
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK)


def watch(operation: str, path: object) -> None:
    """Called before each operation."""


class _File(io.FileIO):
    """A file whose writes are watched. Python's buffer is in front of it, so these are the writes
    that reach the system."""

    def write(self, data: Any) -> Any:
        watch("write", self.name)
        try:
            return super().write(data)
        except OSError as error:  # the system names no file here
            error.filename = error.filename or str(self.name)
            raise


@contextlib.contextmanager
def committed(path: Path | str, *, keep_old: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` complete, or not at all: temp file, fsync, rename,
    fsync of the folder.

    With `keep_old`, what was there stays as `<stem>.old-1<suffix>` (the next free number), and
    under its own name until the new file is whole.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = temporary_of(path)
    watch("create", temporary)
    try:
        with io.BufferedWriter(_File(temporary, "xb")) as file:
            yield file
            file.flush()
            _sync(file.fileno(), temporary)
        put_in_place(temporary, path, keep_old=keep_old)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the name that people know
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def growing(path: Path) -> Iterator[BinaryIO]:
    """A file that several runs fill at any place of it, made if it is not there. Nobody may read it
    under this name: `put_in_place` gives it its own. At the end of the `with` block what was
    written is on the disk."""
    make_folder(path.parent)
    is_new = not path.exists()
    if is_new:
        watch("create", path)
    with io.BufferedRandom(_File(path, "rb+", opener=_open_or_create)) as file:
        yield file
        file.flush()
        _sync(file.fileno(), path)
    if is_new:
        _sync_folder(path.parent)


def _open_or_create(path, flags):
    return os.open(path, flags | os.O_CREAT, 0o666)


def end_here(file: BinaryIO) -> None:
    """Let a `growing` file end where the last write ended."""
    file.truncate()


def put_in_place(made: Path, path: Path, *, keep_old: bool = False) -> None:
    """Give a file that is whole the name under which it is read; keep_old: as `committed`."""
    if keep_old and path.exists():
        keep_aside(path)
    watch("replace", path)
    os.replace(made, path)
    _sync_folder(path.parent)


def _sync(handle, path):
    watch("fsync", path)
    os.fsync(handle)


def _sync_folder(folder):
    handle = os.open(folder, os.O_RDONLY)
    try:
        _sync(handle, folder)
    except OSError as error:
        # some network file systems sync no folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder, and those around it, unless it is there."""
    if not folder.is_dir():
        watch("mkdir", folder)
        folder.mkdir(parents=True, exist_ok=True)


def as_utf8(text: str) -> bytes:
    """UTF-8 for any string: halves of surrogate pairs, as in file names that are not UTF-8, become
    `\\udce9`, as in JSON."""
    return text.encode("utf-8", "backslashreplace")


def write_text(path: Path | str, text: str, *, keep_old: bool = False) -> None:
    """Write a text as `as_utf8` has it, whole or not at all; keep_old: as `committed`."""
    with committed(path, keep_old=keep_old) as file:
        file.write(as_utf8(text))


def to_json(value: Any) -> str:
    """The value as JSON in one line, with characters rather than escapes."""
    return json.dumps(value, ensure_ascii=False)


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text or bytes. Raises ValueError for whatever is none, nesting without
    end included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def write_json(path: Path | str, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def keep_aside(path: Path) -> None:
    """Give the file a second name, `<stem>.old-n<suffix>`."""
    n = 1
    while (target := path.with_name(f"{path.stem}.old-{n}{path.suffix}")).exists():
        if target.samefile(path):  # a run that was killed here had done so
            return
        n += 1
    watch("link", target)
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:  # a file system without hard links
            shutil.copyfile(path, target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    print(f"the old one is kept as {target}")


def set_aside(paths: Iterable[Path]) -> None:
    """Rename files to their `.old-n` names."""
    for path in paths:
        keep_aside(path)
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir():
        watch("rmtree", path)
        shutil.rmtree(path)
    elif path.exists():
        watch("unlink", path)
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(root: Path) -> Iterator[str]:
    """A folder under `root` that is gone at the end of the `with` block; so are now those of
    processes that were killed."""
    make_folder(root)
    for left in root.glob(f"{SCRATCH}*"):
        _remove_if_abandoned(left)
    watch("mkdir", root)
    with tempfile.TemporaryDirectory(dir=root, prefix=SCRATCH) as folder:
        handle = os.open(folder, os.O_RDONLY)
        try:
            # a file system without locks: others leave it alone for a day
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
        finally:
            os.close(handle)


def _remove_if_abandoned(folder):
    """Remove a scratch folder whose process has ended, which the kernel knows by its lock; without
    locks after a day."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            age = time.time() - os.fstat(handle).st_mtime
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                abandoned = age > 60  # it may have been made this moment, and not be locked yet
            except BlockingIOError:
                abandoned = False
            except OSError:
                abandoned = age > 86_400
            if abandoned:
                remove(folder)
        finally:
            os.close(handle)


def replace_folder(new: Path | str, folder: Path) -> None:
    """Move the folder `new` to `folder`, in place of what is there."""
    remove(folder)
    watch("replace", folder)
    os.rename(new, folder)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """A folder of `{name: bytes}`, names with slashes for folders in it, that appears under its
    name complete, or not at all.

    What was there is kept as `<name>.old-n`. Folders cannot be exchanged in one step: a kill
    between the two renames leaves the old one under that name and none under its own, and the next
    run writes it.
    """
    new = temporary_of(folder)
    try:
        for name, content in files.items():
            with committed(new / name) as file:
                file.write(content)
        if folder.exists():
            set_folder_aside(folder)
        watch("replace", folder)
        os.rename(new, folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def set_folder_aside(folder: Path) -> None:
    """Rename a folder to `<name>.old-n`."""
    n = 1
    while (old := folder.with_name(f"{folder.name}.old-{n}")).exists():
        n += 1
    watch("replace", old)
    os.rename(folder, old)
    print(f"the old one is kept as {old}")


# Journals: files that grow by lines, each of which counts by itself


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line and fsync it."""
    make_folder(path.parent)
    is_new = not path.exists()
    if is_new:
        watch("create", path)
    with io.BufferedRandom(_File(path, "ab+")) as file:
        torn = file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        # a torn line must not swallow the next one
        file.write(b"\n" * bool(torn) + as_utf8(to_json(value)) + b"\n")
        file.flush()
        _sync(file.fileno(), path)
    if is_new:
        _sync_folder(path.parent)


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; [] if there is no file.

    A line that is torn, damaged or longer than MAX_LINE is left out.
    """
    if not Path(path).exists():
        return []
    lines = []
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE):
            if whole := line.endswith(b"\n") or len(line) < MAX_LINE:
                with contextlib.suppress(ValueError):
                    if isinstance(value := from_json(line), dict):
                        lines.append(value)
            while not whole and (line := file.readline(MAX_LINE)):
                whole = line.endswith(b"\n")
    return lines


# One writer

_log: dict[str, Any] = {"folder": None}


def log_folder() -> Path | None:
    """The folder of what was claimed last, which takes the log of a crash; None before."""
    return _log["folder"]


def keep_log_in(folder: Path | None) -> None:
    """Where the log of a crash goes from here on; None for nowhere of the user's."""
    _log["folder"] = folder


def claim(path: Path, instead: str) -> None:
    """Until this stage ends, no other run may write `path`. EnvironmentFailure if one does;
    `instead` is the flag that avoids it.

    `path` is a file or a folder. The lock is the kernel's (flock) and ends with the process,
    however that ends; its file `.<name>.lock` says who holds it. Of torchrun's processes rank 0
    takes it for all. Where no lock can be had, a warning says so.
    """
    keep_log_in(path.parent)
    if ranks.current().rank:
        return
    lock = path.with_name(f".{path.name}.lock")
    try:
        make_folder(path.parent)
        handle = _locked(lock, path, instead)
    except OSError as error:
        if error.errno not in NO_LOCKS + NO_RIGHTS:
            raise
        print(
            f"warning: {path}: cannot be locked ({error.strerror}). let no other run write there."
        )
        return
    stops.at_end(lambda: _release(lock, handle))
    if path.is_dir():
        sweep(path)
    else:
        sweep(path.parent, f"{path.stem}[.-]*")


def is_claimed(path: Path) -> bool:
    """Whether a run that still lives has claimed `path`; True also where nobody can know."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        handle = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def sweep(folder: Path, names: str = "*") -> None:
    """Remove the temporary files of runs that were killed, of files whose names match. Only for who
    has claimed them."""
    for left in folder.glob(f".{names}.tmp"):
        if TEMPORARY.fullmatch(left.name):  # nobody else's
            remove(left)


def require_writable(paths: Iterable[Path | str]) -> None:
    """Raise now, before slow work, what writing these files would raise after it: no rights, too
    long a name, a folder in its way.

    Leaves nothing behind but the folders that they will lie in.
    """
    for path in map(Path, paths):
        probe = temporary_of(path)
        try:
            make_folder(path.parent)
            if path.is_dir():
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            watch("create", probe)
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            os.unlink(probe)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


def temporary_of(path: Path) -> Path:
    """The name under which a file or folder is written before it gets its own."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _locked(lock, path, instead):
    looks = 0
    while True:
        watch("create", lock)
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            handle = os.open(lock, os.O_RDONLY)  # another user's: enough to see whether it is held
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock, handle):
                since = time.strftime("%d %b %H:%M:%S")
                holder = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
                with contextlib.suppress(OSError):  # it serves a message only
                    os.truncate(handle, 0)
                    os.write(handle, holder.encode())
                return handle
            os.close(handle)  # its holder had just ended and removed it
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace") or "another run"
            os.close(handle)
            if (looks := looks + 1) <= LOOKS:  # somebody may only look whether it is held
                time.sleep(0.02)
                continue
            raise EnvironmentFailure(
                f"{path}: {holder}, is writing here. wait until it has ended, "
                f"or give another {instead}."
            ) from None
        except OSError:
            os.close(handle)
            raise


def _is_at(path, handle):
    """Whether the open file is still the one that lies there."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _release(lock, handle):
    # a folder that is gone, or rights that were taken away: the lock itself ends with the handle
    with contextlib.suppress(OSError):
        lock.unlink(missing_ok=True)
    os.close(handle)
