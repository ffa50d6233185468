"""One training step of a TopK-family autoencoder from its active features only.

HypotheSAEs computes the loss with dense (batch, M) matrices of which K entries per row are not
zero. Here the forward pass, the loss and every gradient use those entries alone, as sparse (CSR)
products; the encoder's own product is the one dense product left, a block of rows at a time so that
its result is still in the cache when the largest K are picked from it.

The outcome equals autograd through HypotheSAEs' `forward` and `compute_loss`
(tests/sae/test_training_step.py), except for three corrections: aux-k ranks dead features by their
pre-activation and applies no ReLU, so that it reaches features whose pre-activation is negative; it
is left out while nothing is dead; and a batch without variance gives 0 instead of NaN.

Shapes: x (B, d), encoder weight (M, d), decoder rows (M, d), one entry per active feature, sorted
by row and column.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastsae.runtime import distributed
from fastsae.sae import Autoencoder
from fastsae.sae.products import linear

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

TINY = 1e-12  # floor of a batch's variance, so that constant batches divide by something
NUMPY_BEATS = 2  # threads of PyTorch that choose the largest of short rows slower than one of NumPy
BLOCK_ROWS = 512  # rows of pre-activations at a time on a CPU: 512 x 4,608 floats are 9 MB


@dataclass
class SparseActivations:
    """The non-zero entries of a sparse (n_rows, M) matrix of feature activations, sorted by row and
    within a row by column.

    Indices are int32, which the sparse products take as they are (int64 would be converted by each
    of them).
    """

    row: torch.Tensor  # (nnz,) int32
    column: torch.Tensor  # (nnz,) int32
    value: torch.Tensor  # (nnz,) float
    n_rows: int
    n_columns: int
    pointers: torch.Tensor | None = None  # (n_rows + 1,) int32, where each row begins

    def crow(self) -> torch.Tensor:
        """(n_rows + 1,) int32: where each row begins, and the number of entries."""
        if self.pointers is None:
            self.pointers = _pointers(self.row, self.n_rows)
        return self.pointers

    def _csr(self, value):
        return torch.sparse_csr_tensor(
            self.crow(), self.column, value, (self.n_rows, self.n_columns), check_invariants=False
        )

    def times(self, dense: torch.Tensor) -> torch.Tensor:
        """(n_rows, M) @ (M, d) -> (n_rows, d)."""
        return weighted_sums(self.crow(), self.column, self.value, dense)

    def dots(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """<left[row], right[column]> for each entry, (nnz,): left (n_rows, d), right (M, d)."""
        return torch.sparse.sampled_addmm(
            self._csr(torch.zeros_like(self.value)), left, right.t(), beta=0.0
        ).values()

    def transposed_times(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ) -> list[torch.Tensor]:
        """For each (row, value, dense) of `pairs`, the product (M, n) @ (n, d) -> (M, d) over the
        entries of this pattern.

        `row` may number the rows of `dense` otherwise than this pattern does; sorting by column is
        done once for all pairs.
        """
        order = _rising(self.column, self.n_columns)
        crow = _pointers(self.column, self.n_columns)
        return [weighted_sums(crow, row[order], value[order], dense) for row, value, dense in pairs]

    def keep(self, mask: torch.Tensor) -> "SparseActivations":
        """The entries where `mask` (nnz,) is true, or whose numbers it lists in rising order."""
        return SparseActivations(
            self.row[mask], self.column[mask], self.value[mask], self.n_rows, self.n_columns
        )


def weighted_sums(
    pointers: torch.Tensor, column: torch.Tensor, value: torch.Tensor, dense: torch.Tensor
) -> torch.Tensor:
    """(n, d): the product of a sparse (n, m) matrix, whose row i has the entries
    pointers[i] : pointers[i + 1] of column and value (nnz,), with dense (m, d).

    On a CPU each row is a weighted bag of embeddings, whose kernel is four to six times as fast as
    the product of CSR tensors.
    """
    if dense.device.type == "cpu":
        return torch.nn.functional.embedding_bag(
            column, dense, pointers, mode="sum", per_sample_weights=value, include_last_offset=True
        )
    size = (len(pointers) - 1, len(dense))
    return torch.sparse_csr_tensor(pointers, column, value, size, check_invariants=False) @ dense


def _pointers(index, n):
    counts = torch.zeros(n + 1, dtype=torch.int32, device=index.device)
    counts[1:] = torch.bincount(index, minlength=n)
    return counts.cumsum_(0, dtype=torch.int32)


def _rising(column, n_columns):
    """The stable order that sorts `column` (nnz,). NumPy sorts 16-bit numbers by radix, several
    times faster than PyTorch sorts so few."""
    if column.device.type == "cpu" and n_columns <= 2**16:
        return torch.from_numpy(column.numpy().astype(np.uint16).argsort(kind="stable"))
    return column.argsort(stable=True)


@functools.lru_cache(maxsize=16)
def _full_rows(n, k, device):
    """(row (n * k,), pointers (n + 1,)) of a pattern with k entries in each of n rows."""
    pointers = torch.arange(0, n * k + 1, k, dtype=torch.int32, device=device)
    return torch.arange(n, dtype=torch.int32, device=device).repeat_interleave(k), pointers


def _full(column, value, n_columns):
    """SparseActivations with equally many in each row, from (B, k) columns and values."""
    row, pointers = _full_rows(*column.shape, column.device)
    return SparseActivations(
        row, column.flatten().int(), value.flatten(), len(column), n_columns, pointers
    )


def top_columns(pre: torch.Tensor, k: int) -> torch.Tensor:
    """Columns of the k largest entries of each row of `pre` (rows, M), (rows, k), rising.

    Where M is large in two exact rounds: columns fall into groups, the k largest lie in the k
    groups with the largest maxima, and only those groups are searched.
    """
    n_columns = pre.shape[1]
    # with which both rounds search about equally many
    most = math.isqrt(n_columns // k)
    size = next(size for size in range(most, 0, -1) if n_columns % size == 0)
    if pre.is_cuda or size < 3:
        return rising(largest(pre, k))
    n_groups = n_columns // size
    # (rows, k)
    best_groups = largest(pre.view(len(pre), size, n_groups).amax(1), k)
    # (rows, k * size)
    candidates = (best_groups[:, None] + torch.arange(0, n_columns, n_groups)[:, None]).flatten(1)
    return rising(candidates.gather(1, largest(pre.gather(1, candidates), k)))


def largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Columns of the k largest of each row of `values` (rows, n), (rows, k) in any order.

    One thread of NumPy takes a third of the time of one of PyTorch's, so up to two of them.
    """
    if values.device.type != "cpu" or torch.get_num_threads() > NUMPY_BEATS:
        return values.topk(k, dim=1, sorted=False).indices
    n = values.shape[1]
    # NumPy has no bfloat16
    order = values.float().numpy().argpartition(n - k, axis=1)
    return torch.from_numpy(order[:, n - k :])


