"""The sparse step against autograd through HypotheSAEs' forward and loss, and against a step worked
out by hand."""

import pytest
import torch
from hypothesaes.sae import SparseAutoencoder

from fastsae.sae.autoencoder import new_sae, reference_step
from fastsae.sae.initialisation import initialise
from fastsae.sae.sparse_step import sparse_step, top_columns, weighted_sums

VARIANTS = {
    "topk": {},
    "matryoshka": {"prefix_lengths": [8, 24, 64]},
    "batchtopk": {"use_batch_topk": True},
    "matryoshka batchtopk": {"prefix_lengths": [16, 64], "use_batch_topk": True},
}


def make(d=12, m=64, k=4, aux_k=8, seed=0, **options):
    torch.manual_seed(seed)
    sae = new_sae(
        {"input_dim": d, "m_total_neurons": m, "k_active_neurons": k, "aux_k": aux_k, **options}
    )
    x = torch.randn(50, d) * torch.linspace(0.5, 3, d) + 1
    initialise(sae, x, seed)
    with torch.no_grad():
        sae.neuron_bias.normal_(0, 0.3)
        sae.encoder.weight.add_(0.1 * torch.randn_like(sae.encoder.weight))
    return sae, x


def gradients(sae):
    return {name: p.grad.clone() for name, p in sae.named_parameters()}


def assert_close(found, expected, tolerance=1e-5):
    for name in expected:
        assert (found[name] - expected[name]).norm() <= tolerance * expected[name].norm(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_hypothesaes_where_nothing_is_dead(variant):
    sae, x = make(**VARIANTS[variant])
    sae.train()
    reconstruction, info = sae(x)
    expected_loss = sae.compute_loss(x, reconstruction, info, 0.0, 0.0)
    expected_loss.backward()
    expected = gradients(sae)
    loss, fired = sparse_step(sae, x, torch.zeros(64, dtype=torch.bool), aux_coef=1 / 32)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_close(gradients(sae), expected)
    assert torch.equal(fired, (info["activations"] > 0).any(0))


@pytest.mark.parametrize("n_dead", [1, 5, 30])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_autograd_with_dead_features(variant, n_dead):
    sae, x = make(**VARIANTS[variant])
    dead = torch.zeros(64, dtype=torch.bool)
    dead[torch.randperm(64)[:n_dead]] = True
    threshold = sae.threshold.clone()
    expected_loss, expected_fired = reference_step(sae, x, dead, aux_coef=0.3)
    expected, expected_threshold = gradients(sae), sae.threshold.clone()
    sae.threshold.copy_(threshold)
    loss, fired = sparse_step(sae, x, dead, aux_coef=0.3)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_close(gradients(sae), expected)
    assert torch.equal(fired, expected_fired)
    assert torch.equal(sae.threshold, expected_threshold)


def test_one_step_by_hand():
    """d = 2, M = 2, K = 1, identity weights: x = (3, 1) fires feature 0 with 3, x = (0, 2) fires
    feature 1 with 2.

    Errors (reconstruction - x): (0, -1) and (0, 0). Their mean square is 1/4; the batch's mean is
    (1.5, 1.5), its mean squared deviation (2.25 + 0.25 + 2.25 + 0.25) / 4 = 1.25; so the loss is
    0.2. Its gradient at the reconstruction is 2 (0, -1) / (4 * 1.25) = (0, -0.4) for the first
    token; times its activation 3 that is -1.2 for decoder row 0, column 1.
    """
    sae = new_sae({"input_dim": 2, "m_total_neurons": 2, "k_active_neurons": 1, "aux_k": 0})
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(2))
        sae.decoder.weight.copy_(torch.eye(2))
    loss, fired = sparse_step(
        sae, torch.tensor([[3.0, 1.0], [0.0, 2.0]]), torch.zeros(2, dtype=torch.bool), aux_coef=0.0
    )
    assert float(loss) == pytest.approx(0.2)
    torch.testing.assert_close(sae.decoder.weight.grad.t(), torch.tensor([[0.0, -1.2], [0.0, 0.0]]))
    # d loss / d activation = (0, -0.4) . (1, 0) = 0, so nothing reaches the encoder; b_dec gets the
    # sum (0, -0.4)
    torch.testing.assert_close(sae.encoder.weight.grad, torch.zeros(2, 2))
    torch.testing.assert_close(sae.input_bias.grad, torch.tensor([0.0, -0.4]))
    assert fired.tolist() == [True, True]


