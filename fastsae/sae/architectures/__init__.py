"""A file for each architecture, entered in `NAMES` of `fastsae/settings/architectures.py`."""

import importlib

from fastsae.sae import Autoencoder
from fastsae.sae.architectures.base import Architecture
from fastsae.settings.architectures import NAMES

REGISTRY: dict[str, Architecture] = {
    name: importlib.import_module(f"{__name__}.{name}").ARCHITECTURE for name in NAMES
}


def of(sae: Autoencoder) -> Architecture:
    """The architecture of an autoencoder that `autoencoder.new_sae` built."""
    return REGISTRY[sae.architecture]
