"""Triton's kernels in its interpreter, on the CPU: each against its slow twin, then a whole step
against autograd. And compiled for an H100, which needs no GPU.

    pip install triton && python -m pytest tests/sae/test_kernels.py
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton is loaded without its interpreter: run this file alone", True)
os.environ["TRITON_INTERPRET"] = "1"

import kernel_twins
import torch
import triton
import triton.language as tl
from conftest import PROJECT
from test_training_step import VARIANTS, assert_close, gradients, make

from fastsae.sae import kernel_step as module, kernels
from fastsae.sae.autoencoder import reference_step
from fastsae.sae.kernel_step import kernel_step


@triton.jit
def _counted(out, n):
    for i in range(tl.load(n)):
        tl.store(out, i)


try:
    _counted[(1,)](torch.zeros(1), torch.ones(1, dtype=torch.int32))
except triton.runtime.errors.InterpreterError as error:
    pytest.skip(f"Triton {triton.__version__} cannot interpret a loop: {error}", True)

WIDTHS = (1, 12, 80, 130, 300)  # 300: two slices, the second ragged


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def random_entries(n_rows, m, seed=0, most=9):
    """(first, last, column, value): from 0 to `most` entries a row, some rows empty."""
    random = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most + 1, (n_rows,), generator=random)
    counts[::3] = 0
    pointers = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).int()
    n = int(pointers[-1])
    column = torch.randint(0, m, (n,), generator=random).int()
    return pointers[:-1], pointers[1:], column, torch.randn(n, generator=random)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("d", WIDTHS)
def test_errors(d, levels):
    n, m = 5, 20
    entries = random_entries(n * levels, m)
    rows, target = torch.randn(m, d), torch.randn(n, d)
    found, expected = torch.full((2, n * levels, d), torch.nan)
    arguments = (*entries, rows, target, torch.tensor(0.3), levels)
    squares = kernels.errors(found, *arguments)
    close(squares.sum(1, keepdim=True), kernel_twins.errors(expected, *arguments))
    close(found, expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", WIDTHS)
def test_dots(d, kind):
    first, last, column, _ = random_entries(7, 20)
    column = torch.cat([column, column[:3]])  # entries of no row
    left, right = torch.randn(7, d), torch.randn(20, d).to(kind)
    close(
        kernels.dots(first, last, column, left, right),
        kernel_twins.dots(first, last, column, left, right),
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("segment", [256, 4, 1])
@pytest.mark.parametrize("d", [12, 130])
def test_weight_gradients(monkeypatch, d, segment):
    """Features with few entries, none, and more than a segment holds."""
    monkeypatch.setattr(kernels, "SEGMENT", segment)
    monkeypatch.setattr(kernels, "SEGMENTS", 10**9)
    m, n = 12, 6
    first, last, _, _ = random_entries(m, m, most=11)
    pointers = torch.cat([first, last[-1:]])
    nnz = int(last[-1])
    row, gradient_row = torch.randint(0, n, (2, nnz)).int()
    decoder = torch.nn.functional.normalize(torch.randn(m, d), dim=1)
    value = torch.randn(nnz)
    arguments = (pointers, row, gradient_row, value, torch.randn(nnz))
    arguments += (torch.randn(n, d), torch.randn(n, d), decoder, 4)
    found = kernels.weight_gradients(*arguments)
    for one, other in zip(found, kernel_twins.weight_gradients(*arguments)):
        close(one, other)
    for one, other in zip(found, kernels.weight_gradients(*arguments)):
        assert torch.equal(one, other)  # the same bits each time


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("m", "k"), [(5, 3), (64, 64), (96, 4), (300, 24)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_largest(m, k, kind):
    pre = torch.randn(3, m, generator=torch.Generator().manual_seed(m)).to(kind)
    pre[1] = pre[1].round()  # many are equal
    pre[2, 0], pre[2, 1:3] = torch.inf, -torch.inf
    found = kernels.largest(pre, k).long()
    assert all(len(set(row.tolist())) == k for row in found) and 0 <= int(found.min())
    values = pre.gather(1, found)
    assert torch.equal(values, pre.topk(k, dim=1).values)


def test_a_number_that_is_none_is_chosen():
    """So that the loss shows it, as torch.topk has it."""
    pre = torch.randn(2, 40)
    pre[0, 7], pre[1, 9] = torch.nan, -torch.tensor(torch.nan)
    assert kernels.largest(pre, 2)[:, 0].tolist() == [7, 9]


@pytest.mark.parametrize("n_columns", [0, 1, 65, 70])
def test_products_of(n_columns):
    x, weight, bias = torch.randn(5, 40), torch.randn(90, 40), torch.randn(90)
    columns = torch.randperm(90)[:70].int()
    arguments = (x, weight, bias, columns, torch.tensor(n_columns, dtype=torch.int32))
    close(kernels.products_of(*arguments), kernel_twins.products_of(*arguments))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("n_dead", [0, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_equals_autograd(monkeypatch, variant, n_dead):
    """Choice apart, whose kernel takes seconds in the interpreter for as many rows."""
    monkeypatch.setattr(kernels, "MOST_CHOSEN", 0)
    monkeypatch.setattr(module, "kernels", lambda: kernels)
    sae, x = make(**VARIANTS[variant])
    x = x[:8]
    dead = torch.arange(64) < n_dead
    threshold = sae.threshold.clone()
    expected_loss, expected_fired = reference_step(sae, x, dead, aux_coef=0.3)
    sae.adjust_decoder_gradient_()
    expected = gradients(sae)
    sae.threshold.copy_(threshold)
    loss, fired, _ = kernel_step(sae, x, dead, aux_coef=0.3)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_close(gradients(sae), expected)
    assert torch.equal(fired, expected_fired)
    found = gradients(sae)
    sae.threshold.copy_(threshold)
    kernel_step(sae, x, dead, aux_coef=0.3)
    assert all(torch.equal(found[name], p.grad) for name, p in sae.named_parameters())


def test_a_whole_step_with_the_choice():
    sae, x = make(m=40, k=2, aux_k=2, prefix_lengths=[10, 40])
    x, dead = x[:3], torch.arange(40) < 3
    step = functools.partial(kernel_step, sae, x, dead, aux_coef=0.3)
    reference_step(sae, x, dead, aux_coef=0.3)
    sae.adjust_decoder_gradient_()
    expected = gradients(sae)
    step()
    assert_close(gradients(sae), expected)


@pytest.mark.exhaustive
def test_they_compile_for_an_h100_without_spills():
    """In a process of its own, for in this one they are interpreted."""
    code = (
        "import json; from experiments.benchmarks.kernels import registers; "
        "print(json.dumps(registers((4096,), ((65536, 48),))))"
    )
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = {each["kernel"].split()[0]: each for each in json.loads(done.stdout)["kernels"]}
    kinds = {"errors", "dots", "segments", "weight_gradients", "largest", "products_of"}
    assert set(found) == kinds
    for each in found.values():
        assert each["spilled_bytes"] == each["atomics"] == 0 and 16 < each["registers"] <= 255
