"""How stable are features? Autoencoders that differ in the seed alone, against M and K: how many of
their directions agree.

    python -m experiments.studies.stability --quick  # minutes on one core
    python -m experiments.studies.stability --dataset-path my_dialogues.jsonl --ms 1024,4096 \\
        --ks 16,32,64

The seed decides the first weights; split and order of the tokens are the same for all. Decoder
directions of each pair of seeds are compared by cosine: mean over the features of the largest
cosine (several may choose the same partner), the same under the best one-to-one matching (Hungarian
algorithm), and the share of features that every other seed has too, with a cosine above THRESHOLD.
Baselines: as many random directions, and as many random tokens, less their mean, which crowd as the
activations do. Trained by train_sae.py on the activations in OUTPUT_DIR, which are extracted if
they are not there.

Writes experiments/results/<NAME>.json and .png; what is trained stays under checkpoints/, so the
same command goes on after an interruption.
"""

import importlib.util
import itertools
import sys

import numpy as np

import config
from experiments.shared.directions import (
    cosines,
    found_by_all,
    matched_mean,
    mean_max,
    random_directions,
    unit,
)
from experiments.shared.provenance import RESULTS, run_stage, write_figure, write_result
from experiments.shared.sweeps import (
    DATA_SETTINGS,
    epochs_and_steps,
    listed,
    passed_on,
    quick_settings,
    run_many,
)

ARCHITECTURE: str = "topk"  # topk or batchtopk
MS: tuple[int, ...] = (64, 256, 1024)  # features
KS: tuple[int, ...] = (4, 8, 16)  # active features per token
SEEDS: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the first weights, five or more
N_EPOCHS: int = 10  # of training
BATCH_SIZE: int = 512  # tokens per step
LEARNING_RATE: float = 1e-3  # of Adam, falling to 0 over all steps
THRESHOLD: float = 0.7  # cosine above which two directions count as the same feature
NAME: str = "stability"  # of the result
QUICK: bool = False  # two sizes and two K, fewer epochs

QUICK_VALUES = {"MS": (64, 256), "KS": (4, 8), "N_EPOCHS": 5}
MEASURES = {
    "mcc": "matched mean cosine",
    "mean_max_cosine": "mean max cosine",
    "found_by_all": "found by all seeds",
}


def main():
    settings = quick_settings(config.resolve(__file__), QUICK_VALUES)
    settings.show()
    run_stage("extract_activations.py", *passed_on(settings, (*DATA_SETTINGS, "OUTPUT_DIR")))
    run_many("train_sae.py", [train_flags(settings, m) for m in settings.MS])
    rows = []
    for m, k in itertools.product(settings.MS, settings.KS):
        rows.append({"m": m, "k": k, **compared(settings, m, k)})
        print({key: value for key, value in rows[-1].items() if key != "runs"}, flush=True)
    baselines = {str(m): baseline(settings, m) for m in settings.MS}
    print(baselines)
    names = [name for name, file in settings.owner.items() if file == "stability.py"] + [
        "MODEL_NAME",
        "LAYER_IDX",
        "MAX_LENGTH",
    ]
    write_result(
        settings.NAME,
        {**settings.select(names), "dataset": settings.DATASET_PATH.rpartition("/")[2]},
        {"runs": rows, "baselines": baselines},
    )
    if importlib.util.find_spec("matplotlib"):
        draw(RESULTS / f"{settings.NAME}.png", rows, baselines)


def train_flags(settings, m):
    """The flags of train_sae.py for all autoencoders of one size."""
    return [
        *passed_on(settings, (*DATA_SETTINGS, "OUTPUT_DIR")),
        "--run-name",
        settings.NAME,
        "--architecture",
        settings.ARCHITECTURE,
        "--m",
        m,
        "--k",
        listed(settings.KS),
        "--seed",
        listed(settings.SEEDS),
        "--matryoshka-prefixes=none",
        *epochs_and_steps(settings),
    ]


