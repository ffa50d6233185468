"""Stage 3: say what each feature means, from the tokens and examples it fires on, the dataset's
labels, and an LLM if there is one.

    python interpret_sae.py
    OPENAI_API_KEY=... python interpret_sae.py --n-top-neurons 50 --interpreter-model gpt-5-mini
    python interpret_sae.py --target-value remembering
    python interpret_sae.py --text "Where did I leave the key?"
    python interpret_sae.py --layer-idx 21 --sae-path layer_20/width_16k/average_l0_71

Reads the activations, the checkpoint that `checkpoints/<run>/metrics.json` names, and the dataset.
Writes `interpretations.html` (a report for people), `interpretations.csv`, one row per feature, and
`interpretations.jsonl` (the same and more, unrounded; first line: settings and provenance); with a
target `hypotheses.csv`, with NEURONPEDIA_SET `neuronpedia/`. Where a variable named at
INTERPRETER_MODEL is set, excerpts of the data go to that endpoint and the answers to
`checkpoints/<run>/llm_replies.jsonl`; without an LLM every label is made of the feature's most
characteristic tokens, and nothing is sent anywhere.
"""

from fastsae.runtime import early_stop
from fastsae.settings import startup

if __name__ == "__main__":
    early_stop.listen()  # before anything else is loaded
    startup.explain_slips()  # of config.py, which is imported below

import sys
from pathlib import Path

import numpy as np

import config
from fastsae.activations import files as activations_file
from fastsae.formats.source import locate
from fastsae.interpretation import tables
from fastsae.interpretation.features import N_TOP_EXAMPLES, Features
from fastsae.interpretation.llm import client
from fastsae.lm.hook_points import HookPoint
from fastsae.lm.names import short_name
from fastsae.runtime import artifacts, progress, ranks, storage
from fastsae.runtime.errors import EXIT_INCOMPLETE, EnvironmentFailure, InputError
from fastsae.runtime.stage import end, require_printed, run_stage

# fmt: off
# Main settings:
SAE_PATH: str | None = None             # interpret this one: a .pt, or a folder of SAELens,
                                        # sparsify, ...; none = the run's own
INTERPRETER_MODEL: str = "gpt-5-mini"   # at the endpoint (OPENAI_API_KEY or OPENAI_KEY_SAE,
                                        # OPENAI_BASE_URL), or local:NAME here
N_TOP_NEURONS: int = 20                 # [0..] features that the LLM labels: best category AUC
                                        # first, else most activation; 0 = no LLM
TARGET_FIELD: str | None = None         # dataset field to predict, for hypotheses.csv;
                                        # none = LABEL_FIELD
TEXT: str | None = None                 # print the strongest features of each token of this
                                        # sentence, and stop

# Labels by an LLM:
LLM_PROTOCOL: str = "both"              # {both, contrastive, fast} contrastive: HypotheSAEs' label;
                                        # fast: FAST's score and name
N_SCORED_FEATURES: int = 128            # [0..] features, chosen at random, that the LLM scores from
                                        # 1 to 5 besides these
N_FIDELITY_EXAMPLES: int = 20           # [0..] held-out examples per label on which the LLM tests
                                        # it; 0 = no test
N_LLM_WORKERS: int = 8                  # [1..256] calls at a time
LLM_TIMEOUT: float = 60.0               # (0..86400] seconds for the requests of one call, repeated
                                        # ones included
RETRY_UNUSABLE: bool = False            # ask again (and pay again) where an earlier reply could not
                                        # be used
DRY_RUN: bool = False                   # print how many calls and prompt tokens the LLM would take,
                                        # and stop

# Target:
TARGET_VALUE: str | None = None         # its value against all others; none = its numbers (no
                                        # hypotheses.csv without a TARGET_...)
SELECTION_METHOD: str = "correlation"   # {separation_score, correlation, lasso} how features are
                                        # selected for the target
