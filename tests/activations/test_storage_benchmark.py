"""The benchmark of 8 bits, by hand and on the smallest model."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import PROJECT

from experiments.benchmarks.storage import summed_up


def test_figures_of_seeds_by_hand():
    found = [
        {"normalized_mse": 0.4, "given_int8": 0.404, "trained_on_int8": 0.4, "same_features": 1.0},
        {"normalized_mse": 0.5, "given_int8": 0.5, "trained_on_int8": 0.49, "same_features": 0.9},
    ]
    summed = summed_up(found)
    assert summed.pop("seeds") == found
    assert {name: round(value, 6) for name, value in summed.items()} == {
        "normalized_mse": 0.45,
        "given_int8_change": 0.005,
        "trained_on_int8_change": -0.01,
        "seed_spread": 0.222222,
        "same_features": 0.95,
    }


@pytest.mark.exhaustive
def test_a_small_benchmark(tmp_path, tiny_llama):
    words = np.random.default_rng(0).choice(["the", "bread", "rose", "home", "past"], (60, 20))
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in words))
    flags = [f"dataset-path={data}", f"model-name={tiny_llama}", "layer-idx=1", "label-field=none"]
    command = [
        sys.executable, "-m", "experiments.benchmarks.storage", "--work-dir", tmp_path / "w",
        "--small", "--epochs", 2, "--flags", *flags,
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env={**os.environ, "FASTSAE_RESULTS": str(tmp_path)},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "storage.json").read_text())
    (training,) = found["trainings"].values()
    assert len(training["seeds"]) == 2 and 0.9 < training["same_features"] <= 1
    assert abs(training["given_int8_change"]) < 0.01
    assert 0 < found["noise"]["int8"] < 1e-3
