"""A model, its tokenizer and its configuration, by the name in MODEL_NAME.

All raise InputError or EnvironmentFailure, one line that says what to do.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.lm import hub
from fastsae.lm.decoders import require_decoder
from fastsae.lm.files import base_of_adapter
from fastsae.lm.first_blocks import shortened
from fastsae.lm.sources import model_source
from fastsae.runtime.errors import InputError

if TYPE_CHECKING:
    import torch


def load_tokenizer(name: str, *, revision: str | None = None, cache_dir: str | None = None) -> Any:
    """The model's fast tokenizer."""
    tokenizer = hub.read_pretrained(
        hub.quiet_transformers().AutoTokenizer.from_pretrained,
        model_source(name, cache_dir),
        name,
        **hub.hub_options(revision, cache_dir),
    )
    if not tokenizer.is_fast:
        raise InputError(
            f"MODEL_NAME: {name} has no fast tokenizer, which token positions need. "
            "choose another model."
        )
    return tokenizer


def load_model(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    dtype: "torch.dtype",
    device: str | None = None,
    n_blocks: int | None = None,
) -> Any:
    """The whole model, head included, for inference; on the CPU unless `device` is given.

    n_blocks: how many of its blocks are needed. It may have more: where its files hold all of them
    in one piece, or what is built depends on their number.
    """
    transformers, located = hub.quiet_transformers(), model_source(name, cache_dir)
    options = hub.gguf_options(transformers) if located.endswith(".gguf") else {}
    if n_blocks is not None and not options and base_of_adapter(Path(located)) is None:
        config = load_config(name, revision=revision, cache_dir=cache_dir, whole=True)
        shorter = shortened(config, n_blocks)
        options = {} if shorter is None else {"config": shorter}
    model = hub.read_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained,
        located,
        name,
        dtype=dtype,
        **options,
        **hub.hub_options(revision, cache_dir),
    )
    return (model if device is None else model.to(device)).eval()


def load_config(
    name: str, *, revision: str | None = None, cache_dir: str | None = None, whole: bool = False
) -> Any:
    """The configuration of the text model (of a multimodal model, its text part, or `whole`).

    InputError for a model that is not a causal decoder: before its weights are read or fetched.
    """
    config = hub.read_pretrained(
        hub.quiet_transformers().AutoConfig.from_pretrained,
        model_source(name, cache_dir),
        name,
        **hub.hub_options(revision, cache_dir),
    )
    require_decoder(config, name)
    return config if whole else config.get_text_config()


def check_layer(config: Any, layer: int, name: str) -> None:
    """InputError if the model `name` of this configuration has fewer than `layer` blocks."""
    if layer > config.num_hidden_layers:
        raise InputError(
            f"LAYER_IDX: {layer} is beyond the {config.num_hidden_layers} layers of {name}. "
            f"give 1 to {config.num_hidden_layers}."
        )
