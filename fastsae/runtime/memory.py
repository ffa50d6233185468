"""How much memory a device has."""

import os
from pathlib import Path

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_of(device: str) -> int | None:
    """Bytes of memory of a device in all, as far as this process may use them; None if unknown."""
    if device.partition(":")[0] == "cuda":
        import torch

        try:
            return torch.cuda.get_device_properties(device).total_memory
        except (RuntimeError, AssertionError, AttributeError):
            return None
    try:
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):
        return None
    limits += [int(text) for path in CGROUPS if (text := _text_of(path)).isdigit()]
    return min(limits)


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
