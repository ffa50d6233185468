"""Ground truth by construction: tokens are sums of a few known directions; which architecture finds
the directions again?

    python -m experiments.studies.planted --quick     # minutes on one core
    python -m experiments.studies.planted

Every token is the sum of ACTIVE of the known unit directions, drawn at random, with strengths
between 1 and 2, plus noise. There are more directions than dimensions, so no linear method can
separate them. Autoencoders have as many features as there are directions and are given the number
that is active: as K, or for standard and gated by the L1 coefficient, of L1_COEFFICIENTS, whose L0
comes closest to it. Three parts: 1,024 directions in 256 dimensions; 256 in 64 dimensions against
the number active, and against the noise.

Writes experiments/results/<NAME>.json and .png; what was measured before with the same settings is
read from checkpoints/<NAME>/runs.jsonl, so the same command goes on after an interruption.
"""

import functools
import importlib.util
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import config
from experiments.shared.directions import (
    absolute_cosines,
    matched_mean,
    mean_max,
    principal_directions,
    random_directions,
    unit,
)
from experiments.shared.provenance import RESULTS, remembered, write_figure, write_result
from experiments.shared.sweeps import quick_settings

ARCHITECTURES: str = "topk,batchtopk,jumprelu,standard,gated"  # of the small parts
LARGE_ARCHITECTURES: str = "topk,batchtopk"  # of the first part
LARGE: tuple[int, ...] = (1024, 256, 8)  # part 1: directions, dimensions, active ones
SMALL: tuple[int, ...] = (256, 64, 4)  # of the others
ACTIVES: tuple[int, ...] = (2, 4, 8)  # in place of the third of SMALL
NOISE: float = 0.01  # standard deviation in each dimension
NOISES: tuple[float, ...] = (0.1, 0.3)  # in place of NOISE
L1_COEFFICIENTS: tuple[float, ...] = (0.5, 1, 2, 4)  # standard and gated choose after 1/8
SEEDS: tuple[int, ...] = (0, 1, 2)  # each draws directions, tokens, first weights and order
N_TOKENS: int = 200000  # tokens drawn
STEPS: int = 2500  # of training
BATCH_SIZE: int = 1024  # tokens per step
LEARNING_RATE: float = 2e-3  # of Adam, falling to 0 in the second half
NAME: str = "planted"  # of the result
QUICK: bool = False  # one seed, fewer cases

QUICK_VALUES = {"SEEDS": (0,), "ACTIVES": (4, 8), "NOISES": (0.3,), "L1_COEFFICIENTS": (1, 2)}
BY_COEFFICIENT = ("standard", "gated")
DECISIVE = ("N_TOKENS", "STEPS", "BATCH_SIZE", "LEARNING_RATE", "L1_COEFFICIENTS")


def main():
    settings = quick_settings(config.resolve(__file__), QUICK_VALUES)
    settings.show()
    parts = {
        "large": [(*settings.LARGE, settings.NOISE)],
        "active": [(*settings.SMALL[:2], active, settings.NOISE) for active in settings.ACTIVES],
        "noise": [(*settings.SMALL, noise) for noise in settings.NOISES],
    }
    result = {}
    for part, cases in parts.items():
        names = (settings.LARGE_ARCHITECTURES if part == "large" else settings.ARCHITECTURES).split(
            ","
        )
        result[part] = [measured(settings, case, names) for case in cases]
    write_result(
        settings.NAME,
        settings.select([name for name, file in settings.owner.items() if file == "planted.py"]),
        result,
    )
    if importlib.util.find_spec("matplotlib"):
        draw(RESULTS / f"{settings.NAME}.png", result)


def measured(settings, case, names):
    """{the case, and of each method its mean over the seeds and its runs}."""
    runs: dict[str, list[Any]] = {name: [] for name in (*names, "principal components", "random")}
    for seed in settings.SEEDS:
        # only drawn if something is missing
        tokens = functools.cache(lambda: planted_tokens(case, settings.N_TOKENS, seed))
        for name in runs:
            key = {**settings.select(DECISIVE), "case": case, "method": name, "seed": seed}
            runs[name].append(
                remembered(
                    settings.output_dir / "checkpoints" / settings.NAME / "runs.jsonl",
                    key,
                    lambda: run(settings, case, name, seed, *tokens()),
                )
            )
    described = dict(zip(("directions", "dimensions", "active", "noise"), case))
    result: dict[str, Any] = {
        name: {
            "mean": {key: round(float(np.mean([r[key] for r in rows])), 4) for key in rows[0]},
            "runs": rows,
        }
        for name, rows in runs.items()
    }
    print(described, {name: r["mean"]["mean_max_cosine"] for name, r in result.items()}, flush=True)
    return {**described, "methods": result}