def test_dead_features_with_negative_pre_activation_get_a_gradient():
    """HypotheSAEs' aux-k gives these exactly zero, so they stay dead for good."""
    sae, x = make(m=8, k=2, aux_k=4)
    with torch.no_grad():
        sae.neuron_bias[3] = -1000.0
    dead = torch.arange(8) == 3
    sparse_step(sae, x, dead, aux_coef=1 / 32)
    assert sae.encoder.weight.grad[3].norm() > 0 and sae.neuron_bias.grad[3] != 0

    theirs = SparseAutoencoder(12, 8, 2, aux_k=4, device="cpu")
    theirs.load_state_dict(sae.state_dict())
    theirs.steps_since_activation[3] = 10_000
    reconstruction, info = theirs(x)
    theirs.compute_loss(x, reconstruction, info, 1 / 32, 0.0).backward()
    # if this fails, HypotheSAEs repaired it and our note is out of date
    assert theirs.encoder.weight.grad[3].norm() == 0


@pytest.mark.parametrize(
    "x", [torch.ones(1, 12), torch.ones(7, 12)], ids=["one row", "constant rows"]
)
def test_a_batch_without_variance_stays_finite(x):
    sae, _ = make()
    loss, _ = sparse_step(sae, x, torch.zeros(64, dtype=torch.bool), aux_coef=1 / 32)
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in sae.parameters())


def test_without_dead_features_the_aux_loss_adds_nothing():
    """HypotheSAEs adds a constant of about aux_coef then, so its loss is not the normalised MSE."""
    sae, x = make()
    nothing = torch.zeros(64, dtype=torch.bool)
    assert float(sparse_step(sae, x, nothing, aux_coef=10.0)[0]) == float(
        sparse_step(sae, x, nothing, aux_coef=0.0)[0]
    )


def test_batchtopk_threshold_starts_at_the_first_batch():
    """A threshold that creeps up from 0 lets far more than K features through after a short run."""
    sae, x = make(use_batch_topk=True)
    sparse_step(sae, x, torch.zeros(64, dtype=torch.bool), aux_coef=0.0)
    pre = (x - sae.input_bias) @ sae.encoder.weight.t() + sae.neuron_bias
    assert float(sae.threshold) == pytest.approx(float(pre.flatten().topk(4 * 50).values[-1]))


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "k"), [(256, 8), (4608, 32), (1536, 5), (3000, 700), (97, 3), (5, 5)]
)
def test_top_columns_are_the_largest(m, k, dtype, threads, monkeypatch):
    """By NumPy with few threads, by PyTorch with many; of equal entries it may take either."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    pre = torch.randn(40, m, generator=torch.Generator().manual_seed(1)).to(dtype)
    columns = top_columns(pre, k)
    assert (columns.diff(dim=1) > 0).all()
    found = pre.gather(1, columns).sort(dim=1, descending=True).values
    assert torch.equal(found, pre.topk(k, dim=1).values)


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("m", [256, 97])
def test_top_columns_have_what_is_not_a_number(m, threads, monkeypatch):
    """So the loss is not a number either, and the run stops."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    pre = torch.randn(6, m)
    pre[2, 50] = torch.nan
    assert 50 in top_columns(pre, 4)[2]


@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 0, 0], [4]])
@pytest.mark.parametrize("d", [1, 12, 20])
def test_weighted_sums_are_the_dense_product(counts, d):
    """Rows without entries are 0; `dense` may be a part of a wider one, or transposed."""
    generator = torch.Generator().manual_seed(2)
    pointers = torch.tensor([0, *counts]).cumsum(0).int()
    column = torch.randint(0, 7, (sum(counts),), generator=generator).int()
    value = torch.randn(sum(counts), generator=generator)
    wide = torch.randn(7, d + 3, generator=generator)
    matrix = torch.zeros(len(counts), 7)
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    matrix.index_put_((rows, column.long()), value, accumulate=True)
    for dense in (wide[:, :d].contiguous(), wide[:, :d], wide.t().contiguous().t()[:, :d]):
        found = weighted_sums(pointers, column, value, dense)
        torch.testing.assert_close(found, matrix @ dense)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_selection_keeps_exact_values(variant):
    """Whatever features the coarse product picks, their activations are those of float32."""
    from fastsae.sae.sparse_step import active_entries

    sae, x = make(**VARIANTS[variant])
    x_centred = x - sae.input_bias
    pre = (x_centred @ sae.encoder.weight.t() + sae.neuron_bias).relu().detach()
    entries = active_entries(sae, x_centred.detach(), training=True, select=torch.bfloat16)
    torch.testing.assert_close(
        entries.value.detach(), pre[entries.row, entries.column], rtol=1e-4, atol=1e-5
    )
