"""FAST against block training: dialogues alone, the same dialogues in blocks, plain text in blocks,
on equal numbers of tokens.

    python -m experiments.studies.fast_vs_block --quick  # minutes on two cores
    python -m experiments.studies.fast_vs_block --dataset-path my_dialogues.jsonl --device cuda
    python -m experiments.studies.fast_vs_block --quick --dataset-path dialogues.jsonl \\
        --labelled-path data/cognitive_actions.jsonl

FAST trains on each dialogue alone, BT(F) on the same dialogues joined and cut into blocks, BT(P) on
blocks of a plain text; all are measured on the same held-out dialogues, each run alone (arXiv
2506.07691). The coefficients of standard and jumprelu are the same for all, as in the paper, and
give each source an L0 of its own, which is reported; topk has K everywhere. Every autoencoder is
trained twice: on all tokens, as in the paper, and without the shared prefix and attention sinks, as
train_sae.py does by default. Intervals are 95 % bootstrap intervals over held-out dialogues and
seeds, wider where seeds are few. Writes experiments/results/<NAME>.json and .png. An interrupted
run goes on by the same command.
"""

import json
import sys
from pathlib import Path

import numpy as np

import config
from experiments.shared import evidence, heldout
from experiments.shared.provenance import RESULTS, run_stage, write_figure, write_result
from experiments.shared.sweeps import (
    MODEL_SETTINGS,
    epochs_and_steps,
    listed,
    passed_on,
    quick_settings,
    recorded,
    rounded,
    run_many,
)

ARCHITECTURES: str = "standard,jumprelu,topk"  # of those that train_sae.py knows
LAYERS: tuple[int, ...] = (4, 12, 20)  # early, middle and late; of SmolLM2's 30
SEEDS: tuple[int, ...] = (0, 1, 2, 3, 4)  # each: a split, first weights and data order
PLAIN_TEXT: str | None = None  # .txt for BT(P); none = pydoc_data.topics, which is in Python
LABELLED_PATH: str | None = None  # dataset with LABEL_FIELD; none = the held-out dialogues
HELD_OUT_FRACTION: float = 0.2  # part of the dialogues that measure and never train
TRAIN_TOKENS: int | None = None  # of each autoencoder; none = all that the smallest source has
BLOCK_LENGTH: int = 2048  # tokens per block of BT(F) and BT(P)
M: int = 4608  # features
K: int = 32  # active features per token: exact for topk, aimed at by jumprelu
L1_COEFFICIENT: float = 1.0  # of standard
N_EPOCHS: int = 10  # over the TRAIN_TOKENS
BATCH_SIZE: int = 512  # tokens per step: Python's own plain text gives 196 of them an epoch
LEARNING_RATE: float = 1e-3  # of Adam, falling to 0 over all steps
INTERPRETER_MODEL: str = "gpt-5-mini"  # scores 1 to 5, if OPENAI_* name an endpoint
N_SCORED_FEATURES: int = 128  # features of each autoencoder that it scores
NAME: str = "fast_vs_block"  # of the result
QUICK: bool = False  # two architectures, small, 30,000 tokens, short blocks, 30 % held out

QUICK_VALUES = {
    "ARCHITECTURES": "standard,topk",
    "M": 256,
    "K": 8,
    "L1_COEFFICIENT": 2.0,
    "N_EPOCHS": 2,
    "SEEDS": (0, 1, 2),
    "HELD_OUT_FRACTION": 0.3,
    "BLOCK_LENGTH": 512,
    "TRAIN_TOKENS": 30_000,
}
SOURCES = {"FAST": "example", "BT(F)": "block", "BT(P)": "block"}
FOLDERS = {"FAST": "fast", "BT(F)": "block_dialogues", "BT(P)": "block_text"}
PER_SINKS = {
    True: ["--use-tokens", "all+prefix", "--max-norm-ratio", "none"],
    False: [],
}  # are prefix and sinks in the training?
VALIDATION_FRACTION = 0.1