def rising(columns: torch.Tensor) -> torch.Tensor:
    """`columns` (rows, k) sorted in each row."""
    if columns.device.type != "cpu" or torch.get_num_threads() > NUMPY_BEATS:
        return columns.sort(dim=1).values
    return torch.from_numpy(np.sort(columns.numpy(), axis=1))


def _blocks(sae, x_centred, dtype):
    """(first row, pre-activations) of consecutive blocks of rows."""
    size = len(x_centred) if x_centred.is_cuda else BLOCK_ROWS
    weight, bias, x = (
        tensor.detach().to(dtype) for tensor in (sae.encoder.weight, sae.neuron_bias, x_centred)
    )
    # one block of no rows where there are none
    for first in range(0, max(len(x), 1), max(size, 1)):
        yield first, linear(x[first : first + size], weight, bias)


def active_entries(
    sae: Autoencoder,
    x_centred: torch.Tensor,
    *,
    training: bool,
    select: torch.dtype = torch.float32,
) -> SparseActivations:
    """The active features of a batch as HypotheSAEs chooses them, ReLU applied; zeros may remain
    among them.

    TopK: the K largest of each row. BatchTopK: the K * B largest of the batch while training,
    everything above the learned threshold otherwise. With `select=torch.bfloat16` the choice is
    made from a bfloat16 product (several times faster on CPUs that have it), and the values of the
    chosen are computed in float32.
    """
    if not sae.use_batch_topk:
        column, value = _top_k(sae, x_centred, select)
    elif training:
        return _batch_top_k(sae, x_centred)
    else:
        return _above(sae, x_centred, sae.threshold.clamp_min(0))
    entries = _full(column, value, sae.m_total_neurons)
    if select != torch.float32:
        entries.value = (
            entries.dots(x_centred, sae.encoder.weight.detach())
            + sae.neuron_bias.detach()[entries.column]
        )
    entries.value.relu_()
    return entries