def planted_tokens(case: Sequence[float], n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (n, d), directions (n_directions, d)), float32, of (directions, dimensions, active
    per token, noise)."""
    n_directions, d, active = map(int, case[:3])
    noise = case[3]
    random = np.random.default_rng(seed)
    directions = random_directions(n_directions, d, random).astype(np.float32)
    tokens = np.empty((n, d), np.float32)
    for part in np.array_split(tokens, -(-n // 8192)):
        chosen = np.argpartition(
            random.random((len(part), n_directions), np.float32), active, axis=1
        )[:, :active]
        strength = random.uniform(1, 2, chosen.shape).astype(np.float32)
        part[:] = np.einsum(
            "nk,nkd->nd", strength, directions[chosen]
        ) + noise * random.standard_normal(part.shape, np.float32)
    return tokens, directions


def run(settings, case, name, seed, tokens, directions):
    """The recovery of one method: an architecture, or one of the two baselines."""
    if name == "principal components":
        return recovery(directions, principal_directions(tokens, len(directions)))
    if name == "random":
        return recovery(
            directions, random_directions(len(directions), tokens.shape[1], seed + 1000)
        )
    coefficient = None
    if name in BY_COEFFICIENT:
        tried = {
            c: train(settings, case, name, seed, tokens, settings.STEPS // 8, c)[1]
            for c in settings.L1_COEFFICIENTS
        }
        coefficient = min(tried, key=lambda c: abs(math.log(max(tried[c], 1e-3) / case[2])))
    decoder, l0 = train(settings, case, name, seed, tokens, settings.STEPS, coefficient)
    return {
        **recovery(directions, decoder),
        "l0": l0,
        **({"l1_coefficient": coefficient} if coefficient else {}),
    }


def recovery(directions, found):
    """Mean over the known directions of their largest |cosine| with a found one, of the best
    one-to-one matching, and share above 0.9."""
    cosines = absolute_cosines(directions, found)
    return {
        "mean_max_cosine": mean_max(cosines),
        "mcc": matched_mean(cosines),
        "above_0.9": float((cosines.max(1) > 0.9).mean()),
    }


def train(settings, case, architecture, seed, tokens, steps, coefficient):
    """(decoder rows (M, d), L0 on the first tokens) after `steps` of this project's training."""
    import torch

    from fastsae.sae.autoencoder import encode
    from fastsae.sae.dense_step import dense_step
    from fastsae.sae.sparse_step import sparse_step
    from fastsae.settings.architectures import DENSE
    from fastsae.training.run import TrainingRun, learning_rate_factor

    n_directions, d, active, _ = case
    tokens, dense = torch.from_numpy(tokens), architecture in DENSE
    training = TrainingRun(
        {
            "input_dim": d,
            "m_total_neurons": n_directions,
            "k_active_neurons": active,
            "aux_k": 2 * active,
            "architecture": architecture,
        },
        tokens[:32768],
        seed=seed,
        device="cpu",
        learning_rate=settings.LEARNING_RATE,
        normalise="norm" if dense else "none",
        encoder_scale=None,
    )
    step = (
        functools.partial(
            dense_step,
            sparsity=6.0 if coefficient is None else coefficient,
            bandwidth=1.0,
            target_l0=active,
        )
        if dense
        else functools.partial(sparse_step, aux_coef=1 / 32)
    )
    for number in range(steps):
        factor = learning_rate_factor(
            number, n_steps=steps, schedule="linear", warmup_steps=0, decay_fraction=0.5
        )
        batch = tokens[
            np.random.default_rng((seed, number)).integers(0, len(tokens), settings.BATCH_SIZE)
        ]
        training.step(
            step,
            batch,
            learning_rate=settings.LEARNING_RATE * factor,
            dead_after=100 * settings.BATCH_SIZE,
            clip_grad=1.0,
        )
    sae = training.result()
    return unit(sae.decoder.weight.detach().numpy().T), len(encode(sae, tokens[:8192]).value) / len(
        tokens[:8192]
    )


def draw(path, result):
    """Matched mean cosine by method: of the large part, against the number active, and against the
    noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    large = result["large"][0]
    names = list(large["methods"])
    panels[0].barh(
        names, [large["methods"][name]["mean"]["mean_max_cosine"] for name in names], color="C0"
    )
    panels[0].axvline(0.95, color="C3", lw=1, ls="--")
    panels[0].invert_yaxis()
    panels[0].set(
        title=f"{large['directions']:,} directions in {large['dimensions']}, "
        f"{large['active']} active",
        xlim=(0, 1),
        xlabel="mean max cosine (dashed: 0.95)",
    )
    for panel, part, label in zip(
        panels[1:], ("active", "noise"), ("active directions per token", "noise per dimension")
    ):
        for name in result[part][0]["methods"]:
            points = sorted(
                (case[part], case["methods"][name]["mean"]["mcc"]) for case in result[part]
            )
            panel.plot(
                *zip(*points),
                "o-" if "l0" in result[part][0]["methods"][name]["mean"] else "--",
                ms=4,
                label=name,
            )
        panel.set(
            title=f"{result[part][0]['directions']} directions in {result[part][0]['dimensions']}",
            ylim=(0, 1.02),
            xlabel=label,
            ylabel="MCC",
        )
        panel.grid(alpha=0.3)
    panels[1].legend(frameon=False, fontsize=8)
    write_figure(path, figure)


if __name__ == "__main__":
    from fastsae.runtime.stage import run_stage

    sys.exit(run_stage(main))
