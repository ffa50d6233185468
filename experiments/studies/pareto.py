"""Sparsity against reconstruction: every architecture at several sparsities, L0 against normalised
MSE and loss recovered.

    python -m experiments.studies.pareto --quick  # minutes on two cores
    python -m experiments.studies.pareto --dataset-path my_dialogues.jsonl --device cuda

All are trained by train_sae.py on the same activations, with the same M, epochs and learning rate;
only K, or for standard and gated the L1 coefficient, moves. Loss recovered: the reconstruction
takes the place of the residual stream at the tokens that the autoencoder is meant for (no shared
prefix, no sinks) of validation examples, and 1 is the model's own cross entropy, 0 that with zeros
there; against the mean activation it is given as well. Writes experiments/results/<NAME>.json and
.png. An interrupted run goes on by the same command.
"""

import sys

import numpy as np

import config
from experiments.shared.provenance import RESULTS, run_stage, write_figure, write_result
from experiments.shared.subjects import unseen_examples
from experiments.shared.sweeps import (
    DATA_SETTINGS,
    epochs_and_steps,
    listed,
    passed_on,
    quick_settings,
    recorded,
    rounded,
    run_many,
)

ARCHITECTURES: str = "topk,batchtopk,matryoshka,jumprelu,standard,gated"  # which to train
K_LIST: tuple[int, ...] = (8, 16, 32, 64, 128)  # of all but standard and gated
L1_COEFFICIENT_LIST: tuple[float, ...] = (8.0, 4.0, 2.0, 1.0, 0.5)  # of standard and gated
SEEDS: tuple[int, ...] = (0, 1, 2)  # of the first weights; split and data order stay
M: int = 4608  # features
N_EPOCHS: int = 10  # of training
BATCH_SIZE: int = 4096  # tokens per step
LEARNING_RATE: float = 1e-3  # of Adam, falling to 0 over all steps
N_LOSS_EXAMPLES: int = 64  # test examples for loss recovered
AT_L0: tuple[int, ...] = (8, 16, 32)  # where architectures are compared, by interpolation
NAME: str = "pareto"  # of the result
QUICK: bool = False  # small autoencoders, one seed, few examples

QUICK_VALUES = {
    "M": 256,
    "N_EPOCHS": 5,
    "BATCH_SIZE": 512,
    "K_LIST": (4, 8, 16, 32),
    "L1_COEFFICIENT_LIST": (8.0, 4.0, 2.0, 1.0),
    "SEEDS": (0,),
    "N_LOSS_EXAMPLES": 8,
    "AT_L0": (8, 16),
}
BY_COEFFICIENT = ("standard", "gated")


def main():
    settings = quick_settings(config.resolve(__file__), QUICK_VALUES)
    settings.show()
    work = settings.output_dir / "checkpoints" / settings.NAME
    run_stage(
        "extract_activations.py",
        *passed_on(settings, (*DATA_SETTINGS, "LABEL_FIELD")),
        "--output-dir",
        work,
    )
    run_many(
        "train_sae.py",
        [train_flags(settings, work, name) for name in settings.ARCHITECTURES.split(",")],
    )
    runs, n_loss_examples = measure(settings, work)
    result = {
        "n_loss_examples": n_loss_examples,
        "measured_on": "test",
        "at_l0": {
            name: at_equal_l0(runs, name, settings.AT_L0)
            for name in ("normalized_mse", "loss_recovered")
        },
        "frontier": {name: frontier(runs, name) for name in ("normalized_mse", "loss_recovered")},
        "runs": runs,
    }
    write_result(settings.NAME, recorded(settings), rounded(result))
    figure(runs, settings, RESULTS / f"{settings.NAME}.png")


def grid(settings):
    """(architecture, K or L1 coefficient, seed) of every autoencoder."""
    return [
        (name, sparsity, seed)
        for name in settings.ARCHITECTURES.split(",")
        for sparsity in (
            settings.L1_COEFFICIENT_LIST if name in BY_COEFFICIENT else settings.K_LIST
        )
        for seed in settings.SEEDS
    ]


