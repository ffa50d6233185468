"""How much of the model's next-token loss survives when its residual stream is replaced by an
autoencoder's reconstruction.

    # of the run in checkpoints/, trained first if there is none
    python -m experiments.studies.loss_recovered
    # any checkpoints; each says its own model and layer
    python -m experiments.studies.loss_recovered --sae a.pt,b.pt,saelens_folder
    python -m experiments.studies.loss_recovered --sae folder --dataset-path my_dialogues.jsonl \\
        --quick

Loss recovered is (ablated - spliced) / (ablated - clean), the ablated loss being that with zeros,
or with the mean, in the place of the same tokens. The shared prefix and attention sinks, which the
autoencoder is not trained on, stay as they are; "every token" gives the same with these replaced
too. Losses count the tokens after the shared prefix, by kind and role of the token predicted;
intervals are of a bootstrap over examples. Writes experiments/results/loss_recovered.json and .png.
An autoencoder that was measured before with the same settings is read from
OUTPUT_DIR/experiments/loss_recovered.jsonl.
"""

import importlib.util
import sys

import numpy as np

import config
from experiments.shared.provenance import RESULTS, remembered, write_figure, write_result
from experiments.shared.statistics import bootstrap_counts, interval_of_finite
from experiments.shared.subjects import (
    STAGES,
    example_ids,
    load_model,
    require,
    scope,
    some_dialogues,
    subjects,
    usable_tokens_of,
)
from experiments.shared.sweeps import quick_settings
from fastsae.data.tokenization import CONTENT, ROLES, SHARED_PREFIX, TEMPLATE
from fastsae.runtime.stage import run_stage

SAE: str | None = None  # checkpoints or SAELens folders, with commas; none = the run's own
N_EXAMPLES: int = 200  # held-out examples, chosen at random
N_BOOTSTRAP: int = 1000  # resamples of the examples for the intervals
NAME: str = "loss_recovered"  # of the files under experiments/results/
QUICK: bool = False  # 12 examples

QUICK_VALUES = {"N_EXAMPLES": 12}
KIND_NAMES = {"content": CONTENT, "template": TEMPLATE}
ABLATIONS = ("zero", "mean")
COLOURS = ("#3b6ea5", "#c8553d", "#5a9367", "#8d6cab", "#b8860b")


def main():
    settings = quick_settings(config.resolve(*STAGES, __file__), QUICK_VALUES)
    settings.show()
    require(settings, {"N_EXAMPLES": 1, "N_BOOTSTRAP": 1})
    rows = {}
    for subject in subjects(settings):
        key = {
            **scope(subject, settings),
            **settings.select(("N_EXAMPLES", "N_BOOTSTRAP")),
            "path": subject.path,
        }
        journal = settings.output_dir / "experiments" / "loss_recovered.jsonl"
        name = (
            subject.path if subject.name in rows else subject.name
        )  # runs in different folders may be named alike
        rows[name] = remembered(journal, key, lambda: measure(subject, settings))
        show(name, rows[name])
    write_result(
        settings.NAME,
        settings.select(["N_EXAMPLES", "N_BOOTSTRAP", "QUICK", "SEED", "DTYPE"]),
        {"autoencoders": rows},
    )
    if importlib.util.find_spec("matplotlib"):
        draw(RESULTS / f"{settings.NAME}.png", rows)


def measure(subject, settings):
    """Everything that the result says of one autoencoder."""
    import torch
    from tqdm import tqdm

    from fastsae import intervention
    from fastsae.intervention import constant, only, reconstruction

    table = some_dialogues(subject, settings, settings.N_EXAMPLES, held_out=True)
    model, examples = load_model(subject, settings), example_ids(table)
    batch_tokens = settings.BATCH_TOKENS or {"cuda": 4096}.get(model.device.type, 1024)
    stream = intervention.residual_stream(
        model, subject.point, examples, batch_tokens=batch_tokens
    )  # (n_tokens, d)
    usable = usable_tokens_of(subject, stream, table)
    functions = {
        "spliced": reconstruction(subject.sae),
        "zero": constant(torch.zeros(stream.shape[1])),
        "mean": constant(stream[usable].mean(0)),
    }
    replacements = {
        **{name: only(usable, function) for name, function in functions.items()},
        **{f"{name}, every token": function for name, function in functions.items()},
    }
    with tqdm(
        total=len(table.ids), unit="token", desc="losses", mininterval=1, disable=None
    ) as bar:
        losses = intervention.next_token_losses(
            model,
            subject.point,
            examples,
            replacements,
            batch_tokens=batch_tokens,
            progress=bar.update,
        )
    example = np.repeat(np.arange(len(examples)), table.lengths)
    result = {
        **subject.describe(),
        "n_examples": len(examples),
        "held_out": subject.knows_its_examples,
        "n_tokens": len(table.ids),
        "n_left_as_they_are": int((~usable).sum()),
        **reconstruction_error(
            functions["spliced"](stream[usable], torch.from_numpy(np.flatnonzero(usable))),
            stream[usable],
        ),
    }
    for title, ending in (("kinds", ""), ("kinds_every_token_replaced", ", every token")):
        chosen = {name: losses[name + ending] for name in functions} | {"clean": losses["clean"]}
        result[title] = {
            name: of_tokens(chosen, rows, example, settings) for name, rows in groups(table).items()
        }
    return result


def reconstruction_error(found, x):
    """On the tokens that are replaced, about their own mean."""
    squared, variance = (found - x).double().square().sum(), (x - x.mean(0)).double().square().sum()
    return {"normalized_mse": float(squared / variance)}


