"""Weights that are mapped from their file: the memory that reading them took, given back.

A safetensors file is mapped, so pages of it come into memory as they are read and stay while any
weight of the file is in use. Once the blocks' matrices are packed (`cpu_kernels.py`) the originals
would only lie there beside the packed ones.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterable

import torch

SMAPS = "/proc/self/smaps"


def clean_mappings() -> list[tuple[int, int]]:
    """[(first address, address after the last)] of the files of weights that are mapped here and to
    which nobody wrote; [] where the system does not say (anywhere but on Linux)."""
    if not sys.platform.startswith("linux"):
        return []
    found: list[tuple[int, int]] = []
    try:
        with open(SMAPS, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                first, *rest = line.split()
                if not first.endswith(":"):  # the head of a mapping, before its figures
                    is_weights = line.rstrip().endswith(".safetensors")
                    span = tuple(int(end, 16) for end in first.split("-"))
                elif first == "Private_Dirty:" and rest[0] == "0" and is_weights:
                    found.append((span[0], span[1]))
    except OSError:  # not allowed to look: nothing is given back
        return []
    return found


def give_back(tensors: Iterable[torch.Tensor], mappings: Iterable[tuple[int, int]]) -> None:
    """Let the system take back the memory of those tensors that lie in `mappings`, of
    `clean_mappings`. They stay as they are: who reads them reads the file again."""
    spans = list(mappings)
    if not spans:
        return
    madvise = ctypes.CDLL(None).madvise
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        first, n_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if any(start <= first and first + n_bytes <= stop for start, stop in spans):
            # whole pages only: neighbours share the others
            page = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
            n_whole = (first + n_bytes - page) // mmap.PAGESIZE * mmap.PAGESIZE
            if n_whole > 0:
                madvise(
                    ctypes.c_void_p(page),
                    ctypes.c_size_t(n_whole),
                    ctypes.c_int(mmap.MADV_DONTNEED),
                )