def _top_k(sae, x_centred, dtype):
    """(column, value), each (B, K)."""
    n, k, device = len(x_centred), sae.k_active_neurons, x_centred.device
    column = torch.empty(n, k, dtype=torch.long, device=device)
    value = torch.empty(n, k, device=device)
    for first, pre in _blocks(sae, x_centred, dtype):
        column[first : first + len(pre)] = chosen = top_columns(pre, k)
        value[first : first + len(pre)] = pre.gather(1, chosen)
    return column, value


def _above(sae, x_centred, bound):
    """The entries above `bound`, in the order of rows."""
    rows, columns, values = [], [], []
    for first, pre in _blocks(sae, x_centred, torch.float32):
        row, column = (~(pre <= bound)).nonzero(as_tuple=True)  # NaN too, which the loss then shows
        rows.append((row + first).int())
        columns.append(column.int())
        values.append(pre[row, column])
    return SparseActivations(
        torch.cat(rows), torch.cat(columns), torch.cat(values), len(x_centred), sae.m_total_neurons
    )


def _batch_top_k(sae, x_centred):
    """The K * B largest entries of the batch. A bound a little under the usual threshold leaves few
    candidates to sort."""
    n_rows = int(distributed.total(torch.tensor([len(x_centred)])))
    n_wanted = min(sae.k_active_neurons, sae.m_total_neurons) * n_rows
    candidates = _above(
        sae, x_centred, 0.8 * sae.threshold if sae.threshold > 0 else _first_bound(sae, x_centred)
    )
    values = distributed.joined(candidates.value)
    if len(values) < n_wanted:
        candidates = _above(sae, x_centred, -torch.inf)
        values = distributed.joined(candidates.value)
    # each process keeps those of its own that are among the largest of all
    if distributed.together():
        chosen = candidates.value >= values.topk(n_wanted, sorted=False).values.min()
    else:
        chosen = values.topk(n_wanted, sorted=False).indices.sort().values
    entries = candidates.keep(chosen)
    entries.value.relu_()
    return entries


def _first_bound(sae, x_centred):
    """A bound for a start without a threshold, from the first block: without one all
    pre-activations would be candidates."""
    _, pre = next(_blocks(sae, x_centred, torch.float32))
    largest = (
        pre.flatten().topk(min(sae.k_active_neurons * len(pre), pre.numel()), sorted=False).values
    )
    bound = 0.8 * largest.min() if len(largest) else pre.new_tensor(0.0)
    return distributed.least(torch.where(bound > 0, bound, -torch.inf))


