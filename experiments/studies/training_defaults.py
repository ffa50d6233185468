"""The settings with which stage 2 trains, against others: learning rate, schedule, batch, epochs.

    python -m experiments.studies.training_defaults --quick  # minutes on two cores
    python -m experiments.studies.training_defaults --dataset-path my_dialogues.jsonl --m 4608 \\
        --k 32 --cases former,default

Each case is train_sae.py on the same activations with other flags, once for each of SEEDS (of the
first weights; split and order of the tokens stay). The validation examples choose the best epoch,
and the figures are of the test examples, which decide nothing. Given for each case: the mean over
the seeds with its 95 % interval (Student's t), and the same of the difference to the default, seed
by seed. Results are added to experiments/results/<NAME>.json, one entry for each dataset,
architecture, M and K. An interrupted run goes on by the same command.
"""

import json
import re
import statistics
import sys
from pathlib import Path

import config
from experiments.shared.provenance import RESULTS, commit, run_stage, write_result
from experiments.shared.statistics import mean_interval
from experiments.shared.sweeps import DATA_SETTINGS, listed, passed_on, quick_settings, rounded

ARCHITECTURE: str = "topk"  # whose defaults
M: int = 256  # features
K: int = 8  # active features per token
CASES: str = "all"  # names of the cases, with commas
SEEDS: tuple[int, ...] = (0, 1, 2, 3)  # of the first weights
NAME: str = "training_defaults"  # of the result
QUICK: bool = False  # the former defaults and today's, two seeds

QUICK_VALUES = {"CASES": "former,default", "SEEDS": (0, 1)}
FORMER = ["--learning-rate", 5e-4, "--lr-schedule", "constant", "--n-epochs", 100]
FIGURES = ("normalized_mse", "l0", "dead_fraction", "epochs")


def main():
    settings = quick_settings(config.resolve(__file__), QUICK_VALUES)
    settings.show()
    run_stage("extract_activations.py", *passed_on(settings, (*DATA_SETTINGS, "OUTPUT_DIR")))
    from fastsae.runtime import artifacts

    source = artifacts.read_npz_metadata(settings.activations_path)
    flags = cases(settings.ARCHITECTURE, settings.M, source["d_model"])
    names = list(flags) if settings.CASES == "all" else settings.CASES.split(",")
    runs = {}
    for name in names:
        run_stage("train_sae.py", *train_flags(settings, name, flags[name]))
        runs[name] = figures_of(settings, name)
        print(name, {key: runs[name][key] for key in ("normalized_mse", "seconds")}, flush=True)
    summary = {name: summed_up(runs[name], runs.get("default")) for name in names}
    for name in names:
        summary[name]["flags"] = " ".join(map(str, flags[name]))
    about = {"architecture": settings.ARCHITECTURE, "m": settings.M, "k": settings.K}
    about |= {"dataset": Path(settings.DATASET_PATH).name, "seeds": settings.SEEDS}
    about["commit"] = commit()
    path = RESULTS / f"{settings.NAME}.json"
    entries = json.loads(path.read_text("utf-8"))["runs"] if path.exists() else {}
    entries[title(about)] = {"settings": about, "cases": rounded(summary)}
    write_result(settings.NAME, {}, {"runs": entries})


def title(about):
    """The name of an entry of the result."""
    dataset = Path(about["dataset"]).stem
    return f"{dataset}, {about['architecture']}, M = {about['m']}, K = {about['k']}"


def cases(architecture, m, d):
    """{name of a case: its flags of train_sae.py}; the rates are multiples of the default for d
    dimensions."""
    from fastsae.training.usual import BATCH, learning_rate

    def rate(times):
        usual = learning_rate(architecture, m, d, BATCH)
        return ["--learning-rate", float(f"{times * usual:.3g}")]

    return {
        "former": FORMER,
        "default": [],
        "rate / 4": rate(1 / 4),
        "rate / 2": rate(1 / 2),
        "rate x 2": rate(2),
        "constant": ["--lr-schedule", "constant"],
        "constant, rate / 4": ["--lr-schedule", "constant", *rate(1 / 4)],
        "cosine": ["--lr-schedule", "cosine"],
        "fall over the last fifth": ["fastsae.training.objective.LR_DECAY_FRACTION=0.2"],
        "warm-up of 100 steps": ["--warmup-steps", 100],
        "no bound of gradients": ["fastsae.training.objective.CLIP_GRAD=None"],
        "batch 256": ["--batch-size", 256],
        "batch 1024": ["--batch-size", 1024],
        "10 epochs": ["--n-epochs", 10],
        "100 epochs": ["--n-epochs", 100],
    }


def run_name(settings, case):
    """The folder of a case's autoencoders."""
    return re.sub(r"\W+", "-", f"{settings.NAME} {settings.ARCHITECTURE} {case}").strip("-")


def train_flags(settings, name, flags):
    """The flags of train_sae.py for all seeds of a case."""
    return [
        *passed_on(settings, (*DATA_SETTINGS, "OUTPUT_DIR")),
        "--run-name",
        run_name(settings, name),
        "--architecture",
        settings.ARCHITECTURE,
        "--m",
        settings.M,
        "--k",
        settings.K,
        "--seed",
        listed(settings.SEEDS),
        *flags,
    ]


def figures_of(settings, case):
    """{figure: its value for each seed} of a case, and the seconds of one autoencoder."""
    folder = settings.output_dir / "checkpoints" / run_name(settings, case)
    found = [
        json.loads(path.read_text("utf-8"))
        for seed in settings.SEEDS
        for path in folder.glob(f"SAE_*M={settings.M}_K={settings.K}*_seed={seed}.metrics.json")
    ]
    assert len(found) == len(settings.SEEDS), folder
    figures = {name: [each[name] for each in found] for name in FIGURES}
    return {**figures, "seconds": max(each["seconds"] for each in found) / len(found)}


def summed_up(figures, default):
    """Means and intervals of a case's figures, and of the differences to the default's."""
    errors = figures["normalized_mse"]
    summary = {"normalized_mse": errors, "mean": statistics.mean(errors)}
    summary["interval"] = mean_interval(errors)
    if default and default is not figures:
        changes = [100 * (ours / its - 1) for ours, its in zip(errors, default["normalized_mse"])]
        summary["percent_over_default"] = statistics.mean(changes)
        summary["percent_interval"] = mean_interval(changes)
    means = {name: statistics.mean(figures[name]) for name in FIGURES[1:]}
    return {**summary, **means, "seconds": figures["seconds"]}


if __name__ == "__main__":
    from fastsae.runtime.stage import run_stage as run

    sys.exit(run(main))
