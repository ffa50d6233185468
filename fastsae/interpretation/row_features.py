"""What can be said of features of another program's activations, which have no texts: how often
and how strongly each fires, on which rows, and by a table of the rows which category it separates.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastsae.activations import files
from fastsae.data import datasets, readers
from fastsae.data.token_masks import token_norms
from fastsae.interpretation import tables
from fastsae.interpretation.categories import Categories, add_categories
from fastsae.interpretation.evidence import level_name
from fastsae.interpretation.statistics import (
    BLOCK_TOKENS,
    LargestExamples,
    choose_pooled,
    encode_rows,
)
from fastsae.runtime import artifacts, progress, storage
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.settings.dataset_names import HUB, TEXT, is_plain_text
from fastsae.settings.values import Settings

CSV, HTML, JSONL = "interpretations.csv", "interpretations.html", "interpretations.jsonl"
N_TOP = 5  # strongest rows of a feature
SHOWN = 300  # characters of a row's text in the tables
COLUMNS = (
    "feature",
    "status",
    "density",
    "mean_activation",
    "max_activation",
    *(f"top_example_{i}" for i in range(1, N_TOP + 1)),
    "best_category",
    "category_auc",
    "matryoshka_level",
)


def describe(
    settings: Settings, checkpoint_path: Path, sae_meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The metadata of the tables: what decides them."""
    table = table_of(settings)
    return artifacts.new_metadata(
        "interpretations",
        {
            "LABEL_FIELD": label_field(settings),
            "TEXT_FIELD": settings.TEXT_FIELD,
            "SEED": settings.SEED,
            "N_TOP": N_TOP,
        },
        {
            "checkpoint": sae_meta["fingerprint"],
            "activations": files.read_metadata(settings.activations_path)["fingerprint"],
            "dataset": None if table is None else datasets.identity(table)[0],
        },
        checkpoint=str(checkpoint_path),
    )


def table_of(settings: Settings) -> str | None:
    """The table of the rows: DATASET_PATH, unless that is a preset's, which is of its own texts."""
    if settings.source["DATASET_PATH"].startswith("preset"):
        return None
    path = settings.DATASET_PATH
    if not (path.startswith(HUB) or os.path.exists(path)):
        raise InputError(
            f"DATASET_PATH: {path} is not there. give a table of the rows, or leave it out."
        )
    return path


def label_field(settings: Settings) -> str | None:
    """The column with the rows' categories; a preset's is of its own data."""
    preset = settings.source["LABEL_FIELD"].startswith("preset")
    return None if preset else settings.LABEL_FIELD


def interpret(
    settings: Settings,
    sae_meta: Mapping[str, Any],
    metadata: Mapping[str, Any],
    checkpoint_path: Path,
    started: float,
) -> None:
    """Write interpretations.csv and interpretations.jsonl for an array, and say what is in them."""
    data = files.open_activations(settings.activations_path)
    fingerprint = artifacts.metadata_of(data, settings.activations_path)["fingerprint"]
    if settings.SAE_PATH is None and fingerprint != sae_meta["inputs"]["activations"]:
        raise InputError(
            f"{checkpoint_path}: was trained on other activations than "
            f"{settings.activations_path}. run train_sae.py."
        )
    n = len(data["activations"])
    labels, texts = row_table(settings, n, metadata["inputs"]["dataset"])
    sae, max_norm = _load(settings, checkpoint_path, sae_meta, data)
    found = collect(sae, data["activations"], max_norm=max_norm, seed=settings.SEED)
    rows = feature_rows(found, texts, sae.prefix_lengths)
    categories = add_categories(
        rows,
        SimpleNamespace(  # type: ignore[arg-type]  # the three that it asks for
            pooled_examples=found.pooled_rows, pooled_max=found.pooled, pooled_mean=found.pooled
        ),
        labels,
        "mean",
        settings.SEED,
        data["groups"] if "groups" in data else None,
    )
    folder = settings.output_dir
    if (folder / HTML).exists():  # of other features
        storage.set_aside([folder / HTML])
    about = {**metadata, "complete": True, "n_rows": n, "n_rows_left_out": n - found.n_kept}
    artifacts.write_settings(folder / JSONL, settings)
    tables.write_outputs(folder, {CSV: tables.csv_text(rows, COLUMNS)}, folder / JSONL, rows, about)
    _print(rows, categories, labels, folder)
    print_summary(folder, rows, started)


