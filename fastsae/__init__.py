"""The pipeline's parts, in packages named by what they are about. docs/contributing.md has the map.

Nothing here imports config.py or a script.

`from fastsae import load_sae` is the way in for a notebook; it is imported when it is asked for, as
torch takes seconds.
"""


def __getattr__(name):
    if name == "load_sae":
        from fastsae.trained_sae import load_sae

        return load_sae
    raise AttributeError(f"module 'fastsae' has no attribute {name!r}")
