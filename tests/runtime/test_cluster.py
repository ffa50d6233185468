"""Several processes as job systems start them: which GPU each takes, and the documented commands
for SLURM, run with the variables that it would set."""

import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch.distributed as dist
from conftest import PROJECT
from pretended_cuda import pretended
from test_ranks import use
from tiny_world import WORDS

from fastsae.activations.files import open_activations
from fastsae.lm import devices
from fastsae.runtime import distributed, ranks
from fastsae.runtime.errors import InputError

# of each process: (machine, LOCAL_RANK, CUDA_VISIBLE_DEVICES), and the device that it takes
JOBS = {
    "torchrun, all GPUs visible": [("a", 0, None, "cuda:0"), ("a", 1, None, "cuda:1")],
    "SLURM, one GPU each": [("a", 0, "0", "cuda:0"), ("a", 1, "1", "cuda:0")],
    "two machines, one GPU each": [("a", 0, "0", "cuda:0"), ("b", 0, "0", "cuda:0")],
    "two machines, two GPUs each": [
        ("a", 0, None, "cuda:0"),
        ("a", 1, None, "cuda:1"),
        ("b", 0, "1,0", "cuda:0"),
        ("b", 1, "1,0", "cuda:1"),
    ],
    "one process on each machine": [("a", None, None, "cuda:0"), ("b", None, None, "cuda:0")],
}
SHARED = {  # processes that would share a GPU, of which training names those
    "four processes, two GPUs": (
        [("a", i, None, f"cuda:{i % 2}") for i in range(4)],
        [(0, 2), (1, 3), (0, 2), (1, 3)],
    ),
    "both see the first GPU only": (
        [("a", 0, "0", "cuda:0"), ("a", 1, "0", "cuda:0")],
        [(0, 1), (0, 1)],
    ),
    "no LOCAL_RANK on one machine": (
        [("a", None, None, "cuda:0"), ("a", None, None, "cuda:0")],
        [(0, 1), (0, 1)],
    ),
}


def started(monkeypatch, job, store):
    """Each process in turn: yields its rank once it has its device and has said so."""
    for rank, (machine, local_rank, visible, expected) in enumerate(job):
        local = {} if local_rank is None else {"LOCAL_RANK": str(local_rank)}
        use(monkeypatch, RANK=str(rank), WORLD_SIZE=str(len(job)), **local)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(os, "uname", lambda name=machine: type("U", (), {"nodename": name}))
        with pretended() as there:
            device = devices.choose_device("cuda")
            assert (device, there.current) == (expected, int(expected[-1]))
            distributed.say_device(store, rank, device)
            yield rank, device


@pytest.mark.parametrize("job", JOBS)
def test_every_process_has_a_gpu_of_its_own(monkeypatch, job):
    store = dist.HashStore()
    for rank, device in list(started(monkeypatch, JOBS[job], store)):
        distributed.require_own_device(store, rank, len(JOBS[job]), device)


@pytest.mark.parametrize("job", SHARED)
def test_processes_that_share_a_gpu_extract_but_do_not_train(monkeypatch, job):
    store, (processes, named) = dist.HashStore(), SHARED[job]
    for rank, device in list(started(monkeypatch, processes, store)):
        named_here = ranks.listed(named[rank])
        with pytest.raises(InputError, match=f"^DEVICE: {named_here} would train on the same GPU"):
            distributed.require_own_device(store, rank, len(processes), device)


# The documented commands


@pytest.fixture
def cluster(tmp_path):
    """What runs a documented command as SLURM's tasks would; returns what each has said."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    (tools / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\necho other\n")
    (tools / "scontrol").chmod(0o755)

    def run(script, flags, device, visible):
        command = documented(script)
        if device == "cuda":
            support = PROJECT / "tests" / "support" / "pretended_rank.py"
            command = command.replace(f"{script}.py", f"{support} {script}")
        command = re.sub(r"(--dataset-path|--batch-size) \S+", "", command)
        command = command.removeprefix("srun ")[:-1] + " ".join(map(str, ["", *flags])) + "'"
        command = command.replace("29500", str(free_port()))
        tasks = []
        for rank in range(2):
            # the interpreter's packages, whatever stands for `python`
            paths = [str(PROJECT), str(PROJECT / "tests" / "support"), *filter(None, sys.path)]
            environment = {
                **{name: text for name, text in os.environ.items() if name not in ranks.NAMES},
                "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": "1",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_NTASKS": "2",
                "SLURM_JOB_NODELIST": "node[1-2]",
                **({"CUDA_VISIBLE_DEVICES": visible(rank)} if visible else {}),
            }
            tasks.append(
                subprocess.Popen(
                    ["bash", "-c", command],
                    cwd=PROJECT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        said = [task.communicate(timeout=280) for task in tasks]
        assert [task.returncode for task in tasks] == [0, 0], said
        return [out for out, _ in said]

    return run


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def documented(script):
    """The command of docs/scale.md that starts a stage under SLURM."""
    lines = (PROJECT / "docs" / "scale.md").read_text().splitlines()
    (command,) = (line for line in lines if line.startswith("srun ") and f"{script}.py" in line)
    return command


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("device", "visible"), [("cpu", None), ("cuda", str)], ids=["CPU", "one GPU each"]
)
def test_the_documented_commands(tmp_path, cluster, run_main, tiny_llama, device, visible):
    """Two tasks make the bytes of one on a CPU, and its numbers on the pretended device."""
    words = np.random.default_rng(0).choice(WORDS, (40, 12))
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in words))
    extraction = ["--dataset-path", data, "--model-name", tiny_llama, "--layer-idx", 1]
    extraction += ["--dtype", "float32", "--output-dir"]
    out, alone = tmp_path / "out", tmp_path / "alone"
    assert run_main("extract_activations", *extraction, alone, "--device", "cpu") == 0
    said = cluster("extract_activations", [*extraction, out, "--device", device], device, visible)
    name = "activations/activations_layer1.npz"
    assert device == "cuda" or (out / name).read_bytes() == (alone / name).read_bytes()
    rows = [open_activations(each / name)["activations"] for each in (out, alone)]
    np.testing.assert_allclose(*map(np.asarray, rows), rtol=1e-2, atol=1e-3)
    training = ["--m", 16, "--k", 2, "--matryoshka-prefixes", "none", "--n-epochs", 2]
    training += ["--layer-idx", 1, "--batch-size", 64, "--run-name", "r", "--output-dir"]
    assert run_main("train_sae", *training, alone, "--device", "cpu") == 0
    said += cluster("train_sae", [*training, out, "--device", device], device, visible)
    found = [json.loads((each / "checkpoints/r/metrics.json").read_text()) for each in (out, alone)]
    assert found[0]["normalized_mse"] == pytest.approx(found[1]["normalized_mse"], abs=0.02)
    if device == "cuda":
        took = [re.search(r"on (cuda:\d) of (\[.*\])", text).groups() for text in said]
        assert took == 2 * [("cuda:0", "[0]"), ("cuda:0", "[1]")]