def print_summary(
    folder: Path, rows: Sequence[Mapping[str, Any]], started: float, status: str = "written"
) -> None:
    """The summary line."""
    progress.summary(
        "interpret_sae",
        folder / CSV,
        started,
        status=status,
        n_features=len(rows),
        n_dead=sum(row["status"] == "dead" for row in rows),
    )


def _load(settings, path, sae_meta, data):
    """(the autoencoder, the largest norm that it was trained on)."""
    from fastsae.formats import load
    from fastsae.lm.devices import choose_device

    device = choose_device(settings.DEVICE)
    sae, meta = load.load_sae(path, "cpu" if device == "mps" else device)
    if meta["fingerprint"] != sae_meta["fingerprint"]:
        raise EnvironmentFailure(f"{path}: was replaced while this run began. run again.")
    width = data["activations"].shape[1]
    if sae.input_dim != width:
        raise InputError(
            f"SAE_PATH: {path} takes activations of {sae.input_dim} dimensions, "
            f"{settings.activations_path} has {width}. give one that was trained on such rows."
        )
    return sae, meta.get("max_norm")


# The table of the rows


def row_table(
    settings: Settings, n: int, sha256: str | None
) -> tuple[list[str | None] | None, list[str | None] | None]:
    """(categories, texts) of the n rows by DATASET_PATH; None where there are none.

    sha256: what the table's content must be.
    """
    path = table_of(settings)
    if path is None:
        return None, None
    field, text_field = label_field(settings), settings.TEXT_FIELD
    labels = column(path, field, n, sha256, "LABEL_FIELD") if field else None
    if is_plain_text(path) and text_field == TEXT:
        text_field = "line"
    if text_field != TEXT or labels is None:
        return labels, column(path, text_field, n, sha256, "TEXT_FIELD")
    try:  # nobody asked for this column
        return labels, column(path, text_field, n, sha256, "TEXT_FIELD")
    except InputError:
        return labels, None


def column(path: str, field: str, n: int, sha256: str | None, setting: str) -> list[str | None]:
    """The values of one field of a dataset as texts, None where there is none.

    InputError, which names `setting`, where no row has it or there are not n rows.
    """
    values: list[str | None] = []
    bad = datasets.BadRows(path)
    with readers.opened(readers.Source(path, sha256, text_field=field)) as rows:
        for number, row, line in rows:
            if isinstance(row, ValueError) or not isinstance(row, dict):
                what = str(row) if isinstance(row, ValueError) else "is no object. correct it."
                bad.add(number, what, line)
                if bad.enough():
                    break
                continue
            value = row.get(field)
            is_empty = value is None or value != value or not str(value).strip()
            values.append(None if is_empty else str(value))
    if bad.kinds:
        raise InputError(*bad.lines())
    if len(values) != n:
        raise InputError(
            f"DATASET_PATH: {path} has {len(values):,} rows, the array {n:,}. give one for each."
        )
    if not any(value is not None for value in values):
        raise InputError(f"{setting}: no row of {path} has {field}. name another field.")
    return values


# The pass over the rows


class Collected:
    """Of M features over the kept rows: count, total, maximum (M,), the strongest rows (`top`), and
    the features of some rows, `pooled` CSR (n_pooled, M) of the rows `pooled_rows`."""

    def __init__(self, m: int) -> None:
        self.n_kept = 0
        self.count, self.total = np.zeros(m, np.int64), np.zeros(m)
        self.maximum, self.top = np.zeros(m, np.float32), LargestExamples(m, N_TOP)
        self.pooled_rows: np.ndarray
        self.pooled: Any


