"""Ground truth from a model that is understood: do autoencoders find the Fourier directions of a
transformer that adds modulo P?

    python -m experiments.studies.modular_arithmetic --quick     # minutes on one core
    python -m experiments.studies.modular_arithmetic

A transformer of one block learns a + b modulo P to generalisation. It does so with a few key
frequencies k, through cos(2 pi k n / P) and sin(2 pi k n / P) (Nanda et al., arXiv 2301.05217): the
embedding of its numbers tells which. Two places are examined. `embedding`: the residual stream at a
and b, where the known directions are those of n in the embedding itself. `answer`: the residual
stream at "=" above the block, which the answer is read from, with the directions of n = a + b at
those frequencies. Autoencoders are trained on each by train_sae.py and compared with principal
components and random directions.

Writes experiments/results/<NAME>.json and .png; models are kept under checkpoints/<NAME>/, so the
same command goes on after an interruption.
"""

import hashlib
import importlib.util
import sys

import numpy as np

import config
from experiments.shared.directions import (
    absolute_correlations,
    absolute_cosines,
    fourier_directions,
    fourier_power,
    key_frequencies,
    lengths_in_planes,
    matched_mean,
    mean_max,
    principal_directions,
    random_directions,
    random_like,
    unit,
    waves,
)
from experiments.shared.provenance import RESULTS, write_figure, write_result
from experiments.shared.sweeps import listed, quick_settings, run_many
from fastsae.runtime import artifacts

P: int = 113  # the modulus, a prime
TRAIN_FRACTION: float = 0.5  # of the P * P pairs; the others test generalisation
MODEL_EPOCHS: int = 500  # of the transformer
MODEL_BATCH_SIZE: int = 1024  # pairs per step
MODEL_LEARNING_RATE: float = 1e-3  # of AdamW
WEIGHT_DECAY: float = 1.0  # of AdamW
KEY_SHARE: float = 0.9  # share of the embedding's variance that key frequencies hold
ARCHITECTURES: str = "standard,topk,batchtopk"  # which to train
MS: tuple[int, ...] = (16, 64)  # features: 4 frequencies x cosine and sine x signs; more
KS: tuple[int, ...] = (8,)  # of topk, batchtopk: half of 16, as a feature holds one sign
L1_COEFFICIENTS: tuple[float, ...] = (1, 4)  # of standard, in place of K
SEEDS: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the autoencoders
N_EPOCHS: int = 40  # of the autoencoders
N_RANDOM: int = 20  # sets of random directions, whose figures are averaged
NAME: str = "modular_arithmetic"  # of the result
QUICK: bool = False  # three seeds, one L1 coefficient, fewer epochs

QUICK_VALUES = {"MODEL_EPOCHS": 250, "SEEDS": (0, 1, 2), "L1_COEFFICIENTS": (2,), "N_EPOCHS": 15}
SITES = ("embedding", "answer")
MEASURES = ("mcc", "plane_mcc", "mean_max_cosine", "correlation")


def main():
    settings = quick_settings(config.resolve(__file__), QUICK_VALUES)
    settings.show()
    model, figures = transformer(settings)
    print(
        f"transformer: test accuracy {figures['test_accuracy']:.4f} on {figures['n_test_pairs']:,} "
        "pairs, above 0.99 after "
        f"{figures['first_epoch_above_99_percent']} of {figures['epochs']} epochs",
        flush=True,
    )
    table = model.embedding.detach().numpy()[:-1]  # (P, d)
    keys, sites, examined = key_frequencies(table, settings.KEY_SHARE), places(model), {}
    for site, (x, _) in sites.items():
        write_activations(work_folder(settings) / site, x, 2 if site == "embedding" else 1)
    run_many(
        "train_sae.py",
        [
            train_flags(settings, site, name, m)
            for site in SITES
            for name in settings.ARCHITECTURES.split(",")
            for m in settings.MS
        ],
    )
    for site, (x, n) in sites.items():
        examined[site] = examine(settings, site, x, n, keys)
        show(site, examined[site])
    write_result(
        settings.NAME,
        settings.select(
            [name for name, file in settings.owner.items() if file == "modular_arithmetic.py"]
        ),
        {
            "transformer": figures,
            "key_frequencies": keys,
            "embedding_power": [round(float(v), 5) for v in fourier_power(table)],
            "sites": examined,
        },
    )
    if importlib.util.find_spec("matplotlib"):
        draw(
            RESULTS / f"{settings.NAME}.png", settings, examined, sites, fourier_power(table), keys
        )


