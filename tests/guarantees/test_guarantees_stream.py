"""A stream: stage 1 makes parts, stage 2 trains on them and deletes them. Killed at every operation
of either side, whatever the budget and whoever waits, the checkpoint has the same bytes."""

import random
import re
import shutil
from types import SimpleNamespace

import pytest
from sampling import points
from tiny_world import contents

from fastsae.activations.stream import Stream

MAKE, TRAIN = "extract_activations", "train_sae"
PARTS = ["--sample-fraction", 0.3, "--layer-idx", 1]
UNLIMITED = 10**8
FOLDER = "activations/stream_layer1"


def flags_of(world, script, *more, budget=UNLIMITED):
    own = PARTS if script == MAKE else []
    return [*world.flags[script], *own, "--stream-bytes", budget, "--buffer-tokens", 270, *more]


def run(world, worker, script, *more, budget=UNLIMITED, **how):
    """A stage in the worker's folder."""
    flags = flags_of(world, script, *more, budget=budget)
    done = worker.stages.run(script, *flags, output=worker.out, **how)
    assert not done.get("foreign"), done["foreign"]
    return done


def checkpoints(out):
    return {name: digest for name, digest in contents(out).items() if name.endswith(".pt")}


def stream_of(out):
    stream = Stream(out / FOLDER)
    assert stream.read()
    return stream


@pytest.fixture(scope="module")
def outcome(world):
    """What the stages end in: `made` and `trained`, {name: sha256}; their `operations`; the folder
    `kept` between them; the smallest `budget`."""
    worker = world.idle.get()
    shutil.rmtree(worker.out, ignore_errors=True)
    first = run(world, worker, MAKE)
    assert first["code"] == 0, first
    kept = world.folder / "stream_made"
    shutil.copytree(worker.out, kept)
    sizes = stream_of(kept).sizes
    assert len(sizes) >= 6
    second = run(world, worker, TRAIN)
    assert second["code"] == 0, second
    found = SimpleNamespace(
        made=contents(kept),
        trained=checkpoints(worker.out),
        operations={MAKE: first["operations"], TRAIN: second["operations"]},
        kept=kept,
        budget=max(sum(sizes[i : i + 4]) for i in range(len(sizes))),
    )
    assert len(found.trained) == 1 and not list((worker.out / FOLDER).glob("*.npz"))
    world.idle.put(worker)
    return found


def begin(worker, kept=None):
    shutil.rmtree(worker.out, ignore_errors=True)
    if kept:
        shutil.copytree(kept, worker.out)


@pytest.mark.sampled
def test_stage_1_killed_at_every_operation(world, worker, outcome, tally):
    chosen = points(
        range(1, len(outcome.operations[MAKE]) + 1), kinds=outcome.operations[MAKE], thinned=4
    )
    for k in chosen:
        begin(worker)
        assert run(world, worker, MAKE, kill_at=k)["code"] == -9
        done = run(world, worker, MAKE)
        assert done["code"] == 0, (k, done["err"])
        assert contents(worker.out) == outcome.made, k
    tally("kill points survived", len(chosen), len(outcome.operations[MAKE]))


@pytest.mark.sampled
def test_stage_2_killed_at_every_operation(world, worker, outcome, tally):
    """It never needs a part that it has deleted."""
    chosen = points(
        range(1, len(outcome.operations[TRAIN]) + 1), kinds=outcome.operations[TRAIN], thinned=4
    )
    for k in chosen:
        begin(worker, outcome.kept)
        assert run(world, worker, TRAIN, kill_at=k)["code"] == -9
        done = run(world, worker, TRAIN)
        assert done["code"] == 0, (k, done["err"])
        assert checkpoints(worker.out) == outcome.trained, k
        assert not list((worker.out / FOLDER).glob("*.npz")), k
    tally("kill points survived", len(chosen), len(outcome.operations[TRAIN]))


@pytest.mark.sampled
@pytest.mark.parametrize("script", [MAKE, TRAIN])
def test_a_disk_that_is_full_from_any_operation_on(world, worker, outcome, script, tally):
    operations = outcome.operations[script]
    needing = [k for k, name in enumerate(operations, 1) if name not in ("unlink", "rmtree")]
    chosen = points(needing, kinds=[operations[k - 1] for k in needing], thinned=4)
    for k in chosen:
        begin(worker, outcome.kept if script == TRAIN else None)
        done = run(world, worker, script, full_from=k)
        assert done["code"] == 3 and re.fullmatch(
            r"error: .*: No space left on device\. free some space, .*\n", done["err"]
        ), (k, done)
        assert not list(worker.out.rglob("part-*.tmp")), k
        assert run(world, worker, script)["code"] == 0
        if script == TRAIN:
            assert checkpoints(worker.out) == outcome.trained, k
        else:
            assert contents(worker.out) == outcome.made, k
    tally("full-disk points", len(chosen), len(needing))


def both(world, worker, budget, make=None, train=None):
    """Both sides at once, with what is to happen to each; their outcomes."""
    return worker.stages.at_once(
        (MAKE, flags_of(world, MAKE, budget=budget), make or {}),
        (TRAIN, flags_of(world, TRAIN, budget=budget), train or {}),
        output=worker.out,
    )


