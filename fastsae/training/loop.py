"""The training of stage 2: several autoencoders from one reading of the data, epoch by epoch, each
saved while it trains and written when it is finished."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsae.data.token_masks import TEST, VALIDATION
from fastsae.formats.load import target_k
from fastsae.runtime import artifacts, distributed, progress
from fastsae.runtime.errors import InputError, Terminated
from fastsae.runtime.stops import deferred_stop, stop, stop_asked
from fastsae.sae.autoencoder import save_sae
from fastsae.sae.dense_step import validation_loss
from fastsae.sae.metrics import evaluate
from fastsae.settings.values import Settings
from fastsae.training import fine_tuning, monitoring, objective
from fastsae.training.data import Tokens, TrainingRows
from fastsae.training.limits import no_finite_loss
from fastsae.training.plans import Plan
from fastsae.training.resampling import resample
from fastsae.training.run import TrainingRun, final_metrics, learning_rate_factor

# seconds between saves of an unfinished run, which are the most that a kill loses; None: at least
# SAVE_AFTER, and so many that saving takes no more than SAVE_SHARE of the time
SAVE_EVERY: float | None = None
SAVE_AFTER = 60.0
SAVE_SHARE = 0.03
INIT_SAMPLE = 32768  # tokens from which centre, directions, encoder scale and normalisation start
VALIDATION_BATCH = 4096  # tokens whose loss is computed together
DEAD_WARNING = 0.05  # fraction of dead features above which a warning is printed
SHOWN = ("loss", "normalized_mse", "dead_fraction_training")  # beside the bar


class PlannedRun(TrainingRun):
    """The TrainingRun of a plan; `log` takes the line of each epoch."""

    log: Callable[[dict], None]

    def __init__(self, plan: Plan, sample: torch.Tensor, device: str):
        settings = plan.settings
        super().__init__(
            objective.sae_config(sample.shape[1], settings.values),
            sample,
            seed=plan.metadata["settings"]["INIT_SEED"],
            device=device,
            learning_rate=settings.LEARNING_RATE,
            normalise=objective.normalisation(settings.values),
            directions=objective.INIT_DIRECTIONS,
            centre=objective.INIT_CENTRE,
            encoder_scale=objective.INIT_ENCODER_SCALE,
        )
        self.plan, self.device = plan, device
        self.state_path = plan.path.with_suffix(".resume.pt")
        self.fingerprint = plan.metadata["fingerprint"]

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done, or PATIENCE of them were no better than the best."""
        settings = self.plan.settings
        without_gain = self.epoch - (self.best_epoch or self.epoch)
        return self.epoch > settings.N_EPOCHS or without_gain > settings.PATIENCE


def train(plans: list[Plan], tokens: Tokens, settings: Settings, device: str) -> dict[Path, str]:
    """Train all `plans` from one reading of the data; each is written as soon as it is finished.

    `settings` are what the plans have in common. Returns {path: what to say} of those whose loss
    came to no number; the others go on without them.
    """
    order = np.random.default_rng(settings.SEED).permutation(tokens.train)
    sample = tokens.rows(np.sort(order[:INIT_SAMPLE]))  # (n, d_in)
    runs = [start_run(plan, tokens, sample, device) for plan in plans]
    for run in runs:
        open_log(run)
    distributed.wait_for_all()  # until all have read the states that rank 0 may soon remove
    data = TrainingRows(
        tokens.activations,
        tokens.train,
        batch_size=settings.BATCH_SIZE,
        buffer_tokens=settings.BUFFER_TOKENS,
        seed=settings.SEED,
        device=device,
    )
    failed: dict[Path, str] = {}
    saver = Saver(SAVE_EVERY)
    bar = progress.bar(
        max(run.plan.settings.N_EPOCHS for run in runs),
        "training",
        "epoch",
        at_most=True,
        initial=min(run.epoch for run in runs) - 1,
    )
    with deferred_stop(), bar:
        try:
            while runs := write_finished(runs, tokens):
                epoch = train_epoch(runs, data, saver, bar)
                for run in [run for run in runs if run.epoch == epoch]:
                    try:
                        run.log(end_epoch(run, tokens))
                    except InputError as error:  # the others go on
                        runs.remove(run)
                        failed[run.plan.path] = str(error)
                bar.update()
                if runs:
                    line = runs[0].history[-1]
                    bar.set_postfix({name: f"{line[name]:.4g}" for name in SHOWN})
        except (KeyboardInterrupt, Terminated):
            # between steps, or while measuring, which changes nothing of the runs
            if saver.stopping or stop_asked():
                saver.keep(runs)
            raise
    return failed