def work_folder(settings):
    return settings.output_dir / "checkpoints" / settings.NAME


def variants(settings):
    """(architecture, M, K or L1 coefficient) of every kind of autoencoder."""
    return [
        (name, m, sparsity)
        for name in settings.ARCHITECTURES.split(",")
        for m in settings.MS
        for sparsity in (settings.L1_COEFFICIENTS if name == "standard" else settings.KS)
    ]


def title(architecture, m, sparsity):
    return f"{architecture}, M = {m}, {'L1' if architecture == 'standard' else 'K'} = {sparsity:g}"


def transformer(settings):
    from experiments.studies.modular_transformer import trained_model

    return trained_model(
        work_folder(settings) / "transformer.pt",
        p=settings.P,
        train_fraction=settings.TRAIN_FRACTION,
        epochs=settings.MODEL_EPOCHS,
        batch_size=settings.MODEL_BATCH_SIZE,
        learning_rate=settings.MODEL_LEARNING_RATE,
        weight_decay=settings.WEIGHT_DECAY,
        seed=settings.SEED,
    )


def places(model):
    """{site: (activations (tokens, d), the number n that each token's known directions turn with
    (tokens,))} of all pairs."""
    import torch

    from experiments.studies.modular_transformer import all_pairs

    a, b = all_pairs(model.p)
    with torch.no_grad():
        first, second, _ = model.embedded()
        operands = torch.stack([first[a], second[b]], 1).flatten(
            0, 1
        )  # (2 * p * p, d) a and b of each pair in turn
        return {
            "embedding": (operands.numpy(), torch.stack([a, b], 1).flatten().numpy()),
            "answer": (model.residual(a, b).numpy(), ((a + b) % model.p).numpy()),
        }


def write_activations(folder, x, tokens_per_example):
    """An activations file as stage 1 would write it."""
    n = len(x) // tokens_per_example
    inputs = {"dataset": "all pairs of numbers", "model": hashlib.sha256(x.tobytes()).hexdigest()}
    metadata = artifacts.new_metadata(
        "activations",
        {"LAYER_IDX": 1},
        inputs,
        model_name="modular transformer",
        model_revision=None,
        n_examples=n,
        dataset_path="all pairs of numbers",
    )
    zeros = np.zeros(len(x), np.uint8)
    artifacts.write_npz(
        folder / "activations" / "activations_layer1.npz",
        {
            "activations": x,
            "seq_lengths": np.full(n, tokens_per_example, np.int32),
            "token_ids": zeros.astype(np.int32),
            "token_kind": zeros,
            "token_role": zeros,
            "example_ids": np.arange(1, n + 1, dtype=np.int32),
            "metadata": np.array(artifacts.to_json(metadata)),
        },
    )


def train_flags(settings, site, architecture, m):
    """The flags of train_sae.py for all autoencoders of one architecture and size."""
    sparsities = ["--k", 1, "--sparsity-coefficient"] if architecture == "standard" else ["--k"]
    values = settings.L1_COEFFICIENTS if architecture == "standard" else settings.KS
    return [
        "--output-dir",
        work_folder(settings) / site,
        "--run-name",
        architecture,
        "--layer-idx",
        1,
        "--seed",
        settings.SEED,
        "--architecture",
        architecture,
        "--m",
        m,
        *sparsities,
        listed(values),
        "--seed",
        listed(settings.SEEDS),
        "--matryoshka-prefixes=none",
        "--n-epochs",
        settings.N_EPOCHS,
        "--patience",
        settings.N_EPOCHS,
        "--learning-rate",
        1e-3,
        "--lr-schedule",
        "linear",
        "--max-norm-ratio",
        "none",
        "--test-fraction",
        0,
        "--normalize-activations",
        "both",
        "--device",
        "cpu",
    ]


