"""The folder through which stage 1 hands parts to stage 2: who writes and deletes what, and what
each side sees after a kill."""

import itertools
import json

import numpy as np
import pytest
from conftest import put_part

from fastsae.activations import stream as stream_module
from fastsae.activations.stream import Stream, folder_of, require_budget, split_parts
from fastsae.runtime import storage
from fastsae.runtime.errors import InputError


@pytest.fixture
def stream(tmp_path):
    made = Stream(tmp_path / "stream_layer12")
    about = {"fingerprint": "f", "sizes": [100] * 9, "n_tokens": [9] * 9, "budget": 450}
    made.announce(about)
    return made


def there(stream):
    return [n for n in range(1, stream.n_parts + 1) if stream.part_path(n).exists()]


def put(stream, *numbers):
    for number in numbers:
        put_part(stream, number, np.full((9, 2), number, np.float16))


def test_the_folder_is_beside_the_sample(tmp_path):
    path = folder_of(tmp_path / "activations_layer7.npz")
    assert path == tmp_path / "stream_layer7"


def test_parts_by_hand():
    lengths = np.array([4, 4, 4, 4, 4, 1, 1])
    every = np.arange(7)

    def parts(numbers, size):
        return [part.tolist() for part in split_parts(lengths, numbers, size)]

    assert parts(every, 8) == [[0, 1], [2, 3], [4, 5, 6]]  # 6 are at least half of 8
    assert parts(every[:5], 8) == [[0, 1], [2, 3], [4]]
    assert parts(every, 10) == [[0, 1, 2], [3, 4, 5, 6]]
    assert parts(every, 20) == [[0, 1, 2, 3, 4, 5, 6]]  # a small rest joins
    assert parts(np.array([1, 3, 5]), 100) == [[1, 3, 5]]
    assert parts(every[:0], 8) == []


def test_the_parts_of_appended_data_begin_with_the_same_ones():
    lengths = np.random.default_rng(0).integers(1, 9, 300)
    some = split_parts(lengths, np.arange(200), 50)
    more = split_parts(lengths, np.arange(300), 50)
    for a, b in zip(some[:-1], more):
        assert np.array_equal(a, b)


def test_a_budget_below_four_parts_is_refused():
    require_budget(40, [10] * 9)
    require_budget(25, [10, 10])
    with pytest.raises(InputError, match=r"^STREAM_BYTES: 39 bytes .* 4 parts, which take 40\. "):
        require_budget(39, [10] * 9)
    with pytest.raises(InputError, match="take 43"):
        require_budget(42, [10] * 5 + [13])


def test_stage_1_makes_what_is_neither_there_nor_noted_and_has_room(stream, monkeypatch):
    monkeypatch.setattr(stream_module, "SECOND_LOOK", 0.0)
    assert stream.next_part() == 1 and stream.is_due(1)
    put(stream, 1, 2, 4)
    assert stream.next_part() == 3 and stream.is_due(3) and stream.next_part(besides=[3]) == 5
    put(stream, 3)
    assert stream.next_part() == 5 and not stream.is_due(5) and stream.is_full()
    stream.release(1, {})
    assert stream.is_due(5) and not stream.is_full()
    # of two processes each makes its own, and both keep to the one budget
    assert (stream.next_part(0, 2), stream.next_part(1, 2)) == (5, 6)
    assert stream.is_due(5) and not stream.is_due(6)


def test_a_deletion_that_is_just_being_noted_is_not_made_again(stream, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(stream_module.time, "monotonic", lambda: 0.3 * next(clock))
    put(stream, 1, 2)
    storage.remove(stream.part_path(1))  # killed here, or just before the note
    assert stream.next_part() == 1
    assert [stream.is_due(1) for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize("kill_at", range(1, 12))
def test_killed_while_it_releases_nothing_is_lost(stream, monkeypatch, kill_at):
    """At every operation: a part is there, or noted, or stage 1 makes it again; and the next
    release ends as if nothing had happened."""
    put(stream, 1, 2, 3, 4)
    operations = []

    class Killed(BaseException):
        pass

    def watch(operation, path):
        operations.append(operation)
        if len(operations) == kill_at:
            raise Killed

    monkeypatch.setattr(storage, "watch", watch)
    try:
        stream.release(3, {1: "a", 2: "b"})
    except Killed:
        monkeypatch.setattr(storage, "watch", lambda operation, path: None)
        missing = stream.next_part()
        lost = set(range(1, 5)) - set(there(stream)) - set(range(1, stream.released() + 1))
        assert lost <= {missing} and missing in (None, 5, stream.released() + 1)
        if missing in lost:
            put(stream, missing)
        stream.release(3, {1: "a", 2: "b"})
    assert there(stream) == [4] and stream.released() == 3
    lines = storage.read_lines(stream.notes)
    assert [line["part"] for line in lines] == [1, 2, 3]
    assert len(operations) >= min(kill_at, 11)


def test_who_trains(stream):
    mine, other = {"a.pt": "1"}, {"b.pt": "2"}
    stream.take(mine, "python train_sae.py --k 8")
    put(stream, 1, 2, 3)
    stream.take(other, "python train_sae.py --k 9")  # nothing was deleted: it can begin
    stream.release(1, {})
    stream.take(other, "x")  # the same goes on
    assert stream.released() == 1
    with pytest.raises(
        InputError, match=r"other settings \(1 of 9 .*finish that with: .*--k 9; or"
    ):
        stream.take(mine, "python train_sae.py --k 8")
    stream.end(other, "python train_sae.py --k 9")
    assert stream.released() == 9 and there(stream) == [] and stream.next_part() is None
    stream.take(mine, "python train_sae.py --k 8")  # after one that has ended all are made again
    assert stream.released() == 0 and stream.next_part() == 1


def test_what_was_trained_and_not_saved_is_made_again(stream):
    put(stream, 1, 2, 3, 4, 5)
    stream.release(4, {})
    stream.forget_after(2)
    assert stream.released() == 2 and stream.next_part() == 3
    stream.forget_after(0)
    assert stream.next_part() == 1


def test_parts_of_another_run_are_refused_and_of_an_ended_one_forgotten(stream):
    stream.release(9, {})
    stream.require_own_parts("g")
    assert not list(stream.folder.iterdir())
    stream.announce({"fingerprint": "f", "sizes": [100], "n_tokens": [9], "budget": 450})
    put(stream, 1)
    stream.require_own_parts("f")
    with pytest.raises(InputError, match="is of another run, .* or delete "):
        stream.require_own_parts("g")
    assert there(stream) == [1]


def test_the_answer_is_of_one_pipeline(stream):
    assert stream.answered("a") is None
    stream.answer(None, needs=True)
    assert stream.answered("a") is None
    stream.answer("a", needs=False)
    assert stream.answered("a") is False and stream.answered("b") is None


def test_a_torn_or_damaged_note_counts_for_nothing(stream):
    stream.release(2, {})
    with open(stream.notes, "ab") as file:
        file.write(b'{"part": 3')
    assert stream.released() == 2
    (stream.folder / "stream.json").write_text(json.dumps([1]))
    assert not Stream(stream.folder).read()