def main():
    settings = quick_settings(config.resolve(__file__), QUICK_VALUES)
    settings.show()
    work = settings.output_dir / "checkpoints" / settings.NAME
    datasets = write_datasets(settings, work)
    extract(settings, work, datasets)
    n_tokens = min(settings.TRAIN_TOKENS or sys.maxsize, smallest_source(settings, work))
    print(f"training {len(grid(settings))} autoencoders on {n_tokens:,} tokens each", flush=True)
    run_many(
        "train_sae.py", [train_flags(settings, work, n_tokens, *cell) for cell in grid(settings)]
    )
    measured = {layer: measure(settings, work, layer) for layer in settings.LAYERS}
    runs = [run for _, of_layer in measured.values() for run in of_layer]
    per_feature = interpretability(settings, work, datasets["labelled"])
    errors = {key(run): run.pop("per_dialogue") for run in runs}
    l0 = {key(run): run["l0"] for run in runs}
    comparisons = [
        compare(errors, l0, architecture, layer, sinks)
        for architecture in architectures(settings)
        for layer in settings.LAYERS
        for sinks in PER_SINKS
    ]
    result = {
        "train_tokens": n_tokens,
        "data": counts(work, settings),
        "held_out_tokens": {layer: n for layer, (n, _) in measured.items()},
        "comparisons": comparisons,
        "interpretability": per_feature,
        "runs": runs,
    }
    write_result(settings.NAME, recorded(settings), rounded(result))
    figure(result, settings, RESULTS / f"{settings.NAME}.png")


def architectures(settings):
    return settings.ARCHITECTURES.split(",")


def grid(settings):
    """(source, architecture, layer, prefix and sinks in training, seed) of every autoencoder, seed
    by seed."""
    return [
        (source, architecture, layer, sinks, seed)
        for seed in settings.SEEDS
        for source in SOURCES
        for architecture in architectures(settings)
        for layer in settings.LAYERS
        for sinks in PER_SINKS
    ]


def key(run):
    return tuple(
        run[name] for name in ("source", "architecture", "layer", "sinks_in_training", "seed")
    )


def write_datasets(settings, work):
    """{name: path} of the dialogues that train, those that are held out, the plain text and the
    labelled texts."""
    from fastsae.data.datasets import read_dataset
    from fastsae.runtime import artifacts

    dialogues = read_dataset(
        settings.DATASET_PATH,
        text_field=settings.TEXT_FIELD,
        label_field=settings.LABEL_FIELD,
        max_examples=settings.MAX_EXAMPLES,
    )
    training, held_out = heldout.split(dialogues, settings.HELD_OUT_FRACTION, settings.SEED)
    paths = {name: work / f"{name}.jsonl" for name in ("training", "held_out")}
    for name, examples in (("training", training), ("held_out", held_out)):
        rows = (
            heldout.as_row(example, settings.LABEL_FIELD, settings.TEXT_FIELD)
            for example in examples
        )
        artifacts.write_text(paths[name], "".join(rows))
    paths["plain"] = Path(settings.PLAIN_TEXT) if settings.PLAIN_TEXT else work / "plain.txt"
    if not settings.PLAIN_TEXT:
        from pydoc_data import topics

        artifacts.write_text(paths["plain"], "\n\n".join(topics.topics.values()))
    paths["labelled"] = (
        Path(settings.LABELLED_PATH) if settings.LABELLED_PATH else paths["held_out"]
    )
    return paths


def extract(settings, work, datasets):
    """One pass of the model over each dataset, all layers at once."""
    block = ["--block-length", settings.BLOCK_LENGTH]
    parts = {
        "fast": ("training", []),
        "held_out": ("held_out", []),
        "block_dialogues": ("training", block),
        "block_text": ("plain", block),
        "labelled": ("labelled", []),
    }
    for folder, (name, flags) in parts.items():
        if folder != "labelled" or settings.LABELLED_PATH:
            run_stage(
                "extract_activations.py",
                *passed_on(settings, MODEL_SETTINGS),
                "--layer-idx",
                listed(settings.LAYERS),
                "--output-dir",
                work / folder,
                "--dataset-path",
                datasets[name],
                *flags,
            )


