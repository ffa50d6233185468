"""Training on a stream: the same steps as in `training/loop.py`, from parts that come and go.

What an epoch is there is a round here (`training/stream_data.py`); after every so many tokens the
autoencoders are measured on the sample that stage 1 keeps. A part is deleted when the state of all
runs, saved, no longer needs it.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.activations.stream import MAKER, Stream
from fastsae.runtime import distributed, progress, storage
from fastsae.runtime.errors import EnvironmentFailure, InputError, Terminated
from fastsae.runtime.stops import deferred_stop, stop, stop_asked
from fastsae.settings.values import Settings
from fastsae.training import loop, objective
from fastsae.training.data import Tokens
from fastsae.training.loop import (
    INIT_SAMPLE,
    PlannedRun,
    Saver,
    epoch_line,
    finish,
    learning_rate,
    note_line,
    open_log,
    start_run,
)
from fastsae.training.plans import Plan
from fastsae.training.resampling import resample
from fastsae.training.stream_data import StreamRows, Use, chain, n_steps, periods

MEASURE_TOKENS = 1_000_000  # of the stream's, between two measurements on validation
ABSENT = 15.0  # seconds without stage 1 and without the next part after which it will not come
LOOK = 2.0  # seconds between looks whether stage 1 is there
ROOM_SHARE = 0.1  # of the time at most goes into saves that make room for stage 1


def train_on_stream(
    plans: list[Plan], tokens: Tokens, stream: Stream, settings: Settings, device: str
) -> dict[Path, str]:
    """Train all `plans` on one pass over the parts of `stream`; they are written at its end.

    tokens: the sample, whose TRAIN part only decides where weights start. Returns {path: what to
    say} of those whose loss came to no number; the others go on without them.
    """
    order = np.random.default_rng(settings.SEED).permutation(tokens.train)
    sample = tokens.rows(np.sort(order[:INIT_SAMPLE]))  # (n, d_in)
    runs = [start_run(plan, tokens, sample, device) for plan in plans]
    for run in runs:
        open_log(run)
    distributed.wait_for_all()  # until all have read the states that rank 0 may soon remove
    saver = StreamSaver(loop.SAVE_EVERY, stream)
    use = Use(settings.USE_TOKENS, settings.EXCLUDE_SHARED_PREFIX, tokens.max_norm)
    counts = stream.about["n_tokens"]  # of each part
    with progress.bar(sum(counts), "training", "token", unit_scale=True) as bar:
        shown = Shown(stream, counts, bar)
        waiting = Waiting(stream, saver, settings.activations_path, shown)
        data = StreamRows(
            stream,
            use,
            batch_size=settings.BATCH_SIZE,
            seed=settings.SEED,
            waiting=lambda number: waiting.for_part(number, runs),
            digests=max((run.of_stream.get("digests", []) for run in runs), key=len),
            device=device,
        )
        saver.data = data
        saver.begin(runs)
        bar.already(sum(counts[: min(run.epoch for run in runs) - 1]))
        failed = _rounds(runs, data, tokens, saver, shown, settings)
    for run in runs:
        tokens.n_trained = run.trained_tokens
        about = {"stream": {"n_parts": stream.n_parts, "chain": chain(data.digests)}}
        finish(run, tokens, about)
    if distributed.world()[0] == 0:
        stream.release(len(data.digests), dict(enumerate(data.digests, 1)))
    return failed


def _rounds(runs, data, tokens, saver, shown, settings):
    """All rounds that are left, for all runs; those that fail leave the list."""
    failed = {}
    measured = set(periods(shown.counts, MEASURE_TOKENS))
    steps = n_steps(shown.counts, settings.BATCH_SIZE)
    with deferred_stop():
        try:
            while runs and (number := min(run.epoch for run in runs)) <= data.n_rounds:
                train_round(runs, data, number, saver, steps, shown)
                for run in [run for run in runs if run.epoch == number]:
                    try:
                        if line := end_round(run, tokens, number in measured):
                            run.log(line)
                    except InputError as error:  # the others go on
                        runs.remove(run)
                        failed[run.plan.path] = str(error)
                if runs:
                    saver.between_rounds(runs)
        except (KeyboardInterrupt, Terminated):
            # between steps, or while waiting or measuring, which changes nothing of the runs
            if saver.stopping or stop_asked():
                saver.keep(runs)
            raise
        finally:
            data.close()
    return failed


def train_round(
    runs: list[PlannedRun],
    data: StreamRows,
    number: int,
    saver: Saver,
    n_steps: int,
    shown: "Shown",
) -> None:
    """Train on the rest of round `number`; runs that are further on join where they stand."""
    first = min(run.batch for run in runs if run.epoch == number)
    for batch, x in enumerate(data.batches(number, first), first):  # (batch, d_in)
        for run in runs:
            if (run.epoch, run.batch) == (number, batch):
                one_step(run, x, n_steps)
        shown.batch(number, (batch + 1) / data.n_batches, runs[0])
        saver.between_steps(runs)


def one_step(run: PlannedRun, x: Any, n_steps: int) -> None:
    """One step of `run` on the batch x (batch, d_in); the whole stream has about `n_steps`."""
    settings, n_done = run.plan.settings, run.of_stream.get("steps", 0)
    run.step(
        objective.step_function(settings.values, n_done, run.device),
        x,
        learning_rate=learning_rate(settings, min(n_done, n_steps), n_steps),
        dead_after=settings.DEAD_AFTER_TOKENS,
        clip_grad=objective.CLIP_GRAD,
    )
    run.of_stream["steps"] = n_done + 1
    if settings.RESAMPLE_EVERY and (n_done + 1) % settings.RESAMPLE_EVERY == 0:
        resample(run, x, dead_after=settings.DEAD_AFTER_TOKENS, seed=settings.SEED + n_done)


def end_round(run: PlannedRun, tokens: Tokens, is_measured: bool) -> dict[str, Any] | None:
    """Go on to the next round; measure on validation first if it is time, and return the line."""
    since = run.trained_tokens - run.of_stream.get("measured_at", 0)
    if not (is_measured and since):
        run.end_epoch(None)
        return None
    line = distributed.from_rank_0(lambda: epoch_line(run, tokens, since))
    line = {**line, "n_tokens": run.trained_tokens}
    run.of_stream["measured_at"] = run.trained_tokens
    note_line(run, line)
    return line


class Shown:
    """The bar of a stream: tokens trained on, the error, bytes on the disk, and who waits for whom.

    counts: tokens of each part; round r brings those of part r.
    """

    def __init__(self, stream: Stream, counts: list[int], bar: progress.Task) -> None:
        self.stream, self.counts, self.bar = stream, counts, bar
        self.place = (0, 0)  # (round, its tokens that are shown)

    def waiting(self) -> None:
        """Say that the next part is not there."""
        self.bar.set_postfix_str(f"waiting for {MAKER}, {self.stream.fullness()}")
        self.place = (0, 0)

    def batch(self, number: int, fraction: float, run: PlannedRun) -> None:
        """So much of round `number` is done."""
        round_shown, n_shown = self.place
        if round_shown != number:
            self.bar.set_postfix_str(self._figures(run))
            n_shown = 0
        tokens = self.counts[number - 1] if number <= len(self.counts) else 0
        self.place = (number, int(tokens * fraction))
        self.bar.update(self.place[1] - n_shown)

    def _figures(self, run):
        parts = [self.stream.fullness()]
        if run.history:
            parts.insert(0, f"normalized_mse {run.history[-1]['normalized_mse']:.4g}")
        if self.stream.is_full():
            parts.append(f"{MAKER} waits")
        return ", ".join(parts)


class StreamSaver(Saver):
    """Saves the runs, and then lets stage 1 have the room of the parts that none of them needs."""

    def __init__(self, seconds: float | None, stream: Stream):
        super().__init__(seconds)
        self.stream = stream
        self.data: StreamRows | None = None
        self.saved_at: tuple[int, int] | None = None  # (round, batch)

    def begin(self, runs: Iterable[PlannedRun]) -> None:
        """Bring the folder to where the runs stand: what they need again is made again."""
        needed = min(run.epoch for run in runs) - 1
        if distributed.world()[0] == 0:
            self.stream.forget_after(max(0, needed - 1))
            self.stream.release(max(0, needed - 1), {})

    def keep(self, runs: Iterable[PlannedRun]) -> None:
        """Save all runs, then delete the parts that they are done with."""
        runs = list(runs)
        if not runs:
            return
        assert self.data is not None
        began = time.monotonic()
        digests = self.data.digests
        for run in runs:
            run.of_stream["digests"] = list(digests)
        super().keep(runs)
        self.saved_at = position(runs)
        if distributed.world()[0] == 0:
            self.stream.release(self.saved_at[0] - 2, dict(enumerate(digests, 1)))
        self.last = time.monotonic()
        self.cost = self.last - began

    def between_rounds(self, runs: list[PlannedRun]) -> None:
        """Save if stage 1 waits for room, and saving takes little of the time."""
        seldom = time.monotonic() - self.last >= self.cost / ROOM_SHARE
        if seldom and self.stream.is_full():
            self.keep(runs)

    def while_waiting(self, runs: list[PlannedRun]) -> None:
        """Save once, now that there is nothing else to do; stop here if asked to."""
        self.stopping = stop_asked()
        if self.stopping:
            stop()
        if runs and self.saved_at != position(runs):
            self.keep(runs)


def position(runs: Iterable[PlannedRun]) -> tuple[int, int]:
    """(round, batch) of the run that is furthest behind."""
    return min((run.epoch, run.batch) for run in runs)


class Waiting:
    """Waits for stage 1: says so behind the bar, saves meanwhile, and gives up when it is gone."""

    def __init__(
        self, stream: Stream, saver: StreamSaver, activations_path: Path, shown: Shown
    ) -> None:
        self.stream, self.saver, self.shown = stream, saver, shown
        self.activations_path = activations_path
        self.part, self.since, self.looked = 0, 0.0, 0.0

    def for_part(self, number: int, runs: list[PlannedRun]) -> None:
        """To be called again and again while part `number` is not there. EnvironmentFailure when
        nobody makes it."""
        now = time.monotonic()
        if self.part != number:
            self.part, self.since, self.looked = number, now, now
            self.shown.waiting()
        self.saver.while_waiting(runs)
        if now - self.looked < LOOK:
            return
        self.looked = now
        if storage.is_claimed(self.activations_path):
            self.since = now
        elif now - self.since > ABSENT:
            raise EnvironmentFailure(
                f"{self.stream.folder}: part {number} of {self.stream.n_parts} is missing, and no "
                f"{MAKER} runs that makes it. run it beside this command with the same settings; "
                "what was trained is saved, and the same command goes on."
            )
