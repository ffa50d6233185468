"""The first blocks of a model without the others: what is never run need not be read from the disk
and made into another precision."""

import copy
from typing import Any

from fastsae.lm.decoders import decoder_stack
from fastsae.runtime.errors import InputError

PLAIN = (bool, int, float, str, type(None))


def shortened(config: Any, n_blocks: int) -> Any | None:
    """A copy of a model's configuration with `n_blocks` blocks; None where it has no more, or where
    a model of the copy would be built otherwise.

    Both are built without weights, and compared module by module: kinds, plain attributes, shapes.
    So a model whose blocks depend on how many there are is read whole.
    """
    text = config.get_text_config()
    n_all = getattr(text, "num_hidden_layers", None)
    if not isinstance(n_all, int) or n_all <= n_blocks:
        return None
    shorter = copy.deepcopy(config)
    try:
        _shorten(shorter.get_text_config(), n_all, n_blocks)
        whole, part = _description(config, n_blocks), _description(shorter, n_blocks)
    # what a model's author chose to raise at a configuration that is not as usual
    except Exception:
        return None
    return shorter if whole == part else None


def without_weights(config: Any) -> Any:
    """The model of a configuration with shapes alone, which take no memory. Raises what its author
    chose to raise."""
    import torch
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def _shorten(text, n_all, n_blocks):
    """Let a configuration have `n_blocks` blocks, lists with a value for each block included."""
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == n_all:
            setattr(text, name, value[:n_blocks])
    text.num_hidden_layers = n_blocks


def _description(config, n_blocks):
    """{address: what is there} of the modules of a model of this configuration, its blocks after
    the first `n_blocks` left out."""
    model = without_weights(config)
    stack = decoder_stack(model)
    if len(stack.layers) < n_blocks:
        raise InputError("fewer blocks than asked for")
    left_out = tuple(f"{stack.path}.{i}." for i in range(n_blocks, len(stack.layers)))
    found = {}
    for name, module in model.named_modules():
        if not f"{name}.".startswith(left_out):
            found[name] = (
                type(module),
                _plain(module, len(stack.layers), n_blocks),
                _shapes(module),
            )
    return found


def _plain(module, n_all, n_blocks):
    """A module's attributes that are plain values, or lists of them; of a list with a value for
    each block those of the first."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, (list, tuple)):
            values = list(value[:n_blocks] if len(value) == n_all else value)
            if all(isinstance(each, PLAIN) for each in values):
                found[name] = values
        elif isinstance(value, PLAIN):
            found[name] = value
    return found


def _shapes(module):
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own}
