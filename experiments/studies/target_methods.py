"""Which selection method and pooling put features first that hold on the other half, and what the
features cost.

    python -m experiments.studies.target_methods \\
        --data demo OUT_1 data/cognitive_actions.jsonl cognitive_action \\
        --data "grade-school maths" OUT_2 dialogues.jsonl steps,log_answer

Each OUT holds the outputs of stages 1 and 2 on the dataset named behind it. A field of numbers is
one target, a field of texts one target for each of its --n-values commonest values. Per target,
half split, method and pooling: the correlation on the half that chose nothing, with the sign it had
where it was chosen, of the first 5 and 20 features; and a ridge regression on these 20.
least_support: with or without the rule that too few texts of the finding half, firing or silent,
are no evidence. `hypotheses` has per target what stage 3 gives by default: its first features with
their held-out figures, and the ridge regression on all 20 beside as many of random tokens, all
features, the activations themselves and a bag of words, with intervals over half splits.

The targets of gsm8k_dialogues were added to its rows: `steps`, how many computations ("<<") the
answer has, and `log_answer`, the logarithm of 1 + the size of its number.

Writes experiments/results/target_methods.json; what is there of other datasets stays.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import fastsae.interpretation.target_features as tf
from experiments.shared.finished_runs import finished
from experiments.shared.provenance import RESULTS, write_result

METHODS = ("separation_score", "correlation", "lasso")
N_FIRST, N_SELECTED = 5, 20
DEFAULT = {"method": "correlation", "pooling": "mean"}  # of stage 3
NAME = "target_methods"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        nargs=4,
        action="append",
        required=True,
        metavar=("NAME", "OUTPUT_DIR", "DATASET", "FIELDS"),
    )
    parser.add_argument("--n-values", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3, help="half splits of each target")
    args = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text())["datasets"] if path.exists() else {}
    for name, folder, dataset, fields in args.data:
        results[name] = study(Path(folder), dataset, fields.split(","), args)
    write_result(
        NAME,
        {
            "n_values": args.n_values,
            "seeds": args.seeds,
            "n_selected": N_SELECTED,
            "n_first": N_FIRST,
            "method_version": tf.METHOD_VERSION,
        },
        {"datasets": results},
    )


def study(folder, dataset, fields, args):
    """Means over targets and half splits of one dataset."""
    run = finished(folder, dataset)
    evidence, s = run.evidence, run.evidence.statistics
    pooled = {"max": s.pooled_max, "mean": s.pooled_mean}
    texts = evidence.text_numbers[s.pooled_examples]
    targets = dict(targets_of(dataset, fields, evidence, args.n_values))
    rows, hypotheses = {}, {}
    for name, target in targets.items():
        for seed in range(args.seeds):
            for pooling, matrix in pooled.items():
                for method in METHODS:
                    for support in (True, False):
                        figures = one(matrix, target, texts, method, seed, support)
                        rows.setdefault((method, pooling, support), []).append(figures)
        hypotheses[name] = by_default(run, pooled[DEFAULT["pooling"]], target, texts)
        found = hypotheses[name]["sources"]
        shown = {source: round(entry["held_out"], 3) for source, entry in found.items()}
        print(name, shown, file=sys.stderr)
    return {
        "n_examples": len(s.pooled_examples),
        "n_targets": len(targets),
        "autoencoder": run.about(),
        "measure": "AUC" if all(tf.is_binary(t) for t in targets.values()) else "R2",
        "methods": [
            {"method": method, "pooling": pooling, "least_support": support, **means(found)}
            for (method, pooling, support), found in rows.items()
        ],
        "hypotheses": hypotheses,
    }


def by_default(run, pooled, target, texts):
    """What stage 3 gives for a target: {"first": its first hypotheses} and what `compare` says."""
    first = tf.select_features(pooled, target, N_SELECTED, DEFAULT["method"], 0, texts)[:N_FIRST]
    beside = tf.compare(
        pooled,
        target,
        run.evidence.statistics.pooled_examples,
        texts,
        run.untrained,
        run.evidence.text_read,
        n_select=N_SELECTED,
        **DEFAULT,
        seed=0,
    )
    assert beside is not None  # None only where a half has one value
    return {"first": first, **beside}


def targets_of(dataset, fields, evidence, n_values):
    """(name, target of the pooled examples) of every target."""
    with open(dataset, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    rows = [lines[evidence.data["example_ids"][i] - 1] for i in evidence.statistics.pooled_examples]
    for field in fields:
        values = [row[field] for row in rows]
        if all(isinstance(value, (int, float)) for value in values):
            yield field, np.array(values, float)
        else:
            for value, _ in sorted(
                Counter(values).most_common(), key=lambda pair: (-pair[1], pair[0])
            )[:n_values]:
                yield f"{field} = {value}", np.array([v == value for v in values], float)


def one(pooled, target, texts, method, seed, support):
    """Figures of one selection."""
    rule = tf.least_support
    tf.least_support = rule if support else lambda target: 0
    try:
        found = tf.select_features(pooled, target, N_SELECTED, method, seed, texts)
    finally:
        tf.least_support = rule
    signed = [np.sign(entry["score"]) * (entry["held_out_correlation"] or 0) for entry in found]
    columns = pooled.toarray()[:, [entry["feature"] for entry in found]]
    half = tf.finding_half(target, seed, texts)
    ridge = tf.held_out_scores({"selected": columns}, target, half)["selected"]["held_out"]
    return {
        "n": len(found),
        "first_1": signed[0] if signed else 0.0,
        "first_5": float(np.mean(signed[:N_FIRST] or [0])),
        "first_20": float(np.mean(signed or [0])),
        "held_out": ridge,
    }


def means(entries):
    """Mean over entries of each figure."""
    return {
        name: round(
            float(np.mean([entry[name] for entry in entries if entry[name] is not None])), 4
        )
        for name in entries[0]
    }


if __name__ == "__main__":
    main()
