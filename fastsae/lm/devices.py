"""The device and the precision that a model runs in."""

from typing import TYPE_CHECKING

from fastsae.runtime import ranks
from fastsae.runtime.errors import EnvironmentFailure, InputError

if TYPE_CHECKING:
    import torch


def choose_device(setting: str) -> str:
    """'auto' -> cuda, mps or cpu, whichever is there first; a device that is not there is an error.

    A CUDA device comes back with its number, and is the current one from here on: pinned memory
    and events go with the current device. Without a number each process of a machine takes its
    own, counted among those it sees, for a job system may show each process one GPU only.
    """
    import torch

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if setting == "auto":
        setting = next(device for device, there in available.items() if there)
    kind, _, index = setting.partition(":")
    n_devices = torch.cuda.device_count() if kind == "cuda" and available["cuda"] else 0
    if not available[kind] or (kind == "cuda" and int(index or 0) >= n_devices):
        n_seen = f"; PyTorch sees {n_devices} CUDA devices, counted from 0" if n_devices else ""
        raise InputError(
            f"DEVICE: {setting} is not available here{n_seen}. use --device auto, or cpu."
        )
    if kind != "cuda":
        return setting
    number = int(index) if index else ranks.current().local_rank % n_devices
    try:
        torch.cuda.set_device(number)
        torch.empty(1, device=f"cuda:{number}")
    except RuntimeError as error:  # taken by another process, out of memory, a driver too old
        brief = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise EnvironmentFailure(
            f"DEVICE: cuda:{number} cannot be used ({brief}). look at nvidia-smi, "
            "choose another --device, or --device cpu."
        ) from None
    return f"cuda:{number}"


def choose_dtype(setting: str, device: str) -> "torch.dtype":
    """'auto' -> bfloat16 on CUDA, float32 elsewhere."""
    import torch

    if setting == "auto":
        setting = "bfloat16" if device.startswith("cuda") else "float32"
    return getattr(torch, setting)
