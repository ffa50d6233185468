"""How many threads NumPy's and SciPy's matrix products take."""

import os


def in_one_thread() -> None:
    """Let OpenBLAS, which both ship, work in one thread; a user's own choice stays.

    Stage 3 makes thousands of small products, in which a second thread is waited for longer than it
    helps: on two cores the probes of the demo took ten seconds instead of two. PyTorch's threads
    are others. To be called before anything loads NumPy, for OpenBLAS reads its variable once.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