def compared(settings, m, k):
    """The agreement of the autoencoders of one size, and their own figures."""
    from fastsae.formats.load import load_sae
    from fastsae.sae.autoencoder import checkpoint_name

    decoders, figures, name = (
        [],
        [],
        checkpoint_name(m, k, None, settings.ARCHITECTURE).removesuffix(".pt"),
    )
    for seed in settings.SEEDS:
        sae, meta = load_sae(
            settings.output_dir / "checkpoints" / settings.NAME / f"{name}_seed={seed}.pt"
        )
        decoders.append(sae.decoder.weight.detach().numpy().T)  # (M, d)
        figures.append(
            {
                "seed": seed,
                **{key: meta["metrics"][key] for key in ("normalized_mse", "l0", "dead_fraction")},
            }
        )
    means = {
        name: float(np.mean([figure[name] for figure in figures]))
        for name in ("normalized_mse", "dead_fraction")
    }
    return {**agreement(decoders, settings.THRESHOLD), **means, "runs": figures}


def agreement(sets, threshold):
    """Of several sets of directions (M, d): the two means over all pairs with their range, and the
    share that all sets have."""
    pairs = [cosines(a, b) for a, b in itertools.combinations(sets, 2)]
    matched, largest = (
        [matched_mean(pair) for pair in pairs],
        [(mean_max(pair) + mean_max(pair.T)) / 2 for pair in pairs],
    )
    return {
        "mcc": float(np.mean(matched)),
        "mcc_range": [min(matched), max(matched)],
        "mean_max_cosine": float(np.mean(largest)),
        "found_by_all": found_by_all(sets, threshold),
    }


def baseline(settings, m):
    """The agreement of sets that know nothing of each other: random directions, and random tokens
    less their mean."""
    from fastsae.activations.files import open_activations
    from fastsae.data.token_masks import token_norms, usable_tokens

    data = open_activations(settings.activations_path)
    x, norms = data["activations"], token_norms(data["activations"])
    usable = np.flatnonzero(
        usable_tokens(norms, data["token_kind"], exclude_shared_prefix=True, max_norm_ratio=10.0)[0]
    )
    mean = np.asarray(
        x[np.sort(np.random.default_rng(0).permutation(usable)[:8192])], np.float64
    ).mean(0)
    at_random = np.random.default_rng(0).permutation(usable)[
        : m * len(settings.SEEDS)
    ]  # no token is in two draws
    tokens = [
        unit(x[np.sort(rows)] - mean) for rows in np.array_split(at_random, len(settings.SEEDS))
    ]
    random = [random_directions(m, x.shape[1], seed) for seed in settings.SEEDS]
    return {
        "random": agreement(random, settings.THRESHOLD),
        "tokens": agreement(tokens, settings.THRESHOLD),
    }


def draw(path, rows, baselines):
    """Each measure against M: a line for each K, dashed for the baselines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    sizes = [int(m) for m in baselines]
    for panel, (name, title) in zip(figure.subplots(1, 3), MEASURES.items()):
        for k in dict.fromkeys(row["k"] for row in rows):
            panel.plot(
                sizes, [row[name] for row in rows if row["k"] == k], "o-", ms=4, label=f"K = {k}"
            )
        for kind, style, label in (
            ("tokens", "--", "random tokens"),
            ("random", ":", "random directions"),
        ):
            panel.plot(
                sizes,
                [baselines[str(m)][kind][name] for m in sizes],
                f"k{style}",
                lw=1,
                label=label,
            )
        panel.set(title=title, xlabel="M", xscale="log", ylim=(0, 1))
        panel.set_xticks(sizes, [str(m) for m in sizes])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        if name == "mcc":
            panel.legend(frameon=False, fontsize=8)
    write_figure(path, figure)


if __name__ == "__main__":
    from fastsae.runtime.stage import run_stage as run_and_report

    sys.exit(run_and_report(main))
