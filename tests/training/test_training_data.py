"""Which tokens train, in which order they come, and how much memory that takes."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import PROJECT, planted_tokens
from pretended_cuda import device_of, pretended
from small import small

from fastsae.data.token_masks import chosen_tokens
from fastsae.training import feeding
from fastsae.training.data import CHUNK_ROWS, TrainingRows, batch_ends, mixed


def made(n=7000, d=3, **options):
    """Rows that say their own number, a tenth of them left out of training."""
    activations = np.repeat(np.arange(n, dtype=np.float32)[:, None], d, axis=1)
    rows = np.delete(np.arange(n), np.arange(0, n, 10))
    return TrainingRows(
        activations, rows, **{"batch_size": 128, "buffer_tokens": 3000, "seed": 0, **options}
    ), rows


def numbers(batches):
    return [batch[:, 0].numpy().astype(int) for batch in batches]


@pytest.mark.parametrize(
    "buffer_tokens", [10_000, 3000, 700, 6], ids=["all in memory", "half", "tenth", "nearly none"]
)
def test_every_row_once_an_epoch_in_the_order_that_seed_and_epoch_decide(buffer_tokens):
    data, rows = made(1000 if buffer_tokens == 6 else 7000, buffer_tokens=buffer_tokens)
    batches = numbers(data.batches(1))
    assert [len(b) for b in batches] == np.diff([0, *batch_ends(len(rows), 128)]).tolist() and len(
        batches
    ) == data.n_batches()
    served = np.concatenate(batches)
    assert sorted(served) == rows.tolist()
    assert np.array_equal(served, data.order(1))
    assert np.array_equal(served, np.concatenate(numbers(data.batches(1))))
    assert not np.array_equal(served, np.concatenate(numbers(data.batches(2))))
    other, _ = made(1000 if buffer_tokens == 6 else 7000, buffer_tokens=buffer_tokens, seed=1)
    assert not np.array_equal(served, other.order(1))
    assert all(
        batch.dtype == torch.float32 and bool((batch == batch[:, :1]).all())
        for batch in data.batches(1)
    )


@pytest.mark.parametrize("buffer_tokens", [10_000, 3000, 700])
def test_an_epoch_goes_on_from_any_batch(buffer_tokens):
    data, _ = made(buffer_tokens=buffer_tokens)
    whole = numbers(data.batches(3))
    for first in (0, 1, 7, 30, len(whole) - 1, len(whole)):
        rest = numbers(data.batches(3, first))
        assert len(rest) == len(whole) - first
        assert all(np.array_equal(a, b) for a, b in zip(rest, whole[first:]))


def test_the_pool_is_never_larger_than_two_parts():
    rows = np.arange(10 * CHUNK_ROWS)
    for pool, n_served, new in mixed(rows, 1000, seed=0, epoch=1):
        assert len(pool) <= 2000 and len(new) <= 1000 and n_served in (1000, len(pool))


def test_the_buffer_mixes():
    """Batches hold rows of many chunks; without mixing, one each."""
    n = 100 * CHUNK_ROWS
    order = np.concatenate(
        [pool[:k] for pool, k, _ in mixed(np.arange(n), n // 24, seed=0, epoch=1)]
    )
    chunks = [
        len(set((order[i : i + 128] // CHUNK_ROWS).tolist())) for i in range(0, n - 128, 12_800)
    ]
    assert min(chunks) >= 4


def test_batch_sizes_by_hand():
    assert (
        batch_ends(513, 512) == [513]
        and batch_ends(1026, 512) == [512, 1024, 1026]
        and batch_ends(5, 512) == [5]
    )


def test_token_choice_by_hand():
    kind, role = np.array([2, 1, 0, 0, 0]), np.array([0, 3, 2, 3, 0])
    assert chosen_tokens("all", kind, role).tolist() == [True] * 5
    assert chosen_tokens("content", kind, role).tolist() == [False, False, True, True, True]
    assert chosen_tokens("assistant", kind, role).tolist() == [False, False, False, True, False]


SMALL = small(max_norm_ratio=None)
ROWS = np.arange(4000, dtype=np.float32).reshape(1000, 4)


def test_only_the_chosen_tokens_train(tmp_path, write_activations, run_main, capsys):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = write_activations(tokens, [20] * 30, kind=np.tile([1, 1] + [0] * 18, 30))
    assert run_main("train_sae", *flags, *SMALL, "--use-tokens", "content") == 0
    metrics = json.loads((tmp_path / "checkpoints" / "test" / "metrics.json").read_text())
    assert sum(metrics[f"n_{part}_tokens"] for part in ("train", "validation", "test")) == 540
    assert "60 tokens that are not content" in capsys.readouterr().out
    assert run_main("train_sae", *flags, *SMALL, "--use-tokens", "assistant") == 2
    assert "USE_TOKENS: " in capsys.readouterr().err


@pytest.mark.exhaustive
def test_a_buffer_of_an_eighth_trains_as_well_as_a_full_shuffle(
    tmp_path, write_activations, run_main
):
    """Tokens of an example resemble each other, so an order that does not mix examples would
    show."""
    random = np.random.default_rng(0)
    tokens = random.standard_normal((40_000, 32)) * np.linspace(0.1, 1, 32)
    tokens += 0.3 * np.repeat(random.standard_normal((2000, 32)), 20, axis=0)
    flags = [*write_activations(tokens.astype(np.float32), [20] * 2000), *SMALL]
    flags += [
        "--m",
        64,
        "--k",
        6,
        "--n-epochs",
        12,
        "--learning-rate",
        3e-3,
        "--lr-schedule",
        "linear",
    ]
    found = {}
    for buffer_tokens in (100_000, 4500):
        assert run_main("train_sae", *flags, "--buffer-tokens", buffer_tokens) == 0
        found[buffer_tokens] = json.loads(
            (tmp_path / "checkpoints" / "test" / "metrics.json").read_text()
        )["normalized_mse"]
    assert found[4500] == pytest.approx(found[100_000], rel=0.01)


@pytest.mark.exhaustive
def test_rows_beyond_the_buffer_stay_on_the_disk(tmp_path, write_activations):
    """400 MB of activations, a buffer of 24 MB: the process may grow by the buffer and its own few
    weights, not by the data."""
    tokens = np.random.default_rng(0).standard_normal((200_000, 512)).astype(np.float32)
    flags = write_activations(tokens, [100] * 2000)
    code = (
        "import sys, resource, torch, numpy, hypothesaes.sae, train_sae\n"
        "from fastsae.runtime.stage import run_stage\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert run_stage(train_sae.main) == 0\n"
        "print('grew', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            *flags,
            *map(str, SMALL),
            "--n-epochs",
            "1",
            "--buffer-tokens",
            "12000",
            "--batch-size",
            "4096",
        ],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    # MB: buffer 24, its sample of 32,768 tokens 64 and twice that for the median
    assert int(done.stdout.rsplit("grew ", 1)[1]) < 330


def test_an_error_while_reading_ahead_ends_the_run():
    """In a thread it would end nothing but the thread, and old rows would be served once more."""
    rows, calls = TrainingRows(ROWS, np.arange(1000), batch_size=50, buffer_tokens=300, seed=0), []

    class Failing:
        def __len__(self):
            return len(ROWS)

        def __getitem__(self, index):
            calls.append(index)
            if len(calls) == 3:
                raise MemoryError("no room")
            return ROWS[index]

    rows.activations = Failing()
    with pytest.raises(MemoryError, match="no room"):
        list(rows.batches(1))


def test_batches_that_nobody_wants_end_the_reading():
    """Else a thread would go on to write into a buffer that the next epoch fills."""
    rows = TrainingRows(ROWS, np.arange(1000), batch_size=50, buffer_tokens=300, seed=0)
    before = threading.active_count()
    for _ in range(3):
        batches = rows.batches(1)
        next(batches)
        batches.close()
        assert threading.active_count() == before
    assert np.array_equal(np.concatenate([x[:, 0] for x in rows.batches(1)]) / 4, rows.order(1))


# On a device


def halves(n=900, d=4):
    """Rows (n, d) that differ, in the type of a file."""
    return np.random.default_rng(0).standard_normal((n, d)).astype(np.float16)


@pytest.fixture
def narrow(monkeypatch):
    """Pinned blocks of 40 rows, so that they are used again and again."""
    monkeypatch.setattr(feeding, "PINNED_BYTES", 40 * 8)
    monkeypatch.setattr(feeding, "LOOK", 0.0002)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("share", [0.5, 0], ids=["on the device", "sent batch by batch"])
@pytest.mark.parametrize("buffer_tokens", [10_000, 300, 6], ids=["all", "third", "nearly none"])
def test_a_device_is_fed_the_same_rows(monkeypatch, narrow, device, share, buffer_tokens):
    """Whether they are kept there or sent, all at once or through a buffer; no batch waits."""
    monkeypatch.setattr(feeding, "DEVICE_SHARE", share)
    x, options = halves(100 if buffer_tokens == 6 else 900), {"batch_size": 50, "seed": 3}
    options["buffer_tokens"], rows = buffer_tokens, np.arange(len(x))[3:]
    here = TrainingRows(x, rows, **options)
    expected = [[batch.numpy() for batch in here.batches(epoch, 1)] for epoch in (1, 2)]
    with pretended() as machine:
        there = TrainingRows(x, rows, **options, device=device)
        assert isinstance(there.buffer, feeding.DeviceRows if share else feeding.HostRows)
        found = [list(there.batches(epoch, 1)) for epoch in (1, 2)]
        assert not machine.waits
        assert {device_of(batch) for batches in found for batch in batches} == {
            torch.device("cuda", int(device == "cuda:1"))
        }
        assert {batch.dtype for batch in found[0]} == {torch.float32}
        found = [[batch.cpu().numpy() for batch in batches] for batches in found]
    for batches, others in zip(found, expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(batches, others, strict=True))


@pytest.mark.parametrize("fault", ["no wait for the stream", "blocks used too soon"])
def test_a_stream_that_nobody_waits_for_is_seen(monkeypatch, narrow, fault):
    if fault == "no wait for the stream":
        monkeypatch.setattr(feeding.DeviceRows, "_arrive", feeding.DeviceRows._send)
    else:

        def send(self):
            original(self)
            while self.on_the_way:
                self.free.put(self.on_the_way.pop()[1])

        original = feeding.DeviceRows._send
        monkeypatch.setattr(feeding.DeviceRows, "_send", send)
    x = halves()
    with pretended():
        options = {"batch_size": 50, "buffer_tokens": 10_000, "seed": 0, "device": "cuda"}
        data = TrainingRows(x, np.arange(len(x)), **options)
        found = np.concatenate([batch.cpu().numpy() for batch in data.batches(1)])
    assert not np.array_equal(np.sort(found, 0), np.sort(x, 0))


def test_rows_on_a_device_have_the_type_of_their_file():
    for dtype in ("float16", "float32", "int8"):
        with pretended():
            room = feeding.room_for(6, 3, np.dtype(dtype), "cuda")
            values = np.arange(18).reshape(6, 3).astype(dtype)
            room.fill_ahead(lambda part, x=values: x[part], np.arange(6)[::-1].copy()).finish()
            found = room.take(np.array([5, 0]))
            assert found.cpu().numpy().tolist() == [[0, 1, 2], [15, 16, 17]]
            assert room.rows.dtype == getattr(torch, dtype)


def test_what_does_not_fit_stays_on_the_host(monkeypatch):
    """Half of the free memory is the most: by hand."""
    with pretended():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 10**9))
        rooms = [feeding.room_for(n, 10, np.dtype("float16"), "cuda") for n in (100, 101)]
    assert [type(room) for room in rooms] == [feeding.DeviceRows, feeding.HostRows]
