"""Sparse autoencoders: the module, its architectures, the sparse training step, metrics."""