N_HYPOTHESES: int = 20                  # [1..] features to select for the target

# Output:
N_REPORT_FEATURES: int = 1024           # [1..] features in interpretations.html at most; the tables
                                        # hold all
NEURONPEDIA_SET: str | None = None      # also write upload batches under neuronpedia/, for the
                                        # source "<layer>-<this name>"
NEURONPEDIA_MODEL: str | None = None    # Neuronpedia's id of the model; none = the model's own name
                                        # in lower case

# Constants:
POOLING: str = "max"                    # {max, mean} of a feature over an example's tokens, for
                                        # category_auc
TARGET_POOLING: str = "mean"            # {max, mean} the same for the target
# fmt: on

COLUMNS = (
    "feature",
    "label",
    "label_source",
    "status",
    "density",
    "max_activation",
    "top_tokens",
    *(f"top_example_{i}" for i in range(1, N_TOP_EXAMPLES + 1)),
    "best_category",
    "category_auc",
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
    "fidelity_f1",
    "top_tokens",
    "pooling",
    "n_firing",
)
DECISIVE = (
    "POOLING",
    "LABEL_FIELD",
    "TEXT_FIELD",
    "SEED",
    "N_REPORT_FEATURES",
    "NEURONPEDIA_SET",
    "NEURONPEDIA_MODEL",
)
LLM_SETTINGS = (
    "INTERPRETER_MODEL",
    "LLM_PROTOCOL",
    "N_TOP_NEURONS",
    "N_SCORED_FEATURES",
    "N_FIDELITY_EXAMPLES",
)
TARGET_SETTINGS = (
    "TARGET_FIELD",
    "TARGET_VALUE",
    "TARGET_POOLING",
    "SELECTION_METHOD",
    "N_HYPOTHESES",
)


def main():
    settings = config.resolve(__file__)
    started = progress.start(quiet=settings.QUIET)
    ranks.require_one_process("interpret_sae.py", "start it once, without torchrun.")
    settings.show()
    if settings.TEXT is not None:
        from fastsae.trained_sae import describe_text

        # else the model that the file names
        named = settings.MODEL_NAME if settings.source["MODEL_NAME"] == "flag" else None
        found = describe_text(
            settings.TEXT,
            settings.SAE_PATH or named_checkpoint(settings.run_dir),
            settings.output_dir / "interpretations.jsonl",
            device=settings.DEVICE,
            model_name=named,
            layer=settings.LAYER_IDX,
            cache_dir=settings.CACHE_DIR,
        )
        print(*found.split("\n"), sep="\n")
        return require_printed()
    progress.step("looking at what is there")
    checkpoint_path, sae_meta = chosen_sae(settings)
    backend = None
    if settings.N_TOP_NEURONS:
        backend = client.choose_backend(
            settings.INTERPRETER_MODEL,
            timeout=settings.LLM_TIMEOUT,
            device=settings.DEVICE,
            cache_dir=settings.CACHE_DIR,
        )
    metadata = describe(settings, checkpoint_path, sae_meta, backend)
    folder, jsonl_path = settings.output_dir, settings.output_dir / "interpretations.jsonl"
    if not settings.DRY_RUN:
        storage.claim(jsonl_path, "--output-dir")
        if done(folder, jsonl_path, metadata):
            print_summary(folder, artifacts.read_lines(jsonl_path)[1:], started, "unchanged")
            return 0
        require_writable(settings, folder, backend)

    progress.step("reading the examples")
    features = Features(settings, checkpoint_path, sae_meta)
    require_described(features.source, metadata, settings)
    labelled = features.choose(settings.N_TOP_NEURONS)
    hypotheses = features.hypotheses()
    work = None
    if backend or settings.DRY_RUN:
        work = labelling(
            features,
            backend,
            list(dict.fromkeys([*labelled, *(h["feature"] for h in hypotheses)])),
            settings,
        )
        if settings.DRY_RUN:
            work.print_plan(features.evidence.tokenizer)
            return require_printed()
    scored = add_llm_labels(features.rows, work.run(), work) if work else []
    progress.step("writing the report and the tables")
    write_all(features, hypotheses, scored, folder, jsonl_path, metadata, settings)
    print_results(features, work, folder)
    print_summary(
        folder,
        features.rows,
        started,
        "incomplete" if incomplete_rows(features.rows) else "written",
    )
    return incomplete(features.rows) if work else 0


