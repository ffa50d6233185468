"""Run a pipeline as the README does and keep its figures: time of each stage, sizes, metrics,
category evidence.

    python -m experiments.benchmarks.demo
    python -m experiments.benchmarks.demo --name demo_cognitive_500 \\
        --flags "--dataset-path ../shared/data/cognitive_actions_1350.jsonl --max-examples 500"

Writes experiments/results/<name>.json.
"""

import argparse
import json
import shlex
import tempfile
import time
from pathlib import Path

from experiments.shared.provenance import run_stage, write_result

STAGES = ("extract_activations.py", "train_sae.py", "interpret_sae.py")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="demo")
    parser.add_argument("--flags", default="", help="flags handed to the stages, in one string")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--output-dir", folder, *shlex.split(args.flags)]
        known = {script: stage_flags(script, flags) for script in STAGES}
        seconds = {}
        for script in STAGES:
            started = time.perf_counter()
            run_stage(script, *known[script])
            seconds[script] = round(time.perf_counter() - started, 1)
        started = time.perf_counter()
        run_stage("run_pipeline.py", *flags)
        seconds["run_pipeline.py, nothing changed"] = round(time.perf_counter() - started, 1)
        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        with open(Path(folder) / "interpretations.jsonl", encoding="utf-8") as table:
            head = json.loads(next(table))
        training = json.loads(next(Path(folder).glob("checkpoints/*/metrics.json")).read_text())
        training.pop("run_table")  # below
        write_result(
            args.name,
            {"flags": args.flags},
            {
                "seconds": seconds,
                "seconds_total": round(sum(seconds[script] for script in STAGES), 1),
                "bytes": {str(path.relative_to(folder)): path.stat().st_size for path in files},
                "extraction": json.loads(next(Path(folder).glob("activations/*.json")).read_text()),
                "training": training,
                "interpretation": head["summary"],
                "run_table": head["run_table"],
            },
        )


def stage_flags(script, flags):
    """The flags that one stage knows, as run_pipeline.py would hand them on."""
    import config

    return config.resolve(*(config.PROJECT / name for name in STAGES), argv=flags).flags_for(script)


if __name__ == "__main__":
    main()
