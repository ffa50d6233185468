"""What a file is by its content: suffixes and names promise nothing.

Nothing heavy is imported here, so that an up-to-date run ends quickly.
"""

import os
import zipfile
from pathlib import Path

from fastsae.formats.readers import LIBRARIES
from fastsae.runtime.artifacts import is_sealed
from fastsae.runtime.errors import EnvironmentFailure, InputError

NO_WEIGHTS = {  # first bytes of files that are often taken for weights
    b"version https://git-lfs": "is a Git LFS pointer, which only names the weights. "
    "run git lfs pull where it lies",
    b"GGUF": "is a language model (GGUF). give an autoencoder",
    b"\x89HDF": "is an HDF5 file. convert it to safetensors or to a PyTorch state_dict",
    b"%PDF": "is a PDF. give the file that the library wrote",
    b"\x1f\x8b": "is compressed with gzip. unpack it first",
}


def kind_of(path: Path | str) -> str:
    """What the file is: fastsae (a checkpoint of this project, perhaps damaged), torch (what
    torch.save wrote) or npz.

    Raises InputError, which says what it is instead, or EnvironmentFailure for a part of an
    archive.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(4096)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 66))
        tail = file.read(66)
    if is_sealed(tail):
        return "fastsae"
    if not head:
        raise InputError(f"{path}: is empty. get another copy of it.")
    if head.startswith(b"PK"):
        return _kind_of_archive(path)
    if head.startswith(b"\x80"):  # a pickle: how torch.save wrote before version 1.6
        return "torch"
    raise InputError(f"{path}: {_what_instead(head, size)}.")


def _kind_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise EnvironmentFailure(
            f"{path}: damaged, or a part of a file ({str(error)[:100]}). "
            "get another copy, or train again."
        ) from None
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    raise InputError(
        f"{path}: is a zip archive without weights that are known. "
        "give what one of the libraries wrote, unpacked."
    )


def _is_text(head: bytes) -> bool:
    try:
        return "\0" not in head.decode("utf-8")
    except UnicodeDecodeError as error:
        return (
            error.start > 4000 and b"\0" not in head
        )  # a character cut at the end of what was read


def _what_instead(head: bytes, size: int) -> str:
    """What the first bytes of a file that holds no known weights look like, and what to do."""
    for start, what in NO_WEIGHTS.items():
        if head.startswith(start):
            return what
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return (
            "holds safetensors, which do not say what they compute. "
            "give the library's folder, with its cfg.json"
        )
    if _is_text(head):
        return (
            "is a text, not the weights of an autoencoder. "
            f"give a file of {LIBRARIES}, or of this project"
        )
    return f"is not a file that is known. give one of {LIBRARIES}, or of this project"
