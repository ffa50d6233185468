"""How many features, and how many of them active: what a sweep over M, K and tokens says, and which
K it recommends.

    python -m experiments.studies.sparsity --quick     # minutes on one core
    python -m experiments.studies.sparsity --dataset-path texts.jsonl --label-field topic \\
        --ms 256 --parts dataset                       # a K for these data

For each size: normalised MSE of test examples, dead features, the mean AUC of k-sparse probes of
the dataset's labels, and two statistics of the decoder that arXiv 2508.16560 reads the right K
from, since features that mix directions have larger values: the projection of tokens on decoder
rows at the rank N_SHARE x M of each token, and the mean |cosine| of two rows. The least value of
each is looked for between the Ks tried, seed by seed; its mean is the K recommended, with the 95 %
interval of the seeds. On planted tokens the right K is known (`planted`).

Writes experiments/results/<NAME>.json, in which other datasets stay. The same command goes on after
an interruption.
"""

import functools
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import config
from experiments.shared.objective_steps import OBJECTIVES
from experiments.shared.provenance import RESULTS, commit, remembered, run_stage, write_result
from experiments.shared.statistics import mean_interval
from experiments.shared.sweeps import DATA_SETTINGS, passed_on, quick_settings, rounded

OBJECTIVE: str = "topk, prefixes"  # of objective_steps.py
MS: tuple[int, ...] = (64, 256, 1024)  # features
KS: tuple[int, ...] = (2, 4, 8, 16, 32, 64)  # active features per token, up to M / 4
FEW_KS: tuple[int, ...] = (8, 16, 32)  # the same for M above 512 and for parts of the data
SHARES: tuple[float, ...] = (1.0, 0.25)  # of the training examples
SEEDS: tuple[int, ...] = (0, 1)  # of first weights and order of the tokens
STEPS: int = 1000  # of training
BATCH_SIZE: int = 512  # tokens per step
N_SPLITS: int = 3  # half splits for the probes
N_SHARE: float = 0.25  # of the features, the rank at which a projection is read
PLANTED_KS: tuple[int, ...] = (2, 3, 4, 6, 8, 11, 15, 20)  # tried on planted tokens
PLANTED_SHARES: tuple[float, ...] = (0.4, 1.0)  # times how often planted directions are active
ORTHONORMAL: tuple[int, ...] = (0, 1)  # 1: planted directions at right angles, 0: at random
PLANTED_SEEDS: tuple[int, ...] = (0, 1, 2, 3)  # of directions, tokens and first weights
PLANTED_STEPS: int = 1500  # of training on planted tokens
N_PLANTED: int = 64000  # tokens
PARTS: str = "planted,dataset"  # what to measure
NAME: str = "sparsity"  # of the result
QUICK: bool = False  # one size, fewer steps

QUICK_VALUES = {"MS": (256,), "SHARES": (1.0,), "STEPS": 300, "PLANTED_STEPS": 300}
PROBES = (1, 5, 16)  # columns
STATISTICS = ("projection", "cosine")
PLANTED_OBJECTIVES = ("topk", "batchtopk")


def main():
    settings = quick_settings(config.resolve(__file__), QUICK_VALUES)
    settings.show()
    parts = settings.PARTS.split(",")
    path = RESULTS / f"{settings.NAME}.json"
    result = json.loads(path.read_text("utf-8")) if path.exists() else {}
    result = {name: result.get(name, {}) for name in ("datasets", "planted")}
    if "planted" in parts:
        result["planted"] = with_earlier(result["planted"], rounded(on_planted(settings)))
    if "dataset" in parts:
        result["datasets"][Path(settings.DATASET_PATH).stem] = rounded(on_dataset(settings))
    write_result(settings.NAME, {"probes": PROBES, "n_share": settings.N_SHARE}, result)


def journal(settings: Any) -> Path:
    """Where figures of single autoencoders are kept."""
    return settings.output_dir / "checkpoints" / settings.NAME / "runs.jsonl"


