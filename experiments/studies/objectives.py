"""Objectives of training beside the default, at an equal number of active features and of steps.

    python -m experiments.studies.objectives --quick     # minutes on one core
    python -m experiments.studies.objectives --dataset-path texts.jsonl --label-field topic

Judged are: topk and batchtopk with and without Matryoshka prefixes (arXiv 2503.17547), aligned
training (2605.18629), a penalty on features that point alike (2509.22033), K falling from four
times its value, a contrast between neighbouring tokens (2511.05541), and standard with and without
alignment. What each adds is in experiments/shared/objective_steps.py.

On the dataset: normalised MSE and loss recovered of test examples, the mean AUC of k-sparse probes
of its labels, and how many features all seeds have. On planted tokens, whose directions are known:
the one-to-one match with them and F1 of where they fire, for directions that are active together
and for children that need their parent. Learning rates, and weights of added terms, are chosen on
validation examples of another seed (`choices`): of the weights the largest that costs at most
TOLERATED of normalised MSE. BatchTopK's threshold is set so that K fire on validation examples;
standard is trained at two coefficients, and read off where K features fire.

Writes experiments/results/<NAME>.json, in which other datasets stay. What is trained is kept under
checkpoints/<NAME>/, so the same command goes on after an interruption.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import config
from experiments.shared.objective_steps import DEFAULT, OBJECTIVES, Objective
from experiments.shared.provenance import (
    RESULTS,
    code_version,
    commit,
    remembered,
    run_stage,
    write_result,
)
from experiments.shared.statistics import mean_interval
from experiments.shared.sweeps import DATA_SETTINGS, passed_on, quick_settings, rounded

M: int = 256  # features
K: int = 8  # active features per token
SEEDS: tuple[int, ...] = (0, 1, 2, 3)  # of first weights and order of the tokens
STEPS: int = 1600  # of training
BATCH_SIZE: int = 512  # tokens per step
PLANTED_STEPS: int = 1500  # of training on planted tokens
N_PLANTED: int = 64000  # planted tokens, a quarter of them held out
N_LOSS_EXAMPLES: int = 6  # test examples for loss recovered
N_SPLITS: int = 3  # half splits for the probes
PARTS: str = "planted,dataset"  # what to measure
NAMES: str = "all"  # objectives, with semicolons; the others' figures stay
CHOICES: str | None = None  # name of another result's dataset whose choices are taken
NAME: str = "objectives"  # of the result
QUICK: bool = False  # two seeds, fewer steps

QUICK_VALUES = {"SEEDS": (0, 1), "STEPS": 400, "PLANTED_STEPS": 400, "N_LOSS_EXAMPLES": 2}
KS = (1, 5, 16)  # columns of probes
PILOT_SEED = 9
RATES = (0.5, 1.0, 2.0)  # times the usual rate
WEIGHTS = {"orthogonal": (0.03, 0.1, 0.3), "pairs": (0.01, 0.03, 0.1)}
TOLERATED = 0.02  # of normalised MSE, for a term that is added
COEFFICIENTS = (0.5, 16.0)  # of L1, between which the one with K active features is looked for
AROUND = (0.75, 1.33)  # times that: what is trained
PLANTED = ("correlated", "hierarchical")


def main():
    settings = quick_settings(config.resolve(__file__), QUICK_VALUES)
    settings.show()
    parts = settings.PARTS.split(",")
    path = RESULTS / f"{settings.NAME}.json"
    result = json.loads(path.read_text("utf-8")) if path.exists() else {}
    result = {name: result.get(name, {}) for name in ("datasets", "planted")}
    study = Study(settings)
    name = Path(settings.DATASET_PATH).stem
    given = result["datasets"].get(settings.CHOICES, {}).get("choices", {})
    choices = study.choices(given)
    if "dataset" in parts:
        found = rounded(study.on_dataset(choices))
        result["datasets"][name] = merged(result["datasets"].get(name, {}), found)
    if "planted" in parts:
        result["planted"] = merged(result["planted"], rounded(study.on_planted(choices)))
    write_result(settings.NAME, {"ks": KS, "rates": RATES, "weights": WEIGHTS}, result)


def merged(earlier: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """`found`, with the objectives of an earlier result that were not measured now."""
    return {name: {**earlier.get(name, {}), **value} for name, value in found.items()}


class Study:
    """The autoencoders of one dataset, trained when they are asked for, and their figures."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.work = settings.output_dir / "checkpoints" / settings.NAME
        self.sizes: dict[str, Any] = {"m": settings.M, "k": settings.K}
        self.sizes["batch_size"] = settings.BATCH_SIZE
        asked = list(OBJECTIVES) if settings.NAMES == "all" else settings.NAMES.split(";")
        self.names = [DEFAULT, *(name for name in asked if name != DEFAULT)]

    @functools.cached_property
    def dataset(self) -> Any:
        """The activations, extracted if they are not there."""
        from experiments.shared.trainings import Dataset

        names = (*DATA_SETTINGS, "LABEL_FIELD", "OUTPUT_DIR")
        run_stage("extract_activations.py", *passed_on(self.settings, names))
        return Dataset(self.settings)

    @functools.cached_property
    def rows(self) -> Any:
        """The rows that train."""
        return self.dataset.rows()

    @functools.cached_property
    def validation(self) -> Any:
        """(n, d) rows on which choices are made."""
        return self.dataset.tokens.rows(self.dataset.tokens.validation)

    @functools.cached_property
    def model(self) -> Any:
        """The whole model, for loss recovered."""
        from fastsae.lm import devices, loading

        s = self.settings
        return loading.load_model(
            s.MODEL_NAME,
            revision=s.MODEL_REVISION,
            cache_dir=s.CACHE_DIR,
            dtype=devices.choose_dtype("auto", "cpu"),
            device="cpu",
        ).eval()

    def remember(self, what: str, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """`remembered` of this dataset's activations and sizes."""
        own = {"activations": self.dataset.tokens.fingerprint, **self.sizes}
        return remembered(self.work / "runs.jsonl", {**own, "what": what, **key}, compute)

    def trained(self, objective: Objective, seed: int, steps: int, **chosen: Any) -> Any:
        """An autoencoder with exactly K active features where a threshold decides."""
        from experiments.shared.trainings import fire_exactly, train

        sae = train(objective, self.rows, seed=seed, steps=steps, **self.sizes, **chosen)
        if objective.architecture == "batchtopk":
            fire_exactly(sae, self.validation, self.settings.K)
        return sae

    def kept(self, name: str, seed: int, chosen: dict[str, float]) -> tuple[Any, float]:
        """(the autoencoder of an objective, CPU seconds of its training), from the disk if it is
        there."""
        from fastsae.runtime import artifacts
        from fastsae.sae.autoencoder import load_checkpoint, save_sae

        key = artifacts.fingerprint(
            "objective",
            {"name": name, "seed": seed, **chosen, **self.sizes, "steps": self.settings.STEPS},
            {"code": code_version(), "activations": self.dataset.tokens.fingerprint},
        )
        path = self.work / f"{key[:16]}.pt"
        if not path.exists():
            began = time.process_time()
            sae = self.trained(OBJECTIVES[name], seed, self.settings.STEPS, **chosen)
            save_sae(path, sae, {"seconds": time.process_time() - began})
        sae, meta = load_checkpoint(path)
        return sae, meta["seconds"]

    def choices(self, given: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """{objective: its rate, and the weight of what it adds or the coefficient with K active
        features}, by validation examples where none are given."""
        found: dict[str, dict[str, float]] = {}
        for name in self.names:
            if name in given:
                found[name] = given[name]
                continue
            objective = OBJECTIVES[name]
            chosen: dict[str, float] = {}
            if objective.dense:
                chosen["coefficient"] = self.coefficient(name)
            if objective.weighted:
                chosen["weight"] = self.weight(name)
            errors = {rate: self.pilot(name, rate, **chosen) for rate in RATES}
            best = min(errors, key=lambda rate: self.score(name, errors[rate]))
            found[name] = {**chosen, "rate": self.usual(name) * best}
            print(name, found[name], flush=True)
        return found

    def usual(self, name: str) -> float:
        """The rate that stage 2 would take for such a size."""
        from fastsae.training.usual import learning_rate

        architecture, d = OBJECTIVES[name].architecture, self.rows.x.shape[1]
        return learning_rate(architecture, self.settings.M, d, self.settings.BATCH_SIZE)

    def pilot(self, name: str, rate: float, **chosen: float) -> dict[str, float]:
        """Validation figures after half the steps, with another seed."""
        steps = self.settings.STEPS // 2
        key = {"name": name, "rate": rate, **chosen, "steps": steps}

        def compute() -> dict[str, float]:
            sae = self.trained(
                OBJECTIVES[name], PILOT_SEED, steps, rate=rate * self.usual(name), **chosen
            )
            return self.dataset.validation_error(sae)

        return self.remember("pilot", key, compute)

    def score(self, name: str, found: dict[str, float]) -> float:
        """What is least for the best rate: the error, where L0 differs the error it would have if
        L0 times error were constant."""
        share = found["l0"] / self.settings.K if OBJECTIVES[name].dense else 1.0
        return found["normalized_mse"] * share**0.5

    def weight(self, name: str) -> float:
        """The largest weight that costs at most TOLERATED of normalised MSE, else the smallest."""
        weights = WEIGHTS[str(OBJECTIVES[name].adds)]
        bound = (1 + TOLERATED) * self.pilot(DEFAULT, 1.0)["normalized_mse"]
        good = [w for w in weights if self.pilot(name, 1.0, weight=w)["normalized_mse"] <= bound]
        return max(good, default=weights[0])

    def coefficient(self, name: str) -> float:
        """The coefficient of L1 with about K active features, by halving the interval."""
        low, high = COEFFICIENTS
        for _ in range(5):
            middle = math.sqrt(low * high)
            l0 = self.pilot(name, 1.0, coefficient=middle)["l0"]
            low, high = (middle, high) if l0 > self.settings.K else (low, middle)
        return float(f"{math.sqrt(low * high):.3g}")

    def variants(self, name: str, chosen: dict[str, float]) -> list[dict[str, float]]:
        """What is trained of an objective: of those with an L1, at two coefficients."""
        if not OBJECTIVES[name].dense:
            return [chosen]
        middle = self.coefficient(name)  # of this dataset, whatever the choices are of
        return [{**chosen, "coefficient": middle * times} for times in AROUND]

    def on_dataset(self, choices: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Figures of every objective, and their differences from the default's."""
        rows = {}
        for name in self.names:
            variants = self.variants(name, choices[name])
            runs = [self.runs(name, chosen) for chosen in variants]
            rows[name] = at_equal_l0(runs, self.settings.K)
            show(name, rows[name])
        about = self.settings.select(("M", "K", "SEEDS", "STEPS", "BATCH_SIZE", "N_LOSS_EXAMPLES"))
        return {
            "settings": {**about, "commit": commit()},
            "choices": choices,
            "objectives": {name: summed_up(rows[name], rows[DEFAULT]) for name in rows},
        }

    def runs(self, name: str, chosen: dict[str, float]) -> dict[str, list[float]]:
        """{figure: its value for each seed} of an objective."""
        seeds, dataset = self.settings.SEEDS, self.dataset
        saes, seconds = zip(*(self.kept(name, seed, chosen) for seed in seeds))
        key = {"name": name, **chosen, "seeds": seeds, "steps": self.settings.STEPS}
        found = {}
        for seed, sae in zip(seeds, saes):
            one = {**key, "seed": seed, "splits": self.settings.N_SPLITS}

            def compute(sae: Any = sae) -> dict[str, float]:
                probes = dataset.probes(sae, KS, self.settings.N_SPLITS)
                return {**dataset.figures(sae), **{f"probe {k}": auc for k, auc in probes.items()}}

            found[seed] = self.remember("figures", one, compute)
        figures = {figure: [found[seed][figure] for seed in seeds] for figure in found[seeds[0]]}
        figures["seconds"] = list(seconds)
        recovered = self.remember(
            "losses",
            {**key, "n": self.settings.N_LOSS_EXAMPLES},
            lambda: dataset.losses_recovered(
                {str(seed): sae for seed, sae in zip(seeds, saes)},
                self.settings.N_LOSS_EXAMPLES,
                self.model,
                self.settings.LAYER_IDX,
            ),
        )
        figures["loss_recovered"] = [recovered[str(seed)] for seed in seeds]
        return {**figures, **stability([sae.decoder.weight.detach().numpy().T for sae in saes])}

    def on_planted(self, choices: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Recovery of planted directions by every objective."""
        result: dict[str, Any] = {
            "settings": {"commit": commit(), "steps": self.settings.PLANTED_STEPS}
        }
        for kind in PLANTED:
            rows = {name: self.recoveries(kind, name, choices[name]) for name in self.names}
            for name, row in rows.items():
                show(f"{kind} {name}", row)
            result[kind] = {name: summed_up(rows[name], rows[DEFAULT]) for name in rows}
        return result

    def recoveries(self, kind: str, name: str, chosen: dict[str, float]) -> dict[str, list[float]]:
        """{figure: its value for each seed} on one kind of planted tokens."""
        s = self.settings
        sizes = {"steps": s.PLANTED_STEPS, "n": s.N_PLANTED, "batch_size": s.BATCH_SIZE}
        found = [
            remembered(
                self.work / "runs.jsonl",
                {"what": kind, "name": name, **chosen, **sizes, "seed": seed},
                functools.partial(planted_run, kind, name, chosen, seed=seed, **sizes),
            )
            for seed in s.SEEDS
        ]
        return {figure: [each[figure] for each in found] for figure in found[0]}


def planted_run(
    kind: str,
    name: str,
    chosen: dict[str, float],
    *,
    seed: int,
    steps: int,
    n: int,
    batch_size: int,
) -> dict[str, float]:
    """Recovery of the planted directions of a seed by an objective, with as many features as there
    are directions and as many active as are; an L1 by the coefficient that comes closest."""
    import torch

    from experiments.shared import planted
    from experiments.shared.trainings import Rows, fire_exactly, train
    from fastsae.interpretation.statistics import encode_rows

    world = getattr(planted, kind)(n, seed=seed)
    x, n_train = torch.from_numpy(world.tokens), 3 * n // 4 // planted.LENGTH * planted.LENGTH
    rows = Rows(x[:n_train], np.flatnonzero(np.arange(n_train) % planted.LENGTH))
    objective, k = OBJECTIVES[name], round(world.l0)
    fixed: dict[str, Any] = {
        "m": len(world.directions),
        "k": k,
        "seed": seed,
        "batch_size": batch_size,
    }
    fixed |= {key: value for key, value in chosen.items() if key != "coefficient"}

    def made(n_steps: int, **more: Any) -> Any:
        sae = train(objective, rows, steps=n_steps, **fixed, **more)
        if objective.architecture == "batchtopk":
            fire_exactly(sae, rows.x[:8192], k)
        return sae

    def active(sae: Any) -> float:
        return encode_rows(sae, rows.x[:8192]).nnz / 8192

    more = {}
    if objective.dense:
        tried = {c: active(made(steps // 4, coefficient=c)) for c in (0.5, 1.0, 2.0, 4.0, 8.0)}
        more["coefficient"] = min(tried, key=lambda c: abs(math.log(max(tried[c], 1e-3) / k)))
    sae = made(steps, **more)
    held_out = planted.Planted(
        world.tokens[n_train:], world.directions, world.active[n_train:], world.parent
    )
    fires = encode_rows(sae, x[n_train:]).toarray() > 0
    found = planted.recovery(held_out, sae.decoder.weight.detach().numpy().T, fires)
    return {**found, "l0": float(fires.sum(1).mean())}


def show(name: str, row: dict[str, list[float]]) -> None:
    """Print the means of an objective's figures."""
    print(name, {key: float(f"{np.mean(value):.4g}") for key, value in row.items()}, flush=True)


def stability(decoders: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """How far features (M, d) of several seeds agree: of each seed the mean over the others of the
    matched cosine; the share of features that all have (cosine above 0.7)."""
    from experiments.shared.directions import cosines, found_by_all, matched_mean

    if len(decoders) < 2:
        return {}
    pairs = np.array([[matched_mean(cosines(a, b)) for a in decoders] for b in decoders])
    n = len(decoders)
    mean = (pairs.sum(1) - np.diag(pairs)) / (n - 1)
    return {"stability": mean.tolist(), "in_all_seeds": [found_by_all(list(decoders), 0.7)]}


def at_equal_l0(runs: Sequence[dict[str, list[float]]], k: float) -> dict[str, list[float]]:
    """Of one run its figures; of two with different numbers of active features those at k, on the
    line through both in log L0, seed by seed."""
    if len(runs) == 1:
        return runs[0]
    first, second = runs
    low, high = (np.log(np.maximum(run["l0"], 1e-3)) for run in runs)  # (n_seeds,)
    same = np.abs(high - low) < 1e-6
    part = np.where(same, 0.5, (np.log(k) - low) / np.where(same, 1, high - low))
    result = {
        name: (np.asarray(values) + at * np.subtract(second[name], values)).tolist()
        for name, values in first.items()
        for at in [part if len(values) == len(part) else part.mean()]
    }
    result["l0"] = [k] * len(first["l0"])
    result["l0 trained"] = [*first["l0"], *second["l0"]]
    return result


def summed_up(row: dict[str, list[float]], default: dict[str, list[float]]) -> dict[str, Any]:
    """{figure: its values, their mean with interval, and the same of the difference from the
    default's, seed by seed}."""
    result = {}
    for name, values in row.items():
        result[name] = {
            "values": values,
            "mean": float(np.mean(values)),
            "interval": mean_interval(values),
        }
        if row is not default and len(values) == len(default.get(name, ())):
            changes = [a - b for a, b in zip(values, default[name])]
            result[name]["change"] = float(np.mean(changes))
            result[name]["change_interval"] = mean_interval(changes)
    return result


if __name__ == "__main__":
    from fastsae.runtime.stage import run_stage as run

    sys.exit(run(main))
