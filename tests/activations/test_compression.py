"""Activations in 8 bits: by hand, beside a slow twin, at the edges; and the same bytes whoever
packs them."""

import numpy as np
import pytest

from fastsae.activations import compression, files
from fastsae.activations.compression import Calibration, PackedRows, calibrate, members_of, pack
from fastsae.runtime import artifacts
from fastsae.runtime.errors import EnvironmentFailure

MAXIMUM = float(np.finfo(np.float16).max)


def unpacked(packed, calibration):
    return PackedRows(packed.codes, members_of(packed, calibration))[:]


def random_rows(n=300, d=7, seed=0):
    """Rows of dimensions with other means and spreads, and a few sinks."""
    random_of = np.random.default_rng(seed)
    rows = random_of.standard_normal((n, d)) * 10.0 ** random_of.integers(-2, 2, d)
    rows += random_of.integers(-50, 50, d)
    rows[random_of.integers(0, n, 3), random_of.integers(0, d)] = 9000
    return rows.astype(np.float16)


def slow_pack(row, calibration):
    """(codes, scale) of one row, number by number, in single precision."""
    one = np.float32
    z = [(one(x) - c) / s for x, c, s in zip(row, *calibration, strict=True)]
    scale = max(abs(each) for each in z) / one(127)
    return [int(np.rint(each / scale)) if scale else 0 for each in z], scale


def slow_unpack(codes, scale, calibration):
    one = np.float32
    return [
        np.float16(min(max(one(q) * scale * s + c, -MAXIMUM), MAXIMUM))
        for q, c, s in zip(codes, *calibration, strict=True)
    ]


def test_by_hand():
    """Row 0 is 2 and -1 standard deviations from the mean: its scale is 2 / 127, and -1 is -63.5 of
    it, of which rint makes the even -64."""
    calibration = Calibration(np.array([10, 0], np.float32), np.array([2, 4], np.float32))
    rows = np.tile(np.array([[14, -4], [10, 0]], np.float16), (20, 1))
    rows[5] = [10, 4 * 33]  # farther than 32 standard deviations
    packed = pack(rows, calibration)
    assert packed.codes[:2].tolist() == [[127, -64], [0, 0]]
    assert packed.row_scale[:2].tolist() == [np.float32(2) / np.float32(127), 0]
    assert packed.exact_rows.tolist() == [5] and packed.exact_values.tolist() == [[10, 132]]
    assert packed.codes[5].tolist() == [0, 0] and packed.row_scale[5] == 0
    found = unpacked(packed, calibration)
    assert found[0].tolist() == [14, np.float16(-64 * 2 / 127 * 4)]
    assert found[1].tolist() == [10, 0] and found[5].tolist() == [10, 132]


def test_the_calibration_by_hand():
    """Sinks and the shared prefix do not decide it; what hardly varies counts as a hundredth of the
    median dimension."""
    rows = np.array([[1, 4, 0], [3, 8, 0], [1, 4, 0], [3, 8, 0], [900, 0, 0], [7, 7, 7]])
    kind = np.array([0, 0, 1, 1, 0, 2], np.uint8)
    found = calibrate(rows.astype(np.float16), kind)
    assert found.centre.tolist() == [2, 6, 0]
    assert found.spread.tolist() == [1, 2, np.float32(0.01)]


@pytest.mark.parametrize("seed", range(5))
def test_as_the_slow_twin_says(seed):
    rows = random_rows(n=60, seed=seed)
    calibration = calibrate(rows, np.zeros(len(rows), np.uint8))
    packed = pack(rows, calibration)
    found = unpacked(packed, calibration)
    for i, row in enumerate(rows):
        if i in packed.exact_rows:
            assert found[i].tolist() == row.tolist()
        else:
            codes, scale = slow_pack(row, calibration)
            assert packed.codes[i].tolist() == codes and packed.row_scale[i] == scale
            assert found[i].tolist() == slow_unpack(codes, scale, calibration)


@pytest.mark.parametrize("seed", range(5))
def test_the_error_has_a_bound(seed):
    """Half a step of the row's scale, and the rounding to float16; rows that are kept have none."""
    rows = random_rows(seed=seed)
    calibration = calibrate(rows, np.zeros(len(rows), np.uint8))
    packed = pack(rows, calibration)
    assert 0 < len(packed.exact_rows) <= len(rows) // compression.EXACT_EVERY
    found = unpacked(packed, calibration).astype(np.float64)
    step = packed.row_scale[:, None].astype(np.float64) * calibration.spread
    rounding = np.abs(rows.astype(np.float64)) * 2.0**-10 + 1e-6
    assert (np.abs(found - rows) <= 0.501 * step + rounding).all()
    assert step.max() <= compression.FARTHEST / 127 * calibration.spread.max() * 1.001


@pytest.mark.parametrize(
    "rows",
    [
        np.full((40, 3), 7.5),
        np.zeros((40, 3)),
        np.tile([MAXIMUM, -MAXIMUM, 0], (40, 1)),
        np.full((1, 3), 2.0),
        np.zeros((0, 3)),
    ],
    ids=["constant", "zeros", "the largest there are", "one row", "no row"],
)
def test_rows_that_do_not_vary_come_back_exactly(rows):
    rows = rows.astype(np.float16)
    calibration = calibrate(rows, np.zeros(len(rows), np.uint8)) if len(rows) else None
    calibration = calibration or Calibration(*np.ones((2, 3), np.float32))
    assert np.array_equal(unpacked(pack(rows, calibration), calibration), rows)