def groups(table):
    """{name: (n_tokens,) bool} of the tokens whose prediction counts; the first of an example is
    predicted by nothing."""
    first = np.zeros(len(table.ids), bool)
    first[table.starts[:-1]] = True
    counted = ~first & (table.kind != SHARED_PREFIX)
    found = {"all": counted} | {
        name: counted & (table.kind == kind) for name, kind in KIND_NAMES.items()
    }
    found |= {role: counted & (table.role == number) for number, role in enumerate(ROLES) if number}
    return {name: rows for name, rows in found.items() if rows.any()}


def of_tokens(losses, rows, example, settings):
    """Mean losses over the tokens `rows` and what they say, with intervals over examples."""
    n_examples = int(example[-1]) + 1
    sums = {
        name: np.bincount(example[rows], value.ce[rows].astype(np.float64), minlength=n_examples)
        for name, value in losses.items()
    }
    count = np.bincount(example[rows], minlength=n_examples)  # (n_examples,)
    draws = bootstrap_counts(n_examples, settings.N_BOOTSTRAP, settings.SEED)
    n = int(count.sum())
    result = {
        "n_tokens": n,
        "ce": {name: float(s.sum() / n) for name, s in sums.items()},
        "kl": {
            name: float(value.kl[rows].astype(np.float64).mean())
            for name, value in losses.items()
            if name != "clean"
        },
    }
    for ablation in ABLATIONS:
        resampled = recovered({name: draws @ s for name, s in sums.items()}, ablation)
        result[f"loss_recovered_{ablation}"] = {
            "value": float(recovered(result["ce"], ablation)),
            "interval": interval_of_finite(resampled),
        }
    return result


def recovered(ce, ablation):
    """Loss recovered against one ablation: from mean losses, or from their sums over the same
    tokens."""
    from fastsae.intervention import loss_recovered

    with np.errstate(divide="ignore", invalid="ignore"):
        return loss_recovered(np.float64(ce["clean"]), ce["spliced"], ce[ablation])


def show(name, row):
    """The table on the terminal."""
    examples = (
        "held-out examples"
        if row["held_out"]
        else "examples (which ones it was trained on is not known)"
    )
    print(
        f"{name}: {row['model']}, layer {row['layer']}; {row['n_examples']} {examples}, "
        f"{row['n_tokens']:,} tokens, "
        f"{row['n_left_as_they_are']:,} of them left as they are; normalised MSE "
        f"{row['normalized_mse']:.3f} on the others"
    )
    print(
        "  "
        f"{'tokens predicted':<28}{'number':>8}{'clean':>8}"
        f"{'spliced':>9}{'zero':>8}{'mean':>8}{'KL':>8}   recovered (zero)   (mean)"
    )
    for title, ending in (("kinds", ""), ("kinds_every_token_replaced", ", every token")):
        for kind, r in row[title].items():
            low, high = r["loss_recovered_zero"]["interval"] or (float("nan"),) * 2
            print(
                f"  {kind + ending:<28}{r['n_tokens']:>8,}{r['ce']['clean']:>8.3f}"
                f"{r['ce']['spliced']:>9.3f}{r['ce']['zero']:>8.3f}"
                f"{r['ce']['mean']:>8.3f}{r['kl']['spliced']:>8.3f}   "
                f"{r['loss_recovered_zero']['value']:.3f} [{low:.3f}, {high:.3f}]"
                f"{r['loss_recovered_mean']['value']:>8.3f}"
            )


def draw(path, rows):
    """Losses with each replacement, and the loss recovered, by kind of the token predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    kinds, width = list(next(iter(rows.values()))["kinds"]), 0.8 / len(rows)
    if "content" in kinds and len(kinds) == 4:  # one role only: it says what "content" says
        kinds = kinds[:3]
    bars = (
        ("clean", "kinds", "clean"),
        ("spliced", "kinds", "spliced"),
        ("mean", "kinds", "mean"),
        ("zero", "kinds", "zero"),
        ("spliced,\nevery token", "kinds_every_token_replaced", "spliced"),
    )
    for i, row in enumerate(rows.values()):
        label = f"{row['architecture']}, M = {row['m']:,}, K = {row['k']}, layer {row['layer']}"
        place, colour = np.arange(len(bars)) + i * width, COLOURS[i % len(COLOURS)]
        drawn = left.bar(
            place,
            [row[part]["all"]["ce"][name] for _, part, name in bars],
            width,
            color=colour,
            label=label,
        )
        left.bar_label(drawn, fmt="%.2f", fontsize=7)
        for ablation, fill in (("zero", "full"), ("mean", "none")):
            found = [
                row["kinds"].get(kind, row["kinds"]["all"])[f"loss_recovered_{ablation}"]
                for kind in kinds
            ]
            values = np.array([f["value"] for f in found])
            spread = np.abs(np.array([f["interval"] or [f["value"]] * 2 for f in found]).T - values)
            right.errorbar(
                np.arange(len(kinds)) + i * width + 0.1 * (fill == "none"),
                values,
                spread,
                fmt="o",
                color=colour,
                capsize=3,
                fillstyle=fill,
            )
    left.set_xticks(np.arange(len(bars)) + 0.4 - width / 2, [name for name, *_ in bars])
    left.set_title("next-token loss, nats", fontsize=10)
    right.set_xticks(np.arange(len(kinds)) + 0.4 - width / 2, kinds)
    right.set_title(
        "loss recovered, by the token predicted: against zeros (full), against the mean (open)",
        fontsize=10,
        wrap=True,
    )
    right.axhline(1, color="black", lw=0.6)
    right.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    write_figure(path, figure)


if __name__ == "__main__":
    sys.exit(run_stage(main))
