"""Which layer? Norms, reconstruction and LLM-free evidence on the features of several layers, from
one extraction pass.

    python -m experiments.studies.layers  # the demo's model and data
    python -m experiments.studies.layers --quick
    python -m experiments.studies.layers --preset llama-3.1-8b --dataset-path my.jsonl \\
        --compared-layers 4,12,18,20,25 --m 32768 --k 32

Drives the three stages: stage 1 once for all layers, then stages 2 and 3 for each layer and seed
with the same settings; all their flags work here. Per layer: median norm of the stream and
attention sinks, normalised MSE on held-out examples, AUC of probes of the categories on 16 features
beside 16 of random tokens (as stage 3 measures it, mean over the tokens of an example), and token
purity, the share of a feature's activation that lies on its commonest token (1: a token detector).
Work is kept under OUTPUT_DIR/layers, so that a run that was stopped continues. Writes
experiments/results/layers.json and .png.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

import config
from experiments.shared import evidence
from experiments.shared.provenance import PROJECT, RESULTS, run_stage, write_figure, write_result
from experiments.shared.subjects import require
from experiments.shared.sweeps import listed, quick_settings
from fastsae.activations import files
from fastsae.runtime import artifacts
from fastsae.runtime.stage import run_stage as run_main

COMPARED_LAYERS: tuple[int, ...] = (2, 6, 12, 18, 24, 28)  # residual stream after so many blocks
N_SEEDS: int = 3  # SAEs per layer, with SEED, SEED + 1 ... (split, weights, data order)
NAME: str = "layers"  # of the files under experiments/results/
QUICK: bool = False  # 1 seed, 160 examples, 8 epochs

STAGES = [PROJECT / name for name in config.STAGES]
QUICK_VALUES = {"N_SEEDS": 1, "MAX_EXAMPLES": 160, "N_EPOCHS": 8}


def main():
    settings = quick_settings(config.resolve(*STAGES, __file__), QUICK_VALUES)
    settings.show()
    require(settings, {"COMPARED_LAYERS": 1, "N_SEEDS": 1})
    root = settings.output_dir / "layers"
    run_stage(
        "extract_activations.py",
        *settings.flags_for("extract_activations.py"),
        *quick_flag(settings, "MAX_EXAMPLES"),
        "--output-dir",
        root,
        "--layer-idx",
        listed(settings.COMPARED_LAYERS),
    )
    rows = []
    for layer in settings.COMPARED_LAYERS:
        seeds = [
            one_seed(settings, root, layer, settings.SEED + i) for i in range(settings.N_SEEDS)
        ]
        norms = json.loads((root / "activations" / f"activations_layer{layer}.json").read_text())
        rows.append(
            {
                "layer": layer,
                **{
                    name: norms[name]
                    for name in ("median_norm", "max_norm", "n_sinks", "n_sinks_outside_prefix")
                },
                **{
                    name: float(np.mean([s[name] for s in seeds]))
                    for name in seeds[0]
                    if seeds[0][name] is not None
                },
                "seeds": seeds,
            }
        )
    show(rows)
    used = [
        "COMPARED_LAYERS",
        "QUICK",
        "MODEL_NAME",
        "DATASET_PATH",
        "MAX_EXAMPLES",
        "ARCHITECTURE",
        "M",
        "K",
        "MATRYOSHKA_PREFIXES",
        "N_EPOCHS",
        "PATIENCE",
        "BATCH_SIZE",
        "LEARNING_RATE",
        "SEED",
        "N_SEEDS",
    ]
    chosen = settings.select(used) | {"DATASET_PATH": Path(settings.DATASET_PATH).name}
    write_result(settings.NAME, chosen, {"n_blocks": n_blocks(settings), "layers": rows})
    if importlib.util.find_spec("matplotlib"):
        draw(RESULTS / f"{settings.NAME}.png", rows)


def quick_flag(settings, name):
    """The flag that gives a stage the value of --quick, where that is the one in force."""
    return (
        [f"--{config.flag_name(name)}", settings.values[name]]
        if settings.source[name] == "QUICK"
        else []
    )


def n_blocks(settings):
    from fastsae.lm.loading import load_config

    return load_config(
        settings.MODEL_NAME, revision=settings.MODEL_REVISION, cache_dir=settings.CACHE_DIR
    ).num_hidden_layers


def one_seed(settings, root, layer, seed):
    """What stages 2 and 3 and the statistics give for one layer and seed."""
    folder = root / f"layer{layer}-seed{seed}"
    share_activations(root, folder, layer)
    flags = ["--output-dir", folder, "--layer-idx", layer, "--seed", seed, "--run-name", "sae"]
    run_stage(
        "train_sae.py",
        *settings.flags_for("train_sae.py"),
        *quick_flag(settings, "N_EPOCHS"),
        *flags,
    )
    run_stage(
        "interpret_sae.py",
        *settings.flags_for("interpret_sae.py"),
        *flags,
        *("--n-top-neurons", 0, "--no-run-model"),
    )
    metrics = json.loads((folder / "checkpoints" / "sae" / "metrics.json").read_text())
    head, *rows = artifacts.read_lines(folder / "interpretations.jsonl")
    purity = purity_of(
        folder / "checkpoints" / "sae" / metrics["checkpoint"], folder, layer, settings
    )
    return {
        **{name: metrics[name] for name in ("normalized_mse", "l0", "dead_fraction", "epochs")},
        **probed(head["run_table"].get("probing")),
        "mean_token_purity": float(np.nanmean(purity)),
        "share_purity_above_half": float(np.mean(purity[~np.isnan(purity)] > 0.5)),
        "mean_special_token_share": float(
            np.mean(
                [r["special_token_share"] for r in rows if r["special_token_share"] is not None]
            )
        ),
    }


def probed(found):
    """What 16 features tell of the categories, beside 16 of random tokens; None without labels."""
    sources = found["sparse_probing"]["16"] if found else {}
    return {
        name: sources[source]["value"] if source in sources else None
        for name, source in (
            ("probe_auc", "features"),
            ("probe_auc_random_tokens", "random tokens"),
            ("probe_auc_stream", "stream"),
        )
    }


def share_activations(root, folder, layer):
    """Let `folder` have the layer's activations, as links, so that its stages know nothing of the
    others."""
    (folder / "activations").mkdir(parents=True, exist_ok=True)
    for file in files.find_shards(root / "activations" / f"activations_layer{layer}.npz"):
        link = folder / "activations" / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())


def purity_of(checkpoint, folder, layer, settings):
    """(M,) of each feature, the share of its activation on its commonest token (by name); nan for
    those that hardly ever fire."""
    from fastsae.data.token_text import token_names
    from fastsae.formats.load import load_sae
    from fastsae.interpretation.statistics import collect
    from fastsae.lm.loading import load_tokenizer

    data = files.open_activations(folder / "activations" / f"activations_layer{layer}.npz")
    tokenizer = load_tokenizer(
        settings.MODEL_NAME, revision=settings.MODEL_REVISION, cache_dir=settings.CACHE_DIR
    )
    name_of_token, names = token_names(tokenizer, data["token_ids"])
    sae, meta = load_sae(checkpoint)
    found = collect(
        sae,
        data["activations"],
        data["seq_lengths"],
        data["token_kind"],
        data["token_role"],
        name_of_token,
        len(names),
        max_norm=meta["max_norm"],
        exclude_shared_prefix=settings.EXCLUDE_SHARED_PREFIX,
        use=settings.USE_TOKENS,
    )
    return evidence.token_purity(found.name_mass.sums, found.count)


def show(rows):
    print(
        f"{'layer':>5}{'norm':>9}{'sinks':>7}{'norm. MSE':>11}{'dead %':>8}"
        f"{'probe AUC':>11}{'random tokens':>15}{'stream':>8}"
        f"{'purity':>8}"
    )
    for r in rows:
        auc = (
            f"{r['probe_auc']:>11.3f}{r['probe_auc_random_tokens']:>15.3f}{r['probe_auc_stream']:>8.3f}"
            if "probe_auc" in r
            else f"{'no labels':>34}"
        )
        print(
            f"{r['layer']:>5}{r['median_norm']:>9.1f}{r['n_sinks']:>7}{r['normalized_mse']:>11.3f}"
            f"{100 * r['dead_fraction']:>8.1f}{auc}"
            f"{r['mean_token_purity']:>8.3f}"
        )


def draw(path, rows):
    """Four panels over the layers, a dot for each seed and a line through their means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flatten()
    layers = [r["layer"] for r in rows]
    panels[0].plot(layers, [r["median_norm"] for r in rows], "o-", label="median")
    panels[0].plot(
        layers,
        [r["max_norm"] for r in rows],
        "s:",
        color="#c8553d",
        label="largest (attention sinks)",
    )
    panels[0].set_yscale("log")
    for panel, name, label, colour in (
        (panels[1], "normalized_mse", None, "#3b6ea5"),
        (panels[3], "mean_token_purity", None, "#3b6ea5"),
        (panels[2], "probe_auc", "features", "#3b6ea5"),
        (panels[2], "probe_auc_random_tokens", "random tokens", "#999"),
    ):
        if name not in rows[0]:
            continue
        panel.plot(layers, [r[name] for r in rows], "-", color=colour, label=label)
        for r in rows:
            panel.plot(
                [r["layer"]] * len(r["seeds"]), [s[name] for s in r["seeds"]], ".", color=colour
            )
        if panel is not panels[2]:  # an AUC begins at 0.5
            panel.set_ylim(bottom=0)
    for panel, title in zip(
        panels,
        (
            "norm of the residual stream",
            "normalised MSE, held-out examples",
            "AUC of probes of the categories, 16 columns",
            "token purity, mean over features",
        ),
    ):
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
    for panel in (panels[0], panels[2]):
        panel.legend(frameon=False, fontsize=8)
    for panel in panels[2:]:
        panel.set_xlabel("layer")
    write_figure(path, figure)


if __name__ == "__main__":
    sys.exit(run_main(main))
