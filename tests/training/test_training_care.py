"""Resampling of dead features, and what a run shows of itself."""

import functools
import importlib.util
import json
import signal
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, planted_tokens
from small import small

from fastsae.sae.autoencoder import decode, encode
from fastsae.sae.dense_step import dense_step
from fastsae.sae.sparse_step import sparse_step
from fastsae.training.adam import Adam
from fastsae.training.resampling import resample
from fastsae.training.run import TrainingRun

SMALL = small(n_epochs=3, max_norm_ratio=None)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard", "jumprelu", "gated"])
def test_resampled_features_point_at_what_is_left_over(architecture):
    x = torch.from_numpy(planted_tokens(400, 12, 30, 3)[0])
    run = TrainingRun(
        {
            "input_dim": 12,
            "m_total_neurons": 30,
            "k_active_neurons": 3,
            "aux_k": 0,
            "architecture": architecture,
        },
        x,
        seed=0,
        device="cpu",
        learning_rate=1e-2,
    )
    step = (
        functools.partial(sparse_step, aux_coef=0.0)
        if "topk" in architecture
        else functools.partial(dense_step, sparsity=0.1, bandwidth=0.5, target_l0=None)
    )
    for _ in range(5):
        run.step(step, x, learning_rate=1e-2, dead_after=100, clip_grad=None)
    assert resample(run, x, dead_after=100, seed=0) == 0
    dead, live = torch.tensor([3, 17]), torch.tensor([i for i in range(30) if i not in (3, 17)])
    run.tokens_since_fired[dead] = 101
    run.sae.neuron_bias.data[dead] = -1000.0
    before = {name: value.clone() for name, value in run.sae.state_dict().items()}
    assert resample(run, x, dead_after=100, seed=0) == 2
    after = run.sae.state_dict()
    for name, value in before.items():
        if value.ndim:
            rows = (lambda v: v.t()) if name == "decoder.weight" else (lambda v: v)
            if name != "input_bias":
                assert torch.equal(rows(after[name])[live], rows(value)[live]), name
    assert torch.equal(after["input_bias"], before["input_bias"])
    torch.testing.assert_close(after["decoder.weight"][:, dead].norm(dim=0), torch.ones(2))
    torch.testing.assert_close(
        torch.cosine_similarity(
            after["decoder.weight"][:, dead].t(), after["encoder.weight"][dead]
        ),
        torch.ones(2),
    )
    features = encode(run.result(), x)
    # what begins again fires
    assert set(dead.tolist()) <= set(features.column[features.value > 0].tolist())
    assert (after["neuron_bias"][dead] == 0).all() and (run.tokens_since_fired[dead] == 0).all()
    moments = run.optimizer.state[run.sae.encoder.weight]
    assert (moments["exp_avg"][dead] == 0).all() and (moments["exp_avg"][live] != 0).any()
    run.sae.load_state_dict(before)
    run.tokens_since_fired[dead] = 101
    resample(run, x, dead_after=100, seed=0)
    assert all(torch.equal(value, run.sae.state_dict()[name]) for name, value in after.items())


@pytest.mark.parametrize("clip_grad", [None, 0.5])
def test_adam_is_torchs(clip_grad):
    """Weights and moments after some steps, bounded gradients included; half of the steps after its
    state was handed to another one. torch's own state is taken too: unfinished runs may have it."""
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    runs = [new_run(x), new_run(x)]
    theirs = torch.optim.Adam(runs[1].sae.parameters(), lr=1e-2, fused=True)
    fill = functools.partial(sparse_step, aux_coef=0.0)
    for number in range(6):
        if number in (2, 4):
            state = (theirs if number == 2 else runs[0].optimizer).state_dict()
            runs[0].optimizer = Adam(runs[0].sae.parameters(), 1e-2)
            runs[0].optimizer.load_state_dict(state)
        runs[0].step(fill, x, learning_rate=1e-2, dead_after=1000, clip_grad=clip_grad)
        fill(runs[1].sae, x, torch.zeros(40, dtype=torch.bool))
        runs[1].sae.adjust_decoder_gradient_()
        if clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(runs[1].sae.parameters(), clip_grad)
        theirs.step()
        runs[1].sae.normalize_decoder_()
    for ours, other in zip(runs[0].sae.parameters(), runs[1].sae.parameters()):
        torch.testing.assert_close(ours, other)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                runs[0].optimizer.state[ours][name], theirs.state[other][name]
            )


def new_run(x):
    config = {"input_dim": 12, "m_total_neurons": 40, "k_active_neurons": 4, "aux_k": 0}
    return TrainingRun(config, x, seed=0, device="cpu", learning_rate=1e-2)


