"""Language models: where they come from, their residual stream, checks and fast CPU kernels."""
