"""Triton kernels of a training step on a GPU, each with the function that launches it.

None of them adds up by atomics, so that two runs give the same bits, and none makes the host wait:
sizes are known beforehand, and what is not used of them is left out by pointers on the device.
`kernel_step` puts them together. With TRITON_INTERPRET=1 set before the first import they run on
CPU tensors, for tests.

Entries are the active features of a batch. Of entries in the order of rows, those of row r stand
from `first[r]` to `last[r]`; of entries in the order of columns, those of column j from
`pointers[j]` to `pointers[j + 1]`. Indices are int32, values float32; matrices of rows (n, d) are
contiguous, and their rows are read in float32 whatever their type.
"""

# the kernels' arguments have Triton's types
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl

SLICE = 256  # columns of the decoder that a program of `errors` reads; their rows stay in L2
AT_ONCE = 4  # entries whose rows are on their way at the same time
ROWS_AT_ONCE = 2  # and where a program holds whole rows
SEGMENT = 256  # entries of a feature that one program adds up, at least; more are divided
SEGMENTS = 2048  # parts of features, about, that all entries together may be divided into
TILE = 16384  # elements of a row that `largest` looks at together
MOST_CHOSEN = 512  # entries of a row that `largest` can choose
BLOCK = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "num_warps": 4}  # of `products_of`
LOWEST = tl.constexpr(-(2**31))  # below the key of every number