def train_flags(settings, work, architecture):
    """The flags of train_sae.py: all sparsities and seeds of one architecture come from one reading
    of the data."""
    name = "topk" if architecture == "matryoshka" else architecture
    prefixes = (
        ["--matryoshka-prefixes", f"{settings.M // 4},{settings.M}"]
        if architecture == "matryoshka"
        else ["--matryoshka-prefixes=none"]
    )
    how = "L1_COEFFICIENT_LIST" if architecture in BY_COEFFICIENT else "K_LIST"
    return [
        *passed_on(settings, (*DATA_SETTINGS, "LABEL_FIELD")),
        "--output-dir",
        work,
        "--run-name",
        architecture,
        "--architecture",
        name,
        *prefixes,
        "--sparsity-coefficient" if architecture in BY_COEFFICIENT else "--k",
        listed(settings.values[how]),
        "--seed",
        listed(settings.SEEDS),
        "--m",
        settings.M,
        *epochs_and_steps(settings),
    ]


def measure(settings, work):
    """(figures of every autoencoder, one dict each, number of test examples, the same for all, that
    the losses are over)."""
    from fastsae.formats.load import load_sae

    saes, metadata = {}, {}
    for path in sorted((work / "checkpoints").glob("*/SAE_*.pt")):
        if ".old-" in path.name or path.name.endswith(
            ".resume.pt"
        ):  # of an earlier run with other settings
            continue
        sae, meta = load_sae(path)
        s = meta["settings"]
        if s["M"] != settings.M:
            continue
        cell = (
            path.parent.name,
            s["L1_COEFFICIENT"] if path.parent.name in BY_COEFFICIENT else s["K"],
            s["INIT_SEED"],
        )
        saes[cell], metadata[cell] = sae, meta
    cells = grid(settings)
    examples = unseen_examples(metadata[cells[0]])[: settings.N_LOSS_EXAMPLES]
    losses = spliced_losses(
        settings,
        work,
        {cell: saes[cell] for cell in cells},
        examples,
        metadata[cells[0]]["max_norm"],
    )
    clean, zero, mean = (losses[name]["ce"] for name in ("clean", "zero", "mean"))
    runs = []
    for cell in cells:
        ce = losses[cell]["ce"]
        kept = ("l0", "normalized_mse", "dead_fraction", "n_train_tokens")
        runs.append(
            {
                "architecture": cell[0],
                "sparsity": cell[1],
                "seed": cell[2],
                **{name: metadata[cell]["metrics"][name] for name in kept},
                "ce": ce,
                "ce_clean": clean,
                "ce_zero": zero,
                "ce_mean": mean,
                "kl": losses[cell]["kl"],
                "loss_recovered": (zero - ce) / (zero - clean),
                "loss_recovered_against_mean": (mean - ce) / (mean - clean),
            }
        )
    return runs, len(examples)


def spliced_losses(settings, work, saes, chosen, max_norm):
    """{name: mean cross entropy and KL} of the model as it is, with zeros, the mean, and each
    autoencoder's reconstruction spliced in.

    Over the predicted tokens of the examples `chosen` (positions in the activations file) that come
    after a replaced token.
    """
    from fastsae import intervention
    from fastsae.activations.files import open_activations
    from fastsae.data.token_masks import token_norms, usable_tokens
    from fastsae.lm import devices, loading

    data = open_activations(work / "activations" / f"activations_layer{settings.LAYER_IDX}.npz")
    starts = np.concatenate([[0], np.cumsum(data["seq_lengths"])])
    usable, _ = usable_tokens(
        token_norms(data["activations"]),
        data["token_kind"],
        exclude_shared_prefix=True,
        max_norm_ratio=None,
        max_norm=max_norm,
    )
    rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])
    device = devices.choose_device(settings.DEVICE)
    model = loading.load_model(
        settings.MODEL_NAME,
        revision=settings.MODEL_REVISION,
        cache_dir=settings.CACHE_DIR,
        dtype=devices.choose_dtype("auto", device),
        device=device,
    ).eval()
    mean = data["activations"][rows[usable[rows]]].astype(np.float32).mean(0)
    functions = {
        "zero": intervention.constant(np.zeros_like(mean)),
        "mean": intervention.constant(mean),
        **{cell: intervention.reconstruction(sae.to(device)) for cell, sae in saes.items()},
    }
    losses = intervention.next_token_losses(
        model,
        settings.LAYER_IDX,
        [data["token_ids"][starts[i] : starts[i + 1]] for i in chosen],
        {name: intervention.only(usable[rows], function) for name, function in functions.items()},
    )
    after = np.concatenate([[False], usable[rows][:-1]]) & ~np.isnan(
        losses["clean"].ce
    )  # tokens predicted from a replaced position
    return {
        name: {"ce": float(loss.ce[after].mean()), "kl": float(loss.kl[after].mean())}
        for name, loss in losses.items()
    }


