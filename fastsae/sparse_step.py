"""One training step of a TopK-family autoencoder from its active features only.

HypotheSAEs computes the loss with dense (batch, M) matrices of which K entries per row are not zero. Here the forward pass, the
loss and every gradient use those entries alone, as sparse (CSR) products; the encoder's own product is the one dense product
left. The result equals autograd through HypotheSAEs' `forward` and `compute_loss` (tests/test_training_step.py), except for
three corrections: aux-k ranks dead features by their pre-activation and applies no ReLU, so that it reaches features whose
pre-activation is negative; it is left out while nothing is dead; and a batch without variance gives 0 instead of NaN.

Shapes: x (B, d), encoder weight (M, d), decoder rows (M, d), one entry per active feature, sorted by row and then by column.
"""
import warnings
from dataclasses import dataclass

import torch

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

TINY = 1e-12  # floor of a batch's variance, so that constant batches divide by something


@dataclass
class Entries:
    """The non-zero entries of a sparse (n_rows, M) matrix of features, sorted by row and column."""

    row: torch.Tensor     # (nnz,) int64
    column: torch.Tensor  # (nnz,) int64
    value: torch.Tensor   # (nnz,) float
    n_rows: int
    n_columns: int

    def crow(self):
        """CSR row pointers, (n_rows + 1,)."""
        return _pointers(self.row, self.n_rows)

    def times(self, dense):
        """(n_rows, M) @ (M, d) -> (n_rows, d)."""
        return torch.sparse_csr_tensor(self.crow(), self.column, self.value, (self.n_rows, self.n_columns),
                                       check_invariants=False) @ dense

    def dots(self, left, right):
        """<left[row], right[column]> for each entry, (nnz,): left (n_rows, d), right (M, d)."""
        pattern = torch.sparse_csr_tensor(self.crow(), self.column, torch.zeros_like(self.value),
                                          (self.n_rows, self.n_columns), check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values()


def _pointers(sorted_index, n):
    counts = torch.bincount(sorted_index, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def pre_activations(sae, x):
    """W_enc (x - b_dec) + b_enc for a batch, (B, M)."""
    return torch.addmm(sae.neuron_bias, x - sae.input_bias, sae.encoder.weight.t())


def active_entries(sae, pre, *, training):
    """The active features of a batch as HypotheSAEs chooses them, ReLU applied; zeros may remain among them.

    TopK: the K largest of each row. BatchTopK: the K * B largest of the batch while training, everything above the learned
    threshold otherwise.
    """
    n_rows, n_columns = pre.shape
    if not sae.use_batch_topk:
        column = pre.topk(sae.k_active_neurons, dim=1, sorted=False).indices.sort(dim=1).values  # (B, K)
        value = pre.gather(1, column).relu_().flatten()
        row = torch.arange(n_rows, device=pre.device).repeat_interleave(column.shape[1])
        return Entries(row, column.flatten(), value, n_rows, n_columns)
    if training:
        flat = pre.flatten().topk(min(sae.k_active_neurons * n_rows, pre.numel()), sorted=False).indices.sort().values
    else:
        flat = (pre > sae.threshold.clamp_min(0)).flatten().nonzero().squeeze(1)
    return Entries(flat // n_columns, flat % n_columns, pre.flatten()[flat].relu_(), n_rows, n_columns)


@torch.no_grad()
def sparse_step(sae, x, dead, *, aux_coef):
    """Fill `.grad` of all four parameters of a `hypothesaes.sae.SparseAutoencoder` for one batch.

    Args: x (B, d) float32; dead (M,) bool, the features that aux-k should revive; aux_coef, the weight of that loss.
    Returns (loss, fired): the loss as a 0-d tensor, and fired (M,) bool. `sae.decoder.weight` must be the transpose of a
    contiguous (M, d) tensor (see `autoencoder.new_sae`).
    """
    encoder, decoder = sae.encoder.weight, sae.decoder.weight.t()  # (M, d) each
    n, d = x.shape
    pre = pre_activations(sae, x)
    active = active_entries(sae, pre, training=True)
    fired = torch.zeros(pre.shape[1], dtype=torch.bool, device=x.device).index_fill_(0, active.column[active.value > 0], True)
    if sae.use_batch_topk:
        update_threshold(sae, active.value)

    # Matryoshka: entry (b, j) goes to row b * L + level(j), so one product gives every level's part of the reconstruction,
    # and a running sum over the levels gives the reconstruction from each prefix.
    prefixes = sae.prefix_lengths or [sae.m_total_neurons]
    n_levels = len(prefixes)
    if n_levels > 1:
        ends = torch.tensor(prefixes, device=x.device)
        level = torch.bucketize(active.column, ends, right=True)
        leveled = Entries(active.row * n_levels + level, active.column, active.value, n * n_levels, active.n_columns)
    else:
        leveled = active
    error = leveled.times(decoder).view(n, n_levels, d)            # (B, L, d), each level's part of the reconstruction
    error[:, 0] += sae.input_bias - x
    for i in range(1, n_levels):
        error[:, i] += error[:, i - 1]                             # now (reconstruction from the prefix) - x
    variance = (x - x.mean(0)).square().mean().clamp_min(TINY)
    loss = error.square().mean() / variance                        # the mean over levels of their normalised MSE

    # d loss / d (level's part) sums the gradients of all prefixes that contain the level.
    grad_out = error * (2 / (n * n_levels * d * variance))
    for i in range(n_levels - 1, 0, -1):
        grad_out[:, i - 1] += grad_out[:, i]
    grad_input_bias = grad_out[:, 0].sum(0)
    grad_out = grad_out.reshape(n * n_levels, d)
    grad_value = leveled.dots(grad_out, decoder) * (active.value > 0)

    x_centred = x - sae.input_bias
    grad_decoder = _transposed_times(leveled, leveled.value, grad_out)
    grad_encoder = _transposed_times(active, grad_value, x_centred)
    grad_neuron_bias = torch.zeros_like(sae.neuron_bias).index_add_(0, active.column, grad_value)

    if sae.aux_k and aux_coef and bool(dead.any()):
        aux, aux_loss, aux_grad_out = _aux_loss(sae, pre, decoder, -error[:, -1], dead, aux_coef)
        loss = loss + aux_loss
        aux_grad_value = aux.dots(aux_grad_out, decoder)
        grad_decoder += _transposed_times(aux, aux.value, aux_grad_out)
        grad_encoder += _transposed_times(aux, aux_grad_value, x_centred)
        grad_neuron_bias.index_add_(0, aux.column, aux_grad_value)

    # b_dec also enters through x - b_dec: minus the sum over the batch of d loss / d pre, times the encoder.
    grad_input_bias -= grad_neuron_bias @ encoder
    sae.encoder.weight.grad, sae.decoder.weight.grad = grad_encoder, grad_decoder.t()
    sae.input_bias.grad, sae.neuron_bias.grad = grad_input_bias, grad_neuron_bias
    return loss, fired


def _transposed_times(entries, value, dense):
    """(n_rows, M)^T @ (n_rows, d) -> (M, d), with the entries' pattern and other values."""
    order = entries.column.argsort(stable=True)
    crow = _pointers(entries.column, entries.n_columns)
    return torch.sparse_csr_tensor(crow, entries.row[order], value[order], (entries.n_columns, entries.n_rows),
                                   check_invariants=False) @ dense


def _aux_loss(sae, pre, decoder, residual, dead, aux_coef):
    """Dead features predict what the live ones left over: the `aux_k` dead features of largest pre-activation, no ReLU.

    Returns their entries, the weighted loss, and its gradient with respect to the predicted residual (B, d).
    """
    dead_columns = dead.nonzero().squeeze(1)
    k = min(sae.aux_k, dead_columns.numel())
    value, choice = pre[:, dead_columns].topk(k, dim=1)
    choice, order = choice.sort(dim=1)
    row = torch.arange(pre.shape[0], device=pre.device).repeat_interleave(k)
    aux = Entries(row, dead_columns[choice].flatten(), value.gather(1, order).flatten(), *pre.shape)
    error = aux.times(decoder) - residual  # (B, d)
    variance = (residual - residual.mean(0)).square().mean().clamp_min(TINY)
    loss = aux_coef * error.square().mean() / variance
    return aux, loss, error * (2 * aux_coef / (error.numel() * variance))


def update_threshold(sae, values, rate=1e-2):
    """BatchTopK's threshold for later use: a running mean of the smallest positive activation, starting at the first one.

    (HypotheSAEs starts it at 0, which leaves it too low after short runs.)
    """
    positive = torch.where(values > 0, values, torch.inf).min()
    positive = torch.where(positive.isinf(), sae.threshold, positive)
    sae.threshold.copy_(torch.where(sae.threshold == 0, positive, sae.threshold.lerp(positive, rate)))
