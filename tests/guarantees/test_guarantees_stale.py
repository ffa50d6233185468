"""Nothing stale is reused: each setting and each input, changed alone, is named and redone, and
nothing else is."""

import json
import shutil

import pytest
from conftest import PROJECT
from sampling import points
from tiny_world import STAGES, in_parallel

import config

# what decides each stage's output: another value of each setting, with what it needs besides
CHANGES = {
    "extract_activations": {
        "MAX_LENGTH": 30,
        "MAX_EXAMPLES": 20,
        "TEXT_FIELD": "topic",
        "USE_CHAT_TEMPLATE": False,
        "fastsae.data.tokenization.TEMPLATE_DATE": "1 Jan 2020",
        "DTYPE": "bfloat16",
        "STORAGE_DTYPE": "float32",
        "BLOCK_LENGTH": 16,
        "DEDUP_NGRAM": 3,
        "MODEL_NAME": None,
        "DATASET_PATH": None,
        "LAYER_IDX": None,
    },
    "train_sae": {
        "ARCHITECTURE": "batchtopk",
        "M": "32 --matryoshka-prefixes 8,32",
        "K": 3,
        "MATRYOSHKA_PREFIXES": "6,24",
        "SPARSITY_COEFFICIENT": "4 --architecture standard --matryoshka-prefixes auto",
        "NORMALIZE_ACTIVATIONS": "norm",
        "AUX_K": 3,
        "DEAD_AFTER_TOKENS": 99,
        "RESAMPLE_EVERY": 3,
        "N_EPOCHS": 3,
        "PATIENCE": 3,
        "BATCH_SIZE": 32,
        "LEARNING_RATE": 0.02,
        "LR_SCHEDULE": "cosine",
        "WARMUP_STEPS": 2,
        "BUFFER_TOKENS": 300,
        "VALIDATION_FRACTION": 0.2,
        "TEST_FRACTION": 0.2,
        "USE_TOKENS": "content",
        "MAX_NORM_RATIO": 9,
        "SELECT_DTYPE": "bfloat16",
        "fastsae.training.objective.AUX_COEF": 0.1,
        "fastsae.training.objective.JUMPRELU_BANDWIDTH": 2,
        "fastsae.training.objective.JUMPRELU_LOSS": "step",
        "fastsae.training.objective.CLIP_GRAD": 0.5,
        "fastsae.training.objective.LR_DECAY_FRACTION": 0.5,
        "fastsae.training.objective.INIT_DIRECTIONS": "data",
        "fastsae.training.objective.INIT_CENTRE": "mean",
        "fastsae.training.objective.INIT_ENCODER_SCALE": 0.5,
        "SEED": 5,
        "INIT_FROM": None,
        "MAX_TRAIN_TOKENS": 200,
    },
    "interpret_sae": {
        "fastsae.interpretation.features.POOLING": "max",
        "RUN_MODEL": True,
        "N_REPORT_FEATURES": 3,
        "INTERPRETER_MODEL": "other",
        "LLM_PROTOCOL": "fast",
        "N_TOP_NEURONS": 4,
        "N_SCORED_FEATURES": 3,
        "N_FIDELITY_EXAMPLES": 8,
        "N_JUDGED_EXAMPLES": 8,
        "TARGET_FIELD": "topic --target-value t1",
        "TARGET_VALUE": "t0",
        "NEURONPEDIA_SET": "s",
        "LABEL_FIELD": "none",
        "SEED": 5,
        "SELECTION_METHOD": None,
        "N_HYPOTHESES": None,
        "TEXT_FIELD": None,
    },
}
HARMLESS = {  # what decides nothing
    "extract_activations": {
        "BATCH_TOKENS": 64,
        "fastsae.activations.extraction.CHUNK_TOKENS": 500,
        "fastsae.activations.extraction.SHARD_BYTES": 10**9,
        "SAMPLE_FRACTION": 0.5,  # of a stream: test_guarantees_stream
    },
    "train_sae": {
        "fastsae.training.objective.ENGINE": "reference",
        "fastsae.training.loop.SAVE_EVERY": 5,
        "LOGGER": None,
        "EXPORT": None,
    },
    "interpret_sae": {
        "LLM_TIMEOUT": 9,
        "N_LLM_WORKERS": 2,
        "RETRY_UNUSABLE": True,
        "DRY_RUN": None,
        "TEXT": None,
        "SAE_PATH": None,
    },
}
# by its name
OTHER_FILE = ("ARCHITECTURE", "M", "K", "MATRYOSHKA_PREFIXES", "SPARSITY_COEFFICIENT")
RECORDED_AS = {"WARMUP_STEPS": "LR_WARMUP_STEPS", "BLOCK_LENGTH": "PROCESSING"}
GROUPED = {
    "llm": (
        "INTERPRETER_MODEL",
        "LLM_PROTOCOL",
        "N_TOP_NEURONS",
        "N_SCORED_FEATURES",
        "N_FIDELITY_EXAMPLES",
        "N_JUDGED_EXAMPLES",
    ),
    "target": ("TARGET_FIELD", "TARGET_VALUE"),
}


