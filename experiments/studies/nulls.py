"""What training added over dictionaries that nobody trained, with mean and max pooling, on several
datasets.

    python -m experiments.studies.nulls --data demo OUT_1 "" \\
        --data "cognitive actions" OUT_2 "--dataset-path texts.jsonl --label-field action"

Each OUT holds the outputs of stages 1 and 2; behind it the flags with which they were made. Stage 3
runs on it with either POOLING, without a language model, and its run table is kept: probes of the
categories on held-out halves from the features, from random tokens and random directions as
dictionaries, from the model's stream and from the words; loss recovered; seconds and memory of the
stage. Writes experiments/results/<name>.json; what this code measured before is read from
OUT/experiments/nulls.jsonl.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from experiments.shared.provenance import environment, module_command, remembered, write_result

POOLINGS = ("mean", "max")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", nargs=3, action="append", required=True, metavar=("NAME", "OUTPUT_DIR", "FLAGS")
    )
    parser.add_argument("--name", default="nulls")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name, folder, flags in args.data:
        journal = Path(folder) / "experiments" / "nulls.jsonl"
        for pooling in POOLINGS:
            results.setdefault(name, {})[pooling] = remembered(
                journal,
                {"flags": flags, "pooling": pooling},
                lambda: measured(Path(folder), shlex.split(flags), pooling),
            )
    for name, by_pooling in results.items():
        show(name, by_pooling)
    write_result(args.name, {"poolings": POOLINGS}, {"datasets": results})


def measured(folder: Path, flags: list[str], pooling: str) -> dict[str, Any]:
    """The run table of stage 3 on the outputs in `folder`, with the seconds and the memory that the
    stage took."""
    for path in folder.glob("interpretations*"):
        path.unlink()
    shutil.rmtree(folder / "neuronpedia", ignore_errors=True)
    settings = ["--output-dir", str(folder), "--n-top-neurons", "0", *flags]
    constant = f"fastsae.interpretation.features.POOLING={pooling}"
    how = ("experiments.shared.constants", constant, "interpret_sae.py")
    command = module_command(*how, *settings)
    started = time.perf_counter()
    # not subprocess: wait4 says what this one process took
    pid = os.posix_spawn(sys.executable, command, environment())
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(code)
    with open(folder / "interpretations.jsonl", encoding="utf-8") as table:
        head = json.loads(next(table))
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_megabytes": round(usage.ru_maxrss / 1000),
        "summary": head["summary"],
        **head["run_table"],
    }


def show(name: str, by_pooling: dict[str, Any]) -> None:
    """The figures of a dataset on the terminal."""
    from fastsae.interpretation.run_table import describe

    for pooling, found in by_pooling.items():
        used = f"{found['cpu_seconds']} CPU seconds, {found['peak_megabytes']} MB"
        print(f"{name}, {pooling} pooling ({used})")
        print(*(f"  {line}" for line in describe(found, found["summary"])), sep="\n")


if __name__ == "__main__":
    main()
