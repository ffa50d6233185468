"""The benchmark for a GPU in its tiny form on the CPU, the kernels' slow twins in their place: that
it runs to its end and finds what is wrong. What it measures here means nothing."""

import json
import sys

import kernel_twins
import pytest

from experiments.benchmarks import gpu
from experiments.shared import provenance
from fastsae.sae import kernel_step


@pytest.fixture
def bench(tmp_path, monkeypatch, run_main):
    """Run a part in this process, the scripts too; its result and exit code."""

    def stage(script, *flags):
        assert run_main(script.removesuffix(".py"), *flags) == 0

    for module in (gpu, provenance):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "run_stage", stage)
    monkeypatch.setattr(kernel_step, "usable", lambda device: True)
    monkeypatch.setattr(kernel_step, "kernels", kernel_twins.launched)

    def run(part, *flags):
        words = ["gpu.py", "--part", part, "--tiny", "--device", "cpu", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", words)
        code = 0
        try:
            gpu.main()
        except SystemExit as stop:
            code = stop.code
        return json.loads((tmp_path / "gpu.json").read_text())[part], code

    return run


def test_check(bench):
    found, code = bench("check", "--no-scripts")
    errors = found["relative_errors_against_float64"]
    assert code == 0 and not found["failed"] and not found["not_run_for_time"]
    assert len(errors) == 4 and len(found["same_bits_in_two_trainings"]) == 8
    assert all(0 < e < 1e-5 for each in errors.values() for e in each.values())
    assert all(found["same_bits_in_two_trainings"].values())


def test_a_wrong_kernel_is_found(bench, monkeypatch):
    twins = kernel_twins.launched()
    right = twins.dots
    twins.dots = lambda *arguments: right(*arguments) * 1.001
    monkeypatch.setattr(kernel_step, "kernels", lambda: twins)
    found, code = bench("check", "--no-scripts")
    assert len(found["failed"]) == 4 and all(name.endswith("kernels") for name in found["failed"])
    assert code == "error: " + ", ".join(found["failed"]) + " failed"


@pytest.mark.exhaustive
def test_scripts_on_two_devices(bench, monkeypatch):
    monkeypatch.setattr(kernel_step, "usable", lambda device: False)  # the twins take their time
    found, code = bench("check")
    assert code == 0 and found["scripts"]["agree"]
    assert found["scripts"]["median_relative_error"] == 0  # the same device twice
    assert found["scripts"]["cpu"]["features"] == 64


def test_training(bench):
    found, code = bench("training")
    (entrants,) = found["shapes"].values()
    ours = {"kernels", "sparse products", "kernels, all features dead", "dense bfloat16 autograd"}
    assert code == 0 and ours <= set(entrants)
    for name in ours:
        assert entrants[name]["ms"] > 0 and entrants[name]["slowest"], name
        assert entrants[name]["share_of_limit"] == pytest.approx(
            entrants["limit_ms"] / entrants[name]["ms"], abs=1e-2
        )


@pytest.mark.exhaustive
def test_extraction(bench):
    found, code = bench("extraction")
    (ways,) = found["datasets"].values()
    assert code == 0 and set(ways) == {"stage 1", "seeds' loop", "padded batches of 16"}
    assert all(way["tokens_per_second"] > 0 for way in ways.values())


def test_no_time_left(bench):
    found, code = bench("training", "--minutes", 0)
    assert code == 0 and len(found["not_run_for_time"]) >= 4
    (entrants,) = found["shapes"].values()
    assert set(entrants) == {"limit_ms"}


def test_the_limit_by_hand():
    """d=4096, M=65,536, K=32, 4,096 tokens on 790 TFLOP/s and 3 TB/s: 2.8 + 1.4 + 4.3 ms."""
    ceilings = {"bfloat16_flops": 790e12, "copy_bytes": 3e12}
    assert gpu.limit_ms(ceilings, 4096, 65_536, 32, 4096) == pytest.approx(8.5, abs=0.05)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--part", "check"])
    with pytest.raises(SystemExit, match="error: --device: there is no CUDA device"):
        gpu.main()
