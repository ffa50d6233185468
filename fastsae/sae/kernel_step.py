"""A training step of the TopK family on a GPU: what `sparse_step` computes, by the kernels of
`kernels`, without a moment in which the host waits for the device.

Which features are active is decided by a bfloat16 product, several times faster than a float32 one
on a GPU: it names half as many candidates again as are needed, whose float32 values decide. What a
run needs to wait for in `sparse_step` (how many features are dead, how many entries a column has)
stays on the device here.

Of several processes each has its slice of the batch, as in `sparse_step`; their choice of BatchTopK
is made there.
"""

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from fastsae.runtime import distributed
from fastsae.sae import Autoencoder
from fastsae.sae.sparse_step import (
    active_entries,
    rows_of_all,
    sparse_step,
    update_threshold,
    variance_of,
)

SLAB = 2**28  # pre-activations that are kept at a time, 0.5 GB in bfloat16
FEWEST_MORE = 16  # candidates beyond those needed, at least: of few, half as many may be too few
GROUP = (16, 12, 8, 6, 4, 2)  # sizes of groups in which BatchTopK looks for its candidates


@dataclass
class Entries:
    """Active features, sorted by row and within a row by column; row (nnz,), column (nnz,) int32,
    value (nnz,) float32."""

    row: torch.Tensor
    column: torch.Tensor
    value: torch.Tensor


@functools.cache
def kernels() -> Any:
    """The module of the kernels, which needs Triton."""
    from fastsae.sae import kernels

    return kernels


@functools.cache
def usable(device: str) -> bool:
    """Whether a step can be taken by kernels there: on CUDA, with Triton, if a trial of them gives
    what `sparse_step` gives. Triton needs a C compiler besides; a trial that fails is a warning.

    Of several processes all take the kernels or none.
    """
    return device.startswith("cuda") and not distributed.anywhere(not _works(device))


