"""Two processes against one with the same global batch: the same autoencoder, whatever the
architecture."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT, planted_tokens

from fastsae.formats.load import load_sae

FLAGS = [
    "--m",
    "64",
    "--k",
    "3",
    "--no-use-matryoshka",
    "--n-epochs",
    "3",
    "--device",
    "cpu",
    "--run-name",
    "test",
    "--batch-size",
    "100",
    "--max-norm-ratio",
    "none",
    "--dead-after-tokens",
    "400",
]


def launch(command, n_processes):
    # without -- it takes --m for its own
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        n_processes,
        "--",
    ]
    done = subprocess.run(
        [sys.executable, *map(str, [*(torchrun if n_processes > 1 else []), *command])],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(folder, flags, n_processes):
    said = launch([PROJECT / "train_sae.py", *flags], n_processes)
    metrics = json.loads((folder / "checkpoints" / "test" / "metrics.json").read_text())
    path = folder / "checkpoints" / "test" / metrics["checkpoint"]
    state = load_sae(path)[0].state_dict()
    path.unlink()
    return state, metrics, said


@pytest.mark.exhaustive
def test_two_processes_train_what_one_does(tmp_path, write_activations):
    # 1,351 to train: the last batch has 51 rows, of which 25 and 26
    tokens, _ = planted_tokens(1500, 16, 32, 2, noise=0.1)
    flags = [
        *write_activations(tokens, [15] * 100),
        *FLAGS,
        "--architecture=batchtopk",
        "--use-matryoshka",
        "--matryoshka-prefixes",
        "16,64",
    ]
    one, of_one, _ = train(tmp_path, flags, 1)
    two, of_two, said = train(tmp_path, flags, 2)
    for name, value in one.items():
        difference = (two[name] - value).norm() / value.norm().clamp_min(1e-6)
        # Adam turns differences of 1e-7 in tiny gradients into steps
        assert difference < 1e-3, (name, float(difference))
    assert of_two["normalized_mse"] == pytest.approx(of_one["normalized_mse"], rel=1e-4)
    assert (
        of_two["n_train_tokens"] == of_one["n_train_tokens"]
        and said.count("wrote") == said.count("settings: ") == 1
    )


STEPS = """
import os, sys, torch
from fastsae.runtime import distributed as parallel
from fastsae.sae.dense_step import dense_step
from fastsae.sae.sparse_step import sparse_step
from fastsae.training.run import TrainingRun
parallel.start("cpu")
found, (x, configs) = {}, torch.load(sys.argv[1])
for variant, config in configs.items():
    run = TrainingRun(config, x, seed=0, device="cpu", learning_rate=1e-3)
    run.tokens_since_fired[::3] = 1000
    rows, dead = x[parallel.share(len(x))], run.tokens_since_fired > 10
    if variant in ("jumprelu", "gated"):
        loss, fired = dense_step(run.sae, rows, dead, sparsity=0.1, bandwidth=0.5, target_l0=4)
    else:
        loss, fired = sparse_step(run.sae, rows, dead, aux_coef=0.3)
    found[variant] = {n: parallel.total(p.grad).clone() for n, p in run.sae.named_parameters()}
    found[variant] |= {"loss": parallel.total(loss), "fired": parallel.anywhere(fired),
                       "threshold of the step": run.sae.threshold.detach()}
if parallel.world()[0] == 0:
    torch.save(found, sys.argv[2])
os._exit(0)  # see the end of train_sae.py
"""
VARIANTS = {
    "topk": {},
    "matryoshka": {"prefix_lengths": [16, 64]},
    "batchtopk": {"use_batch_topk": True},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
}


def test_a_step_of_two_processes_has_the_gradients_of_one(tmp_path):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((101, 12)).astype(np.float32)) + 1
    shape = {"input_dim": 12, "m_total_neurons": 64, "k_active_neurons": 4, "aux_k": 8}
    torch.save(
        (x, {name: {**shape, **options} for name, options in VARIANTS.items()}), tmp_path / "in.pt"
    )
    (tmp_path / "steps.py").write_text(STEPS)
    found = []
    for n_processes in (1, 2):
        out = tmp_path / f"out{n_processes}.pt"
        launch([tmp_path / "steps.py", tmp_path / "in.pt", out], n_processes)
        found.append(torch.load(out))
    for variant, one in found[0].items():
        for name, value in one.items():
            assert (
                found[1][variant][name].double() - value.double()
            ).norm() <= 1e-5 * value.double().norm(), (variant, name)
