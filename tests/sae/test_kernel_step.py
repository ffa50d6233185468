"""The step by kernels, with their slow twins in PyTorch in the place of Triton's: against autograd,
against the sparse step through whole trainings, and without a moment in which the host waits.
test_kernels.py has Triton's own."""

import functools
import importlib.util

import kernel_twins
import pytest
import step_waits
import torch
from conftest import planted_tokens
from pretended_cuda import pretended
from test_training_step import VARIANTS, assert_close, gradients, make

from fastsae.sae import kernel_step as module
from fastsae.sae.autoencoder import reference_step
from fastsae.sae.kernel_step import chosen, kernel_step
from fastsae.sae.sparse_step import active_entries, sparse_step
from fastsae.training import dead_features, objective
from fastsae.training.run import TrainingRun

STEP = functools.partial(kernel_step, aux_coef=0.1)


@pytest.fixture(autouse=True)
def twins(monkeypatch):
    monkeypatch.setattr(module, "kernels", kernel_twins.launched)


@pytest.mark.parametrize("n_dead", [0, 1, 5, 30])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_autograd(variant, n_dead):
    sae, x = make(**VARIANTS[variant])
    dead = torch.zeros(64, dtype=torch.bool)
    dead[torch.randperm(64)[:n_dead]] = True
    threshold = sae.threshold.clone()
    expected_loss, expected_fired = reference_step(sae, x, dead, aux_coef=0.3)
    sae.adjust_decoder_gradient_()
    expected, expected_threshold = gradients(sae), sae.threshold.clone()
    sae.threshold.copy_(threshold)
    loss, fired, squared_norm = kernel_step(sae, x, dead, aux_coef=0.3)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_close(gradients(sae), expected)
    assert torch.equal(fired, expected_fired)
    torch.testing.assert_close(sae.threshold, expected_threshold)
    norm = torch.cat([each.flatten() for each in expected.values()]).norm()
    assert float(squared_norm.sqrt()) == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("n_dead", [3, 30])
