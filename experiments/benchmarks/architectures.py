"""The five architectures on the same activations: L0, normalised MSE and dead features of each, in
one table.

    # on the demo's activations,
    python -m experiments.benchmarks.architectures
    if they are there
    # on those of another run,
    python -m experiments.benchmarks.architectures --output-dir results/topics
    which --flags may name further

Each is trained by train_sae.py with the same M, K, epochs and learning rate. Standard and Gated
have no K: their L1 coefficient is the one at which about K features fire. Writes
experiments/results/architectures.json.
"""

import argparse
import json
import shlex
import tempfile
from pathlib import Path

from experiments.shared.provenance import PROJECT, run_stage, write_result

VARIANTS = {
    "topk": [],
    "batchtopk": [],
    "jumprelu": [],
    "standard": ["--sparsity-coefficient", "3.5"],
    "gated": ["--sparsity-coefficient", "6"],
}
COMMON = [
    "--m",
    "256",
    "--k",
    "8",
    "--matryoshka-prefixes=none",
    "--n-epochs",
    "10",
    "--patience",
    "10",
    "--learning-rate",
    "1e-3",
    "--lr-schedule",
    "linear",
    "--run-name",
    "architectures",
]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output-dir", default=str(PROJECT), help="the folder that holds activations/"
    )
    parser.add_argument("--flags", default="", help="flags handed to train_sae.py, in one string")
    args = parser.parse_args()
    rows = {}
    for name, flags in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "activations").symlink_to(
                Path(args.output_dir).resolve() / "activations"
            )
            run_stage(
                "train_sae.py",
                "--output-dir",
                folder,
                *COMMON,
                "--architecture",
                name,
                *flags,
                *shlex.split(args.flags),
            )
            metrics = json.loads(
                (Path(folder) / "checkpoints" / "architectures" / "metrics.json").read_text()
            )
        rows[name] = {
            key: metrics[key]
            for key in ("l0", "normalized_mse", "dead_fraction", "epochs", "best_epoch", "seconds")
        }
        print(name, rows[name])
    write_result(
        "architectures",
        {"common": COMMON, "variants": VARIANTS, "flags": args.flags},
        {"runs": rows},
    )


if __name__ == "__main__":
    main()
