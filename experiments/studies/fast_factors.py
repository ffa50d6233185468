"""FAST's advantage over block training taken apart: which part comes from reading each dialogue
alone, which from the template's openings, which from attention sinks, and which from measuring on
dialogues read as in training.

    python -m experiments.studies.fast_factors --quick  # minutes on two cores
    python -m experiments.studies.fast_factors --dataset-path my_dialogues.jsonl
    python -m experiments.studies.fast_factors --dataset-path my_dialogues.jsonl --m 4608 --k 32

Every combination of how dialogues are read in training (alone; in blocks, but apart, so that none
sees another; in whole blocks), of openings kept or dropped and of sinks kept or dropped, on equal
numbers of tokens, of dialogues the same ones. Each autoencoder is measured on held-out dialogues
read alone and in whole blocks. Beside them blocks of two plain texts: the dialogues' own text
without template, and Python's manual. Of the middle layer and FEATURE_SEEDS of the seeds also the
evidence on features: rules, five-shot detection, probing, loss recovered.

Results are added to experiments/results/<NAME>.json, one entry for each dataset, architecture, M
and K. An interrupted run goes on by the same command. docs/fast.md reads them.
"""

import functools
import itertools
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import config
from experiments.shared import fast_measures, in_memory
from experiments.shared.fast_tokens import template_share
from experiments.shared.provenance import Journal
from experiments.shared.sweeps import quick_settings
from experiments.studies import fast_features, fast_sources, fast_summary
from experiments.studies.fast_sources import TEXTS, activations, sources

ARCHITECTURE: str = "topk"  # of those that train_sae.py knows
LAYERS: tuple[int, ...] = (4, 12, 20)  # early, middle and late; of SmolLM2's 30
SEEDS: tuple[int, ...] = (0, 1, 2, 3)  # each: choice and order of the tokens, first weights
M: int = 256  # features
K: int = 8  # active features per token: exact for topk, aimed at by jumprelu
SPARSITY_COEFFICIENT: float | None = None  # of standard, gated, aligned; none = train_sae.py's
TRAIN_TOKENS: int = 40_000  # of each autoencoder; fewer where a source has fewer
N_EPOCHS: int = 10  # over these
BATCH_SIZE: int = 512  # tokens per step
BLOCK_LENGTH: int = 2048  # tokens per block; longer dialogues are left out
HELD_OUT: int = 120  # dialogues that measure and never train; at most a third of all
PLAIN_TEXT: str | None = None  # .txt beside the dialogues; none = pydoc_data.topics of Python
LABELLED_PATH: str | None = None  # texts with LABELLED_FIELD for probing; none = the demo's
LABELLED_FIELD: str = "cognitive_action"  # their categories
FEATURE_SEEDS: int = 2  # seeds of which the evidence on features is gathered; 0 = none
NAME: str = "fast_factors"  # of the result
QUICK: bool = False  # one layer, two seeds, 12,000 tokens, 4 epochs, evidence of one seed

QUICK_VALUES = {
    "LAYERS": (12,),
    "SEEDS": (0, 1),
    "TRAIN_TOKENS": 12_000,
    "N_EPOCHS": 4,
    "HELD_OUT": 60,
    "FEATURE_SEEDS": 1,
}


class Cell(NamedTuple):
    """What one autoencoder is trained on; `openings` and `sinks` number KEPT."""

    layer: int
    source: str
    openings: int
    sinks: int
    seed: int


def main():
    settings = quick_settings(config.resolve(__file__), QUICK_VALUES)
    settings.show()
    work = settings.output_dir / "checkpoints" / settings.NAME / Path(settings.DATASET_PATH).stem
    datasets = fast_sources.write_datasets(settings, work)
    fast_sources.extract(settings, work, datasets)
    n_tokens = min(settings.TRAIN_TOKENS, fast_sources.fewest_tokens(settings, work))
    cells = grid(settings)
    print(f"{len(cells)} autoencoders on {n_tokens:,} tokens each", flush=True)
    values = run_cells(settings, work, datasets, n_tokens)
    fast_summary.write(settings, work, values, n_tokens)


def grid(settings):
    """The Cells, seed by seed."""
    return [
        Cell(layer, source, openings, sinks, seed)
        for seed in settings.SEEDS
        for layer in settings.LAYERS
        for sinks in (0, 1)
        for source, openings in [
            *itertools.product(fast_measures.ATTENTION, (0, 1)),
            *((text, 1) for text in TEXTS),
        ]
    ]


# What is trained and measured


