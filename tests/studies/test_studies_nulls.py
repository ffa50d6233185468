"""Autoencoders of which one part is not trained: that part stays, the others learn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.shared import partly_trained
from fastsae.sae.autoencoder import encode

VALUES = {
    "M": 12,
    "K": 2,
    "MATRYOSHKA_PREFIXES": None,
    "USE_MATRYOSHKA": False,
    "USE_BATCH_TOPK": False,
    "ARCHITECTURE": "topk",
    "AUX_K": None,
    "DEAD_AFTER_TOKENS": 4000,
    "BATCH_SIZE": 100,
    "N_EPOCHS": 8,
    "LEARNING_RATE": 0.02,
    "LR_SCHEDULE": "linear",
    "LR_WARMUP_STEPS": 0,
    "SELECT_DTYPE": "float32",
    "SEED": 0,
}


def some_tokens():
    """1,000 tokens of 8 dimensions, each the sum of two of 12 directions."""
    random = np.random.default_rng(0)
    directions = random.standard_normal((12, 8)).astype(np.float32)
    chosen = random.integers(0, 12, (1000, 2))
    x = directions[chosen].sum(1) + 0.01 * random.standard_normal((1000, 8), np.float32)
    rows = np.arange(800)
    return SimpleNamespace(
        activations=x,
        train=rows,
        test=np.arange(800, 1000),
        rows=lambda rows: torch.from_numpy(x[rows]),
        example=np.arange(1000),
        special=np.zeros(1000, bool),
    )


@pytest.mark.parametrize("kind", partly_trained.KINDS)
def test_one_part_stays_and_the_rest_learns(monkeypatch, kind):
    began = {}
    hold = partly_trained.KINDS[kind]

    def noted(sae):
        began.update({name: value.clone() for name, value in sae.state_dict().items()})
        began["error"] = partly_trained.figures(sae, tokens)["normalized_mse"]
        return hold(sae)

    monkeypatch.setitem(partly_trained.KINDS, kind, noted)
    tokens = some_tokens()
    sae = partly_trained.trained(kind, {"settings": VALUES}, tokens)
    now = sae.state_dict()
    cosine = (now["decoder.weight"] * began["decoder.weight"]).sum(0)
    assert torch.allclose(now["decoder.weight"].norm(dim=0), torch.ones(12), atol=1e-5)
    if kind == "encoder frozen":
        assert torch.equal(now["encoder.weight"], began["encoder.weight"])
        assert float(cosine.min()) < partly_trained.NEAR
    else:
        assert not torch.equal(now["encoder.weight"], began["encoder.weight"])
    if kind == "decoder frozen":
        assert torch.equal(now["decoder.weight"], began["decoder.weight"])
    if kind == "decoder nearly frozen":  # some are held at the bound
        assert partly_trained.NEAR - 1e-4 < float(cosine.min()) < partly_trained.NEAR + 1e-3
    assert partly_trained.figures(sae, tokens)["normalized_mse"] < 0.9 * began["error"]
    same, own = partly_trained.as_dictionary(kind, sae), tokens.rows(tokens.test)
    assert torch.equal(encode(same, own).value, encode(sae, own).value)
