"""What stage 3 writes and prints: the tables, the report, the upload batches, the summary.

Importing this module loads no torch, so that an up-to-date run ends quickly.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.interpretation import tables
from fastsae.interpretation.features import N_TOP_EXAMPLES, Features
from fastsae.lm.hook_points import HookPoint
from fastsae.lm.names import short_name
from fastsae.runtime import artifacts, progress, storage
from fastsae.runtime.errors import EXIT_INCOMPLETE, EnvironmentFailure
from fastsae.settings.values import Settings

if TYPE_CHECKING:
    from fastsae.interpretation.llm.labels import Labelling

CSV, HTML, JSONL = "interpretations.csv", "interpretations.html", "interpretations.jsonl"
HYPOTHESES = "hypotheses.csv"
COLUMNS = (  # of interpretations.csv
    "feature",
    "label",
    "label_source",
    "label_precision",
    "label_recall",
    "label_f1",
    "rule",
    "detection_auc",
    "status",
    "density",
    "max_activation",
    "top_tokens",
    *(f"top_example_{i}" for i in range(1, N_TOP_EXAMPLES + 1)),
    "best_category",
    "category_auc",
    "judged_detection",
    "judged_fuzzing",
    "judged_intruder",
    "kl_removed",
    "kl_random",
    "score",
    "fidelity_f1",
    "matryoshka_level",
    "promoted_tokens",
    "suppressed_tokens",
    "special_token_share",
)
HYPOTHESIS_COLUMNS = (
    "rank",
    "feature",
    "hypothesis",
    "source",
    "target",
    "method",
    "score",
    "held_out_correlation",
    "held_out_auc",
    "held_out_low",
    "held_out_high",
    "fidelity_f1",
    "top_tokens",
    "pooling",
    "n_firing",
)
N_PRINTED = 5  # features named at the end


def up_to_date(folder: Path, metadata: Mapping[str, Any]) -> bool:
    """True if all outputs are there, complete, and made from the same inputs."""

    def read(path):
        about = tables.read_sealed(path)[0]
        for name, digest in about.get("files", {CSV: None}).items():
            if not (folder / name).exists() or artifacts.file_sha256(folder / name) != digest:
                raise EnvironmentFailure(
                    f"{folder / name}: was changed by hand or is missing. it will be made anew."
                )
        if not about["complete"]:
            raise EnvironmentFailure(
                f"{path}: some features are unlabelled. only these are asked again."
            )
        return about

    return artifacts.matches(folder / JSONL, metadata, read)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the features that an earlier run wrote."""
    return artifacts.read_lines(folder / JSONL)[1:]


def require_writable(settings: Settings, with_replies: bool) -> None:
    """Sweep what killed runs left of the outputs, and raise what writing them would raise at the
    end, when calls were paid for."""
    folder = settings.output_dir
    storage.sweep(folder, f"{HYPOTHESES}.*")
    for left in folder.glob("neuronpedia/*"):
        storage.sweep(left)
    names = [JSONL, CSV, HTML]
    if settings.TARGET_FIELD or settings.TARGET_VALUE:
        names.append(HYPOTHESES)
    if settings.NEURONPEDIA_SET:
        source = f"{settings.LAYER_IDX - 1}-{settings.NEURONPEDIA_SET}"
        names.append(f"neuronpedia/{source}/batch-000.json")
    replies = [settings.run_dir / "llm_replies.jsonl"] if with_replies else []
    storage.require_writable([*(folder / name for name in names), *replies])


def write(
    features: Features,
    hypotheses: Sequence[Mapping[str, Any]],
    scored: Sequence[float],
    metadata: Mapping[str, Any],
    settings: Settings,
) -> None:
    """All outputs; the JSONL, which vouches for them, comes last.

    scored: the scores of a random sample of features.
    """
    folder, rows = settings.output_dir, features.rows
    texts = {
        CSV: tables.csv_text(rows, COLUMNS),
        HTML: report(features, scored, metadata, settings),
        **hypothesis_texts(features, hypotheses),
    }
    files = {
        str(path.relative_to(folder)): artifacts.file_sha256(path)
        for path in write_neuronpedia(features, folder, settings)
    }
    about = {
        **metadata,
        "complete": not incomplete_rows(rows),
        "summary": features.summary(),
        "run_table": features.run_table,
        "files": files,
    }
    add_to_run(features, settings)
    artifacts.write_settings(folder / JSONL, settings)
    tables.write_outputs(folder, texts, folder / JSONL, rows, about)


