"""What each function of `fastsae.sae.kernels` computes, entry by entry in PyTorch: their slow
twins, and their stand-ins where there is no Triton."""

import functools
import types

import torch
from pretended_cuda import device_of, mark


def errors(gradient, first, last, column, value, rows, target, factor, n_levels=1):
    n, d = target.shape
    parts = torch.zeros(n, n_levels, d)
    for r in range(n * n_levels):
        for e in range(int(first[r]), int(last[r])):
            parts[r // n_levels, r % n_levels] += value[e] * rows[int(column[e])].float()
    error = parts.cumsum(1) - target[:, None]
    gradient.copy_((error.flip(1).cumsum(1).flip(1) * factor).view(-1, d))
    return error.square().sum((1, 2))[:, None]


def dots(first, last, column, left, right):
    out = torch.zeros(len(column))
    for r in range(len(left)):
        for e in range(int(first[r]), int(last[r])):
            out[e] = left[r].float() @ right[int(column[e])].float()
    return out


def weight_gradients(pointers, row, gradient_row, value, grad_value, x, gradient, decoder, n_main):
    m, d = decoder.shape
    enc, dec, bias = torch.zeros(m, d), torch.zeros(m, d), torch.zeros(m)
    fired = torch.zeros(m, dtype=torch.bool)
    for j in range(m):
        for e in range(int(pointers[j]), int(pointers[j + 1])):
            enc[j] += grad_value[e] * x[int(row[e])]
            dec[j] += value[e] * gradient[int(gradient_row[e])]
            bias[j] += grad_value[e]
            fired[j] |= bool(value[e] > 0) and int(gradient_row[e]) < n_main
        dec[j] -= (dec[j] @ decoder[j]) * decoder[j]
    return enc, dec, bias, fired, enc.square().sum(1) + dec.square().sum(1) + bias.square()


def largest(pre, k):
    return pre.float().topk(k, dim=1).indices.int()


def products_of(x, weight, bias, columns, n_columns):
    out = torch.full((len(x), len(columns)), -torch.inf)
    for i, j in enumerate(columns[: int(n_columns)].tolist()):
        out[:, i] = x @ weight[j] + bias[j]
    return out


ALL = (errors, dots, weight_gradients, largest, products_of)


def launched(machine=None):
    """The twins in place of the module of kernels: what they do is unseen by the pretended
    `machine`, as a kernel's work is, and their results are on its device."""
    if machine is None:
        return types.SimpleNamespace(**{twin.__name__: twin for twin in ALL})

    def as_a_kernel(twin):
        @functools.wraps(twin)
        def launch(*tensors):
            device = device_of(next(t for t in tensors if isinstance(t, torch.Tensor)))
            machine.launches += 1
            with torch._C.DisableTorchFunction():
                out = twin(*tensors)
            for each in out if isinstance(out, tuple) else (out,):
                mark(each, device)
            return out

        return launch

    return types.SimpleNamespace(**{twin.__name__: as_a_kernel(twin) for twin in ALL})
