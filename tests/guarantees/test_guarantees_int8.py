"""Activations in 8 bits through the stages: packed float16 rows, the same bytes whatever the
processes, kills and budget, and read by stages 2 and 3 as any others."""

import shutil

import numpy as np
import pytest
from sampling import points
from tiny_world import contents

from fastsae.activations import compression
from fastsae.activations.files import find_shards, open_activations, rows_of
from fastsae.runtime import artifacts

MAKE, TRAIN, SHOW = "extract_activations", "train_sae", "interpret_sae"
PACKED = ["--storage-dtype", "int8"]
FILE = "activations/activations_layer1.npz"
TIMING = "activations/activations_layer{}.json"  # which says how many processes there were
STREAM = ["--sample-fraction", 0.3, "--layer-idx", 1]
UNLIMITED = 10**8


def begin(worker):
    shutil.rmtree(worker.out, ignore_errors=True)


def make(world, worker, *more, **how):
    return world.run(worker, MAKE, *PACKED, *more, **how)


@pytest.fixture(scope="module")
def made(world):
    """What stage 1 makes in 8 bits: `contents`, {name: sha256}, and its `operations`."""
    worker = world.idle.get()
    begin(worker)
    done = make(world, worker)
    assert done["code"] == 0, done
    found = contents(worker.out)
    world.idle.put(worker)
    return found, done["operations"]


def test_a_file_holds_the_packed_rows_of_float16s(world, worker, made):
    """The first chunk, of about 180 tokens, decides how all are packed."""
    begin(worker)
    assert world.run(worker, MAKE)["code"] == 0
    plain = open_activations(worker.out / FILE)
    rows, lengths = np.asarray(plain["activations"]), plain["seq_lengths"]
    assert make(world, worker)["code"] == 0
    data = open_activations(worker.out / FILE)
    n_first = int(np.cumsum(lengths)[np.searchsorted(np.cumsum(lengths), 180)])
    assert n_first < len(rows)
    calibration = compression.calibrate(rows[:n_first], plain["token_kind"][:n_first])
    packed = data["activations"]
    assert np.array_equal(packed.centre, calibration.centre)
    assert np.array_equal(packed.spread, calibration.spread)
    # in chunks, of which each has its share of rows that are kept
    found = compression.pack(rows, calibration)
    same = packed.exact_rows.tolist() == found.exact_rows.tolist()
    assert np.array_equal(packed.codes, found.codes) is same
    off = np.abs(packed[:].astype(np.float32) - rows) / calibration.spread
    assert off.max() <= compression.FARTHEST / 254 + 0.01
    assert (worker.out / FILE).stat().st_size < len(rows) * (8 * 2 + 14) + 4000


def test_several_processes_and_shards_pack_as_one_process_does(world, worker, made):
    begin(worker)
    done = world.run(worker, MAKE, *PACKED, processes=2)
    assert done["code"] == 0, done
    other = [TIMING.format(layer) for layer in (1, 2)]
    expected, found = dict(made[0]), contents(worker.out)
    for name in other:
        assert found.pop(name) != expected.pop(name)
    assert found == expected
    whole = open_activations(worker.out / FILE)
    begin(worker)
    shards = "fastsae.activations.extraction.SHARD_BYTES=1000"
    assert make(world, worker, shards)["code"] == 0
    assert len(find_shards(worker.out / FILE)) > 1
    data = open_activations(worker.out / FILE)
    assert np.array_equal(data["activations"][:], whole["activations"][:])


@pytest.mark.sampled
def test_stage_1_killed_at_every_operation(world, worker, made, tally):
    expected, operations = made
    chosen = points(range(1, len(operations) + 1), 3, thinned=4)
    for k in chosen:
        begin(worker)
        assert make(world, worker, kill_at=k)["code"] == -9
        done = make(world, worker)
        assert done["code"] == 0, (k, done["err"])
        assert contents(worker.out) == expected, k
    tally("kill points survived", len(chosen), len(operations))


