"""This project's training against HypotheSAEs' own `fit`: same activations, same split by example,
same M, K, prefixes and batch size; learning rate, epochs and stopping as each has them by default.

    python -m experiments.benchmarks.hypothesaes --name compare_cognitive_500 --seeds 0 1 2 \\
        --flags "--dataset-path ../shared/data/cognitive_actions_1350.jsonl --max-examples 500"

For each seed: `train_sae.py`, then `SparseAutoencoder.fit` on exactly the tokens it trained on.
Both are measured on the same test tokens by the same code. Writes experiments/results/<name>.json.
"""

import argparse
import json
import shlex
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments.shared.provenance import run_stage, write_result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="compare_demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--flags", default="", help="flags handed to the stages, in one string")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run_stage("extract_activations.py", "--output-dir", folder, *shlex.split(args.flags))
        for seed in args.seeds:
            run_stage(
                "train_sae.py", "--output-dir", folder, "--seed", seed, *shlex.split(args.flags)
            )
            rows.append({"seed": seed, **compare(Path(folder))})
            print(json.dumps(rows[-1]))
    mean = {
        side: {name: float(np.mean([row[side][name] for row in rows])) for name in rows[0][side]}
        for side in ("ours", "hypothesaes")
    }
    ratio = float(
        np.median([row["hypothesaes"]["seconds"] / row["ours"]["seconds"] for row in rows])
    )
    write_result(
        args.name,
        {"flags": args.flags, "seeds": args.seeds, "rate_and_epochs": "of each by default"},
        {"runs": rows, "mean": mean, "hypothesaes_seconds_over_ours_median": ratio},
    )


def compare(folder):
    """Train HypotheSAEs on the tokens of the checkpoint under `folder`; both sides' figures."""
    import torch
    from hypothesaes.sae import SparseAutoencoder

    from fastsae.data.token_masks import token_norms, usable_tokens
    from fastsae.formats.load import load_sae

    metrics_path = next(folder.glob("checkpoints/*/metrics.json"))
    metrics = json.loads(metrics_path.read_text())
    ours, meta = load_sae(metrics_path.with_name(metrics["checkpoint"]))
    data = dict(np.load(next(folder.glob("activations/*.npz"))))
    example = np.repeat(np.arange(len(data["seq_lengths"])), data["seq_lengths"])
    usable, _ = usable_tokens(
        token_norms(data["activations"]),
        data["token_kind"],
        exclude_shared_prefix=True,
        max_norm_ratio=None,
        max_norm=meta["max_norm"],
    )
    validation, test = (
        np.isin(example, meta[f"{part}_examples"]) for part in ("validation", "test")
    )
    activations = torch.from_numpy(data["activations"])
    chosen = meta["settings"]
    torch.manual_seed(chosen["SEED"])
    theirs = SparseAutoencoder(
        activations.shape[1],
        chosen["M"],
        chosen["K"],
        device="cpu",
        prefix_lengths=chosen["MATRYOSHKA_PREFIXES"] if chosen["USE_MATRYOSHKA"] else None,
    )
    started = time.perf_counter()
    history = theirs.fit(
        activations[usable & ~validation & ~test].float(),
        activations[usable & validation].float(),
        show_progress=False,
        batch_size=chosen["BATCH_SIZE"],
    )
    seconds = time.perf_counter() - started
    return {
        "ours": {
            **figures(ours, data, usable & test, example),
            "seconds": metrics["seconds"],
            "epochs": metrics["epochs"],
        },
        "hypothesaes": {
            **figures(theirs.eval(), data, usable & test, example),
            "seconds": round(seconds, 2),
            "epochs": len(history["train_loss"]),
        },
    }


def figures(sae, data, chosen, example):
    import torch

    from fastsae.sae.metrics import evaluate

    result = evaluate(
        sae,
        torch.from_numpy(data["activations"]),
        np.flatnonzero(chosen),
        example,
        data["token_kind"] != 0,
    )
    return {name: result[name] for name in ("normalized_mse", "l0", "dead_fraction")}


if __name__ == "__main__":
    main()
