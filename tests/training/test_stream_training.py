"""Where the tokens of a stream come from and who trains on them: data without end, several
autoencoders, several processes; and what either side holds."""

import itertools
import json
import shutil
import sys
import threading
import time
import tracemalloc
import types

import numpy as np
import pytest
import torch
from conftest import put_part
from tiny_world import contents, torchrun

from fastsae.activations import producer
from fastsae.activations.extraction import World
from fastsae.activations.files import open_activations
from fastsae.activations.stream import PARTS_NEEDED, Stream
from fastsae.formats.load import load_sae
from fastsae.runtime import artifacts
from fastsae.training.stream_data import StreamRows, Use

MAKE, TRAIN = "extract_activations", "train_sae"
UNLIMITED = 10**8
STREAM = ["--buffer-tokens", 270, "--stream-bytes", UNLIMITED]


@pytest.fixture
def endless(monkeypatch):
    """A dataset of the hub without end; returns how many of its rows were taken."""
    import huggingface_hub

    taken = []

    def rows():
        for number in itertools.count():
            taken.append(number)
            yield {"text": f"the road number {number} home", "topic": "t"}

    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, **options: rows()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = types.SimpleNamespace(sha="abc123")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **options: found)
    return taken


def test_data_without_end_stop_where_enough_tokens_train(tmp_path, run_main, tiny_llama, endless):
    """1,200 tokens train, and a sample of three tenths of all lies beside them."""
    shared = [
        "--dataset-path", "hf:owner/name", "--output-dir", tmp_path, "--device", "cpu",
        "--layer-idx", 1, "--max-train-tokens", 1200, *STREAM, "--label-field", "topic",
    ]  # fmt: skip
    assert run_main(MAKE, *shared, "--model-name", tiny_llama, "--sample-fraction", 0.3) == 0
    sample = open_activations(tmp_path / "activations/activations_layer1.npz")
    stream = Stream(tmp_path / "activations/stream_layer1")
    assert stream.read()
    n_streamed = sum(stream.about["n_tokens"])
    n_sample = len(sample["activations"])
    assert abs(n_streamed + n_sample - 1200 / 0.7) < 60 and abs(n_streamed - 1200) < 400
    # a batch of rows is read ahead of the last one that is needed
    assert len(endless) < 2000
    lines = [sample["example_ids"]]
    for number in range(1, stream.n_parts + 1):
        path = stream.part_path(number)
        lines.append(artifacts.read_npz(path, ["example_ids"], made_by="x")["example_ids"])
    every = np.sort(np.concatenate(lines))
    assert every.tolist() == list(range(1, len(every) + 1))
    small = ["--m", 16, "--k", 2, "--max-norm-ratio", "none", "--batch-size", 64]
    assert run_main(TRAIN, *shared, *small, "--run-name", "r") == 0
    (path,) = (tmp_path / "checkpoints/r").glob("SAE_*.pt")
    meta = load_sae(path)[1]
    assert meta["stream"]["n_parts"] == stream.n_parts
    n_prefix = int(sample["seq_lengths"].min())  # at most so many tokens of each are left out
    assert 0 < meta["metrics"]["n_train_tokens"] <= n_streamed - (n_prefix > 0)


@pytest.fixture(scope="module")
def made(world):
    """A folder with a stream of which all parts are there, and the flags of its stage 2."""
    worker = world.idle.get()
    shutil.rmtree(worker.out, ignore_errors=True)
    flags = [*world.flags[MAKE], "--sample-fraction", 0.3, "--layer-idx", 1, *STREAM]
    assert worker.stages.run(MAKE, *flags, output=worker.out)["code"] == 0
    kept = world.folder / "stream_of_sources"
    shutil.copytree(worker.out, kept)
    world.idle.put(worker)
    return kept, [*world.flags[TRAIN], *STREAM]


def test_seeds_and_lists_train_in_one_pass_what_each_trains_alone(worker, made):
    kept, flags = made
    expected = {}
    for k in (2, 3):  # of seed 0, whose order of the data all have
        shutil.rmtree(worker.out, ignore_errors=True)
        shutil.copytree(kept, worker.out)
        assert worker.stages.run(TRAIN, *flags, "--k", k, output=worker.out)["code"] == 0
        expected |= {n: each for n, each in contents(worker.out).items() if n.endswith(".pt")}
    shutil.rmtree(worker.out)
    shutil.copytree(kept, worker.out)
    done = worker.stages.run(TRAIN, *flags, "--seed", "0,1", "--k", "2,3", output=worker.out)
    assert done["code"] == 0, done
    found = {n: each for n, each in contents(worker.out).items() if n.endswith(".pt")}
    assert len(found) == 4 and len(expected) == 2
    assert set(expected.values()) <= set(found.values())
    assert not list(worker.out.rglob("part-*"))


