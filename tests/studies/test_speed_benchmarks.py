"""What the benchmarks of speed conclude from their timings, and what pages say of it."""

import pytest
import torch
from conftest import planted_tokens

from experiments.benchmarks import busy, train
from experiments.pages import numbers


@pytest.fixture
def rows():
    x = torch.from_numpy(planted_tokens(1200, 12, 20, 2)[0])
    return x[:1100], x[1100:]


@pytest.mark.parametrize("goal", [1.5, 0.0])
def test_ours_stops_where_the_goal_is_reached(rows, goal, monkeypatch):
    """1.5 at the first look, a quarter of the first epoch's two steps; 0 never, and then all epochs
    that it plans are done."""
    monkeypatch.setattr("fastsae.training.usual.EPOCHS", (3, 3))
    found = train.until(goal, 60.0, *rows, (16, 2, None), torch.float32)
    assert found["reached"] == (goal > 1) and found["epochs_planned"] == 3
    assert found["epochs"] == (0.5 if goal > 1 else 3)
    assert (found["normalized_mse"] <= goal) == found["reached"] and found["seconds"] >= 0


def test_the_page_says_whether_it_was_reached():
    ours = {"seconds": 2.0, "epochs": 1.5, "normalized_mse": 0.3, "hypothesaes_seconds_over_it": 20}
    r = {
        "converged": {
            "256,8": {
                "n_train_tokens": 1000,
                "hypothesaes": {"normalized_mse": 0.31, "seconds": 40, "epochs": 9},
                "ours float32": {**ours, "reached": True},
                "ours bfloat16 selection": {**ours, "reached": False},
            }
        }
    }
    (sentence,) = numbers.time_to_quality(r, {"256,8": "M = 256"})
    assert sentence == (
        "M = 256, 1,000 tokens: HypotheSAEs 0.3100 in 40 s, 9 epochs; ours float32 2.0 s after 1.5 "
        "epochs (20 times sooner), bfloat16 selection not within 1.5 epochs (it ends at 0.3000 "
        "after 2.0 s)."
    )


def test_what_is_kept_beside_a_busy_job_is_a_ratio_within_a_round():
    """Rounds may differ in speed: 50 of 100 and 20 of 40 are both a half, and 40 of 80 as well."""
    own = {"stage 1": {"quiet": [100, 80, 160], "busy": [1, 1, 1]}}
    row = {"quiet": [100, 40, 80], "busy": [50, 20, 40]}
    found = busy.summary({"stage 1": row}, own)["stage 1"]
    assert found["kept"] == 0.5 and found["quiet_over_own"] == 0.5
    assert (found["quiet"], found["busy"]) == (80, 40)


@pytest.mark.parametrize("kind", train.DENSE)
def test_each_architecture_without_k_is_timed(rows, kind):
    seconds, _ = train.ours_dense(kind)(rows[0], 2, 16, 2, 64, None)
    assert seconds > 0
