"""What is checked of a language model before its numbers are trusted: that its blocks form a
residual stream, that attention is causal, that a device computes right."""

import sys
from typing import TYPE_CHECKING, Any, Protocol

from fastsae.lm.decoders import ACCEPTED, Decoder, Enough, stream_of
from fastsae.runtime.errors import InputError
from fastsae.runtime.machine_errors import is_out_of_memory

if TYPE_CHECKING:
    import torch

SAMPLE = (2, 16)  # rows and tokens of the sample
# median and largest difference of a token
BOUNDS = {"float32": (1e-3, 1e-2), "bfloat16": (0.05, 0.5), "float16": (0.05, 0.5)}
ROUNDING = 1e-4  # float32: the most that a token may differ where only the order of sums does


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
    return sample_for(model.stack.config)


def sample_for(config: Any) -> "torch.Tensor":
    """Token ids for a check of a model with this configuration, (2, 16)."""
    import torch

    n_rows, length = SAMPLE
    return torch.arange(100, 100 + n_rows * length).reshape(n_rows, length) % config.vocab_size


def require_chain(decoder: Decoder, n_blocks: int, ids: "torch.Tensor", name: str) -> None:
    """InputError unless each of the first `n_blocks` passes its output to the next, as blocks of a
    residual stream do.

    ids: (batch, length) int tensor. A list of modules that is called in another order, or whose
    outputs go elsewhere, has no stream after a block.
    """
    import torch

    last = min(n_blocks, len(decoder.layers) - 1)  # what it reads is the last that is tried
    given: dict[int, torch.Tensor] = {}
    passed_on: list[bool] = []

    def before(arguments, options, block):
        if block:
            read = arguments[0] if arguments else options.get("hidden_states")
            passed_on.append(equal(read, given.get(block - 1)))
        if block == last:
            raise Enough

    hooks = []
    for i, block in enumerate(decoder.layers[: last + 1]):
        hooks += [
            block.register_forward_pre_hook(_with_block(before, i), with_kwargs=True),
            block.register_forward_hook(
                lambda _, __, output, i=i: given.update({i: stream_of(output)})
            ),
        ]
    try:
        with torch.inference_mode():
            decoder.run(ids)
    # what a model's author chose to raise: here it runs for the first time
    except Exception as error:
        if is_out_of_memory(error):
            raise
        brief = (str(error) or type(error).__name__).splitlines()[0][:150]
        raise InputError(
            f"MODEL_NAME: {name} cannot be run on token ids alone ({brief}). {ACCEPTED}."
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    if passed_on != [True] * last:
        raise InputError(
            f"MODEL_NAME: the blocks of {name} do not pass one residual stream on. {ACCEPTED}."
        )


def _with_block(hook, block):
    return lambda module, arguments, options: hook(arguments, options, block)


def equal(a: Any, b: Any) -> bool:
    """Whether both are the same tensor; NaN, which half precision can give, is equal to NaN."""
    import torch

    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.shape != b.shape:
        return False
    return a is b or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


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
                f"after block {layer}. {ACCEPTED}."
            )
        stream, other = before[layer][0, :-1].float(), after[layer][0, :-1].float()
        if bool(((stream - other).norm(dim=1) > 0.01 * stream.norm(dim=1)).any()):
            raise InputError(
                f"MODEL_NAME: in {name} a token sees later ones, so examples cannot be padded. "
                f"{ACCEPTED}."
            )


def equal_up_to_rounding(found: "torch.Tensor", expected: "torch.Tensor") -> bool:
    """Whether two ways to the same streams (..., d_model) agree, token by token; False for NaN.

    In 16 bits a token may differ by more than one rounding: a router can choose another expert.
    """
    import torch

    median_bound, bound = (
        (ROUNDING, ROUNDING)
        if expected.dtype == torch.float32
        else BOUNDS[str(expected.dtype).removeprefix("torch.")]
    )
    difference = (found.float() - expected.float()).norm(dim=-1)
    difference = difference / expected.float().norm(dim=-1)
    return bool(difference.median() <= median_bound and difference.max() <= bound)


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
