"""Files of a layer from the parts of a run: rows in order, shards, norms and speed by hand."""

import numpy as np
import pytest

from fastsae.activations import files, results
from fastsae.data.tokenization import CONTENT, SHARED_PREFIX, TokenTable
from fastsae.runtime import artifacts

D = 2
NORMS = np.array([90, 1, 2, 80, 3, 50], np.float32)  # of six tokens in two examples


@pytest.fixture
def parts(tmp_path):
    """Two parts, of four tokens and of two."""
    paths = []
    for i, (first, last) in enumerate([(0, 4), (4, 6)]):
        paths.append(tmp_path / f"part-{i}.npz")
        artifacts.write_npz(
            paths[-1],
            {
                "activations_3": np.arange(first * D, last * D, dtype=np.float16).reshape(-1, D),
                "norms_3": NORMS[first:last],
                "seconds": np.float64(1.5),
            },
        )
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


@pytest.mark.parametrize("shard_bytes, n_files", [(1000, 1), (3 * D * 2, 2), (1, 2)])
def test_rows_keep_their_order_whatever_the_shards(
    tmp_path, parts, table, capsys, shard_bytes, n_files
):
    path = tmp_path / "activations_layer3.npz"
    results.write_layer(path, parts, table, metadata(), shard_bytes=shard_bytes, n_processes=1)
    assert len(files.find_shards(path)) == n_files
    data = files.open_activations(path)
    rows = data["activations"]
    assert np.array_equal(rows[0 : len(rows)].ravel(), np.arange(12))
    assert list(data["seq_lengths"]) == [3, 3] and list(data["example_ids"]) == [1, 2]
    out = capsys.readouterr().out
    assert ("1 more shards" in out) is (n_files == 2)
    assert results.up_to_date(path, metadata())


def test_shards_of_an_earlier_run_are_set_aside(tmp_path, parts, table):
    path = tmp_path / "activations_layer3.npz"
    for shard_bytes in (1, 1000):
        results.write_layer(path, parts, table, metadata(), shard_bytes=shard_bytes, n_processes=1)
    assert files.find_shards(path) == [path]
    assert not [p for p in tmp_path.glob("*-of-*.npz") if ".old-" not in p.name]