@pytest.mark.parametrize("script", STAGES)
def test_every_setting_of_a_stage_is_known_here(script):
    known = set(CHANGES[script]) | set(HARMLESS[script])
    assert set(config.read_settings(PROJECT / f"{script}.py")) <= known, (
        "say above whether it decides the output, with another value"
    )


def flag(name, value):
    """The flags that change one setting, or one constant of the code."""
    if name.startswith("fastsae."):
        return [f"{name}={value}"]
    first, *more = str(value).split(" --")
    flags = [
        f"--{'no-' if value is False else ''}{config.flag_name(name)}"
        + ("" if isinstance(value, bool) else f"={first}")
    ]
    return flags + [f"--{word}" for rest in more for word in [rest.replace(" ", "=")]]


@pytest.mark.sampled
@pytest.mark.parametrize("script", STAGES)
def test_each_changed_setting_is_named_and_redone(world, script, tally):
    def change(worker, item):
        name, value, decides = item
        shutil.rmtree(worker.out, ignore_errors=True)
        shutil.copytree(worker.after[script], worker.out)
        # stage 1 has a lock for each of two layers, stage 3 for its outputs and the run's folder
        after_locks = 2 if script == "train_sae" else 3
        done = world.run(worker, script, *flag(name, value), stop_at=after_locks)
        if not decides:
            assert (
                done["code"] == 0 and "up to date" in done["out"] and "changed: " not in done["out"]
            ), (name, done)
            return
        name = RECORDED_AS.get(name, name)
        shown = next(
            (group for group, names in GROUPED.items() if name in names), name.rpartition(".")[2]
        )
        assert done["code"] in (0, 143), (name, done)
        assert (
            name in OTHER_FILE
            or f"changed: {shown} " in done["out"]
            or f", {shown} " in done["out"]
        ), (name, done)
        assert "up to date" not in done["out"], (name, done)

    items = [
        (name, value, table is CHANGES)
        for table in (CHANGES, HARMLESS)
        for name, value in table[script].items()
        if value is not None
    ]
    chosen = points(items, 8)
    in_parallel(world, change, chosen)
    tally("settings changed alone", len(chosen), len(items))


def test_each_changed_input_is_named_and_redone(world, worker, tally):
    """Another dataset, another model, other activations, another checkpoint."""

    def restored(script):
        shutil.rmtree(worker.out, ignore_errors=True)
        shutil.copytree(worker.after[script], worker.out)

    data = world.folder / "edited.jsonl"
    rows = (world.folder / "texts.jsonl").read_text().splitlines()
    data.write_text(
        "\n".join([*rows[:-1], json.dumps({"text": "an edited row", "topic": "t1"})]) + "\n"
    )
    restored("extract_activations")
    done = world.run(worker, "extract_activations", "--dataset-path", data)
    assert done["code"] == 0 and done["out"].count("changed: dataset changed") == 2

    other = world.folder / "other-model"
    shutil.copytree(world.folder / "model", other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    restored("extract_activations")
    done = world.run(worker, "extract_activations", "--model-name", other)
    assert done["code"] == 0 and done["out"].count("changed: model changed") == 2

    restored("train_sae")
    assert world.run(worker, "extract_activations", "--max-length", 33)["code"] == 0
    done = world.run(worker, "train_sae")
    assert done["code"] == 0 and "changed: activations changed" in done["out"]

    restored("interpret_sae")
    assert world.run(worker, "extract_activations", "--max-length", 33)["code"] == 0
    done = world.run(worker, "interpret_sae")  # the checkpoint is of other activations
    assert done["code"] == 2 and "was trained on other activations" in done["err"]

    restored("interpret_sae")
    assert world.run(worker, "train_sae", "--learning-rate", 0.003)["code"] == 0
    done = world.run(worker, "interpret_sae")
    assert done["code"] == 0 and "changed: checkpoint changed" in done["out"]

    restored("interpret_sae")
    for name in ("interpretations.csv", "interpretations.html"):
        (worker.out / name).write_text("edited by hand")
        done = world.run(worker, "interpret_sae")
        assert done["code"] == 0 and f"{name}: was changed by hand or is missing" in done["out"]
    tally("inputs changed alone", 7)
