"""The result of fast_factors, from what was measured of each autoencoder. Changes here need no
training anew."""

import json
from pathlib import Path

import numpy as np

from experiments.shared import fast_measures
from experiments.shared.fast_tokens import Tokens
from experiments.shared.provenance import RESULTS, commit, write_result
from experiments.shared.sweeps import recorded, rounded
from experiments.studies import fast_features, fast_sources
from experiments.studies.fast_sources import TEXTS, activations, sources

# what only sums up, or has nothing to do with this study
FILES = (
    "experiments/benchmarks",
    "experiments/pages",
    "experiments/shared/factors.py",
    "experiments/shared/fast_measures.py",
    "experiments/studies/fast_summary.py",
)


def write(settings, work, values, n_tokens):
    """Add the entry of a run, {Cell: what was measured of it}, to the result."""
    entry = {
        "settings": recorded(settings),
        "commit": commit(),
        "train_tokens": n_tokens,
        "cpu_minutes": sum(value["cpu_seconds"] for value in values.values()) / 60,
        "data": counts(settings, work),
        **summed_up(settings, work, values),
        "positions_differ_by": positions_differ_by(settings, work),
    }
    add_entry(settings, rounded(entry, 5))


def summed_up(settings, work, values):
    """The cells' figures, the gaps and the shares of each layer and of their mean, and of the plain
    texts what lies between them and the dialogues' blocks."""
    from fastsae.lm.loading import load_tokenizer

    tokenizer = load_tokenizer(
        settings.MODEL_NAME, revision=settings.MODEL_REVISION, cache_dir=settings.CACHE_DIR
    )
    cells, gaps, shares, texts = [], [], [], []
    by_layer = {name: [] for name in fast_measures.MEASURES}
    for layer in settings.LAYERS:
        tested = fast_sources.tested_at(settings, work, layer, tokenizer)
        about = {on: {"counts": t.counts, "spread": t.spread} for on, t in tested.items()}
        d = tested["alone"].activations.shape[1]
        # the same dialogues at all layers, so the same resamples
        resampled = fast_measures.Resampled(tested["alone"].n_dialogues, len(settings.SEEDS))
        here = {cell: value for cell, value in values.items() if cell.layer == layer}
        errors = {
            cell[1:]: {on: value["on"][on]["errors"] for on in fast_measures.ON}
            for cell, value in here.items()
        }
        for name, measure in fast_measures.MEASURES.items():
            y = fast_measures.table_of(errors, about, settings.SEEDS, d, resampled, measure)
            by_layer[name].append(y)
            where = {"layer": layer, "measure": name}
            gaps += [{**where, **gap} for gap in fast_measures.gaps(y, resampled)]
            shares.append({**where, "shares": fast_measures.shares(y, resampled)})
        of_errors = fast_measures.errors_of_groups(errors, about, settings.SEEDS, d, resampled)
        for group, figures in of_errors.items():
            cells.append({"layer": layer, **group._asdict(), **figures, **means_of(here, group)})
        texts += [
            {"layer": layer, **row}
            for row in fast_measures.text_gaps(errors, about, settings.SEEDS, d, resampled, TEXTS)
        ]
    if len(settings.LAYERS) > 1:
        for name, tables in by_layer.items():
            where = {"layer": "mean", "measure": name}
            mean = np.mean(tables, axis=0)
            gaps += [{**where, **gap} for gap in fast_measures.gaps(mean, resampled)]
            shares.append({**where, "shares": fast_measures.shares(mean, resampled)})
    features = fast_features.summed_up({cell: v for cell, v in values.items() if "features" in v})
    return {"cells": cells, "gaps": gaps, "shares": shares, "texts": texts, "features": features}


def means_of(values, group):
    """Means over the seeds of what a group of cells has besides errors."""
    found = [v for cell, v in values.items() if cell[1:4] == tuple(group)]
    return {
        "trained_on": {
            name: float(np.mean([v["trained_on"][name] for v in found]))
            for name in ("openings", "sinks")
        },
        "template_share": float(np.mean([v["template_share"] or 0.0 for v in found])),
        **{
            name: {
                on: float(np.mean([v["on"][on][name] for v in found])) for on in ("alone", "whole")
            }
            for name in ("l0", "dead_fraction")
        },
    }


def counts(settings, work):
    """What there was to train on and to measure with, at each layer."""
    found = {}
    for layer in settings.LAYERS:
        of_layer = {**sources(work, layer)}
        alone = activations(work, "held_out_alone", layer)
        whole = Tokens(activations(work, "held_out_whole", layer), alone)
        of_layer["held out, alone"] = Tokens(alone, alone, len(whole.ids))
        of_layer["held out, whole"] = whole
        found[str(layer)] = {
            name: {
                "tokens": len(tokens.ids),
                "dialogues": int(tokens.dialogue[-1]) + 1 if name not in TEXTS else 0,
                "openings": int(tokens.opening.sum()),
                "sinks": int(tokens.sink.sum()),
                "sinks_in_openings": int((tokens.sink & tokens.opening).sum()),
            }
            for name, tokens in of_layer.items()
        }
    return found


def positions_differ_by(settings, work):
    """{layer: relative differences of the tokens of a few dialogues apart in blocks, at the
    positions of the block and from 0}: the median and the largest."""
    found = {}
    for layer in settings.LAYERS:
        a, b = (
            np.asarray(Tokens(activations(work, name, layer)).activations, np.float32)
            for name in ("in_block", "from_0")
        )
        length = np.maximum(np.linalg.norm(b, axis=1), 1e-9)
        relative = np.linalg.norm(a - b, axis=1) / length
        found[str(layer)] = {"median": float(np.median(relative)), "largest": float(relative.max())}
    return found


def add_entry(settings, entry):
    """Put a run's entry into the result, in the place of an earlier one of the same title."""
    path = RESULTS / f"{settings.NAME}.json"
    runs = json.loads(path.read_text("utf-8"))["runs"] if path.exists() else {}
    dataset = Path(settings.DATASET_PATH).stem
    title = f"{dataset}, {settings.ARCHITECTURE}, M = {settings.M}, K = {settings.K}"
    write_result(settings.NAME, {}, {"runs": runs | {title: entry}})