@pytest.mark.exhaustive
def test_two_processes_train_on_a_stream_what_one_does(tmp_path, forks, made):
    kept, flags = made
    states = []
    for n_processes in (1, 2):
        out = tmp_path / str(n_processes)
        shutil.copytree(kept, out)
        if n_processes == 1:
            done = forks[0].run(TRAIN, *flags, output=out)
            assert done["code"] == 0, done
        else:
            words = [word for word in map(str, flags) if not word.startswith("fastsae.")]
            done = torchrun(TRAIN, *words, output=out)
            assert done.returncode == 0, done.stderr
        assert not list(out.rglob("part-*"))
        (path,) = (out / "checkpoints" / "r").glob("SAE_*.pt")
        sae, meta = load_sae(path)
        states.append((sae.state_dict(), meta["stream"]))
    (one, parts), (two, same_parts) = states
    assert parts == same_parts
    for name, value in one.items():
        # Adam turns differences of 1e-7 in tiny gradients into steps
        difference = (two[name] - value).norm() / value.norm().clamp_min(1e-6)
        assert torch.isfinite(two[name]).all() and difference < 1e-2, (name, float(difference))


ROWS, WIDTH = 6000, 64  # of a part


def stream_of(folder, n_parts):
    stream = Stream(folder)
    sizes = [ROWS] * n_parts
    stream.announce(
        {"fingerprint": "f", "sizes": [2 * ROWS * WIDTH] * n_parts, "n_tokens": sizes,
         "budget": 10**9, "device": "cpu"}
    )  # fmt: skip
    return stream


def peak_of(work):
    """Bytes that were held at most during `work()`, besides those held before."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - before


def test_what_stage_2_holds_does_not_grow_with_the_parts(tmp_path):
    peaks = []
    for n_parts in (5, 20):
        stream = stream_of(tmp_path / str(n_parts), n_parts)
        for number in range(1, n_parts + 1):
            put_part(stream, number, np.ones((ROWS, WIDTH), np.float16))

        def serve(stream=stream):
            never = {"batch_size": 100, "seed": 0, "waiting": lambda number: None}
            data = StreamRows(stream, Use("all", False, None), **never)
            for number in range(1, data.n_rounds + 1):
                for _ in data.batches(number):
                    pass
                stream.release(number - 2, {})
            data.close()

        peaks.append(peak_of(serve))
    part = 2 * ROWS * WIDTH
    # two parts are mixed; of the one that is read its bytes, its rows, and float32 for their norms
    assert peaks[1] < 1.3 * peaks[0] and peaks[1] < 9 * part + artifacts.CHUNK_BYTES


@pytest.mark.parametrize("n_parts", [8, 32])
def test_what_lies_on_the_disk_does_not_grow_with_the_parts(tmp_path, n_parts):
    """At most the budget, however many parts there are."""
    rows = np.ones((ROWS, WIDTH), np.float16)
    stream = stream_of(tmp_path / "stream_layer1", n_parts)
    put_part(stream, 1, rows)
    size = stream.part_path(1).stat().st_size
    about = {**stream.about, "sizes": [size] * n_parts, "budget": PARTS_NEEDED * size}
    stream.announce(about)
    used, over = [], threading.Event()

    def make(number, done):
        used.append(stream.on_disk())
        members = {"activations": rows.copy(), "metadata": np.array(json.dumps({"part": number}))}
        return {1: members}

    def consume():
        """Stage 2: done with a part as soon as the next one is there."""
        done = 0
        while done < n_parts - 1:
            if stream.part_path(done + 2).exists():
                done += 1
                stream.release(done, {})
            time.sleep(0.001)
        over.set()

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    producer.write_parts({1: stream}, [ROWS] * n_parts, make, World())
    assert over.wait(20)
    assert len(used) == n_parts - 1 and max(used) <= about["budget"]
