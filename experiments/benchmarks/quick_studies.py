"""How long every study takes in its --quick form, one after the other, each from nothing: a folder
of its own, no activations yet.

    python -m experiments.benchmarks.quick_studies                  # 45 minutes on two cores
    python -m experiments.benchmarks.quick_studies planted layers   # the others' figures stay

The results of these runs go to a temporary folder, not among the committed ones. Writes
experiments/results/quick_studies.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.shared.provenance import PROJECT, RESULTS, commit, machine, write_result

STUDIES = (
    "fast_vs_block",
    "fast_factors",
    "loss_recovered",
    "steer",
    "layers",
    "pareto",
    "stability",
    "planted",
    "modular_arithmetic",
)
FLAGS = {"steer": ["--ablate"]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)}; all by default")
    chosen = parser.parse_args().studies
    if unknown := [name for name in chosen if name not in STUDIES]:
        sys.exit(f"error: {', '.join(unknown)}: no such study. choose from {', '.join(STUDIES)}.")
    known = RESULTS / "quick_studies.json"
    studies = json.loads(known.read_text())["studies"] if known.exists() else {}
    for name in chosen or STUDIES:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            run(name, folder, "--quick", *FLAGS.get(name, ()))
            studies[name] = {
                "seconds": round(time.perf_counter() - started),
                "commit": commit(),
                **machine(),
            }
        print(f"{name}: {studies[name]['seconds']} s", flush=True)
        write_result(
            "quick_studies",
            {"FLAGS": FLAGS},
            {"studies": {name: studies[name] for name in STUDIES if name in studies}},
        )


def run(study, folder, *flags):
    """A study in `folder`; what it prints goes to a file there, of which the end is shown if it
    fails."""
    log = Path(folder) / "printed.log"
    command = [sys.executable, "-m", f"experiments.studies.{study}", "--output-dir", folder, *flags]
    with log.open("w") as out:
        code = subprocess.run(
            command,
            stdout=out,
            stderr=out,
            cwd=PROJECT,
            env=os.environ | {"FASTSAE_RESULTS": folder},
        ).returncode
    if code:
        sys.exit(
            f"{log.read_text()[-4000:]}\nerror: {study} {' '.join(flags)} ended with exit code "
            f"{code}."
        )


if __name__ == "__main__":
    main()
