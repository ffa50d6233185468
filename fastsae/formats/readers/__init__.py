"""Readers of the autoencoders that other libraries write: a file each, entered in FORMATS.

A reader has `read(path)`, or where only the content tells (torch.save, .npz), `holds(values)` and
`read(path, values)` of what is in the file. It returns `Parts`, or raises InputError where these
could not hold exactly what the files say. Importing this module loads no torch.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.runtime import artifacts
from fastsae.runtime.errors import EnvironmentFailure, InputError

if TYPE_CHECKING:
    from fastsae.formats.parts import Parts


@dataclass(frozen=True)
class Format:
    """What is known of a format before its reader is loaded.

    library: who writes it, for messages.
    files: its names in a folder, the weights first; () where any name will do.
    content: None where the names tell the format, else what its weights are by `detect.kind_of`.
    """

    library: str
    files: tuple[str, ...] = ()
    content: str | None = None


# the registry: by the name of the reader's file, in the order in which a folder is looked at
FORMATS = {
    "saelens": Format("SAELens", ("sae_weights.safetensors", "cfg.json")),
    "sparsify": Format("sparsify", ("sae.safetensors", "cfg.json")),
    "hypothesaes": Format("HypotheSAEs", content="torch"),
    "dictionary_learning": Format("dictionary_learning", ("ae.pt", "config.json"), "torch"),
    "gemma_scope": Format("Gemma Scope", ("params.npz",), "npz"),
    "gemma_scope_2": Format("Gemma Scope 2", ("params.safetensors", "config.json")),
}
LIBRARIES = " or ".join(
    ", ".join(form.library for form in FORMATS.values()).rsplit(", ", maxsplit=1)
)


def read(kind: str, path: Path) -> "Parts":
    """`Parts` of the weights at `path`; kind: a name in FORMATS, or the content torch or npz.

    Raises InputError for what no reader takes, EnvironmentFailure for damage.
    """
    if kind in FORMATS:
        return _reader(kind).read(path)
    values = _content(kind, path)
    known = [name for name, form in FORMATS.items() if form.content == kind]
    for name in known:
        if _reader(name).holds(values):
            return _reader(name).read(path, values)
    libraries = " or ".join(FORMATS[name].library for name in known)
    raise InputError(
        f"{path}: holds {type(values).__name__}, not an autoencoder as {libraries} saves it. "
        "give the file that the library wrote."
    )


def _reader(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


def _content(kind: str, path: Path) -> Any:
    """What a file of torch.save or an .npz holds. EnvironmentFailure for a checkpoint of this
    project whose end, with its checksum, is gone."""
    if kind == "npz":
        return artifacts.read_foreign_npz(path)
    values = artifacts.read_foreign_checkpoint(path)
    if isinstance(values, dict) and isinstance(values.get("meta"), dict) and "config" in values:
        raise EnvironmentFailure(
            f"{path}: is a checkpoint of this project without its checksum: "
            "damaged, or saved again. get another copy, or run train_sae.py."
        )
    return values