def activations(work, folder, layer):
    return work / folder / "activations" / f"activations_layer{layer}.npz"


def smallest_source(settings, work):
    """The training tokens that every source has, at every layer and seed, with and without prefix
    and sinks."""
    from fastsae.training.data import Tokens

    # (EXCLUDE_SHARED_PREFIX, MAX_NORM_RATIO) with prefix and sinks, and without
    bounds = ((False, None), (True, 10))
    return min(
        len(
            Tokens(
                activations(work, folder, layer),
                validation_fraction=VALIDATION_FRACTION,
                seed=seed,
                use="all",
                exclude_shared_prefix=exclude,
                max_norm_ratio=ratio,
            ).train
        )
        for folder in FOLDERS.values()
        for layer in settings.LAYERS
        for seed in settings.SEEDS
        for exclude, ratio in bounds
    )


def run_name(architecture, layer, sinks, seed):
    return f"{architecture}_layer{layer}_{'with' if sinks else 'without'}_sinks_seed{seed}"


def train_flags(settings, work, n_tokens, source, architecture, layer, sinks, seed):
    """The flags of train_sae.py for one autoencoder: for all sources the same but for the
    activations."""
    return [
        *passed_on(settings, MODEL_SETTINGS),
        "--output-dir",
        work / FOLDERS[source],
        "--run-name",
        run_name(architecture, layer, sinks, seed),
        "--architecture",
        architecture,
        "--layer-idx",
        layer,
        "--seed",
        seed,
        *PER_SINKS[sinks],
        "--max-train-tokens",
        n_tokens,
        "--m",
        settings.M,
        "--k",
        settings.K,
        "--sparsity-coefficient",
        settings.L1_COEFFICIENT,
        "--matryoshka-prefixes=none",
        *epochs_and_steps(settings),
        "--validation-fraction",
        VALIDATION_FRACTION,
        "--test-fraction",
        0,
    ]  # the held-out dialogues test


def checkpoint(work, source, architecture, layer, sinks, seed):
    """(path, metrics) of a trained autoencoder."""
    folder = work / FOLDERS[source] / "checkpoints" / run_name(architecture, layer, sinks, seed)
    metrics = json.loads((folder / "metrics.json").read_text())
    return folder / metrics["checkpoint"], metrics


def measure(settings, work, layer):
    """(numbers of held-out tokens, a dict for each autoencoder of a layer, `per_dialogue` in it for
    the intervals)."""
    from fastsae.formats.load import load_sae
    from fastsae.lm.loading import load_tokenizer

    tokenizer = load_tokenizer(
        settings.MODEL_NAME, revision=settings.MODEL_REVISION, cache_dir=settings.CACHE_DIR
    )
    data = heldout.HeldOut(activations(work, "held_out", layer), tokenizer)
    runs = []
    for cell in (cell for cell in grid(settings) if cell[2] == layer):
        path, metrics = checkpoint(work, *cell)
        figures, per_dialogue = data.measure(load_sae(path)[0])
        names = ("source", "architecture", "layer", "sinks_in_training", "seed")
        runs.append(
            {
                **dict(zip(names, cell)),
                "n_train_tokens": metrics["n_train_tokens"],
                **figures,
                "per_dialogue": per_dialogue,
            }
        )
    return data.counts(), runs


def interpretability(settings, work, dataset_path):
    """The evidence on the labelled dataset of the autoencoders trained without prefix and sinks:
    see evidence.study."""
    from fastsae.lm.loading import load_tokenizer

    tokenizer = load_tokenizer(
        settings.MODEL_NAME, revision=settings.MODEL_REVISION, cache_dir=settings.CACHE_DIR
    )
    folder = "labelled" if settings.LABELLED_PATH else "held_out"
    labelled = {
        layer: evidence.Labelled(
            activations(work, folder, layer), dataset_path, tokenizer, settings
        )
        for layer in settings.LAYERS
    }
    return evidence.study(
        [(cell, checkpoint(work, *cell)[0]) for cell in grid(settings) if not cell[3]], labelled
    )


