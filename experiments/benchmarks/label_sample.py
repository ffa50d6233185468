"""Thirty features drawn by a seed, with what a reader sees of them, to be judged.

    python -m experiments.benchmarks.label_sample --output-dir results/demo
    python -m experiments.benchmarks.label_sample --judgements judged.json --reader "a colleague" \\
        --output-dir results/demo

Reads a folder that run_pipeline.py has filled. The first command prints each feature's label, its
strongest examples and its ordinary ones, each with its share of the feature's maximum, the shaded
token between « », and nothing of how the label was made or scored. `judged.json` holds
{"<feature>": ["right", "why"], ...}; right: the label tells where the feature fires in nearly all
of the examples above 0.3 (all but one), of which alone it speaks; partial: in some, or it names
much that they do not show; useless: it does not help. The second command writes
experiments/results/label_sample.json: the texts, the labels, the judgements and their counts.
With --before the labels are the four most characteristic tokens, which were the labels once.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import config
from experiments.benchmarks.labels import N_TOKENS, collected
from experiments.shared.provenance import PROJECT, write_result

N_FEATURES = 30
VERDICTS = ("right", "partial", "useless")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--judgements", type=Path)
    parser.add_argument("--reader", default="one reader", help="who judged, as a result says it")
    parser.add_argument("--before", action="store_true")
    parser.add_argument("--sample-seed", type=int, default=0)
    args, flags = parser.parse_known_args()
    settings = config.resolve(PROJECT / "interpret_sae.py", argv=flags)
    features, _ = collected(settings)
    alive = [row["feature"] for row in features.rows if row["status"] != "dead"]
    order = np.random.default_rng(args.sample_seed).permutation(alive)
    drawn = sorted(order[:N_FEATURES].tolist())
    sample = [shown(features, j) for j in drawn]
    if args.before:
        for one in sample:
            top = features.evidence.top_tokens[one["feature"]][:N_TOKENS]
            one["label"] = ", ".join(f"'{name}'" for name, _ in top)
    if args.judgements is None:
        for one in sample:
            print(f"\n{one['feature']}: {one['label']}")
            print(*(f"   {text}" for text in one["strongest"]), sep="\n")
            print(*(f"   ~ {text}" for text in one["ordinary"]), sep="\n")
        return
    judged = json.loads(args.judgements.read_text(encoding="utf-8"))
    if missing := [j for j in drawn if judged.get(str(j), [""])[0] not in VERDICTS]:
        sys.exit(f"error: {args.judgements}: no verdict on {missing}. give {', '.join(VERDICTS)}.")
    for one in sample:
        one["verdict"], one["why"] = judged[str(one["feature"])]
        if not args.before:
            one["label_f1"] = features.rows[one["feature"]]["label_f1"]
    counts = {verdict: sum(one["verdict"] == verdict for one in sample) for verdict in VERDICTS}
    write_result(
        "label_sample_before" if args.before else "label_sample",
        {
            "dataset": str(settings.DATASET_PATH),
            "sample_seed": args.sample_seed,
            "reader": args.reader,
        },
        {"counts": counts, "features": sample},
    )


def shown(features, j):
    """A feature as the report has it: label, strongest and ordinary examples."""
    from fastsae.data.token_text import excerpt

    evidence, row = features.evidence, features.rows[j]
    texts = {"strongest": [], "ordinary": []}
    shown = evidence.shown_examples([j])[j]
    values = evidence.token_values([(j, example) for _, example, _ in shown])
    for quantile, example, peak in shown:
        share = values[j, example][1].max() / row["max_activation"]
        text = excerpt(evidence.token_texts(example), peak, evidence.own_start(example))
        texts["strongest" if quantile is None else "ordinary"].append(f"{share:.2f} {text}")
    return {"feature": j, "label": row["label"], **texts}


if __name__ == "__main__":
    main()