def require_writable(settings, folder, backend):
    """Sweep what killed runs left of the outputs, and raise what writing them would raise at the
    end, when calls were paid for."""
    storage.sweep(folder, "hypotheses.csv.*")
    for left in folder.glob("neuronpedia/*"):
        storage.sweep(left)
    names = ["interpretations.jsonl", "interpretations.csv", "interpretations.html"]
    names += ["hypotheses.csv"] * bool(settings.TARGET_FIELD or settings.TARGET_VALUE)
    names += [
        f"neuronpedia/{settings.LAYER_IDX - 1}-{settings.NEURONPEDIA_SET}/batch-000.json"
    ] * bool(settings.NEURONPEDIA_SET)
    replies = [settings.run_dir / "llm_replies.jsonl"] if backend else []
    storage.require_writable([*(folder / name for name in names), *replies])


def print_summary(folder, rows, started, status):
    progress.summary(
        "interpret_sae",
        folder / "interpretations.html",
        started,
        status=status,
        n_features=len(rows),
        n_dead=sum(row["status"] == "dead" for row in rows),
        n_labelled_by_llm=sum(row["label_source"] not in ("", "tokens") for row in rows),
    )


def chosen_sae(settings):
    """(path, metadata) of the run's checkpoint, or of SAE_PATH: of the latter only what decides
    whether the work is done."""
    if settings.SAE_PATH is None:
        path = named_checkpoint(settings.run_dir)
        return path, artifacts.read_checkpoint_metadata(path)
    source = activations_file.read_metadata(settings.activations_path)
    return Path(settings.SAE_PATH), {
        "fingerprint": locate(settings.SAE_PATH).fingerprint(),
        "activations": source,
        "inputs": {"activations": source["fingerprint"]},
    }


def named_checkpoint(run_dir):
    """The checkpoint that the run's metrics.json names."""
    path = run_dir / "metrics.json"
    try:
        return run_dir / artifacts.from_json(path.read_bytes())["checkpoint"]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path}: not found. run train_sae.py first, or check --run-name and --output-dir."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise EnvironmentFailure(f"{path}: damaged. run train_sae.py again.") from None


def describe(settings, checkpoint_path, sae_meta, backend):
    """The metadata of the outputs: what decides them, and where they come from."""
    from fastsae.interpretation.report.report import template_sha256

    target = None
    if settings.TARGET_FIELD or settings.TARGET_VALUE:
        from fastsae.interpretation.target_features import METHOD_VERSION

        target = {**settings.select(TARGET_SETTINGS), "method_version": METHOD_VERSION}
    llm = {**settings.select(LLM_SETTINGS), "base_url": backend.scope[1]} if backend else None
    return artifacts.new_metadata(
        "interpretations",
        {**settings.select(DECISIVE), "llm": llm, "target": target},
        {
            "checkpoint": sae_meta["fingerprint"],
            **inputs_now(settings, sae_meta),
            "report": template_sha256(),
            # a folder's name can say the layer
            **({"sae_path": Path(settings.SAE_PATH).name} if settings.SAE_PATH else {}),
        },
        checkpoint=str(checkpoint_path),
    )