def at_equal_l0(runs, name, l0s):
    """{architecture: {L0: mean and deviation over seeds of a figure there}}, interpolated in log2
    L0; left out beyond its range."""
    found = {}
    for architecture in dict.fromkeys(run["architecture"] for run in runs):
        by_seed = {
            seed: [r for r in runs if (r["architecture"], r["seed"]) == (architecture, seed)]
            for seed in {r["seed"] for r in runs}
        }
        found[architecture] = {}
        for l0 in l0s:
            values = [
                interpolate([(run["l0"], run[name]) for run in points], l0)
                for points in by_seed.values()
            ]
            if None not in values:
                found[architecture][str(l0)] = {
                    "mean": float(np.mean(values)),
                    "deviation": float(np.std(values)),
                }
    return found


def interpolate(points, l0):
    """The value at `l0` on the line through (L0, value), in log2 of L0; None outside them."""
    x, y = np.array(sorted(points)).T
    if not x[0] * 0.99 <= l0 <= x[-1] * 1.01:  # topk's own K is inside
        return None
    return float(np.interp(np.log2(l0), np.log2(x), y))


def frontier(runs, name):
    """The means over seeds (architecture, sparsity, L0, value) that no other equals or beats in
    both L0 and the figure named."""
    sign = 1 if name == "normalized_mse" else -1
    cells = {}
    for run in runs:
        cells.setdefault((run["architecture"], run["sparsity"]), []).append((run["l0"], run[name]))
    means = {cell: np.mean(values, axis=0) for cell, values in cells.items()}
    best = [
        (cell, l0, value)
        for cell, (l0, value) in means.items()
        if not any(
            other != cell and b <= l0 and sign * v <= sign * value
            for other, (b, v) in means.items()
        )
    ]
    return [
        {"architecture": cell[0], "sparsity": cell[1], "l0": float(l0), name: float(value)}
        for cell, l0, value in sorted(best, key=lambda each: each[1])
    ]


def figure(runs, settings, path):
    """L0 against normalised MSE, loss recovered and dead features: a line for each architecture,
    the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for number, architecture in enumerate(settings.ARCHITECTURES.split(",")):
        mine = [run for run in runs if run["architecture"] == architecture]
        for ax, (name, label) in zip(
            axes,
            (
                ("normalized_mse", "normalised MSE"),
                ("loss_recovered", "loss recovered"),
                ("dead_fraction", "features unused on validation"),
            ),
        ):
            lines = [
                [(run["l0"], run[name]) for run in mine if run["sparsity"] == sparsity]
                for sparsity in dict.fromkeys(run["sparsity"] for run in mine)
            ]
            points = np.array(sorted(np.mean(values, axis=0).tolist() for values in lines))
            style = "s--" if architecture in BY_COEFFICIENT else "o-"
            ax.plot(*points.T, style, ms=3.5, lw=1.3, color=f"C{number}", label=architecture)
            ax.set(xscale="log", xlabel="L0 (active features per token)", ylabel=label)
    for ax in axes:
        ax.set_xticks(settings.K_LIST, [str(k) for k in settings.K_LIST])
        ax.minorticks_off()
    axes[0].legend(frameon=False, fontsize=8)
    write_figure(path, fig)


if __name__ == "__main__":
    from fastsae.runtime.stage import run_stage as run_and_report

    sys.exit(run_and_report(main))