def on_dataset(settings: Any) -> dict[str, Any]:
    """{settings, cells: figures of every size, recommended: Ks of each M on all the data}."""
    from experiments.shared.trainings import Dataset

    names = (*DATA_SETTINGS, "LABEL_FIELD", "OUTPUT_DIR")
    run_stage("extract_activations.py", *passed_on(settings, names))
    cells = []
    for share in settings.SHARES:
        dataset = Dataset(settings, share)
        rows = functools.cache(dataset.rows)
        for m, k in sizes(settings, share):
            for seed in settings.SEEDS:
                key = {"share": share, "m": m, "k": k, "seed": seed}
                own = settings.select(("OBJECTIVE", "STEPS", "BATCH_SIZE", "N_SPLITS", "N_SHARE"))
                found = remembered(
                    journal(settings),
                    {**own, **key, "activations": dataset.tokens.fingerprint},
                    lambda: cell(settings, dataset, rows(), m, k, seed),
                )
                cells.append({**key, **found})
            print(cells[-1], flush=True)
    whole = [each for each in cells if each["share"] == max(settings.SHARES)]
    advised = {str(m): recommended([each for each in whole if each["m"] == m]) for m in settings.MS}
    for size, advice in advised.items():
        print(f"M = {size}: {advice}", flush=True)
    about = settings.select(("OBJECTIVE", "STEPS", "BATCH_SIZE", "SEEDS"))
    return {"settings": {**about, "commit": commit()}, "cells": cells, "recommended": advised}


def sizes(settings: Any, share: float) -> list[tuple[int, int]]:
    """(M, K) of the cells on this part of the data."""
    return [
        (m, k)
        for m in settings.MS
        for k in (settings.KS if m <= 512 and share == 1 else settings.FEW_KS)
        if k <= m // 4
    ]


def cell(settings: Any, dataset: Any, rows: Any, m: int, k: int, seed: int) -> dict[str, float]:
    """The figures of one autoencoder."""
    from experiments.shared.trainings import train
    from fastsae.training.usual import learning_rate

    objective = OBJECTIVES[settings.OBJECTIVE]
    rate = learning_rate(objective.architecture, m, rows.x.shape[1], settings.BATCH_SIZE)
    sizes_of = {"m": m, "k": k, "seed": seed, "steps": settings.STEPS}
    sae = train(objective, rows, batch_size=settings.BATCH_SIZE, rate=rate, **sizes_of)
    probes = {}
    if any(label is not None for label in dataset.labels):
        found = dataset.probes(sae, PROBES, settings.N_SPLITS)
        probes = {f"probe {n}": auc for n, auc in found.items()}
    x = dataset.tokens.rows(dataset.tokens.validation)
    of_decoder = decoder_statistics(sae, x, settings.N_SHARE)
    return {"n_tokens": len(rows.x), **dataset.figures(sae), **probes, **of_decoder}


def decoder_statistics(sae: Any, x: Any, share: float) -> dict[str, float]:
    """{projection, cosine} of an autoencoder on tokens x (n, d), see the top of the file."""
    import torch

    with torch.no_grad():
        directions = sae.decoder.weight.t()  # (M, d), of length 1
        projections = ((x - sae.input_bias) @ directions.t()).flatten()
        rank = round(share * len(directions)) * len(x)  # from the largest
        projection = -torch.kthvalue(-projections, rank + 1).values
        cosines = (directions @ directions.t()).abs()
        n = len(directions)
        cosine = (cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))
    return {"projection": float(projection), "cosine": float(cosine)}