def inputs_now(settings, sae_meta):
    """Activations and dataset as they are; one that is gone, or on the hub, counts as the one that
    the autoencoder was trained on."""
    activations, dataset = (
        sae_meta["inputs"]["activations"],
        sae_meta["activations"]["inputs"]["dataset"],
    )
    if activations_file.find_shards(settings.activations_path):
        activations = activations_file.read_metadata(settings.activations_path)["fingerprint"]
    if Path(settings.DATASET_PATH).is_file():
        dataset = artifacts.file_sha256(settings.DATASET_PATH)
    return {"activations": activations, "dataset": dataset}


def require_described(source, metadata, settings):
    """EnvironmentFailure if the activations and the dataset that were read are not those that
    `metadata` names."""
    read = {"activations": source["fingerprint"], "dataset": source["inputs"]["dataset"]}
    for name, value in read.items():
        if metadata["inputs"][name] != value:
            path = settings.activations_path if name == "activations" else settings.DATASET_PATH
            raise EnvironmentFailure(f"{path}: was replaced while this run began. run again.")


def done(folder, jsonl_path, metadata):
    """True if all outputs are there, complete, and made from the same inputs."""

    def read(path):
        lines = tables.read_sealed(path)
        for name, digest in lines[0].get("files", {"interpretations.csv": None}).items():
            if not (folder / name).exists() or artifacts.file_sha256(folder / name) != digest:
                raise EnvironmentFailure(
                    f"{folder / name}: was changed by hand or is missing. it will be made anew."
                )
        if not lines[0]["complete"]:
            raise EnvironmentFailure(
                f"{path}: some features are unlabelled. only these are asked again."
            )
        return lines[0]

    return artifacts.matches(jsonl_path, metadata, read)


def labelling(features, backend, labelled, settings):
    """The LLM's work on these features, and on a random sample of those that can be scored."""
    from fastsae.interpretation.llm.labels import Labelling, Shown, plain_text

    # of a dry run without a key
    backend = backend or client.ChatEndpoint("none", None, settings.INTERPRETER_MODEL, timeout=1)
    asker = client.Asker(
        backend,
        settings.run_dir / "llm_replies.jsonl",
        n_workers=settings.N_LLM_WORKERS,
        retry_unusable=settings.RETRY_UNUSABLE,
    )
    alive = [row["feature"] for row in features.rows if row["status"] != "dead"]
    sample = [alive[i] for i in np.random.default_rng((settings.SEED, 4)).permutation(len(alive))]
    asked = settings.N_TOP_NEURONS > 0  # else a dry run has nothing to count
    return Labelling(
        Shown(
            features.evidence, [plain_text(example) for example in features.examples], settings.SEED
        ),
        asker,
        protocol=settings.LLM_PROTOCOL,
        labelled=labelled if asked else [],
        candidates=sample,
        n_scored=settings.N_SCORED_FEATURES if asked else 0,
        n_fidelity=settings.N_FIDELITY_EXAMPLES,
    )


def add_llm_labels(rows, outcome, work):
    """Put labels, scores and validation into the rows of the features asked about; returns the
    scores of the random sample."""
    for j, result in outcome.items():
        row, problems = rows[j], result.pop("problems")
        row.update(result)
        if "label" in result:
            row["label_source"] = work.asker.backend.model
        if problems:
            row["status"] = f"llm {'; '.join(problems)}"
    return [rows[j]["score"] for j in work.scored if rows[j]["score"] is not None]