def examine(settings, site, x, n, keys):
    """What the result says of one place: how much of it the known directions hold, each
    autoencoder, and what it is compared with."""
    table = np.stack([x[n == number].mean(0) for number in range(settings.P)])  # (P, d)
    truth, centred = fourier_directions(table, keys), x - x.mean(0)
    basis = np.linalg.qr(truth.T)[0]
    runs = {
        title(*variant): [
            autoencoder(settings, site, variant, seed, x, n, keys, truth) for seed in settings.SEEDS
        ]
        for variant in variants(settings)
    }
    compared = {}
    # a matching gains by every direction there is to choose from, so baselines have as many as
    # autoencoders
    for m in settings.MS:
        compared |= {
            f"{name}, M = {m}": sets
            for name, sets in (
                ("principal components", [principal_directions(x, m)]),
                ("random", [random_directions(m, x.shape[1], i) for i in range(settings.N_RANDOM)]),
                (
                    "random, covariance of the data",
                    [random_like(x, m, i) for i in range(settings.N_RANDOM)],
                ),
            )
        }
    baselines = {
        name: means([recovery(rows, centred @ rows.T, n, keys, truth, settings.P) for rows in sets])
        for name, sets in compared.items()
    }
    return {
        "n_tokens": len(x),
        "n_distinct": len(np.unique(x, axis=0)),
        "variance_in_known_directions": round(
            float(np.square(centred @ basis).sum() / np.square(centred).sum()), 4
        ),
        "baselines": baselines,
        "autoencoders": {name: {"mean": means(rows), "runs": rows} for name, rows in runs.items()},
    }


def autoencoder(settings, site, variant, seed, x, n, keys, truth):
    """The figures of one autoencoder: its own, and how well its features that fire at all recover
    the known directions."""
    decoder, features, metrics = fired_features(settings, site, variant, seed, x)
    in_planes = lengths_in_planes(truth, decoder).max(0)
    fires = np.stack(
        [(features[n == number] > 0).mean(0) for number in range(settings.P)]
    )  # (P, m) share of each number's tokens
    return {
        "seed": seed,
        "variant": variant,
        **{name: metrics[name] for name in ("l0", "normalized_mse", "dead_fraction")},
        **recovery(decoder, features, n, keys, truth, settings.P),
        "mean_length_in_best_plane": float(in_planes.sum() / max(len(decoder), 1)),
        "share_of_numbers": float((fires > 0.5).sum() / max(fires.size, 1)),
    }  # on which a feature fires for most tokens


def fired_features(settings, site, variant, seed, x):
    """(decoder rows (m, d), activations (tokens, m), metrics) of the features of a trained
    autoencoder that fire on some token of x."""
    import torch

    from fastsae.formats.load import load_sae
    from fastsae.sae.autoencoder import checkpoint_name, encode

    architecture, m, sparsity = variant
    by_l1 = architecture == "standard"
    name = checkpoint_name(m, 1 if by_l1 else sparsity, None, architecture).removesuffix(".pt") + (
        f"_L1={sparsity:g}" if by_l1 else ""
    )
    sae, meta = load_sae(
        work_folder(settings) / site / "checkpoints" / architecture / f"{name}_seed={seed}.pt"
    )
    entries = encode(sae, torch.from_numpy(x))
    features = np.zeros((entries.n_rows, entries.n_columns), np.float32)
    features[entries.row.numpy(), entries.column.numpy()] = entries.value.numpy()
    fired = features.any(0)
    return sae.decoder.weight.detach().numpy().T[fired], features[:, fired], meta["metrics"]


