"""A file that is filled in place is the file that is written at once."""

import random
import zlib

import numpy as np
import pytest

from fastsae.activations.assembly import Assembly
from fastsae.activations.files import find_shards, open_activations, shard_path
from fastsae.runtime import artifacts, storage

ROWS = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float16)
META = {"format": artifacts.FORMAT, "fingerprint": "f"}


def made(tmp_path, starts=(0, 50)):
    return Assembly(
        tmp_path / "activations_layer2.npz",
        starts,
        d_model=3,
        storage_dtype="float16",
        folder=tmp_path / ".parts-x",
        plan="p",
        fingerprint="f",
    )


def others(starts, shard):
    n = starts[shard + 1] - starts[shard]
    return {
        "seq_lengths": np.array([n], np.int32),
        "token_ids": np.arange(n, dtype=np.int32),
        "token_kind": np.zeros(n, np.uint8),
        "token_role": np.zeros(n, np.uint8),
        "example_ids": np.array([shard + 1], np.int32),
        "metadata": np.array(
            artifacts.to_json({**META, "shard": shard + 1, "n_shards": len(starts) - 1})
        ),
    }


def finish(assembly, starts, placed):
    checksums = assembly.checksums(placed)
    return [
        assembly.finish(shard, checksums[shard], others(starts, shard))
        for shard in range(len(starts) - 1)
    ]


@pytest.mark.parametrize("starts", [(0, 50), (0, 20, 21, 50)], ids=["one file", "shards"])
@pytest.mark.parametrize("ends", [(50,), (7, 8, 30, 50), (20, 21, 50)])
def test_the_same_bytes_in_whatever_order_rows_come(tmp_path, starts, ends):
    assembly = made(tmp_path, starts)
    chunks = list(zip((0, *ends), ends))
    found = {}
    for a, b in random.Random(0).sample(chunks, len(chunks)):
        # of another process
        found[a] = (a, b - a, made(tmp_path, starts).place(a, ROWS[a:b]))
    assert all(assembly.holds(a, b - a) for a, b in chunks)
    written = finish(assembly, starts, [found[a] for a, _ in chunks])
    for shard, path in enumerate(written):
        whole = {"activations": ROWS[starts[shard] : starts[shard + 1]], **others(starts, shard)}
        artifacts.write_npz(tmp_path / "whole.npz", whole)
        assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not list((tmp_path / ".parts-x").iterdir())  # nothing is there twice
    read = open_activations(tmp_path / "activations_layer2.npz")
    assert np.array_equal(np.asarray(read["activations"][0:50]), ROWS)


def test_pieces_by_hand(tmp_path):
    assembly = made(tmp_path, (0, 20, 21, 50))
    assert assembly.pieces(5, 10) == [(0, 5, 10)]
    assert assembly.pieces(18, 10) == [(0, 18, 2), (1, 0, 1), (2, 0, 7)]
    assert assembly.pieces(21, 29) == [(2, 0, 29)]


@pytest.mark.parametrize("kill_at", range(1, 60, 3))
def test_killed_at_an_operation_it_goes_on(tmp_path, monkeypatch, kill_at):
    """Rows that were placed and noted are not placed again; the end is the same, the old file
    kept."""
    starts, noted = (0, 20, 50), {}
    for number in (1, 2):
        old = shard_path(tmp_path / "activations_layer2.npz", number, 2)
        artifacts.write_text(old, f"old {number}")

    class Killed(BaseException):
        pass

    def work():
        assembly = made(tmp_path, starts)
        for a, b in ((0, 15), (15, 35), (35, 50)):
            if a not in noted or not assembly.holds(a, b - a):
                checksums = assembly.place(a, ROWS[a:b])
                storage.watch("note", a)
                noted[a] = (a, b - a, checksums)
        return finish(assembly, starts, [noted[a] for a in (0, 15, 35)])

    operations = []

    def watch(operation, path):
        operations.append(operation)
        if len(operations) == kill_at:
            raise Killed

    monkeypatch.setattr(storage, "watch", watch)
    try:
        work()
    except Killed:
        before = dict(noted)
        monkeypatch.setattr(storage, "watch", lambda operation, path: None)
        work()
        assert all(noted[a] is each for a, each in before.items())
    for shard, path in enumerate(find_shards(tmp_path / "activations_layer2.npz")):
        found = artifacts.read_npz(path, made_by="the test")
        assert np.array_equal(found["activations"], ROWS[starts[shard] : starts[shard + 1]])
        kept = path.with_name(f"{path.stem}.old-1.npz")
        assert kept.read_text() == f"old {shard + 1}"
        assert not path.with_name(f"{path.stem}.old-2.npz").exists()


def test_rows_that_went_missing_are_noticed_and_others_files_are_not_taken(tmp_path):
    assembly = made(tmp_path)
    checksums = assembly.place(0, ROWS)
    assembly.growing[0].unlink()
    assert not made(tmp_path).holds(0, 50)
    assembly.place(0, ROWS)
    # damage between placing and reading is found by the file's own checksum
    with open(assembly.growing[0], "r+b") as file:
        file.seek(assembly._offset(0, 10))
        file.write(b"\0\0")
    target = assembly.finish(0, assembly.checksums([(0, 50, checksums)])[0], others((0, 50), 0))
    with pytest.raises(Exception, match="damaged"):
        open_activations(target)
    assert not made(tmp_path).holds(0, 50)  # a damaged file of this name counts for nothing


def test_joined_checksums_are_those_of_the_whole():
    chance = random.Random(0)
    for _ in range(100):
        a, b = (chance.randbytes(chance.randrange(300)) for _ in range(2))
        assert artifacts.joined_crc32(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)