def _works(device):
    """Whether Triton is there and a trial, of this process alone, gives what it should."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        with distributed.apart():
            error = trial(device)
    except Exception as failure:  # whatever Triton, the compiler or the driver raise
        brief = (str(failure) or type(failure).__name__).splitlines()[0][:200]
        print(f"warning: training goes on without kernels of its own, slower ({brief}).")
        return False
    if error > 1e-4:
        print(
            f"warning: training goes on without kernels of its own, slower: on {device} they miss "
            f"by {error:.1e}."
        )
    return error <= 1e-4


def trial(device: str) -> float:
    """The largest relative difference of a gradient between a step by kernels and `sparse_step`, on
    a small autoencoder with every part of a step in it."""
    from fastsae.sae.autoencoder import new_sae

    sizes = {"input_dim": 48, "m_total_neurons": 96, "k_active_neurons": 4, "aux_k": 8}
    sae = new_sae({**sizes, "prefix_lengths": [24, 96]}, device)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 48, generator=random).to(device)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
        sae.normalize_decoder_()
    dead = torch.arange(96, device=device) % 8 == 0
    found = []
    for step in (kernel_step, sparse_step):
        step(sae, x, dead, aux_coef=0.1)
        sae.adjust_decoder_gradient_()
        found.append([parameter.grad for parameter in sae.parameters()])
    differences = [float((a - b).norm() / b.norm()) for a, b in zip(*found)]
    return max(differences, key=lambda each: each if each == each else float("inf"))


@torch.no_grad()
def kernel_step(
    sae: Autoencoder,
    x: torch.Tensor,
    dead: torch.Tensor,
    *,
    aux_coef: float,
    select: torch.dtype = torch.float32,
    most_dead: int = 8192,
) -> tuple[torch.Tensor, ...]:
    """`sparse_step` by kernels: (loss, fired, squared norm of all gradients).

    The decoder's gradient is already without its part along the decoder's rows. Of `dead` (M,)
    bool, the first `most_dead` are looked at, or aux_k if that is more. With
    `select=torch.bfloat16` the K largest of the bfloat16 product are taken without further
    candidates.
    """
    if not len(x):  # a process without a share of the batch
        return sparse_step(sae, x, dead, aux_coef=aux_coef, select=select)
    decoder, encoder = sae.decoder.weight.detach().t(), sae.encoder.weight.detach()  # (M, d)
    (n, d), n_all = x.shape, rows_of_all(x)
    prefixes = sae.prefix_lengths or [sae.m_total_neurons]
    n_levels = len(prefixes)
    x_centred = (x - sae.input_bias).contiguous()
    entries = chosen(sae, x_centred, select)
    if sae.use_batch_topk:
        update_threshold(sae, entries.value)

    # The gradient with respect to each level's part, and after these to what aux-k predicts.
    gradient = torch.empty(n * (n_levels + 1), d, device=x.device)
    main, of_aux = gradient[: n * n_levels], gradient[n * n_levels :]
    normaliser = n_all * n_levels * d * variance_of(x_centred)
    level = torch.bucketize(entries.column, _ends(tuple(prefixes), x.device), right=True)
    main_row = (entries.row * n_levels + level).int()
    pointers = _pointers(main_row, n * n_levels)
    bounds = pointers[:-1].contiguous(), pointers[1:].contiguous()
    squares = kernels().errors(
        main, *bounds, entries.column, entries.value, decoder, x_centred, 2 / normaliser, n_levels
    )
    loss = squares.sum() / normaliser
    grad_value = kernels().dots(*bounds, entries.column, main, decoder) * (entries.value > 0)
    parts = [(entries.row, main_row, entries.column, entries.value, grad_value)]

    if sae.aux_k and aux_coef:
        residual = main.view(n, n_levels, d)[:, -1] * (normaliser / -2)
        columns, n_dead = _first_of(dead, max(most_dead, sae.aux_k))
        aux, aux_loss = _aux_entries(
            sae, x_centred, decoder, residual, of_aux, columns, n_dead, aux_coef
        )
        loss = loss + aux_loss
        parts.append((aux[0], aux[0] + n * n_levels, *aux[1:]))

    row, gradient_row, column, value, grad_value = map(torch.cat, zip(*parts))
    column, order = column.sort(stable=True)
    enc, dec, grad_neuron_bias, fired, squares = kernels().weight_gradients(
        _pointers(column, sae.m_total_neurons),
        row[order],
        gradient_row[order],
        value[order],
        grad_value[order],
        x_centred,
        gradient,
        decoder,
        n * n_levels,
    )
    # b_dec also enters through x - b_dec, as in `sparse_step`
    grad_input_bias = main.view(n, n_levels, d)[:, 0].sum(0) - grad_neuron_bias @ encoder
    sae.encoder.weight.grad, sae.decoder.weight.grad = enc, dec.t()
    sae.input_bias.grad, sae.neuron_bias.grad = grad_input_bias, grad_neuron_bias
    return loss, fired, squares.sum() + grad_input_bias.square().sum()


def _pointers(index: torch.Tensor, n: int) -> torch.Tensor:
    """(n + 1,) int32: where each number from 0 to n - 1 begins in a rising `index` (nnz,) int32."""
    numbers = torch.arange(n + 1, dtype=torch.int32, device=index.device)
    return torch.searchsorted(index, numbers, out_int32=True)


def _numbers_of_rows(n, k, device):
    """(n * k,) int32: each number from 0 to n - 1, k times."""
    return torch.arange(n, dtype=torch.int32, device=device)[:, None].expand(n, k).flatten()


@functools.lru_cache(maxsize=8)
def _ends(prefixes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The prefixes but the last, on the device: copied once, for a copy from the host waits."""
    return torch.tensor(prefixes[:-1], dtype=torch.int32, device=device)


def _first_of(flags, most):
    """(columns (most,) int32, how many are set (0-d) int32): those set come first, in order."""
    columns = flags.int().sort(descending=True, stable=True).indices[:most]
    return columns.int(), flags.sum(dtype=torch.int32).clamp_max(most)


def _aux_entries(sae, x_centred, decoder, residual, gradient, columns, n_dead, aux_coef):
    """Dead features predict what the live ones left over (`sparse_step._aux_loss`).

    Fills `gradient` (B, d) of their prediction. Returns ((row, column, value, grad_value), loss);
    entries that are not used, all of them where nothing is dead, have column M and value 0.
    """
    (n, d), m = x_centred.shape, sae.m_total_neurons
    pre = kernels().products_of(
        x_centred, sae.encoder.weight.detach(), sae.neuron_bias.detach(), columns, n_dead
    )
    k = min(sae.aux_k, len(columns))
    place = kernels().largest(pre, k).long()  # (B, k), those of dead features first
    used = torch.arange(k, device=x_centred.device) < n_dead  # (k,)
    column = torch.where(used, columns[place], m).flatten()
    value = torch.where(used, pre.gather(1, place), 0.0).flatten()
    first = torch.arange(0, n * k, k, dtype=torch.int32, device=x_centred.device)
    last = first + n_dead.clamp_max(k)
    normaliser = rows_of_all(x_centred) * d * variance_of(residual) / aux_coef
    squares = kernels().errors(
        gradient, first, last, column, value, decoder, residual, 2 / normaliser
    )
    grad_value = kernels().dots(first, last, column, gradient, decoder)
    loss = torch.where(n_dead > 0, squares.sum() / normaliser, 0.0)
    return (_numbers_of_rows(n, k, x_centred.device), column, value, grad_value), loss


