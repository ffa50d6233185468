"""What a user can cause or meet: one line on stderr, the right exit code, and nothing already made
is lost."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT, line_of, snapshot
from small import small

from fastsae.activations import extraction
from fastsae.interpretation.inputs import named_checkpoint
from fastsae.runtime import artifacts, stops, storage
from fastsae.runtime.errors import EnvironmentFailure, InputError

SMALL = small(m=8, n_epochs=1, run_name="r")


@pytest.fixture(autouse=True)
def own_sigterm_handler():
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


# One stage without the one before


def test_stages_out_of_order(run_script, tmp_path):
    path = tmp_path / "activations" / "activations_layer12.npz"
    assert (
        line_of(run_script("train_sae.py"), 2)
        == f"{path}: not found. run extract_activations.py first, or check --output-dir."
    )
    path = tmp_path / "checkpoints" / "cognitive_actions" / "metrics.json"
    assert line_of(run_script("interpret_sae.py"), 2) == (
        f"{path}: not found. run train_sae.py first, or check --run-name and --output-dir."
    )
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"5",
        b'{"checkpoint": 5}',
        b'{"checkpoint": null}',
        b"\xff\xfe{",
        b"[" * 100_000,
        b'{"checkpoint":' * 100_000,
        b"9" * 10_000,
    ],
)
def test_damaged_metrics(tmp_path, outcome, content):
    (tmp_path / "metrics.json").write_bytes(content)
    assert outcome(lambda: named_checkpoint(tmp_path)) == (
        3,
        [f"error: {tmp_path / 'metrics.json'}: damaged. run train_sae.py again."],
    )


def test_metrics_that_name_a_checkpoint_which_is_gone(run_main, capsys, tmp_path):
    (tmp_path / "checkpoints" / "r").mkdir(parents=True)
    (tmp_path / "checkpoints" / "r" / "metrics.json").write_text('{"checkpoint": "gone.pt"}')
    assert run_main("interpret_sae", "--output-dir", tmp_path, "--run-name", "r") == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'checkpoints/r/gone.pt'}: not found. run train_sae.py first, "
        "or check --output-dir.\n"
    )


def test_training_again_mends_what_is_damaged(run_main, write_activations, capsys, tmp_path):
    flags = [
        *write_activations(
            np.random.default_rng(0).standard_normal((60, 4)).astype(np.float16), 6 * [10]
        ),
        *SMALL,
    ]
    run = tmp_path / "checkpoints" / "r"
    assert run_main("train_sae", *flags) == 0
    named = json.loads((run / "metrics.json").read_text())["checkpoint"]
    whole = (run / named).read_bytes()

    (run / "metrics.json").write_bytes(b"{")
    assert run_main("train_sae", *flags) == 0
    assert (
        json.loads((run / "metrics.json").read_text())["checkpoint"] == named
        and (run / named).read_bytes() == whole
    )

    for content in (b"[" * 100_000, b"\xff", b"[1]", b'{"checkpoint": {}}'):  # edited by hand
        for name in ("metrics.json", "metrics.jsonl"):
            (run / name).write_bytes(content)
        assert run_main("train_sae", *flags) == 0
        assert json.loads((run / "metrics.json").read_text())["checkpoint"] == named
        assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["epoch"] == 1

    (run / named).write_bytes(whole[:-1])
    capsys.readouterr()
    assert run_main("train_sae", *flags) == 0
    assert "not reused: " in capsys.readouterr().out
    assert (
        artifacts.read_checkpoint(run / named)["state_dict"].keys()
        == torch.load(io.BytesIO(whole))["state_dict"].keys()
    )
    assert [path.read_bytes() for path in run.glob("*.old-1.pt")] == [whole[:-1]]


def test_a_refused_run_leaves_the_results_of_earlier_ones(
    run_main, write_activations, capsys, tmp_path
):
    flags = [
        *write_activations(
            np.random.default_rng(0).standard_normal((60, 4)).astype(np.float16), 6 * [10]
        ),
        *SMALL,
    ]
    assert run_main("train_sae", *flags) == 0
    path = tmp_path / "activations" / "activations_layer12.npz"
    path.write_bytes(path.read_bytes()[:-1])
    before = snapshot(tmp_path)
    assert run_main("train_sae", *flags, "--seed", 1) == 3
    assert snapshot(tmp_path) == before


# Disk, rights, signals


def fail_with(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), EnvironmentFailure("part: damaged."), MemoryError()]
)
def test_a_write_that_is_cut_off_leaves_the_previous_file(tmp_path, error):
    def rows():
        yield np.ones((1, 2))
        raise error

    path = tmp_path / "a.npz"
    path.write_bytes(b"previous")
    with pytest.raises(type(error)):
        artifacts.write_npz(path, {"a": ((2, 2), "float32", rows())})
    assert snapshot(tmp_path) == {"a.npz": b"previous"}


def test_a_failing_folder_sync_leaves_the_new_file_whole(monkeypatch, tmp_path):
    # the file, then its folder
    steps = iter([os.fsync, fail_with(OSError(errno.EIO, "Input/output error"))])
    monkeypatch.setattr(os, "fsync", lambda handle: next(steps)(handle))
    with pytest.raises(OSError, match="Input/output error"):
        artifacts.write_text(tmp_path / "a", "new")
    assert snapshot(tmp_path) == {"a": b"new"}


def test_a_torn_journal_line_loses_nothing_else(tmp_path):
    path = tmp_path / "j.jsonl"
    artifacts.append_line(path, {"a": 1})
    with open(path, "ab") as file:
        file.write(b'{"b": ')
    artifacts.append_line(path, {"c": "\u00e9"})
    assert artifacts.read_lines(path) == [{"a": 1}, {"c": "\u00e9"}]


def test_a_disk_that_is_too_small_is_noticed_before_the_model_loads(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500_000_000))
    # 2 GB and 16 MiB: 2.0168 GB
    with pytest.raises(EnvironmentFailure) as error:
        extraction.require_disk_space(tmp_path / "activations" / "a.npz", 2 * 10**9)
    assert str(error.value) == (
        f"{tmp_path / 'activations'}: 2.02 GB are needed and 0.50 GB are free. "
        "free some space, choose another --output-dir, or lower --max-examples."
    )
    extraction.require_disk_space(tmp_path / "activations" / "a.npz", 2 * 10**8)


@pytest.mark.parametrize(
    "error, code, text",
    [
        (InputError("M: a. b.", "K: c. d."), 2, ["error: M: a. b.", "error: K: c. d."]),
        (
            EnvironmentFailure("a.npz: damaged. delete it."),
            3,
            ["error: a.npz: damaged. delete it."],
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/o/a"),
            3,
            [
                "error: /o/a: Permission denied. check the folder's rights, or choose "
                "another --output-dir; nothing that was complete is lost."
            ],
        ),
        (
            FileExistsError(errno.EEXIST, "File exists", "/o/activations"),
            3,
            [
                "error: /o/activations: File exists. move away what is there, or choose "
                "another --output-dir; nothing that was complete is lost."
            ],
        ),
        (
            KeyboardInterrupt(),
            130,
            ["stopped: what was finished is kept; the same command continues."],
        ),
    ],
)
def test_exit_codes(outcome, error, code, text):
    assert outcome(fail_with(error)) == (code, text)


def test_a_stage_s_own_code_is_kept(outcome):
    assert outcome(lambda: None) == (0, [])
    assert outcome(lambda: 4) == (4, [])


def test_sigterm(outcome):
    assert outcome(lambda: signal.raise_signal(signal.SIGTERM)) == (
        143,
        ["stopped: what was finished is kept; the same command continues."],
    )


def test_one_stop_that_arrives_twice_stops_once(outcome):
    """A service manager signals every process, and the pipeline passes its own signal on."""

    def body():
        with stops.deferred_stop():
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
            saved.append(stops.stop_asked())
            stops.stop()

    saved = []
    assert outcome(body)[0] == 143 and saved == [True]


def test_asked_again_later_it_stops_at_once(outcome, monkeypatch):
    def body():
        with stops.deferred_stop():
            signal.raise_signal(signal.SIGTERM)
            monkeypatch.setattr(stops, "SAME_STOP", 0)
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("still running")

    assert outcome(body)[0] == 143


def test_a_second_signal_does_not_disturb_the_ending(outcome):
    def body():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            stops.at_end(lambda: signal.raise_signal(signal.SIGTERM))

    assert outcome(body) == (
        143,
        ["stopped: what was finished is kept; the same command continues."],
    )


def test_torchs_allocator_is_out_of_memory(outcome):
    text = (
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 9 bytes."
    )
    code, lines = outcome(fail_with(RuntimeError(text)))
    assert code == 3 and lines[0].startswith("error: memory: ")


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError(), KeyError("a"), FileNotFoundError(errno.ENOENT, "x"), RuntimeError("x")],
)
def test_a_bug_is_not_hidden(outcome, error, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage.keep_log_in(None)  # no output folder is known yet
    code, lines = outcome(fail_with(error))
    (log,) = tmp_path.iterdir()
    assert (
        code == 1
        and lines[0].startswith("Traceback")
        and str(log) in lines[-1]
        and type(error).__name__ in log.read_text()
    )


def stage_process(body, stdout):
    code = (
        f"import sys; from fastsae.runtime.stage import run_stage; "
        f"sys.exit(run_stage(lambda: {body}))"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        timeout=60,
    )


@pytest.mark.parametrize(
    "body",
    ["print('x', flush=True)", "print('x')", "print('x' * 100_000)"],
    ids=["flushed", "buffered", "long"],
)
def test_a_reader_that_left_is_no_error(body):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = stage_process(body, writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