def add_to_run(features: Features, settings: Settings) -> None:
    """Put what the run is worth beside its own autoencoder, into metrics.json and the model card;
    of another one (SAE_PATH) nothing is put there."""
    from fastsae.formats.model_card import add_run_table
    from fastsae.interpretation.run_table import markdown

    if settings.SAE_PATH is not None:
        return
    try:
        add_run_table(settings.run_dir, features.run_table, markdown(features.run_table))
    except PermissionError:  # somebody else's run: the tables and the report have it all
        print(f"{settings.run_dir}: cannot be written; metrics.json has no run_table.")


def report(
    features: Features, scored: Sequence[float], metadata: Mapping[str, Any], settings: Settings
) -> str:
    """The HTML of the report, with at most N_REPORT_FEATURES features."""
    from fastsae.interpretation.report.report import render
    from fastsae.interpretation.report.run_page import describe_run

    rows, limit = features.rows, settings.N_REPORT_FEATURES
    # an LLM's labels were paid for
    shown = sorted(features.choose(len(rows)), key=lambda j: not tables.by_language_model(rows[j]))[
        :limit
    ]
    dead = [row["feature"] for row in rows if row["status"] == "dead"][: limit - len(shown)]
    run = describe_run(features, metadata, scored, settings.values, len(shown))
    return render(features.evidence, rows, sorted([*shown, *dead]), features.lens, run)


