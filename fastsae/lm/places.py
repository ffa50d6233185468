"""Where in a block attention's and the MLP's outputs join the residual stream, found by adding up.

A block that runs one after the other computes mid = stream + attention and after = mid + MLP; one
that runs both side by side computes after = stream + attention + MLP. Which modules these are is
tried with a sample: so a norm behind attention (Gemma 2) counts as part of what is added.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from fastsae.lm.checks import sample_for
from fastsae.lm.decoders import Decoder, Enough, stream_of, with_stream
from fastsae.runtime.errors import InputError

if TYPE_CHECKING:
    import torch

ATTENTION = "att"  # in the names of attention modules, where a block runs both side by side
# the difference that is rounding: of the median token relative to what is added, of every token
# relative to the stream
BOUNDS = {"float32": (1e-3, 1e-5), "bfloat16": (0.05, 0.05), "float16": (0.05, 0.05)}


@dataclass(frozen=True)
class Place:
    """A module below a block, "" the block itself, and whether its input is meant or its output."""

    module: str
    is_input: bool = False

    def hook(
        self, block: "torch.nn.Module", function: "Callable[[torch.Tensor], torch.Tensor | None]"
    ) -> Any:
        """Call `function` on the stream there, (batch, length, d), whenever `block` runs; what it
        returns, unless None, takes its place. Returns the handle that removes the hook."""
        module = block.get_submodule(self.module)
        if self.is_input:
            return module.register_forward_pre_hook(_on_input(function), with_kwargs=True)

        def on_output(_, __, output):
            new = function(stream_of(output))
            return None if new is None else with_stream(output, new)

        return module.register_forward_hook(on_output)


AFTER = Place("")  # where the stream after a block is
_found: "weakref.WeakKeyDictionary[Any, dict[str, Place]]" = weakref.WeakKeyDictionary()


def place_of(decoder: Decoder, block: int, kind: str) -> Place:
    """Where a kind of hook point is in the block of this index, from 0; InputError where it is not.

    Runs a sample through the model up to that block, once.
    """
    if kind == "resid_post":
        return AFTER
    found = places_in(decoder, block)
    if kind in found:
        return found[kind]
    name = type(decoder.module).__name__
    if kind == "resid_mid" and "attn_out" in found:
        raise InputError(
            f"HOOK: in {name} attention and MLP run side by side, so there is no stream between "
            "them. choose attn_out, mlp_out or resid_post."
        )
    raise InputError(
        f"HOOK: block {block} of {name} does not add an attention's and an MLP's output to the "
        f"stream as they are, so {kind} cannot be read. choose resid_post."
    )


def places_in(decoder: Decoder, block: int) -> dict[str, Place]:
    """{kind: where it is} of the kinds below the block of this index, from 0; {} where stream,
    attention and MLP do not add up."""
    module = decoder.layers[block]
    if module not in _found:
        _found[module] = _search(*_recorded(decoder, block))
    return _found[module]


def _on_input(function):
    def on_input(_, arguments, options):
        if arguments:
            new = function(arguments[0])
            return None if new is None else ((new, *arguments[1:]), options)
        new = function(options["hidden_states"])
        return None if new is None else (arguments, {**options, "hidden_states": new})

    return on_input


def _recorded(decoder, number):
    """(what the block reads, what it gives, [(path, input)], [(path, output)]) of a sample, the
    modules below it from the outside in."""
    import torch

    block = decoder.layers[number]
    read: dict[str, torch.Tensor] = {}
    given: dict[str, torch.Tensor] = {}

    def before(path):
        def keep(tensor):
            read.setdefault(path, _kept(tensor))

        return _on_input(keep)

    def after(path):
        def keep(_, __, output):
            given.setdefault(path, _kept(stream_of(output)))
            if not path:
                raise Enough

        return keep

    handles = []
    for path, module in block.named_modules():
        handles.append(module.register_forward_pre_hook(_lenient(before(path)), with_kwargs=True))
        handles.append(module.register_forward_hook(after(path), prepend=not path))
    try:
        ids = sample_for(decoder.config).to(next(block.parameters()).device)
        with torch.inference_mode():
            decoder.run(ids)
    finally:
        for handle in handles:
            handle.remove()
    shape = read[""].shape

    def fitting(tensors):
        chosen = [
            (path, tensor)
            for path, tensor in tensors.items()
            if path and isinstance(tensor, torch.Tensor) and tensor.shape == shape
        ]
        return sorted(chosen, key=lambda entry: entry[0].count("."))  # stable: in order of calls

    return read[""], given[""], fitting(read), fitting(given)


def _kept(value):
    # Falcon adds to its MLP's output in place
    return value.clone() if hasattr(value, "clone") else value


def _lenient(hook):
    """A hook that looks, and passes over modules that take something else than a stream."""

    def look(module, arguments, options):
        if arguments or "hidden_states" in options:
            hook(module, arguments, options)

    return look


def _search(before, after, inputs, outputs):
    """{kind: Place} of a block, from what `_recorded` gives."""
    close = _comparison(before, after)
    for path, middle in inputs:
        attention = next((a for a, x in outputs if close(before + x, middle, middle - before)), "")
        mlp = next((m for m, x in outputs if close(middle + x, after, after - middle)), "")
        if attention and mlp and attention != mlp:
            return {
                "resid_mid": Place(path, is_input=True),
                "attn_out": Place(attention),
                "mlp_out": Place(mlp),
            }
    for (first, x), (second, y) in product(outputs, outputs):
        of_attention = [ATTENTION in name for name in (first, second)]
        if of_attention == [True, False] and close(before + x + y, after, after - before):
            return {"attn_out": Place(first), "mlp_out": Place(second)}
    return {}


def _comparison(before, after):
    median_bound, bound = BOUNDS[str(after.dtype).removeprefix("torch.")]

    def close(found, expected, added):
        """Whether (batch, length, d) sums agree, beside what was added."""
        error = (found.float() - expected.float()).norm(dim=-1)
        of_added = (error / added.float().norm(dim=-1)).median()
        return bool(
            of_added <= median_bound
            and (error / expected.float().norm(dim=-1)).max() <= bound
            and added.float().norm(dim=-1).median() > 0
        )

    return close