class Saver:
    """Saves the state of unfinished runs every `seconds`, or by SAVE_AFTER and SAVE_SHARE, and when
    the process is to stop."""

    def __init__(self, seconds: float | None):
        self.seconds, self.last, self.stopping = seconds, time.monotonic(), False
        self.cost = 0.0  # seconds of the last save

    @property
    def interval(self) -> float:
        """Seconds of training after which the next save is due."""
        if self.seconds is not None:
            return self.seconds
        return max(SAVE_AFTER, self.cost * (1 - SAVE_SHARE) / SAVE_SHARE)

    def keep(self, runs: Iterable[PlannedRun]) -> None:
        """Write the states of `runs` to their files, so that they can go on from here."""
        began = time.monotonic()
        for run in runs:
            run.save(run.state_path, run.fingerprint)
        self.last = time.monotonic()
        self.cost = self.last - began

    def between_steps(self, runs: Iterable[PlannedRun]) -> None:
        """Stop here if this or another process was asked to; save if it is time."""
        self.stopping = distributed.anywhere(stop_asked())
        if self.stopping:
            stop()
        if time.monotonic() - self.last > self.interval:
            self.keep(runs)


def start_run(plan: Plan, tokens: Tokens, sample: torch.Tensor, device: str) -> PlannedRun:
    """The run of a plan at its start, initialised from a sample (n, d_in) of the tokens, or where
    an earlier process left it."""
    settings = plan.settings
    run = PlannedRun(plan, sample, device)
    if plan.start:
        fine_tuning.begin(
            run,
            plan.start,
            plan.metadata["inputs"]["init_from"],
            settings.activations_path,
            plan.metadata["activations"],
            tokens.examples_of(TEST),
        )
    run.resume(run.state_path, run.fingerprint)
    return run


def open_log(run: PlannedRun) -> None:
    """Let `run.log` take the lines of its epochs to where LOGGER says."""
    settings, name = run.plan.settings, run.plan.path.stem
    run.log = monitoring.open_logger(settings.LOGGER, settings.run_dir, name, settings.values)


def write_finished(runs: list[PlannedRun], tokens: Tokens) -> list[PlannedRun]:
    """Write the runs whose training is over; returns the others."""
    for run in runs:
        if run.is_over:
            finish(run, tokens)
    return [run for run in runs if not run.is_over]


def train_epoch(
    runs: list[PlannedRun], data: TrainingRows, saver: Saver, bar: progress.Task
) -> int:
    """Train on the rest of the epoch of the run that is furthest behind; returns its number.

    Runs that are further on join where they stand.
    """
    n_batches = data.n_batches()
    epoch, first = min((run.epoch, run.batch) for run in runs)
    for batch, x in enumerate(data.batches(epoch, first), first):  # (batch, d_in)
        for run in runs:
            if (run.epoch, run.batch) == (epoch, batch):
                one_step(run, x, (epoch - 1) * n_batches + batch, n_batches)
        bar.part((batch + 1) / n_batches)
        saver.between_steps(runs)
    return epoch


def one_step(run: PlannedRun, x: torch.Tensor, n_done: int, n_batches: int) -> None:
    """One step of `run` on the batch x (batch, d_in), after `n_done` others; an epoch has
    `n_batches`."""
    settings = run.plan.settings
    run.step(
        objective.step_function(settings.values, n_done, run.device),
        x,
        learning_rate=learning_rate(settings, n_done, settings.N_EPOCHS * n_batches),
        dead_after=settings.DEAD_AFTER_TOKENS,
        clip_grad=objective.CLIP_GRAD,
    )
    if settings.RESAMPLE_EVERY and (n_done + 1) % settings.RESAMPLE_EVERY == 0:
        resample(run, x, dead_after=settings.DEAD_AFTER_TOKENS, seed=settings.SEED + n_done)


def learning_rate(settings: Settings, n_done: int, n_steps: int) -> float:
    """The learning rate of the step after `n_done` of `n_steps`."""
    factor = learning_rate_factor(
        n_done,
        n_steps=n_steps,
        schedule=settings.LR_SCHEDULE,
        warmup_steps=settings.LR_WARMUP_STEPS,
        decay_fraction=objective.LR_DECAY_FRACTION,
    )
    return settings.LEARNING_RATE * factor


def end_epoch(run: PlannedRun, tokens: Tokens) -> dict[str, Any]:
    """Measure on validation, note it down, keep the best weights; returns the epoch's line.

    InputError without a finite loss: the run then cannot go on.
    """
    line = distributed.from_rank_0(lambda: epoch_line(run, tokens, len(tokens.train)))
    note_line(run, line)
    return line


