"""The pipeline's parts, in packages named by what they are about. docs/contributing.md has the map.

Nothing here imports config.py or a script.

`from fastsae import extract, train, interpret, load_sae, read_table` is the way in for a notebook;
they are imported when they are asked for, as torch takes seconds.
"""

import importlib

_HOMES = {
    **dict.fromkeys(("extract", "train", "interpret"), "notebook"),
    "load_sae": "trained_sae",
    "read_table": "interpretation.frames",
}


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'fastsae' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastsae.{_HOMES[name]}"), name)
