"""Where training starts: known centres, known directions, and the encoder's length by least
squares."""

import pytest
import torch
from hypothesaes.sae import SparseAutoencoder

from fastsae.sae.autoencoder import decode, encode, new_sae
from fastsae.sae.initialisation import draw_directions, geometric_median, initialise


def fresh(d=12, m=40, k=4, **options):
    return new_sae(
        {"input_dim": d, "m_total_neurons": m, "k_active_neurons": k, "aux_k": 0, **options}
    ).eval()


def sample(n=300, d=12):
    return (
        torch.randn(n, d, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.5, 3, d)
        + 5
    )


def test_defaults_are_those_of_hypothesaes():
    x = sample()
    ours, theirs = fresh(), SparseAutoencoder(12, 40, 4, device="cpu")
    initialise(ours, x, seed=7)
    torch.manual_seed(7)
    theirs.initialize_weights_(x)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


def test_geometric_median_by_hand():
    """Of three corners of a square and one point far beyond the fourth: where the diagonals cross.
    The mean is drawn far away."""
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [100.0, 100.0]])
    torch.testing.assert_close(geometric_median(x), torch.tensor([1.0, 1.0]), atol=2e-3, rtol=0)
    same = torch.ones(5, 3)
    torch.testing.assert_close(geometric_median(same), same[0])


@pytest.mark.parametrize("kind", ["xavier", "kaiming", "orthogonal", "data", "mixed"])
@pytest.mark.parametrize("m", [5, 12, 1000])
def test_directions(kind, m):
    x = sample()
    rows = draw_directions(kind, m, x, seed=1)
    assert rows.shape == (m, 12) and (rows.norm(dim=1) > 0).all()
    assert torch.equal(rows, draw_directions(kind, m, x, seed=1)) and not torch.equal(
        rows, draw_directions(kind, m, x, seed=2)
    )
    if kind == "orthogonal":
        block = rows[:12]
        torch.testing.assert_close(block @ block.t(), torch.eye(len(block)), atol=1e-5, rtol=0)
    # the tokens here all point one way; cos = 0.25 / sqrt(1 + 0.25^2) if the rest is random
    if m == 1000 and kind in ("mixed", "xavier"):
        lean = torch.nn.functional.cosine_similarity(rows, x.mean(0)[None]).mean()
        assert lean == pytest.approx(0.2425 if kind == "mixed" else 0, abs=0.05)
    if kind == "data" and m <= len(x):  # a noisy copy of a token each
        assert torch.cdist(rows, x).min(1).values.max() < 1


@pytest.mark.parametrize(
    "variant",
    [{}, {"use_batch_topk": True}, {"prefix_lengths": [10, 40]}],
    ids=["topk", "batchtopk", "matryoshka"],
)
def test_no_other_encoder_scale_reconstructs_better(variant):
    x = sample()
    errors = {}
    for scale in (None, 1.0):
        sae = fresh(**variant)
        initialise(sae, x, 0, encoder_scale=scale)
        if scale is None:
            best = float(sae.encoder.weight.norm(dim=1).mean())
        for factor in (0.9, 1.0, 1.1):
            sae.encoder.weight.data.mul_(factor)
            entries = encode(sae, x)
            errors[scale, factor] = float((decode(sae, entries) - x).square().sum())
            sae.encoder.weight.data.div_(factor)
    # its threshold is 0 before the first batch: more than K fire here
    if not variant.get("use_batch_topk"):
        assert errors[None, 1.0] == min(errors.values()) and best < 1


def test_a_sample_on_which_nothing_fires_keeps_the_scale():
    sae = fresh()
    initialise(sae, torch.zeros(10, 12), 0, encoder_scale=None)
    torch.testing.assert_close(sae.encoder.weight.norm(dim=1), torch.ones(40))
