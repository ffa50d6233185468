"""What the blocks of a model take on a device, from its configuration alone."""

from typing import TYPE_CHECKING, Any

from fastsae.lm.decoders import decoder_stack
from fastsae.lm.first_blocks import without_weights
from fastsae.runtime.errors import InputError
from fastsae.runtime.memory import memory_of

if TYPE_CHECKING:
    import torch


def weight_bytes(config: Any, n_blocks: int, dtype: "torch.dtype") -> int | None:
    """Bytes of the first `n_blocks` blocks of a model and of what stands before them, in `dtype`;
    None where the model cannot be built without its weights."""
    try:
        stack = decoder_stack(without_weights(config))
    except Exception:  # whatever is wrong with it is said where it is loaded
        return None
    count = sum(parameter.numel() for parameter in stack.module.parameters())
    for block in stack.layers[n_blocks:]:
        count -= sum(parameter.numel() for parameter in block.parameters())
    return count * dtype.itemsize


def require_memory(
    config: Any, n_blocks: int, dtype: "torch.dtype", *, device: str, name: str
) -> None:
    """InputError where the blocks of the model `name` are larger than the device's memory, before
    anything of them is read."""
    needed, there = weight_bytes(config, n_blocks, dtype), memory_of(device)
    if needed is not None and there is not None and needed > there:
        kind = str(dtype).removeprefix("torch.")
        raise InputError(
            f"MODEL_NAME: the blocks of {name} up to {n_blocks} take {needed / 1e9:,.1f} GB in "
            f"{kind}, {device} has {there / 1e9:,.1f} GB. choose a smaller model, or lower "
            "--layer-idx."
        )
