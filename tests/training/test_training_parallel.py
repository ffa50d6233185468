"""Two processes against one with the same global batch: the same autoencoder, whatever the
architecture."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import parallel_steps
import pytest
import torch
from conftest import PROJECT, planted_tokens
from small import small

from fastsae.formats.load import load_sae

FLAGS = small(m=64, k=3, n_epochs=3, batch_size=100, max_norm_ratio=None, dead_after_tokens=400)


def launch(command, n_processes):
    """What torchrun's processes print, or one alone."""
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


VARIANTS = {
    "topk": {},
    "matryoshka": {"prefix_lengths": [16, 64]},
    "batchtopk": {"use_batch_topk": True},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
    "kernels": {"prefix_lengths": [16, 64]},
    "kernels, batchtopk": {"use_batch_topk": True},
}


def test_a_step_of_two_processes_has_the_gradients_of_one(tmp_path):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((101, 12)).astype(np.float32)) + 1
    shape = {"input_dim": 12, "m_total_neurons": 64, "k_active_neurons": 4, "aux_k": 8}
    configs = {name: {**shape, **options} for name, options in VARIANTS.items()}
    torch.save((x, configs), tmp_path / "in.pt")
    parallel_steps.steps(tmp_path / "in.pt", tmp_path / "one.pt")
    command = [sys.executable, parallel_steps.__file__, tmp_path / "in.pt", tmp_path / "two.pt"]
    together = meeting(2)
    processes = [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert one.keys() == two.keys() == VARIANTS.keys()
    for variant, values in one.items():
        for name, value in values.items():
            assert (
                two[variant][name].double() - value.double()
            ).norm() <= 1e-5 * value.double().norm(), (variant, name)


def meeting(n):
    """The environment in which n processes of this machine find each other, as torchrun sets it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "PYTHONPATH": str(PROJECT),
    }
