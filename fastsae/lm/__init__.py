"""Language models: where they come from, their residual stream, checks and fast CPU kernels.

The hook is placed by `residual.ResidualModel`; `hook_points.py` says what that place is called.
"""
