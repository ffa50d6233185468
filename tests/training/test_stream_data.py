"""In which order a stream trains, and what is held of it."""

import itertools

import numpy as np
import pytest
from conftest import put_part

from fastsae.activations.stream import Stream
from fastsae.runtime import artifacts
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.training.stream_data import (
    StreamRows,
    Use,
    batch_bounds,
    chain,
    halves,
    n_steps,
    periods,
    shuffled,
)

ALL = Use("all", False, None)


def never(number):
    raise AssertionError(f"waits for part {number}")


@pytest.fixture
def stream(tmp_path):
    """A stream of five parts whose rows say their part and their place in it."""
    made = Stream(tmp_path / "stream_layer12")
    sizes = [23, 31, 1, 0, 40]
    made.announce(
        {"fingerprint": "f", "sizes": sizes, "n_tokens": sizes, "budget": 10**9, "device": "cpu"}
    )
    for number, n in enumerate(sizes, 1):
        put_part(made, number, np.stack([np.full(n, number), np.arange(n)], 1).astype(np.float16))
    return made


def rows_of(stream, batch_size=8, waiting=never, **options):
    return StreamRows(stream, ALL, batch_size=batch_size, seed=3, waiting=waiting, **options)


def plain_order(sizes, seed):
    """The slow twin: every round as a list of (part, row), in Python."""
    rounds, left = [], []
    for number, n in enumerate([*sizes, 0], 1):
        order = np.random.default_rng((seed, 0, number)).permutation(n).tolist()
        own, later = order[: (n + 1) // 2], order[(n + 1) // 2 :]
        together = left + [(number, row) for row in own]
        places = np.random.default_rng((seed, 1, number)).permutation(len(together))
        rounds.append([together[place] for place in places])
        left = [(number, row) for row in later]
    return rounds


def test_rounds_serve_every_row_once_as_the_slow_twin_says(stream):
    data = rows_of(stream)
    found = [
        [tuple(row) for batch in data.batches(number) for row in batch.int().tolist()]
        for number in range(1, data.n_rounds + 1)
    ]
    assert found == plain_order(stream.about["n_tokens"], seed=3)
    served = sorted(itertools.chain(*found))
    assert served == [(p, r) for p, n in enumerate(stream.sizes, 1) for r in range(n)]
    for number, rows in enumerate(found, 1):  # so round r needs parts r - 1 and r alone
        assert {part for part, _ in rows} <= {number - 1, number}
    assert len(data.digests) == 5 and len(set(data.digests)) == 5


def test_a_round_goes_on_from_any_batch_without_the_parts_before(stream):
    whole = rows_of(stream)
    expected = {r: [b.tolist() for b in whole.batches(r)] for r in range(1, 7)}
    for number in range(1, 7):
        stream.release(number - 2, {})
        for first in range(len(expected[number]) + 1):
            data = rows_of(stream, digests=whole.digests[: number - 1])
            assert [b.tolist() for b in data.batches(number, first)] == expected[number][first:]
            data.close()


def test_bounds_halves_and_periods_by_hand():
    assert batch_bounds(0, 4) == [0]
    assert batch_bounds(3, 4) == [0, 3]
    assert batch_bounds(11, 4) == [0, 5, 11]
    assert batch_bounds(12, 4) == [0, 4, 8, 12]
    a, b = halves(5, 0, 1)
    assert (len(a), sorted([*a, *b])) == (3, [0, 1, 2, 3, 4])
    assert sorted(shuffled(6, 0, 1)) == list(range(6))
    assert not np.array_equal(shuffled(60, 0, 1), shuffled(60, 0, 2))
    assert not np.array_equal(shuffled(60, 0, 1), shuffled(60, 1, 1))
    # after 20 tokens, after 20 more, and at the end; a rest below half of it joins
    assert periods([10, 10, 10, 10, 10], 20) == [2, 4, 6]
    assert periods([10, 10, 10, 10, 4], 20) == [2, 6]
    assert periods([10], 20) == [2]
    # rounds of 5, 10 and 5 rows
    assert n_steps([10, 10], 5) == 1 + 2 + 1


def test_the_chain_of_digests_by_hand():
    import hashlib

    one = hashlib.sha256(b"a").hexdigest()
    assert chain(["a"]) == one
    assert chain(["a", "b"]) == hashlib.sha256((one + "b").encode()).hexdigest()
    assert chain(["b", "a"]) != chain(["a", "b"])


def test_it_waits_for_a_part_that_is_not_there(stream):
    path, asked = stream.part_path(2), []
    away = path.rename(path.with_suffix(".away"))

    def waiting(number):
        asked.append(number)
        away.rename(path)

    data = rows_of(stream, waiting=waiting)
    list(data.batches(1))
    assert len(list(data.batches(2))) == 3 and asked == [2]
    data.close()


def test_damaged_and_foreign_parts_are_one_line_with_the_way_on(stream):
    path = stream.part_path(1)
    whole = path.read_bytes()
    at = artifacts.first_member_start("activations", (23, 2), "float16") + 5
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(EnvironmentFailure, match=r"damaged.*delete it and run extract_act") as e:
        next(rows_of(stream).batches(1))
    assert "\n" not in str(e.value) and str(path) in str(e.value)
    path.write_bytes(stream.part_path(2).read_bytes())
    with pytest.raises(EnvironmentFailure, match="is a part of another run. delete it"):
        next(rows_of(stream).batches(1))
    put_part(stream, 1, np.full((4, 2), np.inf, np.float16))
    with pytest.raises(InputError, match="holds NaN or infinity"):
        next(rows_of(stream).batches(1))


def test_a_part_that_was_made_again_must_be_the_same_on_a_cpu(stream, capsys):
    data = rows_of(stream, digests=["other"])
    with pytest.raises(EnvironmentFailure, match="is not the part that was trained on"):
        next(data.batches(1))
    stream.about["device"] = "cuda"
    data = rows_of(stream, digests=["other"])
    next(data.batches(1))
    assert "made again" in capsys.readouterr().out and data.digests != ["other"]
    data.close()


def test_what_is_left_out_is_left_out(stream):
    norms = 1.0 * np.arange(10)
    rows = np.stack([norms, 0 * norms], 1).astype(np.float16)
    put_part(stream, 1, rows, kind=[2, 1] + 8 * [0])
    use = Use("content", True, 5.0)
    data = StreamRows(stream, use, batch_size=100, seed=0, waiting=never)
    served = [row for r in (1, 2) for batch in data.batches(r) for row in batch.tolist()]
    data.close()
    assert sorted(a for a, b in served if b == 0) == [2, 3, 4, 5]


def test_a_partner_that_is_gone_is_one_line_and_what_was_trained_is_saved(stream, monkeypatch):
    from fastsae.runtime import progress
    from fastsae.training import stream_loop

    saved = []

    class Saver:
        def while_waiting(self, runs):
            saved.append(runs)

    monkeypatch.setattr(stream_loop, "ABSENT", 0.3)
    monkeypatch.setattr(stream_loop, "LOOK", 0.0)
    stream.part_path(2).unlink()
    path = stream.folder.parent / "activations_layer12.npz"
    bar = progress.Task("training", 10, "token")
    shown = stream_loop.Shown(stream, stream.about["n_tokens"], bar)
    waiting = stream_loop.Waiting(stream, Saver(), path, shown)
    data = rows_of(stream, waiting=lambda number: waiting.for_part(number, ["run"]))
    list(data.batches(1))
    with pytest.raises(EnvironmentFailure, match=r"part 2 of 5 is missing, .* run it beside"):
        next(data.batches(2))
    data.close()
    assert saved and saved[0] == ["run"]
    assert bar.note.startswith("waiting for extract_activations.py, 0.0 of 1.0 GB on disk")


def test_the_bar_says_tokens_error_disk_and_who_waits(stream):
    """Two parts of five lie there; the third has no room, so stage 1 waits."""
    from types import SimpleNamespace

    from fastsae.runtime import progress
    from fastsae.training.stream_loop import Shown

    for number in (3, 4, 5):
        stream.part_path(number).unlink()
    stream.about.update(sizes=[10**6] * 5, budget=2_500_000)
    bar = progress.Task("training", 95, "token")
    shown, run = Shown(stream, stream.about["n_tokens"], bar), SimpleNamespace(history=[])
    shown.batch(1, 0.5, run)
    said = "0.0 of 2.5 MB on disk, extract_activations.py waits"
    assert (bar.n, bar.note) == (11, said)
    shown.batch(1, 1.0, run)
    stream.release(1, {})
    run.history.append({"normalized_mse": 0.4322})
    shown.batch(2, 0.5, run)
    assert (bar.n, bar.note) == (23 + 15, "normalized_mse 0.4322, 0.0 of 2.5 MB on disk")
    shown.batch(2, 1.0, run)
    shown.waiting()
    assert bar.note == "waiting for extract_activations.py, 0.0 of 2.5 MB on disk"
    shown.batch(3, 1.0, run)
    assert bar.n == 23 + 31 + 1 and bar.note.startswith("normalized_mse")
    shown.batch(6, 1.0, run)
    assert bar.n == 55
