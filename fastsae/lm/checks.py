"""What is checked of a language model before its numbers are trusted: that attention is causal,
that a device computes right."""

import sys
from typing import TYPE_CHECKING, Any, Protocol

from fastsae.runtime.errors import InputError

if TYPE_CHECKING:
    import torch

SAMPLE = (2, 16)  # rows and tokens of the sample
# median and largest difference of a token
BOUNDS = {"float32": (1e-3, 1e-2), "bfloat16": (0.05, 0.5), "float16": (0.05, 0.5)}


class StreamReader(Protocol):
    """What is checked: `residual.ResidualModel`, or what stands in for it."""

    stack: Any
    layers: tuple[int, ...]
    d_model: int
    dtype: Any
    device: str

    def __call__(self, ids: "torch.Tensor", /) -> "dict[int, torch.Tensor]":
        """(batch, length) int tensor -> {layer: (batch, length, d_model)}."""


def sample_ids(model: "StreamReader") -> "torch.Tensor":
    """Token ids for a check, (2, 16)."""
    import torch

    n_rows, length = SAMPLE
    return (
        torch.arange(100, 100 + n_rows * length).reshape(n_rows, length)
        % model.stack.config.vocab_size
    )


def require_causal(model: "StreamReader", name: str) -> None:
    """InputError unless `model` gives a residual stream in which no token depends on a later one:
    padding and prefix rely on it."""
    ids = sample_ids(model)[:1]
    changed = ids.clone()
    changed[0, -1] = 0
    before, after = model(ids), model(changed)
    for layer in model.layers:
        if layer not in before or before[layer].shape != (*ids.shape, model.d_model):
            raise InputError(
                f"MODEL_NAME: {name} has no residual stream of width {model.d_model} "
                f"after block {layer}. choose a Llama-type model."
            )
        stream, other = before[layer][0, :-1].float(), after[layer][0, :-1].float()
        if bool(((stream - other).norm(dim=1) > 0.01 * stream.norm(dim=1)).any()):
            raise InputError(
                f"MODEL_NAME: in {name} a token sees later ones, so examples cannot be padded. "
                "choose a causal model."
            )


def device_agrees(model: "StreamReader", ids: "torch.Tensor", device: str) -> tuple[bool, float]:
    """Move `model` from the CPU to `device`; (whether it computes the same there, largest relative
    difference of a token).

    ids: (batch, length) int tensor. The same weights are run before and after, so no second copy is
    needed. The bounds depend on the model's precision: in bfloat16 one rounding is 0.4 %.
    """

    def streams():
        # (batch, length, d_model) of each layer
        return [stream.float().cpu() for _, stream in sorted(model(ids).items())]

    expected = streams()
    model.stack.to(device)
    model.device = device
    median_bound, bound = BOUNDS[str(model.dtype).removeprefix("torch.")]
    agrees, largest = True, 0.0
    for there, here in zip(streams(), expected):
        difference = (there - here).norm(dim=-1) / here.norm(dim=-1)  # (batch, length)
        # NaN is not <= anything
        agrees &= bool(difference.median() <= median_bound and difference.max() <= bound)
        largest = max(largest, float(difference.nan_to_num(float("inf")).max()))
    return agrees, largest


def move(model: "StreamReader", device: str) -> None:
    """Put `model` on `device`, with a warning where it computes something else there than on the
    CPU."""
    agrees, largest = device_agrees(model, sample_ids(model), device)
    if not agrees:
        print(
            f"warning: DEVICE: {device} and the CPU differ by up to {100 * largest:.0f} % "
            f"on a sample of {SAMPLE[0] * SAMPLE[1]} tokens; its numbers may be wrong. "
            "compare with --device cpu.",
            file=sys.stderr,
            flush=True,
        )
