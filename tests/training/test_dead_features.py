"""When features count as dead, and that a step never looks at too many of them."""

import functools
import json

import numpy as np
import pytest
import torch
from conftest import planted_tokens
from pretended_cuda import pretended

from fastsae.formats.load import load_sae
from fastsae.sae.sparse_step import sparse_step
from fastsae.training import dead_features
from fastsae.training.dead_features import considered, tokens_until_dead
from fastsae.training.run import TrainingRun


def test_the_rule_by_hand():
    """1,024 M / K tokens, from 131,072 to 10 million, and 256 steps at least."""
    assert tokens_until_dead(256, 8, 512) == 131_072  # the demo
    assert tokens_until_dead(16, 8, 64) == 131_072
    assert tokens_until_dead(4608, 32, 512) == 1024 * 144
    assert tokens_until_dead(65_536, 32, 4096) == 1024 * 2048  # 512 steps
    assert tokens_until_dead(131_072, 1, 4096) == 10_000_000
    assert tokens_until_dead(1024, 32, 16_384) == 256 * 16_384


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], 131_072),
        (["--m", 512, "--k", 2], 1024 * 256),
        (["--dead-after-tokens", 99], 99),
        (["--batch-size", 1000], 256_000),
    ],
)
def test_the_checkpoint_says_which_number_it_was(
    tmp_path, write_activations, run_main, flags, expected
):
    tokens, _ = planted_tokens(200, 8, 16, 2)
    common = [
        *write_activations(tokens, [10] * 20),
        "--matryoshka-prefixes=none",
        "--n-epochs",
        1,
        "--run-name",
        "r",
        "--device",
        "cpu",
    ]
    assert run_main("train_sae", *common, *flags) == 0
    metrics = json.loads((tmp_path / "checkpoints" / "r" / "metrics.json").read_text())
    assert (
        load_sae(tmp_path / "checkpoints" / "r" / metrics["checkpoint"])[1]["settings"][
            "DEAD_AFTER_TOKENS"
        ]
        == expected
    )


@pytest.mark.parametrize("n_dead", [0, 1, 5, 7, 8, 9, 23, 100])
def test_all_dead_features_have_their_turn(monkeypatch, n_dead):
    monkeypatch.setattr(dead_features, "MOST_AT_ONCE", 7)
    dead = torch.zeros(100, dtype=torch.bool)
    dead[torch.randperm(100, generator=torch.Generator().manual_seed(n_dead))[:n_dead]] = True
    seen = torch.zeros(100, dtype=torch.int)
    n_turns = -(-n_dead // 7)
    for turn in range(1000, 1000 + n_turns):
        some = considered(dead, turn)
        assert int(some.sum()) == min(7, n_dead) and not (some & ~dead).any()
        assert torch.equal(some, considered(dead, turn))
        seen += some.int()
    assert torch.equal(seen > 0, dead) and int(seen.max()) <= 2


def test_few_features_are_all_considered():
    """And turns without end overflow nothing."""
    dead = torch.arange(8192) % 3 == 0
    assert considered(dead, 5) is dead
    many = torch.ones(20_000, dtype=torch.bool)
    assert int(considered(many, 10**12).sum()) == 8192
    assert int(considered(many, 3, at_least=10_000).sum()) == 10_000


def test_a_step_is_given_no_more(monkeypatch):
    """The features of large M that it revives change from step to step, as in the run that did not
    stop."""
    monkeypatch.setattr(dead_features, "MOST_AT_ONCE", 10)
    x = torch.from_numpy(planted_tokens(40, 8, 16, 2)[0])
    run = TrainingRun(
        {"input_dim": 8, "m_total_neurons": 100, "k_active_neurons": 2, "aux_k": 4},
        x,
        seed=0,
        device="cpu",
        learning_rate=1e-3,
    )
    given = []

    def step(sae, x, dead):
        given.append(dead.numpy().copy())
        return sparse_step(sae, x, dead, aux_coef=0.1)

    for _ in range(10):
        run.tokens_since_fired.fill_(1000)
        run.step(step, x, learning_rate=1e-3, dead_after=100, clip_grad=None)
    assert [int(each.sum()) for each in given] == [10] * 10 and np.stack(given).any(0).all()


def test_choosing_them_makes_no_host_wait(monkeypatch):
    monkeypatch.setattr(dead_features, "MOST_AT_ONCE", 10)
    torch.use_deterministic_algorithms(True)
    try:
        with pretended() as machine:
            dead = torch.ones(100, dtype=torch.bool).to("cuda")
            machine.waits.clear()
            considered(dead, 3)
            assert machine.launches > 3 and not machine.waits
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_is_bounded_at_large_m(monkeypatch):
    """The product with the encoder rows of the dead has MOST_AT_ONCE columns, however many are
    dead."""
    monkeypatch.setattr(dead_features, "MOST_AT_ONCE", 50)
    widths, addmm = [], torch.addmm
    monkeypatch.setattr(
        torch,
        "addmm",
        lambda *arguments: (widths.append(arguments[2].shape[1]), addmm(*arguments))[1],
    )
    x = torch.from_numpy(planted_tokens(40, 8, 16, 2)[0])
    run = TrainingRun(
        {"input_dim": 8, "m_total_neurons": 2000, "k_active_neurons": 2, "aux_k": 4},
        x,
        seed=0,
        device="cpu",
        learning_rate=1e-3,
    )
    run.tokens_since_fired.fill_(1000)
    widths.clear()
    run.step(
        functools.partial(sparse_step, aux_coef=0.1),
        x,
        learning_rate=1e-3,
        dead_after=100,
        clip_grad=None,
    )
    assert 50 in widths and set(widths) <= {50, 2000}