def recovery(found, activations, n, keys, truth, p):
    """How well directions `found` (m, d), with the activations (tokens, m), match the known ones
    `truth` (2 F, d) and cos / sin of n."""
    cosines = absolute_cosines(truth, found)
    return {
        "mcc": matched_mean(cosines),
        "plane_mcc": matched_mean(lengths_in_planes(truth, found)),
        "mean_max_cosine": mean_max(cosines),
        "correlation": matched_mean(absolute_correlations(waves(p, keys)[n], activations)),
    }


def means(rows):
    return {
        name: round(float(np.mean([row[name] for row in rows])), 4)
        for name in rows[0]
        if name not in ("seed", "variant")
    }


def show(site, result):
    print(
        f"{site}: {100 * result['variance_in_known_directions']:.1f} % of the variance lies in the "
        "known directions"
    )
    for name, row in {
        **result["baselines"],
        **{name: r["mean"] for name, r in result["autoencoders"].items()},
    }.items():
        print(
            f"  {name:32}" + ", ".join(f"{key} {value:.3f}" for key, value in row.items()),
            flush=True,
        )


def draw(path, settings, examined, sites, power, keys):
    """The embedding's spectrum, the recovery of each method, and features of the best autoencoder
    along the circle of their frequency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    panels[0, 0].bar(
        np.arange(1, len(power) + 1),
        power,
        color=["C3" if k in keys else "C7" for k in range(1, len(power) + 1)],
    )
    panels[0, 0].set(
        title="embedding of the numbers",
        xlabel="frequency (key frequencies red)",
        ylabel="share of variance",
    )
    draw_recovery(panels[0, 1], examined)
    for panel, site in zip(panels[1], SITES):
        x, n = sites[site]
        draw_features(panel, settings, site, x, n, keys, examined[site])
    write_figure(path, figure)


def draw_recovery(panel, examined):
    names = [
        name
        for site in SITES[:1]
        for part in ("autoencoders", "baselines")
        for name in examined[site][part]
    ]
    for shift, (site, measure) in enumerate(
        (site, measure) for site in SITES for measure in ("mcc", "plane_mcc")
    ):
        rows = {
            **{name: r["mean"] for name, r in examined[site]["autoencoders"].items()},
            **examined[site]["baselines"],
        }
        panel.barh(
            np.arange(len(names)) + 0.2 * shift,
            [rows[name][measure] for name in names],
            0.2,
            color=f"C{SITES.index(site)}",
            alpha=1 if measure == "mcc" else 0.5,
            label=f"{site}, {'directions' if measure == 'mcc' else 'planes'}",
        )
    panel.set_yticks(np.arange(len(names)) + 0.3, names, fontsize=8)
    panel.invert_yaxis()
    panel.set(title="MCC with the known directions, planes", xlim=(0, 1))
    panel.legend(
        frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.08)
    )


def best_run(result):
    return max(
        (run for rows in result["autoencoders"].values() for run in rows["runs"]),
        key=lambda run: run["mcc"],
    )


def draw_features(panel, settings, site, x, n, keys, result):
    """Mean activation of the features that lie most in the plane of the strongest frequency, along
    that circle."""
    best = best_run(result)
    decoder, features, _ = fired_features(settings, site, best["variant"], best["seed"], x)
    table = np.stack([x[n == number].mean(0) for number in range(settings.P)])
    lengths = lengths_in_planes(fourier_directions(table, keys[:1]), unit(decoder))[0]
    angle = (keys[0] * np.arange(settings.P)) % settings.P
    for j in np.argsort(-lengths)[:3]:
        mean = np.bincount(n, features[:, j], settings.P) / np.bincount(
            n, minlength=settings.P
        )  # (P,)
        panel.plot(np.sort(angle), mean[np.argsort(angle)], lw=1.2)
    panel.set(
        title=f"{site}: {best['variant'][0]}'s features nearest to k = {keys[0]}",
        xlabel=f"{keys[0]} n mod {settings.P}",
        ylabel="mean activation",
    )


if __name__ == "__main__":
    from fastsae.runtime.stage import run_stage

    sys.exit(run_stage(main))
