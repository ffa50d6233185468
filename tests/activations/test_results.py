"""Files of a layer from the parts of a run: rows in order, shards, norms and speed by hand."""

import numpy as np
import pytest

from fastsae.activations import files, results
from fastsae.activations.assembly import Assembly
from fastsae.data.tokenization import CONTENT, SHARED_PREFIX, TokenTable
from fastsae.runtime import artifacts

D = 2
ROWS = np.arange(12, dtype=np.float16).reshape(6, D)
PLACES = [(0, 4), (4, 2)]
NORMS = np.array([90, 1, 2, 80, 3, 50], np.float32)  # of six tokens in two examples


@pytest.fixture
def parts(tmp_path):
    """The notes of two parts, of four tokens and of two, at PLACES."""
    paths = []
    for i, (first, n_rows) in enumerate(PLACES):
        paths.append(tmp_path / f"part-{i}.npz")
        norms = NORMS[first : first + n_rows]
        artifacts.write_npz(paths[-1], {"norms_3": norms, "seconds": np.float64(1.5)})
    return paths


@pytest.fixture
def table():
    """Two examples of three tokens, of which the first belongs to the shared prefix."""
    kind = np.full(6, CONTENT, np.uint8)
    kind[[0, 3]] = SHARED_PREFIX
    ids, three = np.arange(6, dtype=np.int32), np.array([3, 3], np.int32)
    return TokenTable(ids, kind, kind, three, np.array([1, 2], np.int32), 0, 0)


def metadata():
    about = {"n_tokens": 6, "d_model": D, "n_shared_prefix": 1, "n_truncated": 0}
    about |= {
        "n_control_strings": 0,
        "n_duplicates": 0,
        "device": "cpu",
        "compute_dtype": "float32",
    }
    decisive = {"LAYER_IDX": 3, "STORAGE_DTYPE": "float16"}
    return artifacts.new_metadata("activations", decisive, {}, **about)


def test_norms_and_speed_by_hand(parts, table):
    """Own tokens have norms 1, 2, 3 and 50: the median is 2.5, so that 90, 80 and 50 are sinks."""
    timing = results.timing_of(parts, table, metadata(), n_processes=2)
    assert timing == {
        "seconds": 1.5,
        "tokens_per_second": 4.0,
        "device": "cpu",
        "compute_dtype": "float32",
        "n_processes": 2,
        "median_norm": 2.5,
        "max_norm": 90.0,
        "n_sinks": 3,
        "n_sinks_outside_prefix": 1,
    }


def write(tmp_path, table, parts, shard_bytes):
    """The file of layer 3, its rows placed part by part; returns its path."""
    shards = results.shards_of(table, D, "float16", shard_bytes)
    about, path = metadata(), tmp_path / "activations_layer3.npz"
    assembly = Assembly(
        path,
        [0, *(int(table.starts[last]) for _, last in shards)],
        d_model=D,
        storage_dtype="float16",
        folder=tmp_path / ".parts",
        plan="plan",
        fingerprint=about["fingerprint"],
    )
    for part, (first, n_rows) in zip(parts, PLACES, strict=True):
        note = artifacts.read_npz(part, made_by="the test")
        checksums = assembly.place(first, ROWS[first : first + n_rows])
        artifacts.write_npz(part, {**note, "crc32_3": np.array(checksums, np.uint32)})
    results.write_layer(assembly, parts, PLACES, shards, table, about, n_processes=1)
    return path


@pytest.mark.parametrize("shard_bytes, n_files", [(1000, 1), (3 * D * 2, 2), (1, 2)])
def test_rows_keep_their_order_whatever_the_shards(
    tmp_path, parts, table, capsys, shard_bytes, n_files
):
    path = write(tmp_path, table, parts, shard_bytes)
    assert len(files.find_shards(path)) == n_files
    data = files.open_activations(path)
    assert np.array_equal(np.asarray(data["activations"][0:6]), ROWS)
    assert list(data["seq_lengths"]) == [3, 3] and list(data["example_ids"]) == [1, 2]
    out = capsys.readouterr().out
    assert ("1 more shards" in out) is (n_files == 2)
    assert results.up_to_date(path, metadata())


def test_shards_of_an_earlier_run_are_set_aside(tmp_path, parts, table):
    for shard_bytes in (1, 1000):
        path = write(tmp_path, table, parts, shard_bytes)
    assert files.find_shards(path) == [path]
    assert not [p for p in tmp_path.glob("*-of-*.npz") if ".old-" not in p.name]
