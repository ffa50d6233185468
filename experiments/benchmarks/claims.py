"""What is claimed of training, each measured by train_sae.py as a user runs it.

    python -m experiments.benchmarks.claims --part memory   # peak memory on a 4 GB file with a
    buffer of 256 MB
    python -m experiments.benchmarks.claims --part buffer   # a mixing buffer of 1/8 of the data
    against a full shuffle
    python -m experiments.benchmarks.claims --part dead     # dead features at M = 4,608
    python -m experiments.benchmarks.claims --part several  # three seeds in one pass against three
    runs

The last three read the demo's activations, which `--output-dir` names. Writes
experiments/results/training_<part>.json. planted.py measures that known directions are found again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments.shared.provenance import (
    PROJECT,
    environment,
    module_command,
    run_stage,
    write_result,
)

MEMORY = {"tokens": 3_500_000, "d": 576, "buffer_tokens": 222_000, "m": 256, "k": 8}

EPOCHS = ["--matryoshka-prefixes=none", "--patience", 1000, "--n-epochs"]
# {part: {run: flags of train_sae.py, and constants of the code as shared/constants.py takes them}}
ON_THE_DEMO = {
    "buffer": {
        "full shuffle": [*EPOCHS, 15, "--learning-rate", 1e-3],
        "buffer of 1/8": [*EPOCHS, 15, "--learning-rate", 1e-3, "--buffer-tokens", 7600],
    },
    "dead": {
        "4,608 features": ["--m", 4608, "--k", 32, *EPOCHS, 3],
        "4,608 features that start as tokens": [
            "--m",
            4608,
            "--k",
            32,
            *EPOCHS,
            3,
            "fastsae.training.objective.INIT_DIRECTIONS=data",
        ],
    },
    "several": {
        "seed 0": ["--seed", 0, *EPOCHS, 10],
        "seed 1": ["--seed", 1, *EPOCHS, 10],
        "seed 2": ["--seed", 2, *EPOCHS, 10],
        "seeds 0,1,2": ["--seed", "0,1,2", *EPOCHS, 10],
    },
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["memory", *ON_THE_DEMO], required=True)
    parser.add_argument(
        "--output-dir",
        default=str(PROJECT),
        help="the folder that holds activations/, for the last three parts",
    )
    if sys.argv[1:2] == ["train"]:  # how memory() calls itself: everything behind is train_sae.py's
        return measured_training(sys.argv[2:])
    args = parser.parse_args()
    if args.part in ON_THE_DEMO:
        settings = ON_THE_DEMO[args.part]
        result = {"runs": on_the_demo(args.output_dir, settings)}
        write_result(f"training_{args.part}", settings, result)
    else:
        write_result(f"training_{args.part}", MEMORY, memory())
    return 0


def memory():
    """Peak resident memory of train_sae.py on a file of MEMORY["tokens"] made-up tokens."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "activations" / "activations_layer12.npz"
        write_made_up(path, MEMORY["tokens"], MEMORY["d"])
        flags = [
            "--output-dir",
            folder,
            "--buffer-tokens",
            MEMORY["buffer_tokens"],
            "--m",
            MEMORY["m"],
            "--k",
            MEMORY["k"],
            "--matryoshka-prefixes=none",
            "--n-epochs",
            1,
            "--batch-size",
            4096,
        ]
        done = subprocess.run(
            module_command("experiments.benchmarks.claims", "train", *flags),
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        return {
            "file_gb": round(path.stat().st_size / 1e9, 2),
            **json.loads(done.stdout.splitlines()[-1]),
        }


def write_made_up(path, n, d):
    """An activations file of n normally distributed tokens (n, d), in examples of 100."""
    from fastsae.runtime import artifacts

    lengths = np.full(n // 100, 100, np.int32)
    metadata = artifacts.new_metadata(
        "activations",
        {"LAYER_IDX": 12},
        {"dataset": "made up", "model": "made up"},
        model_name="made up",
        model_revision=None,
        n_examples=len(lengths),
        dataset_path="made up",
    )
    blocks = (
        np.random.default_rng(i).standard_normal((50_000, d), np.float32).astype(np.float16)
        for i in range(n // 50_000)
    )
    artifacts.write_npz(
        path,
        {
            "activations": ((n, d), np.float16, blocks),
            "seq_lengths": lengths,
            "token_ids": np.zeros(n, np.int32),
            "token_kind": np.zeros(n, np.uint8),
            "token_role": np.zeros(n, np.uint8),
            "example_ids": np.arange(1, len(lengths) + 1, dtype=np.int32),
            "metadata": np.array(artifacts.to_json(metadata)),
        },
    )


def on_the_demo(output_dir, runs):
    """{run: figures}, each run in an output folder of its own that shares the activations."""
    rows = {}
    for name, flags in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "activations").symlink_to(Path(output_dir).resolve() / "activations")
            started = time.perf_counter()
            run_stage("train_sae.py", "--output-dir", folder, "--run-name", "claims", *flags)
            metrics = json.loads(
                (Path(folder) / "checkpoints" / "claims" / "metrics.json").read_text()
            )
            rows[name] = {
                key: metrics[key]
                for key in (
                    "normalized_mse",
                    "l0",
                    "dead_fraction",
                    "dead_fraction_training",
                    "seconds",
                )
            }
            rows[name]["seconds_with_start"] = round(time.perf_counter() - started, 1)
        print(name, rows[name])
    return rows


def peak_resident_gb():
    """Of this process, mapped files included. (getrusage's figure would start from that of the
    process that started it.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e6, 3)


def measured_training(flags):
    from fastsae.runtime.stage import run_stage

    sys.argv = ["train_sae.py", *flags]
    import train_sae

    code = run_stage(train_sae.main)
    print(json.dumps({"exit_code": code, "peak_resident_gb": peak_resident_gb()}))
    return code


if __name__ == "__main__":
    sys.exit(main())
