"""Benchmarks, studies and the pages that quote them. Run one from the project's folder, for example
`python -m experiments.studies.planted --quick`; `--help` says what it measures, reads and writes.
"""

from fastsae.settings import startup

startup.explain_slips()  # of config.py, which most experiments import after this package
