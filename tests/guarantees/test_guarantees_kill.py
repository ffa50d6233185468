"""Killed, starved of disk space, stopped or started twice at every operation: the same command ends
in the same bytes."""

import functools
import random
import re

import pytest
from sampling import points
from tiny_world import STAGES, contents, in_parallel, replay

from fastsae.runtime import artifacts


def assert_whole(world, worker, script):
    """Under every final name there is the older file or the new one; none that another stage reads
    is neither."""
    new, before = world.expected[worker.number, script], contents(worker.before[script])
    for name, digest in contents(worker.out).items():
        if name.endswith(".resume.pt"):
            artifacts.read_checkpoint(worker.out / name)  # raises if it is not whole
            continue
        growing = name.endswith((".resume.jsonl", "llm_replies.jsonl"))  # these grow line by line
        assert growing or digest in (new.get(name), before.get(name)), (script, name)


def assert_outcome(world, worker, script):
    assert contents(worker.out) == world.expected[worker.number, script]
    kept = set(contents(worker.out, old=True).values())
    # what was there before is still there
    assert set(world.old[worker.number, script].values()) <= kept
    assert not [
        path
        for path in worker.out.rglob(".*")
        if path.name.endswith((".tmp", ".lock")) or path.name.startswith(".parts")
    ]


def test_nothing_happens_twice(world, worker):
    """The second run of each stage says so and changes nothing; the first wrote through
    fastsae.runtime.storage only."""
    for script in STAGES:
        replay(world, worker, script)
        before = {path: path.stat().st_mtime_ns for path in worker.out.rglob("*") if path.is_file()}
        again = world.run(worker, script)
        assert again["code"] == 0 and "up to date" in again["out"]
        assert {
            path: path.stat().st_mtime_ns for path in worker.out.rglob("*") if path.is_file()
        } == before


@pytest.mark.sampled
@pytest.mark.parametrize("script", STAGES)
def test_killed_at_every_operation(world, script, tally):
    def kill(worker, k):
        asked = len(worker.server.requests)
        assert replay(world, worker, script, kill_at=k)["code"] == -9
        assert_whole(world, worker, script)
        done = world.run(worker, script)
        assert done["code"] == 0, (k, done["err"])
        assert_outcome(world, worker, script)
        prompts = worker.server.prompts()[asked:]
        # the one in flight, whose reply had not reached the disk
        assert len(prompts) - len(set(prompts)) <= 1, k

    operations = world.operations[script]
    chosen = points(range(1, len(operations) + 1), kinds=operations)
    in_parallel(world, kill, chosen)
    tally("kill points survived", len(chosen), len(operations))


def test_there_are_enough_operations(world):
    n = {script: len(operations) for script, operations in world.operations.items()}
    assert sum(n.values()) >= 300, n


@pytest.mark.sampled
@pytest.mark.parametrize("script", STAGES)
def test_a_disk_that_is_full_from_any_operation_on(world, script, tally):
    def starve(worker, k, then_space):
        done = replay(world, worker, script, full_from=k)
        assert done["code"] == 3 and re.fullmatch(
            r"error: .*: No space left on device\. free some space, .*\n", done["err"]
        ), (k, done)
        assert_whole(world, worker, script)
        assert not list(worker.out.rglob("*.tmp")), k
        if then_space:
            assert world.run(worker, script)["code"] == 0
            assert_outcome(world, worker, script)

    needing = [
        (k, operation)
        for k, operation in enumerate(world.operations[script], 1)
        if operation not in ("unlink", "rmtree")
    ]
    chosen = points([k for k, _ in needing], kinds=[operation for _, operation in needing])
    with_space = {k for i, k in enumerate(chosen) if i % 5 == 0}
    in_parallel(world, lambda worker, k: starve(worker, k, k in with_space), chosen)
    tally("full-disk points", len(chosen), len(needing))


@pytest.mark.sampled
@pytest.mark.parametrize("script", STAGES)
def test_sigterm_at_any_operation(world, script, tally):
    def stop(worker, k):
        done = replay(world, worker, script, stop_at=k)
        assert done["code"] in (0, 143) and (
            done["code"] or contents(worker.out) == world.expected[worker.number, script]
        ), (k, done)
        assert done["code"] == 0 or done["err"].endswith(
            "stopped: what was finished is kept; the same command continues.\n"
        )
        # those a thread left go with their folder
        assert not [p for p in worker.out.rglob("*.tmp") if ".parts-" not in str(p)], k
        assert world.run(worker, script)["code"] == 0
        assert_outcome(world, worker, script)

    every = range(1, len(world.operations[script]) + 1, 8)
    chosen = points(every, 4)
    in_parallel(world, stop, chosen)
    tally("SIGTERM points", len(chosen), len(every))


@pytest.mark.sampled
def test_runs_killed_three_times_at_random(world, tally):
    seconds = dict(
        in_parallel(
            world, lambda worker, script: (script, replay(world, worker, script)["seconds"]), STAGES
        )
    )

    def torment(worker, number):
        chance, script, n_killed = random.Random(number), STAGES[number % 3], 0
        # one that was done before its third kill is tried from its beginning again
        while n_killed < 3:
            run = world.run if n_killed else functools.partial(replay, world)
            n_killed = (
                n_killed + 1
                if run(worker, script, kill_after=chance.uniform(0.1, 0.9) * seconds[script])[
                    "code"
                ]
                == -9
                else 0
            )
        assert world.run(worker, script)["code"] == 0
        assert_outcome(world, worker, script)

    chosen = points(range(100), kinds=[number % 3 for number in range(100)])
    in_parallel(world, torment, chosen)
    tally("runs killed three times at random", len(chosen), 100)


@pytest.mark.parametrize("script", STAGES)
def test_of_twenty_that_start_at_once_one_writes(world, worker, script, tally):
    done = replay(world, worker, script, racers=20)
    codes = sorted(racer["code"] for racer in done["racers"])
    assert done["n_waiting"] == 1 and codes == [0] + 19 * [3], codes
    for racer in done["racers"]:
        line = (
            r"error: .*: (process \d+ on \S+, since [^,]+|another run), is writing here\. "
            r"wait until it has ended, or give another --[\w-]+\.\n"
        )
        assert racer["code"] == 0 or re.fullmatch(line, racer["err"]), racer
    assert_outcome(world, worker, script)
    tally("racing starts with one winner", 20)


def test_dead_features_were_there(world, worker):
    replay(world, worker, "train_sae")
    path = next((worker.out / "checkpoints" / "r").glob("SAE_*24*.pt"))
    assert artifacts.read_checkpoint_metadata(path)["metrics"]["dead_fraction_training"] > 0
