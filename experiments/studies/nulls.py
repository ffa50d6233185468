"""What training added over dictionaries that nobody trained, or of which one part was not trained,
with mean and max pooling, on several datasets.

    python -m experiments.studies.nulls --partly-trained \\
        --data demo OUT_1 data/cognitive_actions.jsonl cognitive_action \\
        --data other OUT_2 texts.jsonl action

Each OUT holds the outputs of stages 1 and 2 on the dataset named behind it; then comes its field of
categories. With either POOLING the probes of stage 3: of the categories on held-out halves, from
the features, from random tokens and random directions as dictionaries, with --partly-trained from
autoencoders that are trained in part (`experiments/shared/partly_trained.py`), from the model's
stream and from the words. And what the model loses with the reconstruction in place of its stream,
as stage 3 measures it. Writes experiments/results/<name>.json; what is there of other datasets
stays.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.shared.finished_runs import Finished, finished
from experiments.shared.provenance import RESULTS, write_result

POOLINGS = ("mean", "max")
AUC_BOUND = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        nargs=4,
        action="append",
        required=True,
        metavar=("NAME", "OUTPUT_DIR", "DATASET", "FIELD"),
    )
    parser.add_argument("--name", default="nulls")
    parser.add_argument(
        "--partly-trained",
        action="store_true",
        help="train three autoencoders of each dataset in part, which takes three trainings",
    )
    args = parser.parse_args()
    path = RESULTS / f"{args.name}.json"
    results = json.loads(path.read_text())["datasets"] if path.exists() else {}
    for name, folder, dataset, field in args.data:
        parts, beside = partly_trained_beside()
        run = finished(Path(folder), dataset, field, beside if args.partly_trained else None)
        results[name] = {**measured(run), "partly_trained": parts}
        show(name, results[name])
    write_result(args.name, {"poolings": POOLINGS, "auc_bound": AUC_BOUND}, {"datasets": results})


def partly_trained_beside() -> tuple[dict[str, Any], Callable[[Path, Mapping[str, Any]], list]]:
    """({kind: figures of its reconstruction}, `beside` of `finished`, which fills that)."""
    parts: dict[str, Any] = {}

    def beside(path, meta):
        from experiments.shared import partly_trained

        tokens, found = partly_trained.tokens_of(path, meta), []
        for kind in partly_trained.KINDS:
            started = time.process_time()
            sae = partly_trained.trained(kind, meta, tokens)
            parts[kind] = partly_trained.figures(sae, tokens)
            parts[kind]["cpu_seconds"] = round(time.process_time() - started, 1)
            print(f"{kind}: {parts[kind]}", file=sys.stderr)
            found.append(partly_trained.as_dictionary(kind, sae))
        return found

    return parts, beside


def measured(run: Finished) -> dict[str, Any]:
    """What the features are worth with each pooling, and what the model loses; CPU seconds."""
    from fastsae.interpretation.run_table import Probed, core_figures, probe

    evidence = run.evidence
    labels = [example.label for example in evidence.examples]
    result: dict[str, Any] = {
        "autoencoder": run.about(),
        "core": core_figures(run.meta, evidence.statistics),
    }
    for pooling in POOLINGS:
        started = time.process_time()
        probed = Probed(
            evidence.statistics,
            run.untrained,
            labels,
            evidence.text_numbers,
            evidence.text_read,
            pooling,
        )
        found = probe(probed, AUC_BOUND, 0)
        assert found is not None  # only where no category has four texts
        if pooling != POOLINGS[0]:
            del found["per_category"]  # one pooling's are long enough
        result[pooling] = {"probing": found}
        result[pooling]["cpu_seconds"] = round(time.process_time() - started, 1)
    started = time.process_time()
    result["model_loss"] = model_loss_of(run)
    result["model_loss"]["cpu_seconds"] = round(time.process_time() - started, 1)
    return result


def model_loss_of(run: Finished) -> dict[str, Any]:
    """Loss recovered and KL, on the CPU, on examples that decided nothing."""
    from fastsae.interpretation import model_loss

    evidence, source = run.evidence, run.meta["activations"]
    model, why_not = model_loss.model_at_hand(
        source["model_name"],
        revision=source["model_revision"],
        cache_dir=None,
        device="cpu",
        width=evidence.sae.input_dim,
    )
    if model is None:
        return {"not_measured": why_not}
    unseen = run.meta.get("test_examples") or run.meta["validation_examples"]
    found = model_loss.measure(
        model,
        evidence.sae,
        source["settings"]["LAYER_IDX"],
        evidence.data,
        evidence.statistics.kept,
        model_loss.some_held_out(evidence.data, unseen, 0),
        run.untrained.dictionaries[0].input_bias,
        0,
    )
    return {"held_out": True, **found}


def show(name: str, found: dict[str, Any]) -> None:
    """The figures of a dataset on the terminal."""
    from fastsae.interpretation.run_table import model_loss_sentence, plus_minus, verdict

    print(f"{name}: {model_loss_sentence(found['model_loss'])}")
    for pooling in POOLINGS:
        probing = found[pooling]["probing"]
        by_k, dense = probing["sparse_probing"], probing["dense_probing"]
        print(f"  {pooling} pooling: {', '.join(by_k)} columns, all")
        for source in dense:
            shown = [plus_minus(each[source]) for each in (*by_k.values(), dense)]
            print(f"    {source:<34}{'  '.join(shown)}")
        print(f"    {verdict(probing)}")


if __name__ == "__main__":
    main()
