"""Parts that two or more of the scripts need. Nothing here imports config.py or a script.

`from fastsae import load_sae` is the way in for a notebook; it is imported when it is asked for, as
torch takes seconds.
"""


def __getattr__(name):
    if name == "load_sae":
        from fastsae.trained_sae import load_sae

        return load_sae
    raise AttributeError(f"module 'fastsae' has no attribute {name!r}")