def collect(sae: Any, activations: Any, *, max_norm: float | None, seed: int = 0) -> Collected:
    """One pass over activations (n, d), a block at a time; rows longer than `max_norm` are left
    out, as in training."""
    import torch
    from scipy import sparse

    m, n = sae.m_total_neurons, len(activations)
    found = Collected(m)
    pooled = choose_pooled(np.ones(1), np.arange(n), m, sae.k_active_neurons, seed)
    parts, kept_pooled = [], []
    with progress.bar(n, "statistics", "row", unit_scale=True) as rows_done:
        for start in range(0, n, BLOCK_TOKENS):
            x = np.asarray(activations[start : start + BLOCK_TOKENS], np.float32)
            files.release(activations)
            kept = np.arange(len(x))
            if max_norm is not None:
                kept = np.flatnonzero(token_norms(x) <= max_norm)
            features = encode_rows(sae, torch.from_numpy(np.array(x[kept])))  # CSR (n_kept, M)
            numbers = start + kept
            column_, value = features.indices.astype(np.int64), features.data
            row = np.repeat(numbers, np.diff(features.indptr))
            found.n_kept += len(kept)
            found.count += np.bincount(column_, minlength=m)
            found.total += np.bincount(column_, value, minlength=m)
            np.maximum.at(found.maximum, column_, value)
            fires = value > 0
            found.top.offer(
                column_[fires], value[fires], row[fires], np.zeros(fires.sum(), int), value[fires]
            )
            chosen = np.isin(numbers, pooled, assume_unique=True)
            parts.append(features[np.flatnonzero(chosen)])
            kept_pooled.append(numbers[chosen])
            rows_done.update(len(x))
    found.pooled = sparse.vstack(parts, format="csr")
    found.pooled_rows = np.concatenate(kept_pooled)
    return found


def feature_rows(
    found: Collected, texts: Sequence[str | None] | None, prefixes: Sequence[int] | None
) -> list[dict[str, Any]]:
    """One dict per feature; rows are numbered from 1."""
    rows = []
    for j, count in enumerate(found.count.tolist()):
        top = [
            (int(row) + 1, float(value))
            for row, value in zip(found.top.example[j], found.top.value[j])
            if row >= 0
        ]
        shown = [f"row {row} ({value:.4g}){_text_of(texts, row)}" for row, value in top]
        rows.append(
            {
                "feature": j,
                "status": "ok" if count else "dead",
                "density": count / max(found.n_kept, 1),
                "mean_activation": float(found.total[j] / count) if count else None,
                "max_activation": float(found.maximum[j]),
                **{f"top_example_{i}": text for i, text in enumerate(shown, 1)},
                "top_rows": [row for row, _ in top],
                "top_values": [value for _, value in top],
                "best_category": "",
                "category_auc": None,
                "matryoshka_level": level_name(j, prefixes),
            }
        )
    return rows


def _text_of(texts, row):
    text = texts[row - 1] if texts is not None else None
    return "" if text is None else f": {text[:SHOWN]}"


def _print(
    rows: Sequence[Mapping[str, Any]],
    categories: Categories | None,
    labels: Sequence[str | None] | None,
    folder: Path,
) -> None:
    alive = [row for row in rows if row["status"] == "ok"]
    print(f"features: {len(rows)}, {len(rows) - len(alive)} dead on these rows")
    if categories is not None:
        n_named = sum(bool(row["best_category"]) for row in rows)
        print(f"categories: {n_named} features separate one better than chance")
    elif labels is not None:
        print("category AUC: none, for too few rows share a value")
    best = sorted(alive, key=lambda row: (-(row["category_auc"] or 0), -row["max_activation"]))
    for row in best[:N_TOP]:
        auc = row["category_auc"] or math.nan
        category = f" ({row['best_category']}, AUC {auc:.2f})" if row["best_category"] else ""
        print(f"  {row['feature']}: strongest on {row['top_example_1'][:100]}{category}")
    print(f"wrote {folder / CSV} and {JSONL}; without texts there are no labels and no report")