@triton.jit
def _errors(
    gradient,
    squares,
    first,
    last,
    column,
    value,
    rows,
    target,
    factor,
    d,
    L: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
):
    """One example and one slice of columns a program; see `errors`."""
    b, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = s * D + tl.arange(0, D)
    inside = at < d
    error = -tl.load(target + b * d + at, mask=inside, other=0.0).to(tl.float32)
    square = tl.zeros((D,), tl.float32)
    scale = tl.load(factor)
    for level in tl.static_range(L):
        r = b * L + level
        end = tl.load(last + r)
        for e in range(tl.load(first + r), end, U):
            entry = e + tl.arange(0, U)
            there = entry < end
            j = tl.load(column + entry, mask=there, other=0).to(tl.int64)
            v = tl.load(value + entry, mask=there, other=0.0)
            of_row = rows + j[:, None] * d + at[None, :]
            w = tl.load(of_row, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
            error += tl.sum(v[:, None] * w, 0)
        square += error * error
        # the gradient where there is one level; with more the errors, added up below
        kept = error * scale if L == 1 else error
        tl.store(gradient + r * d + at, kept, mask=inside)
    tl.store(squares + b * tl.num_programs(1) + s, tl.sum(square, 0))
    if L > 1:
        tl.debug_barrier()
        above = tl.zeros((D,), tl.float32)
        for i in tl.static_range(L):
            r = b * L + (L - 1 - i)
            above += tl.load(gradient + r * d + at, mask=inside, other=0.0)
            tl.store(gradient + r * d + at, above * scale, mask=inside)


def errors(
    gradient: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    column: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    target: torch.Tensor,
    factor: torch.Tensor,
    n_levels: int = 1,
) -> torch.Tensor:
    """Reconstruct, compare and differentiate: the errors of each level l of an example b are

        error[b, l] = sum of value * rows[column] over the entries of levels 0 to l, - target[b]

    Fills gradient (B * L, d) with `factor` (0-d) times the sum of error[b, l'] over l' >= l, the
    gradient of level l's part. Entries of level l of example b are those of row b * L + l. Returns
    partial sums (B, slices) of the squared errors.
    """
    n, d = target.shape
    width = min(SLICE, triton.next_power_of_2(d))
    squares = torch.empty(n, triton.cdiv(d, width), device=target.device)
    sizes = {"L": n_levels, "D": width, "U": AT_ONCE, "num_warps": max(1, width // 256)}
    _errors[squares.shape](
        gradient, squares, first, last, column, value, rows, target, factor, d, **sizes
    )
    return squares


@triton.jit
def _dots(out, first, last, column, left, right, d, D: tl.constexpr, U: tl.constexpr):
    """One row of `left` a program, in registers; see `dots`."""
    r = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, D)
    inside = at < d
    end = tl.load(last + r)
    x = tl.load(left + r * d + at, mask=inside, other=0.0).to(tl.float32)
    for e in range(tl.load(first + r), end, U):
        entry = e + tl.arange(0, U)
        there = entry < end
        j = tl.load(column + entry, mask=there, other=0).to(tl.int64)
        of_row = right + j[:, None] * d + at[None, :]
        w = tl.load(of_row, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        tl.store(out + entry, tl.sum(x[None, :] * w, 1), mask=there)


def dots(
    first: torch.Tensor,
    last: torch.Tensor,
    column: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
) -> torch.Tensor:
    """<left[row], right[column]> of each entry, (nnz,); of entries in no row, 0."""
    out = torch.zeros(len(column), device=left.device)
    d = left.shape[1]
    _dots[(len(left),)](out, first, last, column, left, right, d, **_whole_row(d))
    return out


def _whole_row(d: int) -> dict[str, int]:
    """Sizes of a program that holds a whole row of d numbers."""
    width = triton.next_power_of_2(d)
    return {"D": width, "U": ROWS_AT_ONCE, "num_warps": max(1, min(16, width // 512))}


@triton.jit
def _added_up(
    start,
    end,
    row,
    gradient_row,
    value,
    grad_value,
    x,
    gradient,
    n_main,
    d,
    D: tl.constexpr,
    U: tl.constexpr,
):
    """What the entries from `start` to `end`, all of one feature, add to its gradients: encoder
    row (D,), decoder row (D,), bias, and how many of them make it count as fired."""
    at = tl.arange(0, D)
    inside = at < d
    enc, dec = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    bias, fired = tl.zeros((U,), tl.float32), tl.zeros((U,), tl.int32)
    for e in range(start, end, U):
        entry = e + tl.arange(0, U)
        there = entry < end
        b = tl.load(row + entry, mask=there, other=0).to(tl.int64)
        r = tl.load(gradient_row + entry, mask=there, other=0).to(tl.int64)
        a = tl.load(value + entry, mask=there, other=0.0)
        g = tl.load(grad_value + entry, mask=there, other=0.0)
        both = there[:, None] & inside[None, :]
        of_x = tl.load(x + b[:, None] * d + at[None, :], mask=both, other=0.0).to(tl.float32)
        enc += tl.sum(g[:, None] * of_x, 0)
        of_out = tl.load(gradient + r[:, None] * d + at[None, :], mask=both, other=0.0)
        dec += tl.sum(a[:, None] * of_out.to(tl.float32), 0)
        bias += g
        fired += ((a > 0) & (r < n_main)).to(tl.int32)
    return enc, dec, tl.sum(bias, 0), tl.sum(fired, 0)


@triton.jit
def _segments(
    part_enc,
    part_dec,
    part_bias,
    part_fired,
    feature,
    parts,
    pointers,
    row,
    gradient_row,
    value,
    grad_value,
    x,
    gradient,
    n_main,
    d,
    segment,
    n_features,
    D: tl.constexpr,
    U: tl.constexpr,
):
    """One part of a feature with many entries a program."""
    s = tl.program_id(0).to(tl.int64)
    j = tl.load(feature + s)
    if j < n_features:
        at = tl.arange(0, D)
        inside = at < d
        start = tl.load(pointers + j) + (s.to(tl.int32) - tl.load(parts + j)) * segment
        end = tl.minimum(start + segment, tl.load(pointers + j + 1))
        enc, dec, bias, fired = _added_up(
            start, end, row, gradient_row, value, grad_value, x, gradient, n_main, d, D, U
        )
        tl.store(part_enc + s * d + at, enc, mask=inside)
        tl.store(part_dec + s * d + at, dec, mask=inside)
        tl.store(part_bias + s, bias)
        tl.store(part_fired + s, fired)


@triton.jit
def _weight_gradients(
    to_enc,
    to_dec,
    to_bias,
    to_fired,
    squares,
    part_enc,
    part_dec,
    part_bias,
    part_fired,
    parts,
    pointers,
    row,
    gradient_row,
    value,
    grad_value,
    x,
    gradient,
    decoder,
    n_main,
    d,
    segment,
    D: tl.constexpr,
    U: tl.constexpr,
):
    """One feature a program: its own entries, or the parts that `_segments` made of them."""
    j = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, D)
    inside = at < d
    start, end = tl.load(pointers + j), tl.load(pointers + j + 1)
    own_end = tl.where(end - start > segment, start, end)
    enc, dec, bias, fired = _added_up(
        start, own_end, row, gradient_row, value, grad_value, x, gradient, n_main, d, D, U
    )
    for s in range(tl.load(parts + j).to(tl.int64), tl.load(parts + j + 1).to(tl.int64)):
        part = s * d + at
        enc += tl.load(part_enc + part, mask=inside, other=0.0)
        dec += tl.load(part_dec + part, mask=inside, other=0.0)
        bias += tl.load(part_bias + s)
        fired += tl.load(part_fired + s)
    w = tl.load(decoder + j * d + at, mask=inside, other=0.0)
    dec -= tl.sum(dec * w, 0) * w
    tl.store(to_enc + j * d + at, enc, mask=inside)
    tl.store(to_dec + j * d + at, dec, mask=inside)
    tl.store(to_bias + j, bias)
    tl.store(to_fired + j, fired > 0)
    tl.store(squares + j, tl.sum(enc * enc, 0) + tl.sum(dec * dec, 0) + bias * bias)


def weight_gradients(
    pointers: torch.Tensor,
    row: torch.Tensor,
    gradient_row: torch.Tensor,
    value: torch.Tensor,
    grad_value: torch.Tensor,
    x: torch.Tensor,
    gradient: torch.Tensor,
    decoder: torch.Tensor,
    n_main: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of encoder rows (M, d), decoder rows (M, d) and biases (M,), fired (M,) bool, and
    what each feature adds to the squared norm of all gradients (M,).

    Entries are in the order of columns. Encoder: sum of grad_value * x[row]; decoder: sum of
    value * gradient[gradient_row], less its part along the decoder row (of length 1); biases: sum
    of grad_value. A feature has fired if an entry with a gradient_row below `n_main` is positive.
    Features without entries get zeros.
    """
    m, d = decoder.shape
    # A feature with more entries than a segment is divided, into fewer parts than twice its entries
    # make segments: so many programs are enough, however the entries are spread.
    segment = max(SEGMENT, triton.cdiv(len(row), SEGMENTS))
    n_parts = 2 * len(row) // segment + 1
    counts = pointers.diff()
    needed = torch.where(counts > segment, (counts + segment - 1) // segment, 0)
    parts = torch.zeros(m + 1, dtype=torch.int32, device=x.device)
    torch.cumsum(needed, 0, dtype=torch.int32, out=parts[1:])
    numbers = torch.arange(n_parts, dtype=torch.int32, device=x.device)
    feature = torch.searchsorted(
        parts[1:], numbers, right=True, out_int32=True
    )  # M beyond the last

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=x.device)

    partial = (empty(n_parts, d), empty(n_parts, d), empty(n_parts))
    partial_fired = empty(n_parts, dtype=torch.int32)
    sources: tuple[Any, ...] = (pointers, row, gradient_row, value, grad_value, x, gradient)
    sizes = _whole_row(d)
    _segments[(n_parts,)](
        *partial, partial_fired, feature, parts, *sources, n_main, d, segment, m, **sizes
    )
    enc, dec, bias = empty(m, d), empty(m, d), empty(m)
    fired, squares = empty(m, dtype=torch.bool), empty(m)
    _weight_gradients[(m,)](
        enc,
        dec,
        bias,
        fired,
        squares,
        *partial,
        partial_fired,
        parts,
        *sources,
        decoder,
        n_main,
        d,
        segment,
        **sizes,
    )
    return enc, dec, bias, fired, squares


@triton.jit
def _key(number):
    """An int32 that rises with a float32; NaN has the highest."""
    bits = number.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(number != number, 0x7FFFFFFF, key)


@triton.jit
def _largest(
    out, pre, m, k, K: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, V: tl.constexpr
):
    """One row a program.

    Columns fall into GROUPS groups of STEPS times V neighbours. The K largest lie in the K groups
    with the largest maxima, so one pass finds the maxima and a second looks at those groups alone.
    Keys are sorted together with their numbers, the lower number first among equals.
    """
    b = tl.program_id(0).to(tl.int64)
    group, v = tl.arange(0, GROUPS), tl.arange(0, V)
    best = tl.full((GROUPS,), LOWEST, tl.int32)
    for step in range(STEPS):
        at = step * GROUPS * V + group[:, None] * V + v[None, :]
        number = tl.load(pre + b * m + at, mask=at < m, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.max(tl.where(at < m, _key(number), LOWEST), 1))
    packed = (best.to(tl.int64) << 31) | (0x7FFFFFFF - group).to(tl.int64)
    chosen = 0x7FFFFFFF - (tl.topk(packed, K) & 0x7FFFFFFF).to(tl.int32)
    c = tl.arange(0, STEPS * V)
    at = (c // V * GROUPS * V + c % V)[None, :] + chosen[:, None] * V
    number = tl.load(pre + b * m + at, mask=at < m, other=0.0).to(tl.float32)
    key = tl.where(at < m, _key(number), LOWEST)
    packed = (key.to(tl.int64) << 31) | (0x7FFFFFFF - at).to(tl.int64)
    top = tl.topk(tl.reshape(packed, (K * STEPS * V,)), K)
    place = tl.arange(0, K)
    tl.store(out + b * k + place, 0x7FFFFFFF - (top & 0x7FFFFFFF).to(tl.int32), mask=place < k)


def largest(pre: torch.Tensor, k: int) -> torch.Tensor:
    """Columns of the k largest of each row of `pre` (n, M), (n, k) int32, the largest first; of
    equal numbers the same ones are chosen each time."""
    n, m = pre.shape
    if k > MOST_CHOSEN:
        return pre.topk(k, dim=1).indices.int()
    out = torch.empty(n, k, dtype=torch.int32, device=pre.device)
    _largest[(n,)](out, pre, m, k, **_groups(m, k))
    return out


def _groups(m: int, k: int) -> dict[str, int]:
    """Sizes of `_largest`: about as many groups as candidates in the groups that are chosen."""
    chosen = triton.next_power_of_2(k)
    groups = max(chosen, triton.next_power_of_2(int((m * chosen) ** 0.5)))
    in_group = triton.next_power_of_2(triton.cdiv(m, groups))
    neighbours = max(1, min(in_group, TILE // groups, 8))
    warps = max(1, min(16, groups * neighbours // 512))
    steps = triton.cdiv(in_group, neighbours)
    return {"K": chosen, "GROUPS": groups, "STEPS": steps, "V": neighbours, "num_warps": warps}


@triton.jit
def _products_of(
    out,
    x,
    weight,
    bias,
    columns,
    n_columns,
    n,
    d,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of rows and columns a program; blocks without columns read no weights."""
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = at < tl.load(n_columns)
    j = tl.load(columns + at, mask=there, other=0).to(tl.int64)
    depth = tl.where(tl.program_id(0) * COLUMNS < tl.load(n_columns), d, 0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(0, depth, DEPTH):
        k = i + tl.arange(0, DEPTH)
        left = x + b.to(tl.int64)[:, None] * d + k[None, :]
        right = weight + j[:, None] * d + k[None, :]
        total = tl.dot(
            tl.load(left, mask=(b < n)[:, None] & (k < d)[None, :], other=0.0),
            tl.trans(tl.load(right, mask=there[:, None] & (k < d)[None, :], other=0.0)),
            total,
            input_precision="tf32x3",
        )
    total += tl.load(bias + j, mask=there, other=0.0)[None, :]
    to = out + b.to(tl.int64)[:, None] * size + at[None, :]
    total = tl.where(there[None, :], total, float("-inf"))
    tl.store(to, total, mask=(b < n)[:, None] & (at < size)[None, :])


def products_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    columns: torch.Tensor,
    n_columns: torch.Tensor,
) -> torch.Tensor:
    """x @ weight[columns].T + bias[columns], (n, size), of the first `n_columns` (0-d, on the
    device) of `columns` (size,); -inf in the places of the others."""
    n, size = len(x), len(columns)
    out = torch.empty(n, size, device=x.device)
    grid = (triton.cdiv(size, BLOCK["COLUMNS"]), triton.cdiv(n, BLOCK["ROWS"]))
    _products_of[grid](out, x, weight, bias, columns, n_columns, n, x.shape[1], size, **BLOCK)
    return out
