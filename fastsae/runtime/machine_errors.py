"""Errors of the machine: memory, disk, rights and limits. Which these are, and what to do about
them.

They say nothing of the file that was being read, so no reader may turn one into "damaged".
"""

import errno
import re

WHERE_WRITTEN = {  # another output folder helps as well
    "free some space": (errno.ENOSPC, errno.EDQUOT),
    "check the folder's rights": (errno.EACCES, errno.EPERM, errno.EROFS),
    "move away what is there": (errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    "give shorter names": (errno.ENAMETOOLONG,),
    "the file system (FAT32: 4 GB) or ulimit -f allows no file of this size. lower SHARD_BYTES in "
    "fastsae/activations/extraction.py": (errno.EFBIG,),
}
ANYWHERE = {
    "raise the limit of open files (ulimit -n), then run again": (errno.EMFILE, errno.ENFILE),
    "check the disk or the network drive, then run again": (
        errno.EIO,
        errno.ESTALE,
        errno.ENXIO,
        errno.ENODEV,
        errno.ENOTCONN,
        *(getattr(errno, name) for name in ("EREMOTEIO", "EUCLEAN") if hasattr(errno, name)),
    ),
    "free some memory, then run again": (errno.ENOMEM,),
    "see that nothing moves or removes it meanwhile, then run again": (errno.ENOENT,),
}
# what PyTorch's RuntimeErrors say: its allocators, CUDA and MPS, and CUDA's libraries
NO_MEMORY = (
    "not enough memory|allocate memory|DefaultCPUAllocator|out of memory|_ALLOC_FAILED"
    "|INSUFFICIENT_RESOURCES|insufficient resources"
)
NUMBERS = frozenset(
    n for table in (WHERE_WRITTEN, ANYWHERE) for each in table.values() for n in each
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, PyTorch on a device, or PyTorch's allocator of the CPU found no memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, RuntimeError)
        and bool(re.search(NO_MEMORY, str(error)))
    )


def cause_in_machine(error: BaseException | None, *, missing: bool = True) -> BaseException | None:
    """The error of the machine that `error` is, or that a library raised it for; None without one.

    missing: whether a file that is not there counts. To a library that looks for files it is usual.
    """
    for _ in range(20):  # links of a chain
        if error is None or is_out_of_memory(error):
            return error
        number = error.errno if isinstance(error, OSError) else None
        if number in NUMBERS and (missing or number != errno.ENOENT):
            return error
        error = error.__cause__ or error.__context__
    return None


def remedy(error: OSError) -> str | None:
    """What to do about an OSError, as the end of a line; None if it is not one of the machine."""
    if error.errno == errno.EFBIG and ".npz" not in str(error.filename or ".npz"):  # not in shards
        return (
            "the file system (FAT32: 4 GB) or ulimit -f allows no file of this size. "
            "raise that limit, or choose another --output-dir; nothing that was complete is lost."
        )
    for what, numbers in WHERE_WRITTEN.items():
        if error.errno in numbers:
            return f"{what}, or choose another --output-dir; nothing that was complete is lost."
    if error.errno == errno.ENOENT and error.filename is None:  # no file is named: a bug
        return None
    for what, numbers in ANYWHERE.items():
        if error.errno in numbers:
            return f"{what}; nothing that was complete is lost."
    return None