def test_the_budget_and_who_waits_decide_nothing(world, worker, outcome):
    for budget in (outcome.budget, 2 * outcome.budget):
        begin(worker)
        assert run(world, worker, MAKE, budget=UNLIMITED, kill_after=0.0)["code"] == -9
        done = both(world, worker, budget)
        # stage 2 may have looked before stage 1 claimed the folder
        while done[1]["code"] == 2 and "not found" in done[1]["err"]:
            done = both(world, worker, budget)
        assert [each["code"] for each in done] == [0, 0], done
        assert checkpoints(worker.out) == outcome.trained


@pytest.mark.sampled
def test_both_sides_killed_at_random_with_the_smallest_budget(world, worker, outcome, tally):
    def torment(number):
        chance = random.Random(number)
        begin(worker)
        for _ in range(3):
            how = [
                {"kill_after": chance.uniform(0.2, 1.2)}
                if chance.random() < 0.7
                else {"kill_after": 1.5}
                for _ in range(2)
            ]
            both(world, worker, outcome.budget, *how)
        while True:
            done = both(world, worker, outcome.budget)
            codes = [each["code"] for each in done]
            if codes == [0, 0]:
                break
            assert codes[0] in (0, -9) and "not found" in done[1]["err"], (number, done)
        assert checkpoints(worker.out) == outcome.trained, number
        assert not list((worker.out / FOLDER).glob("*.npz"))

    chosen = points(range(30), 2, thinned=4)
    for number in chosen:
        torment(number)
    tally("streams of which both sides were killed at random", len(chosen), 30)


def test_what_was_trained_is_named_by_its_parts(world, worker, outcome):
    import hashlib

    from fastsae.runtime import artifacts
    from fastsae.training.stream_data import chain

    begin(worker, outcome.kept)
    parts = sorted((worker.out / FOLDER).glob("part-*.npz"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in parts]
    assert run(world, worker, TRAIN)["code"] == 0
    (name,) = checkpoints(worker.out)
    meta = artifacts.read_checkpoint_metadata(worker.out / name)
    assert meta["stream"] == {"n_parts": len(parts), "chain": chain(digests)}


def test_a_lost_or_damaged_state_begins_again(world, worker, outcome):
    """The parts that were deleted are made once more, and the end is the same."""
    begin(worker, outcome.kept)
    operations = outcome.operations[TRAIN]
    k = max(i for i, name in enumerate(operations, 1) if name == "unlink") - 6
    assert run(world, worker, TRAIN, kill_at=k)["code"] == -9
    assert stream_of(worker.out).released() > 1
    (state,) = worker.out.rglob("*.resume.pt")
    state.write_bytes(state.read_bytes()[:-9])
    done = both(world, worker, outcome.budget)
    if done[1]["code"] == 3:  # stage 1 was up to date before stage 2 asked for the parts
        done = both(world, worker, outcome.budget)
    assert done[1]["code"] == 0, done
    assert checkpoints(worker.out) == outcome.trained


def test_one_line_each(world, worker, outcome):
    """A damaged part, another training, stage 1 gone, a second stage 1, parts of another run, too
    small a budget."""

    def line(done, code):
        assert done["code"] == code and done["err"].count("\n") == 1, done
        return done["err"]

    begin(worker, outcome.kept)
    stream = stream_of(worker.out)
    part = stream.part_path(2)
    whole = part.read_bytes()
    part.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    assert f"{part}: damaged" in line(run(world, worker, TRAIN), 3)
    part.unlink()
    assert run(world, worker, MAKE)["code"] == 0 and part.read_bytes() == whole
    assert run(world, worker, TRAIN, kill_at=60)["code"] == -9
    assert stream_of(worker.out).released()
    said = line(run(world, worker, TRAIN, "--k", 3), 2)
    assert "is being trained on with other settings" in said
    said = line(run(world, worker, MAKE, "--max-length", 30), 2)
    assert "is of another run" in said
    assert run(world, worker, TRAIN)["code"] == 0
    said = line(run(world, worker, MAKE, "--seed", 9, budget=outcome.budget // 2), 2)
    assert said.startswith("error: STREAM_BYTES: ")
    said = line(run(world, worker, TRAIN, "--layer-idx", 2), 2)
    assert "not found" in said


def test_several_processes_make_the_parts_that_one_makes(world, worker, outcome):
    """As torchrun starts them: part i is that of rank i % size, the sample that of rank 0."""
    begin(worker)
    done = run(world, worker, MAKE, processes=2)
    assert done["code"] == 0, done
    found = contents(worker.out)
    timing = "activations/activations_layer1.json"  # which says how many there were
    assert found.pop(timing) != outcome.made[timing]
    assert found == {name: each for name, each in outcome.made.items() if name != timing}


def test_several_autoencoders_train_in_one_pass(world, worker, outcome):
    """The first of them is the one that trains alone."""
    begin(worker, outcome.kept)
    assert run(world, worker, TRAIN, "--k", "2,3")["code"] == 0
    found = checkpoints(worker.out)
    assert len(found) == 2 and set(outcome.trained.items()) <= set(found.items())
    assert not list((worker.out / FOLDER).glob("*.npz"))
