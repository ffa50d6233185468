import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
for name in ("OPENAI_API_KEY", "OPENAI_KEY_SAE", "OPENAI_BASE_URL"):  # a developer's own endpoint is never asked by tests
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def smol_tokenizer():
    from fastsae.language_model import load_tokenizer

    return load_tokenizer("SmolLM2-135M-Instruct")


@pytest.fixture
def run_script(tmp_path):
    """Run one of the scripts as a user does, outputs under tmp_path; returns the finished process."""
    def run(script, *flags, env=None, cwd=None):
        command = [sys.executable, str(PROJECT / script), "--output-dir", str(tmp_path), *map(str, flags)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=cwd, timeout=300)
    return run


@pytest.fixture
def write_activations(tmp_path):
    """Write an activations file as stage 1 would, from made-up numbers; returns the flags that make stages 2 and 3 use it."""
    from fastsae import artifacts

    def write(activations, lengths, *, dataset=None, kind=None, token_ids=None):
        n = len(activations)
        inputs = {"dataset": artifacts.file_sha256(dataset) if dataset else "made up", "model": "made up"}
        metadata = artifacts.new_metadata("activations", {"LAYER_IDX": 12}, inputs, model_name="SmolLM2-135M-Instruct",
                                          model_revision=None, n_examples=len(lengths), dataset_path=str(dataset or "made-up.jsonl"))
        artifacts.write_npz(tmp_path / "activations" / "activations_layer12.npz", {
            "activations": activations, "seq_lengths": np.array(lengths, np.int32),
            "token_ids": np.arange(n, dtype=np.int32) % 1000 if token_ids is None else np.asarray(token_ids, np.int32),
            "token_kind": np.zeros(n, np.uint8) if kind is None else np.asarray(kind, np.uint8), "token_role": np.zeros(n, np.uint8),
            "example_ids": np.arange(1, len(lengths) + 1, dtype=np.int32), "metadata": np.array(artifacts.to_json(metadata))})
        return ["--output-dir", str(tmp_path), *(["--dataset-path", str(dataset)] if dataset else [])]
    return write


@pytest.fixture
def run_main(monkeypatch):
    """Call a script's `main()` in this process with the given flags, through `run_stage`; returns the exit code."""
    import importlib

    from fastsae.errors import run_stage

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--no-print-settings", *map(str, flags)])
        return run_stage(importlib.import_module(script).main)
    return run


def planted_tokens(n, d, n_directions, n_active, seed=0, noise=0.0):
    """Tokens made of a few known unit directions each: (tokens (n, d), directions (n_directions, d)) float32."""
    generator = np.random.default_rng(seed)
    directions = generator.standard_normal((n_directions, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    codes = np.zeros((n, n_directions))
    for row in codes:
        row[generator.choice(n_directions, n_active, replace=False)] = generator.uniform(1, 2, n_active)
    tokens = codes @ directions + noise * generator.standard_normal((n, d))
    return tokens.astype(np.float32), directions.astype(np.float32)