def write_all(features, hypotheses, scored, folder, jsonl_path, metadata, settings):
    """All outputs; the JSONL, which vouches for them, comes last."""
    from fastsae.interpretation.report.report import render
    from fastsae.interpretation.report.run_page import describe_run
    from fastsae.interpretation.target_features import METHOD_VERSION

    rows, evidence = features.rows, features.evidence
    # an LLM's labels were paid for
    shown = sorted(
        features.choose(len(rows)), key=lambda j: rows[j]["label_source"] in ("", "tokens")
    )
    shown = shown[: settings.N_REPORT_FEATURES]
    dead = [row["feature"] for row in rows if row["status"] == "dead"][
        : settings.N_REPORT_FEATURES - len(shown)
    ]
    run = describe_run(features, metadata, scored, settings.values, len(shown))
    texts = {
        "interpretations.csv": tables.csv_text(rows, COLUMNS),
        "interpretations.html": render(evidence, rows, sorted([*shown, *dead]), features.lens, run),
    }
    if hypotheses:
        filled = [
            {
                **h,
                "hypothesis": row["label"],
                "source": row["label_source"],
                **{name: row[name] for name in ("fidelity_f1", "top_tokens")},
            }
            for h in hypotheses
            for row in (rows[h["feature"]],)
        ]
        texts["hypotheses.csv"] = tables.csv_text(filled, HYPOTHESIS_COLUMNS)
        about = {name: hypotheses[0][name] for name in ("target", "method", "pooling")}
        texts["hypotheses.json"] = (
            artifacts.to_json(
                {**about, "method_version": METHOD_VERSION, **(features.comparison or {})}
            )
            + "\n"
        )
    files = {}
    if settings.NEURONPEDIA_SET:
        from fastsae.interpretation.neuronpedia import write_batches

        model = settings.NEURONPEDIA_MODEL or short_name(features.source["model_name"]).lower()
        paths = write_batches(
            folder / "neuronpedia",
            evidence,
            rows,
            features.lens,
            model_id=model,
            name=settings.NEURONPEDIA_SET,
            hook_point=HookPoint.of_activations(features.source),
        )
        files = {str(path.relative_to(folder)): artifacts.file_sha256(path) for path in paths}
    tables.write_outputs(
        folder,
        texts,
        jsonl_path,
        rows,
        {
            **metadata,
            "complete": not incomplete_rows(rows),
            "summary": features.summary(),
            "files": files,
        },
    )


def incomplete_rows(rows):
    return [row for row in rows if row["status"].startswith("llm ")]


def incomplete(rows):
    """Exit code 4, and a line that says why, if the LLM left something open."""
    if failed := incomplete_rows(rows):
        unlabelled, reasons = (
            sum(row["label_source"] == "tokens" for row in failed),
            sorted({row["status"] for row in failed}),
        )
        print(
            f"incomplete: {len(failed)} features, {unlabelled} of them without an LLM's label "
            f"({'; '.join(reasons[:3])}). mend it and "
            "run again: what was answered is not asked twice (--retry-unusable asks again what "
            "gave no usable reply).",
            file=sys.stderr,
        )
        return EXIT_INCOMPLETE
    return 0


def print_results(features, work, folder):
    counts, rows = features.summary(), features.rows
    alive = [row for row in rows if row["status"] != "dead"]
    print(
        f"features: {counts['n_features']}, {counts['n_dead']} dead on these tokens; "
        f"labelled by an LLM: {sum(row['label_source'] not in ('', 'tokens') for row in rows)}"
    )
    if work:
        spent = work.asker.spent
        print(
            f"LLM: {spent['calls']:,} calls now, {spent['prompt_tokens']:,} tokens in, "
            f"{spent['completion_tokens']:,} out"
        )
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
    if features.comparison:
        print(
            "the target on the other half, by ridge regression "
            f"({features.comparison['measure']}): "
            + ", ".join(
                f"{name} {entry['held_out']:.3f}"
                for name, entry in features.comparison["sources"].items()
                if entry["held_out"] is not None
            )
        )
    for row in sorted(alive, key=lambda row: (-(row["category_auc"] or 0), -row["max_activation"]))[
        :5
    ]:
        category = (
            f" ({row['best_category']}, AUC {row['category_auc']:.2f})"
            if row["best_category"]
            else ""
        )
        print(f"  {row['feature']}: {row['label'][:90]}{category}")
    print(f"wrote {folder / 'interpretations.html'}, interpretations.csv and interpretations.jsonl")


if __name__ == "__main__":
    end(run_stage(main))