@torch.no_grad()
def sparse_step(
    sae: Autoencoder,
    x: torch.Tensor,
    dead: torch.Tensor,
    *,
    aux_coef: float,
    select: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill `.grad` of all four parameters of a `hypothesaes.sae.SparseAutoencoder` for one batch.

    Args: x (B, d) float32; dead (M,) bool, the features that aux-k should revive; aux_coef, the
    weight of that loss; select, see `active_entries`. Returns (loss, fired): the loss as a 0-d
    tensor, and fired (M,) bool; of several processes, each one's part. `sae.decoder.weight` must be
    the transpose of a contiguous (M, d) tensor (see `autoencoder.new_sae`).
    """
    decoder = sae.decoder.weight.detach().t()  # (M, d)
    (n, d), n_all = x.shape, rows_of_all(x)
    prefixes = sae.prefix_lengths or [sae.m_total_neurons]
    n_levels = len(prefixes)
    x_centred = x - sae.input_bias
    active = active_entries(sae, x_centred, training=True, select=select)
    if sae.use_batch_topk:
        update_threshold(sae, active.value)
    leveled = _by_level(active, prefixes)

    # (B, L, d), each level's part of the reconstruction
    error = leveled.times(decoder).view(n, n_levels, d)
    error[:, 0] -= x_centred
    for i in range(1, n_levels):
        error[:, i] += error[:, i - 1]  # now (reconstruction from the prefix) - x
    variance = variance_of(x_centred)
    # mean over levels of their normalised MSE
    loss = torch.linalg.vector_norm(error).square() / (n_all * n_levels * d * variance)
    residual = -error[:, -1] if sae.aux_k and aux_coef and bool(dead.any()) else None

    # d loss / d (level's part) sums the gradients of all prefixes that contain the level.
    grad_out = error.mul_(2 / (n_all * n_levels * d * variance))
    for i in range(n_levels - 1, 0, -1):
        grad_out[:, i - 1] += grad_out[:, i]
    grad_input_bias = grad_out[:, 0].sum(0)
    grad_out = grad_out.view(n * n_levels, d)
    grad_value = leveled.dots(grad_out, decoder) * (active.value > 0)
    grad_decoder, grad_encoder = active.transposed_times(
        [(leveled.row, active.value, grad_out), (active.row, grad_value, x_centred)]
    )
    zeros = torch.zeros_like(sae.neuron_bias)
    fired = zeros.index_add(0, active.column, active.value) > 0
    grad_neuron_bias = zeros.index_add_(0, active.column, grad_value)

    if residual is not None:
        aux, aux_loss, aux_grad_out = _aux_loss(sae, x_centred, decoder, residual, dead, aux_coef)
        aux_grad_value = aux.dots(aux_grad_out, decoder)
        to_decoder, to_encoder = aux.transposed_times(
            [(aux.row, aux.value, aux_grad_out), (aux.row, aux_grad_value, x_centred)]
        )
        loss = loss + aux_loss
        grad_decoder = grad_decoder + to_decoder
        grad_encoder = grad_encoder + to_encoder
        grad_neuron_bias.index_add_(0, aux.column, aux_grad_value)

    # b_dec also enters through x - b_dec: minus the sum over the batch of d loss / d pre, times the
    # encoder.
    grad_input_bias -= grad_neuron_bias @ sae.encoder.weight
    sae.encoder.weight.grad, sae.decoder.weight.grad = grad_encoder, grad_decoder.t()
    sae.input_bias.grad, sae.neuron_bias.grad = grad_input_bias, grad_neuron_bias
    return loss, fired


def rows_of_all(x: torch.Tensor) -> int:
    """How many rows the batch has in all processes together, of which x (B, d) are this one's."""
    return int(distributed.total(torch.tensor([len(x)]))) if distributed.together() else len(x)


def variance_of(x: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of the rows of x (B, d) from their mean, per dimension; about 20 times
    faster than `x.var(0).mean()`.

    The rows must be roughly centred, or the difference of squares would lose digits: x - b_dec and
    residuals are.
    """
    if distributed.together():
        sums = distributed.total(
            torch.cat(
                [x.sum(0), torch.linalg.vector_norm(x).square()[None], x.new_tensor([len(x)])]
            )
        )
        n, d = sums[-1], x.shape[1]
        return (sums[-2] / (n * d) - (sums[:-2] / n).square().mean()).clamp_min(TINY)
    return (torch.linalg.vector_norm(x).square() / x.numel() - x.mean(0).square().mean()).clamp_min(
        TINY
    )


def _by_level(active, prefixes):
    """The entries spread over B * L rows: entry (b, j) goes to row b * L + level(j), the first
    Matryoshka prefix that holds j.

    One product with the decoder then gives every level's part of the reconstruction, and a running
    sum over the levels the reconstruction from each prefix. Columns rise within a row, hence levels
    do, and the entries keep their order.
    """
    if len(prefixes) == 1:
        return active
    level = sum((active.column >= end).int() for end in prefixes[:-1])
    return SparseActivations(
        active.row * len(prefixes) + level,
        active.column,
        active.value,
        active.n_rows * len(prefixes),
        active.n_columns,
    )


def _aux_loss(sae, x_centred, decoder, residual, dead, aux_coef):
    """Dead features predict what the live ones left over: the `aux_k` dead features of largest
    pre-activation, no ReLU.

    Returns their entries, the weighted loss, and its gradient with respect to the predicted
    residual (B, d).
    """
    columns = dead.nonzero().squeeze(1)
    # (B, dead)
    pre = torch.addmm(sae.neuron_bias[columns], x_centred, sae.encoder.weight[columns].t())
    choice = pre.topk(min(sae.aux_k, len(columns)), dim=1).indices.sort(dim=1).values
    aux = _full(columns[choice], pre.gather(1, choice), sae.m_total_neurons)
    error = aux.times(decoder) - residual  # (B, d)
    variance = variance_of(residual)
    numel = rows_of_all(error) * error.shape[1]
    loss = aux_coef * error.square().sum() / (numel * variance)
    return aux, loss, error * (2 * aux_coef / (numel * variance))


def update_threshold(sae: Autoencoder, values: torch.Tensor, rate: float = 1e-2) -> None:
    """BatchTopK's threshold for later use: a running mean of the smallest positive activation,
    starting at the first one.

    (HypotheSAEs starts it at 0, which leaves it too low after short runs.)
    """
    positive = torch.where(values > 0, values, torch.inf)
    positive = distributed.least(positive.min() if len(values) else values.new_tensor(torch.inf))
    positive = torch.where(positive.isinf(), sae.threshold, positive)
    sae.threshold.copy_(
        torch.where(sae.threshold == 0, positive, sae.threshold.lerp(positive, rate))
    )