def recommended(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{statistic: the K at which it is best, by seed, with its mean and interval}: least for those
    of the decoder, largest for probes."""
    result = {}
    names = [*STATISTICS, *(f"probe {n}" for n in PROBES)]
    for name in names:
        if name not in cells[0]:
            continue
        sign = 1 if name in STATISTICS else -1
        by_seed = {}
        for seed in sorted({each["seed"] for each in cells}):
            mine = {each["k"]: sign * each[name] for each in cells if each["seed"] == seed}
            by_seed[seed] = least_at(mine)
        logs = np.log2(list(by_seed.values()))
        ends = mean_interval(list(logs))
        ks = sorted({each["k"] for each in cells})
        result[name] = {
            "by_seed": list(by_seed.values()),
            "k": float(2 ** logs.mean()),
            "interval": None if ends is None else np.clip(np.exp2(ends), ks[0], ks[-1]).tolist(),
            "at_the_edge": bool(np.isin(list(by_seed.values()), (ks[0], ks[-1])).any()),
        }
    return result


def least_at(values: Mapping[int, float]) -> float:
    """The K at which {K: value} is least: the lowest point of the parabola in log K through the
    least value and its neighbours; an end of the range if it is least there."""
    ks = sorted(values)
    at = min(range(len(ks)), key=lambda i: values[ks[i]])
    if at in (0, len(ks) - 1):
        return float(ks[at])
    x = np.log2(ks[at - 1 : at + 2])
    a, b, _ = np.polyfit(x - x[1], [values[k] for k in ks[at - 1 : at + 2]], 2)
    return float(2 ** (x[1] - b / (2 * a))) if a > 0 else float(ks[at])


def on_planted(settings: Any) -> dict[str, Any]:
    """{worlds: for each number of active directions and objective what every K finds of them, and
    which K each statistic recommends}."""
    worlds = []
    for orthonormal, share in itertools.product(settings.ORTHONORMAL, settings.PLANTED_SHARES):
        for name in PLANTED_OBJECTIVES:
            cells = []
            for seed in settings.PLANTED_SEEDS:
                own = settings.select(("BATCH_SIZE", "PLANTED_STEPS", "N_PLANTED", "N_SHARE"))
                for k in settings.PLANTED_KS:
                    key = {"planted": share, "objective": name, "seed": seed, "k": k}
                    key["orthonormal"] = orthonormal
                    found = remembered(
                        journal(settings),
                        {**own, **key},
                        lambda: planted_cell(settings, share, orthonormal, name, seed, k),
                    )
                    cells.append({"seed": seed, "k": k, **found})
            l0 = float(np.mean([each["true_l0"] for each in cells]))
            by_f1 = recommended_by(cells, "f1")
            worlds.append(
                {
                    "true_l0": l0,
                    "orthonormal": orthonormal,
                    "objective": name,
                    "commit": commit(),
                    "cells": cells,
                    "recommended": {**recommended(cells), "best f1": by_f1},
                }
            )
            print(f"L0 {l0:.1f}, {name}: {worlds[-1]['recommended']}", flush=True)
    about = settings.select(("PLANTED_STEPS", "BATCH_SIZE", "N_PLANTED"))
    return {"settings": about, "worlds": worlds}


def with_earlier(earlier: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """`found`, behind the worlds of an earlier result that were not measured now."""

    def which(world: Mapping[str, Any]) -> tuple[Any, ...]:
        return world["orthonormal"], world["objective"], round(world["true_l0"], 1)

    now = {which(world) for world in found["worlds"]}
    kept = [world for world in earlier.get("worlds", []) if which(world) not in now]
    return {**found, "worlds": [*kept, *found["worlds"]]}


def recommended_by(cells: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The K at which a figure of planted tokens is largest, by seed and in the mean."""
    seeds = sorted({each["seed"] for each in cells})
    best = [
        least_at({each["k"]: -each[name] for each in cells if each["seed"] == seed})
        for seed in seeds
    ]
    return {"by_seed": best, "k": float(2 ** np.mean(np.log2(best)))}


@functools.lru_cache(maxsize=1)
def planted_world(share: float, orthonormal: int, n: int, seed: int) -> Any:
    """Correlated directions, `share` times as often active as usual."""
    from experiments.shared import planted

    probabilities = (0.2 * share, 0.03 * share)
    return planted.correlated(
        n, seed=seed, probabilities=probabilities, orthonormal=bool(orthonormal)
    )


def planted_cell(
    settings: Any, share: float, orthonormal: int, name: str, seed: int, k: int
) -> dict[str, float]:
    """What an autoencoder with k active features finds of planted directions, and its statistics;
    as many features as there are directions."""
    import torch

    from experiments.shared import planted
    from experiments.shared.trainings import Rows, fire_exactly, train
    from fastsae.interpretation.statistics import encode_rows

    world = planted_world(share, orthonormal, settings.N_PLANTED, seed)
    x, n_train = torch.from_numpy(world.tokens), len(world.tokens) * 3 // 4
    rows = Rows(x[:n_train], np.arange(1, n_train))
    sae = train(
        OBJECTIVES[name],
        rows,
        m=len(world.directions),
        k=k,
        seed=seed,
        steps=settings.PLANTED_STEPS,
        batch_size=settings.BATCH_SIZE,
    )
    if OBJECTIVES[name].architecture == "batchtopk":
        fire_exactly(sae, rows.x[:8192], k)
    fires = encode_rows(sae, x[n_train:]).toarray() > 0
    held_out = planted.Planted(
        world.tokens[n_train:], world.directions, world.active[n_train:], world.parent
    )
    found = planted.recovery(held_out, sae.decoder.weight.detach().numpy().T, fires)
    statistics = decoder_statistics(sae, x[n_train:], settings.N_SHARE)
    return {"true_l0": world.l0, **found, **statistics}


if __name__ == "__main__":
    from fastsae.runtime.stage import run_stage as run

    sys.exit(run(main))
