"""How often an unfinished training is saved, and what that takes."""

import errno
import hashlib
import io
import struct

import pytest
import torch

from fastsae.runtime import artifacts
from fastsae.training import loop


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def monotonic(self):
        return self.now


class SlowRun:
    """A run whose state takes `seconds` to write."""

    state_path = fingerprint = ""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.saves = clock, seconds, []

    def save(self, *_):
        self.clock.now += self.seconds
        self.saves.append(self.clock.now)


def trained(monkeypatch, seconds, n_steps, given=None):
    """(the run, share of the time from the first save to the last that went into saves) after steps
    of one second each."""
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    run, saver = SlowRun(clock, seconds), loop.Saver(given)
    for _ in range(n_steps):
        clock.now += 1
        saver.between_steps([run])
    passed = run.saves[-1] - run.saves[0]
    return run, (len(run.saves) - 1) * seconds / passed


def test_saves_that_cost_little_come_every_minute(monkeypatch):
    run, share = trained(monkeypatch, seconds=0.5, n_steps=1000)
    assert len(run.saves) == 1000 // 61 and share < 0.03
    assert [b - a for a, b in zip(run.saves, run.saves[1:])] == [61.5] * 15


@pytest.mark.parametrize("seconds", [3, 17, 200])
def test_saves_take_three_percent_of_the_time_at_most(monkeypatch, seconds):
    """By hand: after a save of s seconds, s x 97 / 3 seconds of training."""
    run, share = trained(monkeypatch, seconds, n_steps=40_000)
    assert share <= 0.03 and len(run.saves) >= 6
    pauses = {b - a for a, b in zip(run.saves, run.saves[1:])}
    assert all(0 <= pause - seconds - seconds * 97 / 3 <= 1 for pause in pauses)


def test_an_interval_that_is_given_is_kept_whatever_saves_cost(monkeypatch):
    run, _ = trained(monkeypatch, seconds=50, n_steps=100, given=9.5)
    assert len(run.saves) == 10


CHECKPOINTS = [
    {"a": torch.arange(70_000.0).reshape(700, 100), "b": torch.zeros(0), "plain": [1, None, "x"]},
    {},
    {"a": torch.arange(7)[::2], "n": {"deep": torch.ones(1, dtype=torch.bool)}},
]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_checkpoint_is_what_torch_saves_and_its_seal(tmp_path, checkpoint):
    """The slow twin: all of it in memory, and then its sha256."""
    whole = io.BytesIO()
    torch.save(checkpoint, whole)
    content = whole.getvalue()[:-2]
    seal = struct.pack("<H", 64) + hashlib.sha256(content).hexdigest().encode()
    artifacts.write_checkpoint(tmp_path / "a.pt", checkpoint)
    assert (tmp_path / "a.pt").read_bytes() == content + seal
    artifacts.read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("sizes", [[1] * 9, [9], [2, 1, 1, 5], [0, 3, 6], [8, 1]])
def test_the_seal_is_of_all_but_the_last_two_bytes(sizes):
    content, file = bytes(range(9)), io.BytesIO()
    sealed, at = artifacts._Sealed(file), 0
    for size in sizes:
        assert sealed.write(content[at : at + size]) == size
        at += size
    sealed.end()
    expected = struct.pack("<H", 64) + hashlib.sha256(content[:7]).hexdigest().encode()
    assert file.getvalue() == content[:7] + expected


def test_a_disk_that_fills_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """PyTorch's own error would speak of positions in a file."""

    def refuse(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts._Sealed, "_written", refuse)
    with pytest.raises(OSError, match="No space left on device") as caught:
        artifacts.write_checkpoint(tmp_path / "a.pt", CHECKPOINTS[0])
    assert caught.value.filename == str(tmp_path / "a.pt") and not list(tmp_path.iterdir())