def run_cells(settings, work, datasets, n_tokens):
    """{Cell: what was measured of it}; each is written down as soon as it is there."""
    from fastsae.lm.devices import choose_device

    journal = Journal(work / f"{settings.NAME}.jsonl", leaving_out=fast_summary.FILES)
    chosen = choose_device(settings.DEVICE)
    device = "cpu" if chosen == "mps" else chosen  # which has no sparse products
    how = in_memory.stage_settings(*training_flags(settings))
    middle = settings.LAYERS[len(settings.LAYERS) // 2]
    inputs = functools.cache(functools.partial(fingerprints, work))
    values, at = {}, {}
    for number, cell in enumerate(grid(settings), 1):
        with_features = (
            cell.layer == middle and cell.seed in settings.SEEDS[: settings.FEATURE_SEEDS]
        )
        key = {
            "cell": list(cell),
            "tokens": n_tokens,
            "training": how.select(["ARCHITECTURE", "M", "K", "SPARSITY_COEFFICIENT", "N_EPOCHS"]),
            "batch": how.BATCH_SIZE,
            "features": with_features,
            "inputs": inputs(cell.layer, with_features),
        }

        def compute(cell=cell, with_features=with_features):
            if cell.layer not in at:
                at.clear()  # one layer's activations at a time
                at[cell.layer] = AtLayer(settings, work, datasets, cell.layer)
            return at[cell.layer].measure(cell, n_tokens, how, device, with_features)

        values[cell] = journal.remembered(key, compute)
        if number % 16 == 0 or number == len(grid(settings)):
            print(f"{number} of {len(grid(settings))} autoencoders", flush=True)
    return values


def training_flags(settings):
    """The flags of train_sae.py that every autoencoder has."""
    names = ("ARCHITECTURE", "M", "K", "N_EPOCHS", "BATCH_SIZE")
    flags = [f"--{name.lower().replace('_', '-')}={settings.values[name]}" for name in names]
    if settings.SPARSITY_COEFFICIENT is not None:
        flags.append(f"--sparsity-coefficient={settings.SPARSITY_COEFFICIENT}")
    return [*flags, "--matryoshka-prefixes=none"]


def fingerprints(work, layer, with_features):
    """Of the activations that a cell's figures depend on."""
    from fastsae.activations.files import read_metadata

    folders = (*fast_measures.ATTENTION, *TEXTS, "held_out_alone", "held_out_whole")
    names = [*folders, "labelled"] if with_features else folders
    return [read_metadata(activations(work, name, layer))["fingerprint"] for name in names]


class AtLayer:
    """Everything that the cells of one layer are trained on and measured with."""

    def __init__(self, settings, work, datasets, layer):
        from fastsae.lm.loading import load_tokenizer

        tokenizer = load_tokenizer(
            settings.MODEL_NAME, revision=settings.MODEL_REVISION, cache_dir=settings.CACHE_DIR
        )
        self.sources = sources(work, layer)
        self.tested = fast_sources.tested_at(settings, work, layer, tokenizer)
        paths = {name: activations(work, name, layer) for name in ("held_out_alone", "labelled")}
        self.evidence = fast_features.Evidence(settings, datasets, paths, tokenizer, layer)

    def measure(self, cell, n_tokens, how, device, with_features):
        """Train the autoencoder of a cell; JSON-able figures of it."""
        started, tokens = time.process_time(), self.sources[cell.source]
        rows = tokens.some(
            n_tokens, cell.seed, openings=bool(cell.openings), sinks=bool(cell.sinks)
        )
        sae = in_memory.train(how, tokens.activations, rows, seed=cell.seed, device=device)
        found = {on: tested.measure(sae) for on, tested in self.tested.items()}
        value = {
            "trained_on": {
                "openings": float(tokens.opening[rows].mean()),
                "sinks": float(tokens.sink[rows].mean()),
            },
            "template_share": none_if_nan(template_share(sae, self.tested["alone"])),
            "on": {
                on: {
                    **each,
                    "errors": {
                        s: [float(f"{e:.6g}") for e in v] for s, v in each["errors"].items()
                    },
                }
                for on, each in found.items()
            },
        }
        if with_features:
            value["features"] = self.evidence.of(sae)
        value["cpu_seconds"] = time.process_time() - started
        return value


def none_if_nan(value):
    """A number as JSON has it."""
    return None if np.isnan(value) else float(value)


if __name__ == "__main__":
    from fastsae.runtime.stage import run_stage as as_stage

    sys.exit(as_stage(main))