def test_huge_values_stay_finite_and_tiny_ones_are_not_lost():
    rows = random_rows()
    rows[:200, 0], rows[200:, 0] = MAXIMUM, -MAXIMUM
    calibration = calibrate(rows, np.zeros(len(rows), np.uint8))
    assert np.isfinite(unpacked(pack(rows, calibration), calibration)).all()
    tiny = (random_rows().astype(np.float32) * 1e-6).astype(np.float16)
    calibration = calibrate(tiny, np.zeros(len(tiny), np.uint8))
    found = unpacked(pack(tiny, calibration), calibration).astype(np.float64)
    assert np.abs(found - tiny).max() <= np.abs(tiny).max() * 0.01


def test_too_many_distant_rows_the_most_distant_are_kept():
    rows = np.ones((64, 2), np.float16) * np.arange(64)[:, None].astype(np.float16)
    calibration = Calibration(np.zeros(2, np.float32), np.full(2, 0.1, np.float32))
    packed = pack(rows, calibration)
    assert packed.exact_rows.tolist() == [62, 63]
    # of equally distant ones the first
    assert pack(np.full((64, 2), 9, np.float16), calibration).exact_rows.tolist() == [0, 1]


def test_indexing_is_that_of_an_array():
    rows = random_rows()
    calibration = calibrate(rows, np.zeros(len(rows), np.uint8))
    packed = pack(rows, calibration)
    kept = PackedRows(packed.codes, members_of(packed, calibration))
    plain = kept[:]
    assert plain.dtype == np.float16 and plain.shape == kept.shape == (len(kept), 7)
    assert np.array_equal(np.asarray(kept), plain)
    mask = np.arange(len(rows)) % 3 == 0
    order = np.random.default_rng(1).permutation(len(rows))
    for index in (slice(3, 9), slice(None, None, -2), slice(5, 5), order, mask, [-1, 0], 7):
        assert np.array_equal(kept[index], plain[index])
    for wrong in (np.array([len(rows)]), mask[:-1]):
        with pytest.raises(IndexError):
            kept[wrong]


def test_blocks_decide_nothing(monkeypatch):
    rows, kind = random_rows(), np.zeros(300, np.uint8)
    expected = members_of(pack(rows, calibrate(rows, kind)), calibrate(rows, kind))
    plain = PackedRows(expected["activations"], expected)[:]
    monkeypatch.setattr(compression, "BLOCK", 7)
    monkeypatch.setattr(compression, "COLUMNS", 2)
    found = members_of(pack(rows, calibrate(rows, kind)), calibrate(rows, kind))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert np.array_equal(PackedRows(found["activations"], found)[:], plain)


def test_no_file_is_larger_than_was_foreseen():
    for n, d in ((1, 3), (64, 2), (1000, 50)):
        rows = 100 * np.random.default_rng(0).standard_cauchy((n, d)).clip(-500, 500)
        rows = rows.astype(np.float16)
        calibration = calibrate(rows, np.zeros(n, np.uint8))
        members = members_of(pack(rows, calibration), calibration)
        size = sum(each.nbytes for each in members.values())
        assert size <= compression.bytes_of(n, d, "int8")
    assert compression.bytes_of(10, 4, "float16") == 80
    assert compression.bytes_of(64, 4, "int8") == 64 * 8 + 2 * 16 + 32


def test_notes_of_chunks_become_the_members_of_any_file(tmp_path):
    """Chunks and files end at other rows."""
    rows = random_rows()
    calibration = calibrate(rows, np.zeros(len(rows), np.uint8))
    chunks = [(0, 100), (100, 31), (131, 169)]
    notes, codes, exact = [], [], []
    for first, n in chunks:
        packed = pack(rows[first : first + n], calibration)
        notes.append(tmp_path / f"{first}.npz")
        artifacts.write_npz(notes[-1], compression.note_of(packed, 5, first))
        codes.append(packed.codes)
        exact += [first + i for i in packed.exact_rows]
    codes = np.concatenate(codes)
    assert exact
    for a, b in ((0, 300), (0, 100), (99, 132), (140, 150), (100, 131)):
        members = compression.noted_members(notes, chunks, 5, calibration, (a, b))
        assert (members["exact_rows"] + a).tolist() == [i for i in exact if a <= i < b]
        assert np.array_equal(members["exact_values"], rows[members["exact_rows"] + a])
        found = PackedRows(codes[a:b], members)[:]
        whole = compression.noted_members(notes, chunks, 5, calibration, (0, 300))
        assert np.array_equal(found, PackedRows(codes, whole)[a:b])


@pytest.mark.parametrize("name", compression.MEMBERS)
def test_members_that_are_missing_or_do_not_fit_are_one_line(tmp_path, name):
    rows = random_rows()
    calibration = calibrate(rows, np.zeros(len(rows), np.uint8))
    members = members_of(pack(rows, calibration), calibration)
    for wrong in (None, members[name][:-1]):
        broken = {**members, name: wrong}
        if wrong is None:
            del broken[name]
        artifacts.write_npz(tmp_path / "a.npz", broken)
        for read in (files._mapped_rows, whole):
            with pytest.raises(EnvironmentFailure, match=r"a\.npz: .*run extract_activations\.py"):
                read(tmp_path / "a.npz")
    artifacts.write_npz(tmp_path / "a.npz", members)
    assert np.array_equal(files._mapped_rows(tmp_path / "a.npz")[:], whole(tmp_path / "a.npz"))
    unordered = {**members, "exact_rows": members["exact_rows"][::-1].copy()}
    with pytest.raises(ValueError, match="rising"):
        PackedRows(members["activations"], unordered)


def whole(path):
    return files.rows_of(path, artifacts.read_npz(path, made_by="x"))