def test_stages_2_and_3_read_it(world, worker, made):
    begin(worker)
    assert make(world, worker)["code"] == 0
    for script in (TRAIN, SHOW):
        done = world.run(worker, script)
        assert done["code"] == 0, done
    assert (worker.out / "interpretations.html").exists()
    # in a buffer smaller than the file too
    assert world.run(worker, TRAIN, "--buffer-tokens", 90, "--run-name", "s")["code"] == 0


def stream_flags(world, script, budget=UNLIMITED):
    own = [*STREAM, *PACKED] if script == MAKE else []
    return [*world.flags[script], *own, "--stream-bytes", budget, "--buffer-tokens", 270]


def stage_of_stream(world, worker, script, **how):
    return worker.stages.run(script, *stream_flags(world, script), output=worker.out, **how)


@pytest.fixture(scope="module")
def streamed(world):
    """{name: sha256} of what stage 1 makes as a stream in 8 bits, its operations, and the smallest
    budget; {name: sha256} of the checkpoint."""
    worker = world.idle.get()
    begin(worker)
    done = stage_of_stream(world, worker, MAKE)
    assert done["code"] == 0, done
    parts = contents(worker.out)
    sizes = artifacts.from_json((worker.out / "activations/stream_layer1/stream.json").read_bytes())
    sizes = sizes["sizes"]
    assert stage_of_stream(world, worker, TRAIN)["code"] == 0
    trained = {n: each for n, each in contents(worker.out).items() if n.endswith(".pt")}
    world.idle.put(worker)
    budget = max(sum(sizes[i : i + 4]) for i in range(len(sizes)))
    return parts, done["operations"], budget, trained


def test_parts_are_packed_by_the_sample_which_is_not(world, worker, streamed):
    begin(worker)
    assert stage_of_stream(world, worker, MAKE)["code"] == 0
    sample = open_activations(worker.out / FILE)
    assert sample["activations"].dtype == np.float16
    assert isinstance(sample["activations"], np.memmap)
    expected = compression.calibrate(np.asarray(sample["activations"]), sample["token_kind"])
    for path in sorted((worker.out / "activations/stream_layer1").glob("part-*.npz")):
        found = artifacts.read_npz(path, made_by="the test")
        assert found["activations"].dtype == np.int8
        assert np.array_equal(found["centre"], expected.centre)
        assert np.array_equal(found["spread"], expected.spread)
        assert rows_of(path, found).shape == found["activations"].shape
    begin(worker)
    done = stage_of_stream(world, worker, MAKE, processes=2)
    assert done["code"] == 0, done
    found, whole = contents(worker.out), dict(streamed[0])
    assert found.pop(TIMING.format(1)) != whole.pop(TIMING.format(1))
    assert found == whole


def test_the_budget_decides_nothing(world, worker, streamed):
    _, _, budget, trained = streamed
    begin(worker)
    sides = [(script, stream_flags(world, script, budget), {}) for script in (MAKE, TRAIN)]
    done = [{"code": 2, "err": "not found"}] * 2
    # stage 2 may have looked before stage 1 claimed the folder
    while done[1]["code"] == 2 and "not found" in done[1]["err"]:
        done = worker.stages.at_once(*sides, output=worker.out)
    assert [each["code"] for each in done] == [0, 0], done
    assert {n: each for n, each in contents(worker.out).items() if n.endswith(".pt")} == trained


@pytest.mark.sampled
def test_stage_1_of_a_stream_killed_at_every_operation(world, worker, streamed, tally):
    expected, operations = streamed[:2]
    chosen = points(range(1, len(operations) + 1), 3, thinned=4)
    for k in chosen:
        begin(worker)
        assert stage_of_stream(world, worker, MAKE, kill_at=k)["code"] == -9
        done = stage_of_stream(world, worker, MAKE)
        assert done["code"] == 0, (k, done["err"])
        assert contents(worker.out) == expected, k
    tally("kill points survived", len(chosen), len(operations))