def test_no_more_dead_features_than_allowed(n_dead):
    """The first of them; with aux-k above that, as many as it takes."""
    sae, x = make(aux_k=2)
    dead = torch.arange(64) % (64 // n_dead) == 0
    first = dead & (dead.cumsum(0) <= 3)
    reference_step(sae, x, first, aux_coef=0.3)
    sae.adjust_decoder_gradient_()
    expected = gradients(sae)
    kernel_step(sae, x, dead, aux_coef=0.3, most_dead=3)
    assert_close(gradients(sae), expected)


@pytest.mark.parametrize("slab", [2**28, 64 * 7, 1])
@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
def test_slabs_change_nothing(monkeypatch, variant, slab):
    sae, x = make(**VARIANTS[variant])
    expected = active_entries(sae, (x - sae.input_bias).detach(), training=True)
    monkeypatch.setattr(module, "SLAB", slab)
    with torch.no_grad():
        found = chosen(sae, x - sae.input_bias, torch.float32)
    assert torch.equal(found.row, expected.row) and torch.equal(found.column, expected.column)
    torch.testing.assert_close(found.value, expected.value.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_batch_topk": True}])
def test_the_choice_is_that_of_float32(options):
    """Candidates come from bfloat16, in which many neighbours are equal; values decide."""
    sae, x = make(d=32, m=512, k=8, **options)
    x_centred = (x - sae.input_bias).detach()
    coarse = torch.addmm(
        sae.neuron_bias.bfloat16(), x_centred.bfloat16(), sae.encoder.weight.bfloat16().t()
    ).float()
    expected = active_entries(sae, x_centred, training=True)
    other = coarse.topk(8, dim=1).indices.sort(dim=1).values.flatten()
    with torch.no_grad():
        found = chosen(sae, x_centred, torch.float32)
        coarser = chosen(sae, x_centred, torch.bfloat16)
    assert torch.equal(found.row, expected.row) and torch.equal(found.column, expected.column)
    if not options:
        assert torch.equal(coarser.column, other.int())
        assert not torch.equal(coarser.column, expected.column)


def test_few_features_need_no_candidates():
    """M features, all of them active, or as many candidates as features."""
    for m, k in ((8, 8), (20, 4)):
        sae, x = make(m=m, k=k, aux_k=0)
        expected = active_entries(sae, (x - sae.input_bias).detach(), training=True)
        with torch.no_grad():
            found = chosen(sae, x - sae.input_bias, torch.float32)
        assert torch.equal(found.column, expected.column)


def test_groups_of_neighbours_change_nothing():
    pre = torch.randn(40 * 96, generator=torch.Generator().manual_seed(0))
    for n in (1, 40, 60, 3000):
        places = module._largest_places(pre, n, 96)
        assert torch.equal(places.sort().values, pre.topk(n).indices.sort().values)


def test_a_process_without_rows():
    sae, x = make()
    loss, fired = kernel_step(sae, x[:0], torch.zeros(64, dtype=torch.bool), aux_coef=0.0)[:2]
    assert not fired.any() and all(not p.grad.any() for p in sae.parameters())


def trained(step, architecture, clip_grad):
    x = torch.from_numpy(planted_tokens(60, 12, 30, 3)[0])
    config = {
        "input_dim": 12,
        "m_total_neurons": 30,
        "k_active_neurons": 3,
        "aux_k": 6,
        "prefix_lengths": [10, 30],
        "architecture": architecture,
    }
    run = TrainingRun(config, x, seed=0, device="cpu", learning_rate=0.01)
    for i in range(6):
        batch = x[i % 2 :: 2]
        run.step(step, batch, learning_rate=0.01, dead_after=70, clip_grad=clip_grad)
    return run


@pytest.mark.parametrize("clip_grad", [None, 0.05, 100.0])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_trainings_equal_those_of_the_sparse_step(architecture, clip_grad):
    """Through Adam, which divides by the norm itself, and the dead features of the counters."""
    expected = trained(functools.partial(sparse_step, aux_coef=0.1), architecture, clip_grad)
    found = trained(STEP, architecture, clip_grad)
    assert float(found.loss_sum) == pytest.approx(float(expected.loss_sum), rel=1e-4)
    assert torch.equal(found.tokens_since_fired, expected.tokens_since_fired)
    for name, value in expected.sae.state_dict().items():
        torch.testing.assert_close(found.sae.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dead_after", [10**9, 10], ids=["none dead", "some dead"])
@pytest.mark.parametrize("variant", step_waits.VARIANTS)
def test_the_host_waits_for_nothing(variant, dead_after):
    """In a whole step: choice, gradients, clipping, Adam, counters. The sparse step waits."""
    found, sparse = (
        step_waits.counted(step, step_waits.VARIANTS[variant], dead_after)
        for step in (kernel_step, sparse_step)
    )
    assert found["waits_a_step"] == 0 and found["calls_a_step"] > 50, found
    assert sparse["waits_a_step"] >= 2


# Where it is used


VALUES = {"ARCHITECTURE": "topk", "USE_BATCH_TOPK": False, "SELECT_DTYPE": "float32"}


def engine(device, **values):
    return objective.step_function({**VALUES, **values}, 0, device).func


def test_cuda_with_triton_takes_kernels(monkeypatch):
    monkeypatch.setattr(module, "usable", lambda device: device.startswith("cuda"))
    assert engine("cuda:1") is kernel_step and engine("cpu") is sparse_step
    step = objective.step_function(VALUES, 0, "cuda:0")
    assert step.keywords["most_dead"] == dead_features.MOST_AT_ONCE
    monkeypatch.setattr(objective, "ENGINE", "sparse")
    assert engine("cuda:1") is sparse_step
    monkeypatch.setattr(objective, "ENGINE", "reference")
    assert engine("cuda:1") is reference_step


@pytest.fixture
def usable(monkeypatch):
    """`usable` as if it had not been asked before, on a pretended device with Triton."""
    real = importlib.util.find_spec
    there = {"triton": True}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: there[name] if name in there else real(name, *more),
    )
    module.usable.cache_clear()
    yield lambda device, triton=True: there.update(triton=triton or None) or module.usable(device)
    module.usable.cache_clear()


def test_kernels_are_tried_first(usable, monkeypatch, capsys):
    with pretended() as machine:
        monkeypatch.setattr(module, "kernels", lambda: kernel_twins.launched(machine))
        assert usable("cuda:0") and not usable("cpu")
        assert usable("cuda:0", triton=False)  # is asked once
        assert not usable("cuda:1", triton=False)
    assert capsys.readouterr().out == ""


def test_all_processes_take_kernels_or_none(usable, monkeypatch):
    """The trial is each one's own: another process may have no Triton, and never come to it."""
    found = []

    def trial(device):
        found.append(module.distributed.together())
        return 0.0

    monkeypatch.setattr(module.distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module, "trial", trial)
    monkeypatch.setattr(module.distributed, "anywhere", lambda flag: True)
    assert not usable("cuda:0") and found == [False] and module.distributed.together()


def test_kernels_that_fail_or_miss_are_left_out_aloud(usable, monkeypatch, capsys):
    def no_compiler():
        raise RuntimeError("Failed to find C compiler\nmore")

    with pretended() as machine:
        wrong = kernel_twins.launched(machine)
        launch = wrong.dots
        wrong.dots = lambda *arguments: launch(*arguments) / 2
        monkeypatch.setattr(module, "kernels", no_compiler)
        assert not usable("cuda:0")
        monkeypatch.setattr(module, "kernels", lambda: wrong)
        assert not usable("cuda:1")
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "warning: training goes on without kernels of its own, slower (Failed to find C compiler)."
    )
    assert second.startswith("warning: ") and "on cuda:1 they miss by" in second
