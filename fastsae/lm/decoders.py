"""The blocks of a causal decoder, found by structure: the one place that knows how transformers
builds its models.

A model is read if it has one list of as many blocks as its configuration counts, directly in the
module that takes token ids. `residual.ResidualModel` then tries that each block passes its output
to the next one, and that no token sees a later one.
"""

import contextlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastsae.runtime.errors import InputError

if TYPE_CHECKING:
    import torch

ACCEPTED = (
    "choose a causal decoder, such as Llama, Qwen, Gemma, Mistral, GPT-2, Pythia, OPT, Phi, "
    "Falcon, BLOOM or Mamba (docs/models.md)"
)
# what the norm after the last block is called, beside the blocks
FINAL_NORMS = (
    "norm",
    "final_layernorm",
    "final_layer_norm",
    "ln_f",
    "norm_f",
    "final_norm",
    "layer_norm",
    "layernorm",
    "embedding_norm",
    "out_norm",
    "ln_out",
)
# modules of a block that read an encoder
CROSS_ATTENTION = ("encoder_attn", "cross_attn", "crossattention")


class Enough(Exception):
    """Raised by a hook when nothing after it is needed; `Decoder.run` ends there."""


@dataclass(frozen=True)
class Decoder:
    """The part of a model that holds the blocks.

    `module` takes token ids and calls the blocks in order; `path` is the address of the blocks in
    the whole model, as in `transformer.h`; `norm_name` names the norm after the last block in
    `module`, None where there is none.
    """

    module: Any
    path: str
    norm_name: str | None

    @property
    def layers(self) -> Any:
        """The blocks, a ModuleList."""
        return getattr(self.module, self._list_name)

    @property
    def norm(self) -> Any:
        """The norm after the last block, or None."""
        return getattr(self.module, self.norm_name) if self.norm_name else None

    @property
    def config(self) -> Any:
        """The configuration of the text model."""
        return self.module.config

    @property
    def _list_name(self) -> str:
        return self.path.rpartition(".")[2]

    def to(self, device: str) -> None:
        """Move blocks and embeddings to a device."""
        self.module.to(device)

    def keep_first(self, n_blocks: int) -> None:
        """Drop the later blocks, so that their memory is free. A run must end before them."""
        setattr(self.module, self._list_name, self.layers[:n_blocks])

    def run(
        self, ids: "torch.Tensor", cache: Any = None, positions: "torch.Tensor | None" = None
    ) -> None:
        """Call the blocks on ids (batch, length) for the sake of their hooks, until one raises
        `Enough`. `cache`: keys and values of tokens before them, which the run extends;
        `positions` (batch, length): of the tokens, where they do not follow from the two."""
        options = {"input_ids": ids, "past_key_values": cache, "use_cache": cache is not None}
        if cache is None:
            del options["past_key_values"]
        if positions is not None:
            options["position_ids"] = positions
        with contextlib.suppress(Enough):
            self.module(**{name: options[name] for name in options if self.takes(name)})

    def takes(self, option: str) -> bool:
        """Whether the module has an argument of this name."""
        return option in inspect.signature(self.module.forward).parameters

    def table_length(self) -> int | None:
        """How many positions the model has a row for, in a table of positions or a mask that its
        blocks hold; None where positions are computed."""
        import torch

        n = getattr(self.config, "max_position_embeddings", None)
        if not n:
            return None
        words = self.module.get_input_embeddings()
        for module in self.module.children():
            if isinstance(module, torch.nn.Embedding) and module is not words:
                if module.num_embeddings - getattr(module, "offset", 0) == n:
                    return n
        held = [*self.module.named_buffers(recurse=False), *self.layers[0].named_buffers()]
        tables = (buffer for _, buffer in held if buffer.ndim >= 2)
        return n if any(n in (table.shape[0], table.shape[-1]) for table in tables) else None


def stream_of(output: Any) -> "torch.Tensor":
    """The residual stream in what a block returns: the tensor itself, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_stream(output: Any, stream: "torch.Tensor") -> Any:
    """What a block returns, with another stream in its place."""
    if isinstance(output, (tuple, list)):
        return type(output)([stream, *output[1:]])
    return stream


def decoder_stack(model: "torch.nn.Module") -> Decoder:
    """The `Decoder` of a model for causal language modelling. InputError where there is none."""
    import torch
    from transformers import PreTrainedModel

    found = []
    if isinstance(model, PreTrainedModel):
        text = model.config.get_text_config()
        n_blocks = getattr(text, "num_hidden_layers", None)
        for where, module in model.named_modules():
            if isinstance(module, PreTrainedModel) and type(module.config) is type(text):
                found += [
                    (module, f"{where}.{name}".lstrip("."))
                    for name, child in module.named_children()
                    if isinstance(child, torch.nn.ModuleList) and len(child) == n_blocks
                ]
    kind = type(model).__name__
    if len(found) != 1:
        raise InputError(f"MODEL_NAME: {kind} is not built as one list of blocks. {ACCEPTED}.")
    module, path = found[0]
    norm_name = next((name for name in FINAL_NORMS if getattr(module, name, None)), None)
    decoder = Decoder(module, path, norm_name)
    if any(hasattr(decoder.layers[0], name) for name in CROSS_ATTENTION):
        raise InputError(f"MODEL_NAME: {kind} is the decoder of an encoder. {ACCEPTED}.")
    return decoder


def require_decoder(config: Any, name: str) -> None:
    """InputError unless transformers builds a causal decoder from this configuration of the model
    `name`. No weights are read."""
    import torch
    import transformers

    kind = f"MODEL_NAME: {name} ({config.model_type})"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{kind} is an encoder-decoder model. {ACCEPTED}.")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{kind} is not a causal language model in transformers. {ACCEPTED}.")
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    # classes that cannot be built without weights: loading them says what is wrong, if anything
    except Exception:
        return
    decoder_stack(model)
