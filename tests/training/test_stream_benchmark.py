"""The benchmark of streams: pieces that add up, and a small form of all of it."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import PROJECT

from experiments.benchmarks import kill_stream, stream

WORK = """\
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "part-1.npz").write_bytes(bytes(8192))
while not (folder / "enough").exists():
    time.sleep(0.01)
"""


def test_pieces_of_a_step_add_up(tmp_path, monkeypatch):
    """Stopped in time twice; then it is done."""
    monkeypatch.setattr(stream, "may_begin", lambda args, out: (out / "part-1.npz").exists())
    args = SimpleNamespace(work_dir=tmp_path, minutes=1.5 / 60, layer=1)
    commands = [[sys.executable, "-c", WORK, str(tmp_path / "both")]] * 2
    for n_pieces in (1, 2):
        with pytest.raises(SystemExit) as stop:
            stream.measured(args, "both", "both", commands)
        assert stop.value.code == stream.GO_ON
        kept = json.loads((tmp_path / "both.partial.json").read_text())
        assert kept["pieces"] == n_pieces and len(kept["stages"]) == 2
        assert kept["seconds"] >= 1.4 * n_pieces
    (tmp_path / "both" / "enough").touch()
    args.minutes = 1
    found = stream.measured(args, "both", "both", commands)
    assert found["pieces"] == 3 and found["seconds"] >= kept["seconds"]
    assert found["peak_bytes"]["parts"] >= 8192
    assert all(each["peak_memory_mb"] > 1 for each in found["stages"])
    for n, stage in enumerate(found["stages"]):
        assert stage["cpu_seconds"] >= kept["stages"][n]["cpu_seconds"]


def test_a_stage_that_fails_ends_the_benchmark(tmp_path):
    args = SimpleNamespace(work_dir=tmp_path, minutes=1, layer=1)
    with pytest.raises(SystemExit) as stop:
        stream.measured(args, "train", "alone", [[sys.executable, "-c", "raise SystemExit(3)"]])
    assert stop.value.code == 3


def test_counts_of_trials_are_read_from_what_pytest_prints():
    printed = (
        "..\nguarantees: 1,204 of 4,816 kill points survived, 7 full-disk points\n"
        "6 passed in 3.21s\n"
    )
    assert kill_stream.counts(printed) == {
        "kill points survived": [1204, 4816],
        "full-disk points": [7, 7],
    }


@pytest.mark.exhaustive
def test_a_small_benchmark(tmp_path):
    command = [
        sys.executable, "-m", "experiments.benchmarks.stream", "--work-dir", tmp_path / "w",
        "--small-model", "--tokens", 30_000, "--buffer-tokens", 4_500, "--budget", 0.5,
        "--layer", 2, "--sample", 0.2,
    ]  # fmt: skip
    results = tmp_path / "results"
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env={**os.environ, "FASTSAE_RESULTS": str(results)},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((results / "stream.json").read_text())
    assert found["same_bytes"] is True and found["n_parts"] > 8
    assert found["peak_bytes"]["both"]["parts"] <= found["budget_bytes"] + 2 * 4096 * 5
    assert found["sizes"]["half"]["n_tokens"] < found["sizes"]["both"]["n_tokens"]
    assert abs(found["mixing_loss"]) < 0.1 and set(found["pieces"].values()) == {1}
