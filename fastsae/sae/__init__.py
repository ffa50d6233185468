"""Sparse autoencoders: the module, its architectures, the sparse training step, metrics."""

from typing import Any, TypeAlias

# A `hypothesaes.sae.SparseAutoencoder` as `autoencoder.new_sae` builds it. The name is for readers:
# HypotheSAEs has no types of its own and takes seconds to import.
Autoencoder: TypeAlias = Any
