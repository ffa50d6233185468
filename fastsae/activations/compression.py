"""Rows of activations in 8 bits (STORAGE_DTYPE = "int8"): about half of float16's bytes.

A value x of dimension j in row i is kept as the integer of

    (x - centre[j]) / spread[j] / row_scale[i]

nearest to it, where centre and spread are the mean and standard deviation of each dimension, of one
sample for the whole file or stream, and row_scale lets the row's largest value be 127. Without mean
and spread a few large dimensions would decide the scale of all. A row with a value more than
FARTHEST standard deviations from the mean (an attention sink) is kept as it was, in float16.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastsae.data.token_masks import token_norms, usable_tokens
from fastsae.runtime import artifacts

MAKER = "extract_activations.py"
# rows with values farther from the mean are kept in float16. So no value of the others is off by
# more than FARTHEST / 254 of the standard deviation of its dimension
FARTHEST = 32.0
# at most one row in so many is kept in float16, the most distant ones: a bound for a file's size
EXACT_EVERY = 32
SAMPLE_ROWS = 16384  # of which mean and spread are
# of the median dimension: what hardly varies in the sample counts as varying so much
LEAST_SPREAD = 0.01
SINK_RATIO = 10.0  # norms above this many times the median do not decide mean and spread
LEVELS = 127
EXACT = np.dtype(np.float16)
BLOCK = 4096  # rows at a time, which stay in a cache
COLUMNS = 256  # dimensions at a time
MEMBERS = ("row_scale", "centre", "spread", "exact_rows", "exact_values")


def computed_dtype(storage_dtype: str) -> str:
    """The type of rows before they are packed, and after they are read."""
    return EXACT.name if storage_dtype == "int8" else storage_dtype


def bytes_of(n_rows: int, d_model: int, storage_dtype: str) -> int:
    """At most so many bytes n rows of d_model values take in a file."""
    if storage_dtype != "int8":
        return n_rows * d_model * np.dtype(storage_dtype).itemsize
    n_exact = n_rows // EXACT_EVERY
    return n_rows * (d_model + 4) + n_exact * (2 * d_model + 8) + 8 * d_model


class Calibration(NamedTuple):
    """Mean and standard deviation (d_model,) float32 of each dimension."""

    centre: np.ndarray
    spread: np.ndarray


class Packed(NamedTuple):
    """n rows: codes (n, d_model) int8; row_scale (n,) float32; exact_rows (m,) int64, the numbers
    of those that are kept as exact_values (m, d_model) float16, whose codes are 0."""

    codes: np.ndarray
    row_scale: np.ndarray
    exact_rows: np.ndarray
    exact_values: np.ndarray


def calibrate(rows: np.ndarray, kind: np.ndarray) -> Calibration:
    """Mean and spread of the first SAMPLE_ROWS of rows (n, d_model) that training would use.

    kind (n,): as in the activations file. Without usable rows all of them count.
    """
    rows, kind = rows[:SAMPLE_ROWS], kind[:SAMPLE_ROWS]
    used, _ = usable_tokens(
        token_norms(rows), kind, exclude_shared_prefix=True, max_norm_ratio=SINK_RATIO
    )
    rows = rows[used] if used.any() else rows
    centre, spread = np.zeros((2, rows.shape[1]), np.float32)
    for start in range(0, rows.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        values = rows[:, part].astype(np.float64)  # (n, at most COLUMNS)
        centre[part], spread[part] = values.mean(0), values.std(0)
    least = np.float32(LEAST_SPREAD) * np.median(spread)
    # all values alike: their differences are 0 in any unit
    least = least or np.float32(spread.max(initial=0) or 1)
    return Calibration(centre, np.maximum(spread, least))


def pack(rows: np.ndarray, calibration: Calibration) -> Packed:
    """Rows (n, d_model) of finite float16 values in 8 bits."""
    import torch  # in several threads, and not needed where nothing is packed

    n, d = rows.shape
    centre, spread = map(torch.from_numpy, calibration)
    codes = np.empty((n, d), np.int8)
    farthest = np.empty(n, np.float32)
    for start in range(0, n, BLOCK):
        block = slice(start, start + BLOCK)
        x = torch.from_numpy(rows[block].astype(np.float32))  # (b, d)
        x.sub_(centre).div_(spread)
        peak = x.abs().amax(1)  # (b,)
        scale = (peak / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
        torch.from_numpy(codes[block]).copy_(x.div_(scale[:, None]).round_())
        farthest[block] = peak.numpy()
    exact = np.flatnonzero(farthest > FARTHEST)
    if len(exact) > n // EXACT_EVERY:
        # equally distant ones: those that come first
        order = np.argsort(-farthest[exact], kind="stable")
        exact = np.sort(exact[order[: n // EXACT_EVERY]])
    codes[exact] = 0
    row_scale = farthest / np.float32(LEVELS)
    row_scale[exact] = 0
    return Packed(codes, row_scale, exact.astype(np.int64), rows[exact].astype(EXACT))


class Packing:
    """How the rows of an unfinished run are packed, {layer: Calibration}: decided by its first
    chunk, and written once in its folder, so that all processes, and a run that goes on after a
    kill, pack alike."""

    def __init__(self, folder: Path, plan: str) -> None:
        self.path = folder / f"calibration-{plan}.npz"
        self._found: dict[int, Calibration] = {}

    def is_decided(self) -> bool:
        """Whether the calibrations are there."""
        return self.path.exists()

    def decide(self, rows: Mapping[int, np.ndarray], kind: np.ndarray) -> None:
        """Write the calibrations of the first chunk's rows {layer: (n, d_model)}, unless they are
        there; kind (n,): of these tokens."""
        if self.is_decided():
            return
        found = {}
        for layer, each in rows.items():
            found |= dict(zip(_names(layer), calibrate(each, kind), strict=True))
        artifacts.write_npz(self.path, found)

    def of(self, layer: int) -> Calibration:
        """What was decided for a layer."""
        if layer not in self._found:
            names = _names(layer)
            found = artifacts.read_npz(self.path, names, made_by=MAKER)
            self._found[layer] = Calibration(*(found[name] for name in names))
        return self._found[layer]


def _names(layer):
    return [f"centre_{layer}", f"spread_{layer}"]


def note_of(packed: Packed, layer: int, first_row: int) -> dict[str, np.ndarray]:
    """What is noted of a chunk besides its codes; first_row: of the chunk in the whole result."""
    values = (packed.row_scale, packed.exact_rows + first_row, packed.exact_values)
    return dict(zip(_noted(layer), values, strict=True))


def _noted(layer):
    return [f"{name}_{layer}" for name in ("row_scale", "exact_rows", "exact_values")]


def noted_members(
    notes: Sequence[Path],
    places: Sequence[tuple[int, int]],
    layer: int,
    calibration: Calibration,
    rows: tuple[int, int] | np.ndarray,
) -> dict[str, np.ndarray]:
    """The members of a file that holds the given rows of the result, besides the codes.

    notes: of chunks that lie at `places` [(first row, number of rows)], in order. rows: [first,
    last), or (n,) their numbers where the file has them in another order.
    """
    if isinstance(rows, np.ndarray):
        first = int(rows.min(initial=0))
        last = int(rows.max(initial=-1)) + 1
        found = _noted_range(notes, places, layer, calibration, first, last)
        return _chosen(found, rows - first)
    return _noted_range(notes, places, layer, calibration, *rows)


def _chosen(members, rows):
    """The members of a file with these rows of another one."""
    number, value = members["exact_rows"], members["exact_values"]
    at = np.searchsorted(number, rows).clip(max=max(len(number) - 1, 0))
    is_exact = number[at] == rows if len(number) else np.zeros(len(rows), bool)
    return {
        **members,
        "row_scale": members["row_scale"][rows],
        "exact_rows": np.flatnonzero(is_exact),
        "exact_values": value[at[is_exact]],
    }


def _noted_range(notes, places, layer, calibration, first, last):
    """`noted_members` of the rows [first, last)."""
    scales, numbers = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
    values = [np.zeros((0, len(calibration.centre)), EXACT)]
    for note, (start, n) in zip(notes, places, strict=True):
        if start >= last or start + n <= first:
            continue
        found = artifacts.read_npz(note, _noted(layer), made_by=MAKER)
        scale, number, value = (found[name] for name in _noted(layer))
        inside = (first <= number) & (number < last)
        scales.append(scale[max(first - start, 0) : last - start])
        numbers.append(number[inside] - first)
        values.append(value[inside])
    joined = (np.concatenate(each) for each in (scales, numbers, values))
    row_scale, exact_rows, exact_values = joined
    small = (row_scale, *calibration, exact_rows, exact_values)
    return dict(zip(MEMBERS, small, strict=True))


def members_of(packed: Packed, calibration: Calibration) -> dict[str, np.ndarray]:
    """The members of a file with these rows, `activations` the first of them."""
    codes, row_scale, exact_rows, exact_values = packed
    small = (row_scale, *calibration, exact_rows, exact_values)
    return {"activations": codes, **dict(zip(MEMBERS, small, strict=True))}


class PackedRows:
    """Rows (n, d_model) of a file in 8 bits, mapped or in memory; indexing gives float16 rows in
    memory.

    codes (n, d_model) int8 and `members`, by the names of MEMBERS. ValueError if they do not fit
    each other.
    """

    dtype, ndim = EXACT, 2

    def __init__(self, codes: np.ndarray, members: Mapping[str, np.ndarray]) -> None:
        self.parts = [codes]  # what is mapped from the disk
        self.codes = codes
        self.shape = codes.shape
        self.row_scale, self.centre, self.spread, self.exact_rows, self.exact_values = (
            members[name] for name in MEMBERS
        )
        (n, d), n_exact = self.shape, len(self.exact_rows)
        shapes = [members[name].shape for name in MEMBERS]
        if shapes != [(n,), (d,), (d,), (n_exact,), (n_exact, d)]:
            raise ValueError("its members do not fit each other")
        if n_exact and not (
            0 <= self.exact_rows[0]
            and self.exact_rows[-1] < n
            and (np.diff(self.exact_rows) > 0).all()
        ):
            raise ValueError("exact_rows is not a rising list of its rows")

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows in memory."""
        rows = self[:]
        return rows if dtype is None else rows.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        """A slice, a row number, an array of row numbers or a mask."""
        if isinstance(index, (int, np.integer)):
            return self[np.array([index])][0]
        numbers = _numbers(index, len(self))  # (k,) or a range
        out = np.empty((len(numbers), self.shape[1]), EXACT)
        for start in range(0, len(numbers), BLOCK):
            self._unpack(numbers[start : start + BLOCK], out[start : start + BLOCK])
        return out

    def _unpack(self, numbers, out):
        """Write the rows numbered to `out`."""
        import torch

        if isinstance(numbers, range) and numbers.step == 1:
            which: Any = slice(numbers.start, numbers.stop)  # no copy of neighbours
            codes = self.codes[which]
        else:
            which = np.asarray(numbers)
            codes = self.codes[which]
        x = torch.from_numpy(codes.astype(np.float32))  # (k, d)
        x.mul_(torch.from_numpy(self.row_scale[which])[:, None])
        x.mul_(torch.from_numpy(self.spread)).add_(torch.from_numpy(self.centre))
        most = float(np.finfo(EXACT).max)
        torch.from_numpy(out).copy_(x.clamp_(-most, most))
        if len(self.exact_rows):
            asked = np.asarray(numbers)
            at = np.searchsorted(self.exact_rows, asked).clip(max=len(self.exact_rows) - 1)
            found = self.exact_rows[at] == asked
            out[found] = self.exact_values[at[found]]


def _numbers(index: Any, n: int) -> range | np.ndarray:
    """The row numbers, from 0, that an index into n rows means. IndexError if there is no such."""
    if isinstance(index, slice):
        return range(n)[index]
    numbers = np.asarray(index)
    if numbers.dtype == bool:
        if numbers.shape != (n,):
            raise IndexError(f"a mask of {numbers.shape} for {n} rows")
        return np.flatnonzero(numbers)
    numbers = np.where(numbers < 0, numbers + n, numbers).astype(np.int64)
    if len(numbers) and not (0 <= numbers.min() and numbers.max() < n):
        raise IndexError(f"rows 0 to {n - 1} exist")
    return numbers