def hypothesis_texts(features: Features, hypotheses: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{file name: text} of the features that predict the target; {} without hypotheses."""
    if not hypotheses:
        return {}
    from fastsae.interpretation.target_features import METHOD_VERSION

    filled = []
    for hypothesis in hypotheses:
        row = features.rows[hypothesis["feature"]]
        filled.append(
            {
                **hypothesis,
                "hypothesis": row["label"],
                "source": row["label_source"],
                "fidelity_f1": row["fidelity_f1"],
                "top_tokens": row["top_tokens"],
            }
        )
    about = {
        **{name: hypotheses[0][name] for name in ("target", "method", "pooling")},
        "method_version": METHOD_VERSION,
        **(features.comparison or {}),
    }
    return {
        HYPOTHESES: tables.csv_text(filled, HYPOTHESIS_COLUMNS),
        "hypotheses.json": artifacts.to_json(about) + "\n",
    }


def write_neuronpedia(features: Features, folder: Path, settings: Settings) -> list[Path]:
    """Write the upload batches of NEURONPEDIA_SET; returns their paths, [] without a set."""
    if not settings.NEURONPEDIA_SET:
        return []
    from fastsae.interpretation.neuronpedia import write_batches

    return write_batches(
        folder / "neuronpedia",
        features.evidence,
        features.rows,
        features.lens,
        model_id=settings.NEURONPEDIA_MODEL or short_name(features.source["model_name"]).lower(),
        name=settings.NEURONPEDIA_SET,
        hook_point=HookPoint.of_activations(features.source),
    )


def incomplete_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of features of which the language model left something open."""
    return [row for row in rows if row["status"].startswith("llm ")]


def exit_code(rows: Sequence[Mapping[str, Any]]) -> int:
    """0, or 4 and a line that says why if the language model left something open."""
    failed = incomplete_rows(rows)
    if not failed:
        return 0
    unlabelled = sum(not tables.by_language_model(row) for row in failed)
    reasons = sorted({row["status"] for row in failed})
    print(
        f"incomplete: {len(failed)} features, {unlabelled} of them without an LLM's label "
        f"({'; '.join(reasons[:3])}). solve it and "
        "run again: what was answered is not asked twice (--retry-unusable asks again what "
        "gave no usable reply).",
        file=sys.stderr,
    )
    return EXIT_INCOMPLETE


def print_results(features: Features, work: "Labelling | None", folder: Path) -> None:
    """Counts over all features, and the five that the report's first page shows."""
    from fastsae.interpretation.report.overview import category_name

    counts, rows = features.summary(), features.rows
    print(
        f"features: {counts['n_features']}, {counts['n_dead']} dead on these tokens; "
        f"labelled by an LLM: {n_labelled_by_llm(rows)}"
    )
    if work:
        spent = work.asker.spent
        print(
            f"LLM: {spent['calls']:,} calls now, {spent['prompt_tokens']:,} tokens in, "
            f"{spent['completion_tokens']:,} out"
        )
    print_judged(counts)
    print_rules(counts)
    print_detection(counts)
    print_categories(features, counts)
    if features.comparison:
        from fastsae.interpretation.report.run_page import shown_with_interval

        sources = [
            f"{name} {shown_with_interval(entry)}"
            for name, entry in features.comparison["sources"].items()
            if entry["held_out"] is not None
        ]
        print(
            "the target on the other half, by ridge regression "
            f"({features.comparison['measure']}): {', '.join(sources)}"
        )
    for row in (rows[j] for j in features.clearest(N_PRINTED)):
        category = ""
        if row["best_category"]:
            name = category_name(row["best_category"], features.settings.LABEL_FIELD)
            category = f" ({name}, AUC {row['category_auc']:.2f})"
        claim = "" if row["label_f1"] is None else f", F1 {row['label_f1']:.2f}"
        claim = "" if tables.by_language_model(row) else claim
        print(f"  {row['feature']}: {row['label'][:90]}{claim}{category}")
    print(f"wrote {folder / HTML}, {CSV} and {JSONL}")


def print_judged(counts: Mapping[str, Any]) -> None:
    """What the language model's tests of its labels gave, beside chance and labels of other
    features."""
    judged = counts.get("judged", {})
    for kind in ("detection", "fuzzing", "intruder"):
        if f"judged_{kind}" not in judged:
            continue
        own = judged[f"judged_{kind}"]
        beside = [f"{own['chance']:.1f} by chance"]
        for source, words in (("other", "with another feature's label"), ("rule", "with the rule")):
            if entry := judged.get(f"judged_{kind}_{source}"):
                beside.append(f"{tables.with_interval(entry)} {words}")
        value = tables.with_interval(own)
        print(f"{kind} test: {value} over {own['n']} features; {', '.join(beside)}")


def print_rules(counts: Mapping[str, Any]) -> None:
    """What the labels that are rules are worth, beside those of other features."""
    if counts.get("n_rule_tested"):
        print(
            f"rules: {counts['n_with_rule']} features have one; on texts that they were not found "
            f"on their mean F1 is {counts['mean_label_f1']:.2f} (0 without a rule), "
            f"another feature's has {counts['mean_label_f1_other_rule']:.2f}"
        )


def print_detection(counts: Mapping[str, Any]) -> None:
    """How well five examples tell where features fire, beside random directions."""
    if "n_detection" in counts:
        print(
            f"five-shot detection: mean AUC {counts['mean_detection_auc']:.2f} of "
            f"{counts['n_detection']} features, {counts['mean_detection_auc_random']:.2f} of "
            "random directions (the same tokens, firing or silent)"
        )


def print_categories(features: Features, counts: Mapping[str, Any]) -> None:
    """How well categories are read from the features, beside what nobody trained; or why that is
    not known."""
    from fastsae.interpretation.run_table import describe

    for line in describe(features.run_table):
        print(line)
    if "probing" in features.run_table:
        return
    if features.categories is not None:
        print(
            f"categories: {counts['n_with_category']} features separate one better than chance, "
            f"{counts['n_above_auc_bound']} with an AUC above {counts['auc_bound']}; with shuffled "
            "labels "
            f"{counts['n_with_category_shuffled']:.1f} and "
            f"{counts['n_above_auc_bound_shuffled']:.1f} on average"
        )
    elif any(example.label is not None for example in features.examples):
        print(
            "category AUC: none, for too few examples share a value of "
            f"{features.settings.LABEL_FIELD}"
        )


def n_labelled_by_llm(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many features have a label from a language model."""
    return sum(map(tables.by_language_model, rows))


def print_summary(
    folder: Path, rows: Sequence[Mapping[str, Any]], started: float, status: str | None = None
) -> None:
    """The summary line; the status is "written" or "incomplete" unless one is given."""
    progress.summary(
        "interpret_sae",
        folder / HTML,
        started,
        status=status or ("incomplete" if incomplete_rows(rows) else "written"),
        n_features=len(rows),
        n_dead=sum(row["status"] == "dead" for row in rows),
        n_labelled_by_llm=n_labelled_by_llm(rows),
    )
