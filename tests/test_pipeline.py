"""The whole pipeline on the real embedded model with a slice of the data, and the README's two
commands."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import sampling
from conftest import PROJECT

FAST = ["--max-examples", 96, "--n-epochs", 3, "--device", "cpu"]


@pytest.mark.sampled
def test_demo_end_to_end(tmp_path, run_script):
    first = run_script("run_pipeline.py", *FAST)
    assert first.returncode == 0, first.stderr
    assert first.stderr == "" or "error" not in first.stderr
    for name in (
        "activations/activations_layer12.npz",
        "interpretations.csv",
        "interpretations.jsonl",
    ):
        assert (tmp_path / name).is_file()
    metrics = json.loads(
        (tmp_path / "checkpoints" / "cognitive_actions" / "metrics.json").read_text()
    )
    for name in (
        "mse",
        "normalized_mse",
        "explained_variance",
        "l0",
        "dead_fraction",
        "mse_template_tokens",
        "n_train_tokens",
        "n_validation_tokens",
        "epochs",
        "best_epoch",
        "seconds",
        "tokens_per_second",
        "prefix_normalized_mse",
    ):
        assert name in metrics
    assert (
        metrics["normalized_mse"] < 0.8
        and metrics["l0"] <= 8
        and metrics["checkpoint"].startswith("SAE_matryoshka_M=256_K=8")
    )
    table = (tmp_path / "interpretations.csv").read_text(encoding="utf-8")
    assert table.startswith(
        "feature,label,label_source,label_precision,label_recall,label_f1,rule,status,density,"
        "max_activation,top_tokens,top_example_1"
    )
    assert sum(line.split(",")[0].isdigit() for line in table.splitlines()) == 256

    if not sampling.exhaustive:  # that nothing is done twice: test_the_whole_pipeline_quietly
        return
    again = run_script("run_pipeline.py", *FAST)
    assert again.returncode == 0 and again.stdout.count("up to date") == 3

    other = run_script("run_pipeline.py", *FAST, "--k", 16)
    assert other.returncode == 0 and other.stdout.count("up to date") == 1
    assert "K=16" in other.stdout
    metrics = json.loads(
        (tmp_path / "checkpoints" / "cognitive_actions" / "metrics.json").read_text()
    )
    assert 8 < metrics["l0"] <= 16


def test_a_failing_stage_gives_its_exit_code_and_stops_the_rest(tmp_path, run_script):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "one"}\n{"text": 7}\n')
    done = run_script("run_pipeline.py", "--dataset-path", bad)
    assert done.returncode == 2
    assert f"error: {bad}:2: " in done.stderr and "[2/3]" not in done.stdout


def test_relative_paths_of_flags_are_the_users(tmp_path, run_script):
    (tmp_path / "mine.jsonl").write_text('{"text": ""}\n')
    done = run_script("run_pipeline.py", "--dataset-path", "mine.jsonl", cwd=tmp_path)
    assert "mine.jsonl:1: text is empty" in done.stderr


def test_sigterm_ends_the_stage_too(tmp_path):
    pipeline = subprocess.Popen(
        [
            sys.executable,
            str(PROJECT / "run_pipeline.py"),
            "--output-dir",
            str(tmp_path),
            "--device",
            "cpu",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (line := pipeline.stdout.readline()).startswith("[1/3]"):
        assert line, pipeline.stderr.read()
    time.sleep(3)  # until the stage has set its handler
    pipeline.send_signal(signal.SIGTERM)
    _, error = pipeline.communicate(timeout=30)
    assert pipeline.returncode == 143
    assert "the same command continues" in error
    assert not list(tmp_path.rglob("*.tmp"))
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in listing


def readme_commands():
    blocks = [
        block
        for path in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
    ]
    return [
        line.strip()
        for block in blocks
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]


def test_readme_commands_parse():
    """Every python command of the README and of docs/ names a script that exists and flags that it
    knows."""
    import config

    commands = readme_commands()
    assert commands[0].endswith("run_pipeline.py") and "pytest" in commands[1]
    checked = 0
    for command in commands:
        words = shlex.split(command.split("&&")[-1], comments=True)
        if not any(word in ("run_pipeline.py", *config.STAGES) for word in words):
            continue
        script = next(word for word in words if word.endswith(".py"))
        flags = words[words.index(script) + 1 :]
        scripts = config.STAGES if script == "run_pipeline.py" else [script]
        declared = config.read_settings(PROJECT / "config.py")
        for name in scripts:
            declared |= config.read_settings(PROJECT / name)
        _, problems = config.parse_flags(declared, flags, script)
        assert not problems, (command, problems)
        checked += 1
    assert checked >= 30


def test_ci_runs_the_readmes_test_command():
    command = readme_commands()[1]
    assert command in (PROJECT / ".ci" / "run").read_text()


def test_top_level_is_as_designed():
    tracked = subprocess.run(
        ["git", "-C", PROJECT, "ls-files"], capture_output=True, text=True
    ).stdout.split()
    top = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    assert top <= {
        "config.py",
        "extract_activations.py",
        "train_sae.py",
        "interpret_sae.py",
        "run_pipeline.py",
        "fastsae",
        "data",
        "docs",
        "experiments",
        "activations",
        "checkpoints",
        "tests",
        "requirements.txt",
        "README.md",
        "LICENSE",
    }