def test_a_step_loads_no_compiler():
    """torch.optim.Adam would import PyTorch's: more than a second of each start of stage 2."""
    code = (
        "import sys, torch; from fastsae.training.adam import Adam; "
        "weight = torch.nn.Parameter(torch.ones(3)); weight.grad = torch.ones(3); "
        "Adam([weight], 0.1).step(); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_resampling_revives_what_would_stay_dead():
    """Three quarters of the features are out of reach, and nothing but resampling looks after
    them."""
    x = torch.from_numpy(planted_tokens(2000, 32, 48, 2)[0])
    errors = {}
    for every in (None, 60):
        run = TrainingRun(
            {"input_dim": 32, "m_total_neurons": 64, "k_active_neurons": 2, "aux_k": 0},
            x,
            seed=0,
            device="cpu",
            learning_rate=1e-2,
        )
        run.sae.neuron_bias.data[16:] = -1000.0
        for i in range(300):
            run.step(
                functools.partial(sparse_step, aux_coef=0.0),
                x,
                learning_rate=1e-2,
                dead_after=50,
                clip_grad=None,
            )
            if every and (i + 1) % every == 0 and i < 200:
                resample(run, x, dead_after=50, seed=i)
        error = (decode(run.sae, encode(run.sae, x)) - x).square().sum() / (
            x - x.mean(0)
        ).square().sum()
        errors[every] = float(error), int((run.tokens_since_fired > 50).sum())
    assert errors[None][1] == 48 and errors[60][1] < 24 and errors[60][0] < 0.7 * errors[None][0]


def test_a_run_with_resampling_goes_on_where_it_was_stopped(
    tmp_path, write_activations, run_main, monkeypatch
):
    from fastsae.training import loop

    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = [
        *write_activations(tokens, [20] * 30),
        *SMALL,
        "--m",
        64,
        "--batch-size",
        50,
        "--dead-after-tokens",
        150,
        "--resample-every",
        5,
    ]
    assert run_main("train_sae", *flags) == 0
    path = tmp_path / "checkpoints" / "test" / "SAE_M=64_K=2.pt"
    whole, original, steps = path.read_bytes(), loop.learning_rate_factor, []
    path.unlink()

    def stop_at_14(step, **options):
        steps.append(step)
        if len(steps) == 14:
            signal.raise_signal(signal.SIGTERM)
        return original(step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate_factor", stop_at_14)
        assert run_main("train_sae", *flags) == 143
        assert run_main("train_sae", *flags) == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "more", [[], ["--matryoshka-prefixes", "4,16"], ["--architecture", "standard"]], ids=str
)
def test_the_figure_is_drawn(tmp_path, write_activations, run_main, more):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    assert run_main("train_sae", *write_activations(tokens, [20] * 30), *SMALL, *more) == 0
    assert (tmp_path / "checkpoints" / "test" / "training.png").read_bytes().startswith(b"\x89PNG")
    lines = [
        json.loads(line)
        for line in (tmp_path / "checkpoints" / "test" / "metrics.jsonl").read_text().splitlines()
    ]
    assert set(lines[0]["prefix_normalized_mse"]) == (
        {"4", "16"} if "--matryoshka-prefixes" in more else {"16"}
    )


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_named(
    write_activations, run_main, capsys, monkeypatch, logger
):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = write_activations(tokens, [20] * 30)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == logger else found(name, *rest),
    )
    assert run_main("train_sae", *flags, *SMALL, "--logger", logger) == 2
    assert f"pip install {logger}" in capsys.readouterr().err


def test_lines_reach_tensorboard(tmp_path, write_activations, run_main):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    tokens, _ = planted_tokens(600, 8, 16, 2)
    assert (
        run_main(
            "train_sae", *write_activations(tokens, [20] * 30), *SMALL, "--logger", "tensorboard"
        )
        == 0
    )
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_loggers_decide_nothing(tmp_path, write_activations, run_main, capsys):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = write_activations(tokens, [20] * 30)
    assert run_main("train_sae", *flags, *SMALL) == 0
    assert run_main("train_sae", *flags, *SMALL, "--logger", "wandb") == 0
    assert "up to date" in capsys.readouterr().out


def test_wandb_takes_a_run_offline(tmp_path, write_activations, run_main, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tokens, _ = planted_tokens(600, 8, 16, 2)
    assert (
        run_main(
            "train_sae",
            *write_activations(tokens, [20] * 30),
            *SMALL,
            "--logger",
            "wandb",
            "--seed",
            "0,1",
        )
        == 0
    )
    assert len(list(tmp_path.rglob("*.wandb"))) == 2  # each autoencoder is a run of its own