def note_line(run: PlannedRun, line: dict[str, Any]) -> None:
    """Keep what was measured, and the weights if they are the best; InputError without a finite
    loss."""
    plan = run.plan
    if not math.isfinite(line["loss"] + line["normalized_mse"]):
        name = plan.path.name if plan.several else ""
        raise no_finite_loss(plan.settings.values, line["epoch"], name)
    run.end_epoch(line)
    if distributed.world()[0] == 0:
        # not metrics.jsonl: until this run has ended, an earlier one's files stand together
        artifacts.write_text(
            plan.path.with_suffix(".resume.jsonl"), monitoring.lines_of(run.history)
        )


def epoch_line(run: PlannedRun, tokens: Tokens, n_tokens: int) -> dict[str, Any]:
    """What metrics.jsonl says of an epoch of `n_tokens`."""
    settings = run.plan.settings
    result = evaluate(
        run.result(), tokens.activations, tokens.validation, tokens.example, tokens.special
    )
    dead = run.tokens_since_fired >= settings.DEAD_AFTER_TOKENS  # (d_sae,)
    line = {
        "epoch": len(run.history) + 1,
        "loss": float(run.loss_sum) / n_tokens,
        "normalized_mse": result["normalized_mse"],
        "prefix_normalized_mse": result["prefix_normalized_mse"],
        "l0": result["l0"],
        "dead_fraction_training": float(dead.double().mean()),
    }
    if not objective.about(settings.values).picks_k:
        n_blocks = -(-len(tokens.validation) // VALIDATION_BATCH)
        blocks = (
            run.normalisation(tokens.rows(rows).to(run.loss_sum.device))
            for rows in np.array_split(tokens.validation, n_blocks)
        )
        line["validation_loss"] = validation_loss(
            run.sae, blocks, **objective.penalty(settings.values)
        )
    return line


def finish(run: PlannedRun, tokens: Tokens, about: Mapping[str, Any] | None = None) -> None:
    """Write the weights that are best on validation, their figures (of the test part) and
    curves; `about` is recorded with them."""
    seconds = run.elapsed()
    timing: dict[str, Any] = {"seconds": round(seconds, 2), "device": run.device}
    if not run.plan.several:  # else these are the seconds of the whole pass
        timing["tokens_per_second"] = round(run.trained_tokens / seconds, 1)
    if distributed.world()[0]:
        return
    plan, sae = run.plan, run.best()
    metrics = final_metrics(sae, tokens, run.history)
    # the same objects, hence bytes, whether the run was interrupted or not
    history = json.loads(json.dumps(run.history))
    save_sae(
        plan.path,
        sae,
        {
            **plan.metadata,
            "max_norm": tokens.max_norm,
            "metrics": metrics,
            "history": history,
            "validation_examples": tokens.examples_of(VALIDATION),
            "test_examples": tokens.examples_of(TEST),
            **(about or {}),
        },
    )
    artifacts.write_json(
        plan.beside("metrics.json"), {"checkpoint": plan.path.name, **metrics, **timing}
    )
    monitoring.write_beside(
        plan.path, {**plan.metadata, "metrics": metrics, "history": history}, plan.beside
    )
    print_results(metrics, timing, plan.settings)
    print(f"wrote {plan.path}")


def print_results(metrics: dict[str, Any], timing: dict[str, Any], settings: Settings) -> None:
    """The final figures, and a warning for each that a good autoencoder would not have."""
    speed = ""
    if "tokens_per_second" in timing:
        speed = f", {timing['tokens_per_second']:,.0f} tokens/s"
    print(
        f"epochs: {metrics['epochs']}, best {metrics['best_epoch']}; {timing['seconds']} s{speed} "
        f"({timing['device']})"
    )
    prefixes = ", ".join(
        f"{end} features {value:.3f}" for end, value in metrics["prefix_normalized_mse"].items()
    )
    validation = ""
    if metrics["measured_on"] == "test":
        validation = f"; validation: normalised MSE {metrics['validation']['normalized_mse']:.4f}"
    print(
        f"{metrics['measured_on']}: normalised MSE {metrics['normalized_mse']:.4f} ({prefixes}), "
        f"L0 {metrics['l0']:.2f}, dead {100 * metrics['dead_fraction']:.1f} %, "
        f"MSE {metrics['mse']:.4g}{validation}"
    )
    if metrics["normalized_mse"] >= 1:
        print(
            "warning: normalised MSE is not below 1: worse than the mean activation. "
            "train longer, or raise --k or --m."
        )
    if target_k(settings.values) and abs(metrics["l0"] - settings.K) > 0.25 * settings.K:
        print(
            f"warning: L0 {metrics['l0']:.2f} is not near K = {settings.K}. "
            "with BatchTopK or JumpReLU train longer; else lower --k."
        )
    if metrics["dead_fraction"] > DEAD_WARNING:
        print(
            "warning: over 5 % of the features are dead. "
            "lower --m, raise --aux-k, or give more data."
        )