def compare(errors, l0, architecture, layer, sinks):
    """L0 and MSE_st of the three sources with intervals, whether they are ordered as in the paper,
    and the part that the sinks play."""
    stacked = {
        source: {
            name: np.stack(
                [
                    value[name]
                    for cell, value in errors.items()
                    if cell[:4] == (source, architecture, layer, sinks)
                ]
            )
            for name in heldout.PER_DIALOGUE
        }
        for source in SOURCES
    }
    result = {
        "architecture": architecture,
        "layer": layer,
        "sinks_in_training": sinks,
        "l0": {
            source: float(
                np.mean(
                    [
                        value
                        for cell, value in l0.items()
                        if cell[:4] == (source, architecture, layer, sinks)
                    ]
                )
            )
            for source in SOURCES
        },
    }
    for tokens in heldout.SETS:
        for what in ("mse", "mse_special"):
            arrays = {source: values[f"{what}, {tokens}"] for source, values in stacked.items()}
            result[f"{what}, {tokens}"] = heldout.ordering(arrays)
    for other in ("BT(F)", "BT(P)"):
        result[f"gap of {other} on sinks"] = heldout.gap_on_sinks(stacked["FAST"], stacked[other])
    return result


def counts(work, settings):
    """What there was to train on and to measure with."""
    from fastsae.activations.files import read_metadata

    folders = {
        **FOLDERS,
        "held out": "held_out",
        **({"labelled": "labelled"} if settings.LABELLED_PATH else {}),
    }
    found = {
        name: read_metadata(activations(work, folder, settings.LAYERS[0]))
        for name, folder in folders.items()
    }
    return {
        name: {
            "examples": m["n_examples"],
            "tokens": m["n_tokens"],
            "file": Path(m["dataset_path"]).name,
            "sha256": m["inputs"]["dataset"],
        }
        for name, m in found.items()
    }


def figure(result, settings, path):
    """MSE_st per source: a row for each architecture, a column for each layer; every seed a dot,
    the bars their means."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = architectures(settings), settings.LAYERS
    fig, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(3.3 * len(columns), 2.6 * len(rows)),
        squeeze=False,
        layout="constrained",
    )
    panels = [
        (True, "all tokens", "trained with sinks,\nall tokens"),
        (False, heldout.SETS[2], "trained without,\nmeasured without"),
    ]
    colours = dict(zip(SOURCES, ("#2a6fbb", "#d98a29", "#8a8a8a")))
    for i, architecture in enumerate(rows):
        for j, layer in enumerate(columns):
            for x, (sinks, tokens, _) in enumerate(panels):
                for offset, source in enumerate(SOURCES):
                    found = [
                        run["sets"][tokens]["mse_special"]
                        for run in result["runs"]
                        if key(run)[:4] == (source, architecture, layer, sinks)
                    ]
                    at = x + 0.25 * (offset - 1)
                    axes[i, j].plot(
                        [at - 0.09, at + 0.09], [np.mean(found)] * 2, color=colours[source], lw=2
                    )
                    axes[i, j].scatter(
                        [at] * len(found),
                        found,
                        color=colours[source],
                        s=14,
                        label=source if x == 0 else None,
                    )
            axes[i, j].set(
                yscale="log",
                xticks=range(len(panels)),
                xlim=(-0.5, len(panels) - 0.5),
                title=f"{architecture}, layer {layer}",
            )
            axes[i, j].set_xticklabels([name for *_, name in panels], fontsize=7)
        axes[i, 0].set_ylabel("MSE on special tokens")
    axes[0, 0].legend(fontsize=7, frameon=False)
    write_figure(path, fig)


if __name__ == "__main__":
    from fastsae.runtime.stage import run_stage as run_and_report

    sys.exit(run_and_report(main))
