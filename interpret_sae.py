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
target `hypotheses.csv`, with NEURONPEDIA_SET `neuronpedia/`. What the run is worth also goes into
`metrics.json` and the model card of `checkpoints/<run>/`. Where a variable named at
INTERPRETER_MODEL is set, excerpts of the data go to that endpoint and the answers to
`checkpoints/<run>/llm_replies.jsonl`; without an LLM every label is a rule on the tokens,
tested on half of the texts, and nothing is sent anywhere.
"""

from fastsae.runtime import blas, early_stop, threads
from fastsae.settings import startup

if __name__ == "__main__":
    early_stop.listen()  # before anything else is loaded
    blas.in_one_thread()
    threads.share_cores()
    startup.explain_slips()  # of config.py, which is imported below

from pathlib import Path

import config
from fastsae.interpretation import inputs, outputs
from fastsae.interpretation.features import Features, pooling
from fastsae.interpretation.llm.client import choose_backend
from fastsae.runtime import artifacts, progress, ranks, storage
from fastsae.runtime.stage import end, require_printed, run_stage

# fmt: off
# Main settings:
SAE_PATH: str | None = None             # interpret this one: a .pt, a folder of SAELens, sparsify,
                                        # ..., or saelens:RELEASE/ID; none = the run's own
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
N_JUDGED_EXAMPLES: int = 0              # [0..] held-out passages per label and kind of test
                                        # (detection, fuzzing, intruder), beside wrong labels
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
                                        # source "<layer>-<this name>"; model/name gives also
                                        # Neuronpedia's id of the model, else its own name
RUN_MODEL: bool = True                  # run the model, where its weights are here, on a few
                                        # examples: loss recovered, what features do
# fmt: on

# What decides the results; of the labels and the target only where there are any.
DECISIVE = (
    "POOLING", "LABEL_FIELD", "TEXT_FIELD", "SEED", "N_REPORT_FEATURES", "NEURONPEDIA_SET",
    "NEURONPEDIA_MODEL", "RUN_MODEL",
)  # fmt: skip
LLM_SETTINGS = (
    "INTERPRETER_MODEL", "LLM_PROTOCOL", "N_TOP_NEURONS", "N_SCORED_FEATURES",
    "N_FIDELITY_EXAMPLES", "N_JUDGED_EXAMPLES",
)  # fmt: skip
TARGET_SETTINGS = (
    "TARGET_FIELD", "TARGET_VALUE", "TARGET_POOLING", "SELECTION_METHOD", "N_HYPOTHESES",
)  # fmt: skip


def main():
    settings = config.resolve(__file__)
    started = progress.start(quiet=settings.QUIET)
    ranks.require_one_process("interpret_sae.py", "start it once, without torchrun.")
    settings.show()
    if settings.TEXT is not None:
        return print_features_of_text(settings)

    progress.step("looking at what is there")
    checkpoint_path, sae_meta = inputs.chosen_sae(settings)
    if inputs.without_texts(settings):
        return describe_rows(settings, checkpoint_path, sae_meta, started)
    backend = chosen_backend(settings)
    metadata = describe(settings, checkpoint_path, sae_meta, backend)
    folder = settings.output_dir
    if not settings.DRY_RUN:
        storage.claim(folder / outputs.JSONL, "--output-dir")
        if settings.SAE_PATH is None:
            storage.claim(settings.run_dir, "--run-name")  # what it is worth goes there too
        if outputs.up_to_date(folder, metadata):
            outputs.print_summary(folder, outputs.read_rows(folder), started, "unchanged")
            return 0
        outputs.require_writable(settings, with_replies=backend is not None)

    progress.step("reading the examples")
    features = Features(settings, checkpoint_path, sae_meta)
    inputs.require_described(features.source, metadata, settings)
    labelled = features.choose(settings.N_TOP_NEURONS)
    hypotheses = features.hypotheses()

    from fastsae.interpretation.running import add_what_the_model_tells

    work, scored = None, []
    if backend or settings.DRY_RUN:
        from fastsae.interpretation.llm.work import add_labels, plan_work

        labelled += [hypothesis["feature"] for hypothesis in hypotheses]
        work = plan_work(features, backend, labelled, settings)
        if settings.DRY_RUN:
            work.print_plan(features.evidence.tokenizer)
            return require_printed()
        scored = add_labels(features.rows, work)

    add_what_the_model_tells(features)
    progress.step("writing the report and the tables")
    outputs.write(features, hypotheses, scored, metadata, settings)
    outputs.print_results(features, work, folder)
    outputs.print_summary(folder, features.rows, started)
    return outputs.exit_code(features.rows)


def describe_rows(settings, checkpoint_path, sae_meta, started):
    """The tables of another program's activations, which have rows but no texts."""
    from fastsae.interpretation import row_features

    folder = settings.output_dir
    metadata = row_features.describe(settings, checkpoint_path, sae_meta)
    storage.claim(folder / outputs.JSONL, "--output-dir")
    if outputs.up_to_date(folder, metadata):
        row_features.print_summary(folder, outputs.read_rows(folder), started, "unchanged")
        return
    storage.require_writable([folder / outputs.JSONL, folder / outputs.CSV])
    progress.step("reading the rows")
    row_features.interpret(settings, sae_meta, metadata, checkpoint_path, started)


def print_features_of_text(settings):
    """Print the strongest features of each token of TEXT, and nothing else."""
    from fastsae.trained_sae import describe_text

    # else the model that the file names
    named = settings.MODEL_NAME if settings.source["MODEL_NAME"] == "flag" else None
    found = describe_text(
        settings.TEXT,
        settings.SAE_PATH or inputs.named_checkpoint(settings.run_dir),
        settings.output_dir / outputs.JSONL,
        device=settings.DEVICE,
        model_name=named,
        layer=settings.LAYER_IDX,
        cache_dir=settings.CACHE_DIR,
    )
    print(*found.split("\n"), sep="\n")
    return require_printed()


def chosen_backend(settings):
    """What answers as INTERPRETER_MODEL; None without one, or where nothing is to be asked."""
    if not settings.N_TOP_NEURONS:
        return None
    return choose_backend(
        settings.INTERPRETER_MODEL,
        timeout=settings.LLM_TIMEOUT,
        device=settings.DEVICE,
        cache_dir=settings.CACHE_DIR,
    )


def describe(settings, checkpoint_path, sae_meta, backend):
    """The metadata of the outputs: what decides them, and where they come from."""
    from fastsae.interpretation.report.report import template_sha256

    recorded = settings.replace(**pooling())
    target = None
    if settings.TARGET_FIELD or settings.TARGET_VALUE:
        from fastsae.interpretation.target_features import METHOD_VERSION

        target = {**recorded.select(TARGET_SETTINGS), "method_version": METHOD_VERSION}
    llm = {**settings.select(LLM_SETTINGS), "base_url": backend.scope[1]} if backend else None
    return artifacts.new_metadata(
        "interpretations",
        {**recorded.select(DECISIVE), "llm": llm, "target": target},
        {
            "checkpoint": sae_meta["fingerprint"],
            **inputs.inputs_now(settings, sae_meta),
            "report": template_sha256(),
            # a folder's name can say the layer
            **({"sae_path": Path(settings.SAE_PATH).name} if settings.SAE_PATH else {}),
        },
        checkpoint=str(checkpoint_path),
    )


if __name__ == "__main__":
    end(run_stage(main))
