"""Lines off a terminal: what, how far, how fast and how long still; none where nobody wants
them."""

import io
import os
import re
import sys
import time

import pytest

from fastsae.runtime import progress
from fastsae.runtime.progress import Task, duration
from fastsae.runtime.stage import run_stage


def after(seconds, task):
    return task.line(task.began + seconds)


def test_what_a_line_says():
    """60 s for 3,000 of 12,000 tokens are 50 a second, and 180 s for the other 9,000."""
    task = Task("extracting", 12_000, "token")
    task.update(3000)
    assert (
        after(60, task)
        == "progress: extracting: 3,000 of 12,000 tokens (25 %), 50 tokens/s, 3 min left"
    )
    assert after(60, Task("loading the model", None, "")) == "progress: loading the model, for 60 s"
    assert after(60, Task("labels", 20, "call")) == "progress: labels: 0 of 20 calls (0 %)"
    reading = Task("tokenising", None, "example")
    reading.update(90)
    assert after(30, reading) == "progress: tokenising: 90 examples, 3.0 examples/s"


def test_what_an_earlier_run_did_is_far_but_not_fast():
    """Half was there; a quarter took 10 s, so the last quarter takes 10 s."""
    task = Task("extracting", 400, "token")
    task.already(200)
    task.update(100)
    assert (
        after(10, task) == "progress: extracting: 300 of 400 tokens (75 %), 10 tokens/s, 10 s left"
    )
    resumed = Task("training", 100, "epoch", initial=50, at_most=True)
    resumed.update()
    assert (
        after(60, resumed)
        == "progress: training: 51 of 100 epochs (51 %), 1.0 epochs/min, at most 49 min left"
    )


def test_part_of_an_epoch_counts():
    task = Task("training", 100, "epoch", at_most=True)
    task.part(0.5)
    task.set_postfix({"loss": "0.25"})
    assert (
        after(3600, task)
        == "progress: training: 0.5 of 100 epochs (0 %), 0.5 epochs/h, at most 199.0 h left, "
        "loss 0.25"
    )
    task.update()
    assert after(3600, task).startswith(
        "progress: training: 1 of 100 epochs (1 %), 1 epochs/h, at most 99.0 h"
    )


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def stage(monkeypatch, work, *, quiet=False, terminal=False, interval=0.01, **environment):
    """stderr of a stage with that body whose lines come at that interval."""

    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    err = Stream()
    with monkeypatch.context() as patch:
        patch.setattr(progress, "INTERVAL", interval)
        patch.setattr(sys, "stderr", err)
        patch.setattr(sys, "stdout", io.StringIO())
        for name, value in environment.items():
            patch.setenv(name, value)

        def main():
            progress.start(quiet=quiet)
            work(err)

        assert run_stage(main) == 0
    return err.getvalue()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def test_a_stage_off_a_terminal_says_what_it_does(monkeypatch):
    """Also while nothing is counted, and within one long unit; the innermost piece of work is
    named, and none after the end."""

    def work(err):
        def says(text):
            until(lambda: text in err.getvalue())

        says("progress: starting, for")
        progress.step("loading the model")
        says("progress: loading the model, for")
        with progress.bar(10, "extracting", "token") as bar:
            bar.update(5)
            says("progress: extracting: 5 of 10 tokens (50 %)")
            for _ in progress.counted(iter("ab"), "reading", "example"):
                says("progress: reading: 0 examples")
                break
        progress.step("writing the report")
        says("progress: writing the report")

    text = stage(monkeypatch, work)
    assert all(re.match(r"progress: \w", line) for line in text.splitlines())


def test_short_runs_terminals_quiet_ones_and_other_ranks_print_no_lines(monkeypatch):
    def work(err):
        with progress.bar(10, "extracting", "token") as bar:
            bar.update(5)
            time.sleep(0.05)

    assert progress.INTERVAL == 30
    assert stage(monkeypatch, work, interval=30) == ""
    assert stage(monkeypatch, work, quiet=True) == ""
    assert (
        "progress: " not in (text := stage(monkeypatch, work, terminal=True))
        and "extracting:  50%" in text
    )
    assert (
        stage(monkeypatch, work, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
        == ""
    )


def test_no_line_comes_after_the_stage(monkeypatch):
    seen = []
    stage(monkeypatch, lambda err: [until(lambda: "starting" in err.getvalue()), seen.append(err)])
    text = seen[0].getvalue()
    time.sleep(0.05)
    assert seen[0].getvalue() == text


def test_what_another_process_shows_is_not_shown_twice(monkeypatch):
    """Neither a bar nor lines of a task that is hidden, or in a process that is told so."""

    def work(err):
        with progress.bar(10, "hidden work", "row", hidden=True) as bar:
            assert bar.bar is None
            time.sleep(0.05)

    assert "hidden work" not in stage(monkeypatch, work)
    assert "hidden work" not in stage(monkeypatch, work, terminal=True)

    def other(err):
        with progress.bar(10, "other work", "row") as bar:
            assert bar.bar is None
            time.sleep(0.05)

    assert stage(monkeypatch, other, **{progress.HIDDEN: "1"}) == ""
    assert stage(monkeypatch, other, terminal=True, **{progress.HIDDEN: "1"}) == ""


def test_a_terminal_without_a_size_has_a_bar(monkeypatch):
    import pty

    ours, theirs = pty.openpty()
    with open(theirs, "w") as err, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", err)
        assert progress._has_no_size(err)
        with progress.bar(10, "work", "row") as bar:
            bar.set_postfix_str("waiting")
        err.flush()
        assert b"work:   0%|" in os.read(ours, 10_000)
    os.close(ours)
