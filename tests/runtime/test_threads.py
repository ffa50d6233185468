"""OpenMP's threads sleep early while the machine is busy, unless a user chose otherwise; every
stage sees to that."""

import ast
import os
import subprocess
import sys
import threading

import pytest
from conftest import PROJECT

import config
from fastsae.runtime import threads

LINUX = pytest.mark.skipif(not threads.TASKS.exists(), reason="Linux says how long threads wait")


@pytest.fixture
def started(monkeypatch):
    """The environment without a user's choice, and whether the watch was started."""
    monkeypatch.setattr(os, "environ", environ := {"OMP_NUM_THREADS": "2"})
    monkeypatch.setattr(threads, "watch", (begun := threading.Event()).set)
    monkeypatch.setattr(threads, "TASKS", PROJECT)
    return environ, begun


def test_the_machine_is_watched(started):
    threads.share_cores()
    assert started[1].wait(5)


@pytest.mark.parametrize("name", threads.DECIDE)
def test_a_users_own_choice_stays(name, started):
    started[0][name] = "its value"
    threads.share_cores()
    assert not started[1].wait(0.05)


def test_nothing_is_watched_outside_linux(started, monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "TASKS", tmp_path / "missing")
    threads.share_cores()
    assert not started[1].wait(0.05)


def test_a_process_that_may_start_no_thread_goes_on(started, monkeypatch):
    def refused(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    threads.share_cores()


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError("no thread")])
def test_what_prevents_the_watch_ends_it_silently(error, monkeypatch, capsys):
    def fails():
        raise error

    monkeypatch.setattr(threads, "seconds_waited", fails)
    threads.watch()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("after", "busy"),
    [
        ({"1": 10.0, "2": 5.0}, False),
        ({"1": 10.02, "2": 5.02}, False),  # 0.04 of half a second
        ({"1": 10.03, "2": 5.03}, True),  # 0.06: more than a tenth
        ({"1": 10.0, "3": 7.0}, False),  # one thread has ended, another one is new
    ],
)
def test_busy_is_a_tenth_of_the_time(after, busy):
    assert threads.is_busy({"1": 10.0, "2": 5.0}, after, 0.5) == busy


def test_waits_are_read_from_the_system(monkeypatch, tmp_path):
    """Of a thread that has ended meanwhile nothing is said."""
    for name, text in (("11", "5 2500000000 9\n"), ("12", None), ("13", "")):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "schedstat").write_text(text)
    monkeypatch.setattr(threads, "TASKS", tmp_path)
    assert threads.seconds_waited() == {"11": 2.5}


def test_a_crowd_comes_and_goes(monkeypatch):
    """At the first look at a busy machine, and after three in a row at one that is not."""

    class Crowd:
        def __init__(self):
            self.over = threading.Event()

    monkeypatch.setitem(sys.modules, "torch", object())
    monkeypatch.setattr(threads, "Crowd", Crowd)
    sharing, seen = threads.Sharing(), []
    for busy in [0, 1, 0, 0, 1, 0, 0, 0, 0, 1]:
        sharing.look(bool(busy))
        seen.append(sharing.crowd)
    first, last = seen[1], seen[9]
    assert seen == [None, *[first] * 6, None, None, last] and first is not last
    assert first.over.is_set() and not last.over.is_set()


def test_without_pytorch_there_is_nothing_to_share(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(threads, "Crowd", lambda: pytest.fail("would load it"))
    sharing = threads.Sharing()
    sharing.look(True)
    assert sharing.crowd is None


@LINUX
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_a_crowd_has_a_team_of_its_own():
    """In a process of its own, with two threads: OpenMP then has three, and looks a hundred times
    only. When it is over they are gone."""
    code = """
import os, time, torch
from fastsae.runtime import threads

def until(n):
    end = time.monotonic() + 20
    while len(os.listdir(threads.TASKS)) != n and time.monotonic() < end:
        time.sleep(0.01)
    return len(os.listdir(threads.TASKS))

torch.set_num_threads(2)
torch.zeros(1 << 18).add_(1)
first = len(os.listdir(threads.TASKS))
crowd = threads.Crowd()
second = until(first + 2)
crowd.over.set()
print(second - first, until(first) - first)
"""
    kept = {k: v for k, v in os.environ.items() if k not in (*threads.DECIDE, "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT, env=kept, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["2", "0"]


@pytest.mark.parametrize("script", config.STAGES)
def test_every_stage_watches(script):
    tree = ast.parse((PROJECT / script).read_text())
    first = next(node for node in tree.body if isinstance(node, ast.If))
    assert "threads.share_cores()" in [ast.unparse(each) for each in first.body]