def chosen(sae: Autoencoder, x_centred: torch.Tensor, select: torch.dtype) -> Entries:
    """The active features of a batch while training, as `active_entries` chooses them, ReLU
    applied."""
    if sae.use_batch_topk and distributed.together():
        found = active_entries(sae, x_centred, training=True)
        return Entries(found.row, found.column, found.value)
    n, m, k = len(x_centred), sae.m_total_neurons, min(sae.k_active_neurons, sae.m_total_neurons)
    n_chosen, product = k if select == torch.bfloat16 else n_candidates(k), torch.bfloat16
    if n_chosen >= m:  # no product of all would be saved
        n_chosen, product = k, torch.float32
    choose = _largest_of_batch if sae.use_batch_topk else _largest_of_rows
    row, column = choose(sae, x_centred, n_chosen, product)
    pointers = _pointers(row, n)
    value = kernels().dots(
        pointers[:-1].contiguous(),
        pointers[1:].contiguous(),
        column,
        x_centred,
        sae.encoder.weight.detach(),
    )
    value += sae.neuron_bias.detach()[column]
    if n_chosen > k:
        best = _best_of_batch if sae.use_batch_topk else _best_of_rows
        kept = best(value, n, k)
        row, column, value = row[kept], column[kept], value[kept]
    return Entries(row, column, value.relu_())


def n_candidates(k: int) -> int:
    """How many features of the largest bfloat16 product a token has its k chosen from."""
    return k + max(k // 2, FEWEST_MORE)


def _best_of_rows(value, n, k):
    """The numbers, rising, of the k largest entries of each row; `value` has equally many a row."""
    value = value.view(n, -1)
    place = value.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    first = torch.arange(0, value.numel(), value.shape[1], device=value.device)
    return (place + first[:, None]).flatten()


def _best_of_batch(value, n, k):
    """The numbers, rising, of the n * k largest entries."""
    return value.topk(n * k, sorted=False).indices.sort().values


def _slabs(sae, x_centred, product):
    """(first row, pre-activations) of consecutive slabs of rows, computed in the type `product`."""
    weight, bias, x = (
        tensor.detach().to(product) for tensor in (sae.encoder.weight, sae.neuron_bias, x_centred)
    )
    size = max(1, SLAB // len(weight))
    for first in range(0, len(x), size):
        yield first, torch.addmm(bias, x[first : first + size], weight.t())


def _largest_of_rows(sae, x_centred, k, product):
    """(row, column), (B * k,) int32 each, of the k largest pre-activations of each row."""
    found = [kernels().largest(pre, k) for _, pre in _slabs(sae, x_centred, product)]
    column = torch.cat(found).sort(dim=1).values
    return _numbers_of_rows(len(column), k, column.device), column.flatten()


def _largest_of_batch(sae, x_centred, k, product):
    """(row, column), (B * k,) int32 each, of the B * k largest pre-activations of the batch."""
    m, n_wanted = sae.m_total_neurons, len(x_centred) * k
    values, places = [], []
    for first, pre in _slabs(sae, x_centred, product):
        place = _largest_places(pre.view(-1), min(n_wanted, pre.numel()), m)
        values.append(pre.view(-1)[place])
        places.append(place + first * m)
    place = torch.cat(places)
    if len(places) > 1:
        place = place[torch.cat(values).topk(n_wanted, sorted=False).indices]
    place = place.sort().values
    return (place // m).int(), (place % m).int()


def _largest_places(pre, n, m):
    """Where the n largest of `pre` (B * M,) stand, in any order. Neighbours form groups: the n
    largest lie in the n groups with the largest maxima, and only these are searched."""
    size = next((size for size in GROUP if m % size == 0 and 4 * n * size <= len(pre)), 1)
    if size == 1:
        return pre.topk(n, sorted=False).indices
    groups = pre.view(-1, size)
    best = groups.amax(1).topk(n, sorted=False).indices  # (n,)
    inside = groups[best].view(-1).topk(n, sorted=False).indices
    return best[inside // size] * size + inside % size
