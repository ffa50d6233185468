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
from conftest import PROJECT, summaries

import config

FAST = ["--max-examples", 96, "--n-epochs", 3, "--device", "cpu"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(output folder, the finished run, run) of the demo with a slice of its data, run quietly;
    `run(*flags)` runs it again."""
    folder = tmp_path_factory.mktemp("demo")

    def run(*flags):
        words = ["--output-dir", folder, *FAST, *flags]
        command = [sys.executable, PROJECT / "run_pipeline.py", *words]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)

    return folder, run("--quiet"), run


def test_demo_end_to_end(demo):
    folder, first, _ = demo
    assert first.returncode == 0, first.stderr
    for name in (
        "activations/activations_layer12.npz",
        "interpretations.csv",
        "interpretations.jsonl",
    ):
        assert (folder / name).is_file()
    metrics = json.loads(
        (folder / "checkpoints" / "cognitive_actions" / "metrics.json").read_text()
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
    table = (folder / "interpretations.csv").read_text(encoding="utf-8")
    assert table.startswith(
        "feature,label,label_source,label_precision,label_recall,label_f1,rule,detection_auc,status,density,"
        "max_activation,top_tokens,top_example_1"
    )
    assert sum(line.split(",")[0].isdigit() for line in table.splitlines()) == 256


def test_the_whole_pipeline_quietly(demo):
    """Three summary lines on stdout and nothing else anywhere, twice."""
    folder, first, run = demo
    for status, done in (("written", first), ("unchanged", run("--quiet"))):
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        found = summaries(done.stdout)
        assert len([line for line in lines if not line.startswith("warning: ")]) == 3
        assert [(line["stage"], line["status"]) for line in found] == [
            (name.removesuffix(".py"), status) for name in config.STAGES
        ]
        assert all(line["seconds"] >= 0 and (folder / line["path"]).exists() for line in found)
        assert (
            found[0]["n_examples"] == 96
            and found[0]["n_tokens"] > 96
            and found[2]["n_features"] == 256
        )


@pytest.mark.exhaustive
def test_what_is_done_is_not_done_again(demo):
    folder, _, run = demo
    again = run()
    assert again.returncode == 0 and again.stdout.count("up to date") == 3

    other = run("--k", 16)
    assert other.returncode == 0 and other.stdout.count("up to date") == 1
    assert "K=16" in other.stdout
    metrics = json.loads(
        (folder / "checkpoints" / "cognitive_actions" / "metrics.json").read_text()
    )
    assert 8 < metrics["l0"] <= 16


def test_a_failing_stage_gives_its_exit_code_and_stops_the_rest(tmp_path, run_script):
    """The path is the user's, relative to where they stand."""
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": 7}\n')
    done = run_script("run_pipeline.py", "--dataset-path", "bad.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: (\S+/)?bad\.jsonl:2: ", line) and "[2/3]" not in done.stdout


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


# Two stages at once: processes that do nothing but end

# as a stage's first line does: it is started with stops blocked
FOREVER = "import signal, time; signal.pthread_sigmask(signal.SIG_UNBLOCK, [15]); time.sleep(60)"
SLOW = "import time; time.sleep(0.5)"
CASES = {  # {case: (stage 1, stage 2 of a layer or of two, has stage 1 begun a stream, exit code)}
    "both end": ("", "", True, 0),
    "stage 1 fails before its stream": ("raise SystemExit(2)", FOREVER, False, 2),
    "stage 1 fails": ("import time; time.sleep(1); raise SystemExit(3)", FOREVER, True, 3),
    "stage 2 fails": (FOREVER, "raise SystemExit(2)", True, 2),
    "stage 2 needs nothing": (FOREVER, "", True, 0),
    "stage 2 is killed": (FOREVER, "import os; os.kill(os.getpid(), 9)", True, 137),
    "two layers end": (FOREVER, "", SLOW, True, 0),
    "the second layer fails": (FOREVER, FOREVER, f"{SLOW}; raise SystemExit(3)", True, 3),
    "the first layer fails": ("", "raise SystemExit(4)", FOREVER, True, 4),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_of_two_stages_at_once_none_is_left(tmp_path, monkeypatch, case):
    import run_pipeline

    *codes, begun, expected = case
    stages = []
    for number, code in enumerate(codes, 1):
        script = tmp_path / f"stage{number}.py"
        script.write_text(code)
        stages.append(run_pipeline.Stage(script, [], ""))
    monkeypatch.setattr(run_pipeline, "has_begun", lambda settings, name: begun)
    monkeypatch.setattr(run_pipeline, "LAST_WORDS", 0.2)
    monkeypatch.setattr(run_pipeline, "POLL", 0.02)
    began = time.monotonic()
    assert run_pipeline.run(stages, None) == expected
    assert time.monotonic() - began < 20 and not any(stage.is_running() for stage in stages)
    if not begun:
        assert stages[1].process is None


def test_a_stop_before_the_stream_begins_ends_the_run(tmp_path, monkeypatch):
    import os
    import threading

    import run_pipeline

    script = tmp_path / "stage.py"
    script.write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: exit(0))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\n"
        "time.sleep(60)"
    )
    stages = [run_pipeline.Stage(script, [], "") for _ in range(2)]
    monkeypatch.setattr(run_pipeline, "has_begun", lambda settings, name: False)
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert run_pipeline.run(stages, None) == 143
    assert stages[1].process is None


def test_each_layer_of_a_stream_has_a_stage_2():
    """The flags that come last count; only the first layer's shows a bar."""
    import run_pipeline

    argv = ["--layer-idx", "12,18,7", "--dataset-path", "a/b.jsonl", "--k", "4"]
    settings = config.resolve(PROJECT / "train_sae.py", argv=argv)
    first = run_pipeline.Stage("train_sae.py", ["--k=4"], "[2/3] train_sae.py")
    others = run_pipeline.of_other_layers(first, settings)
    assert [stage.flags for stage in others] == [
        ["--k=4", "--layer-idx=18", "--run-name=b_layer18"],
        ["--k=4", "--layer-idx=7", "--run-name=b_layer7"],
    ]
    assert others[0].title == "[2/3] train_sae.py for layer 18"
    assert first.has_bar and not any(stage.has_bar for stage in others)
    one = config.resolve(PROJECT / "train_sae.py", argv=["--layer-idx", "12"])
    assert run_pipeline.of_other_layers(first, one) == []


@pytest.mark.parametrize(
    "more, n_trained",
    [
        ((), 1),
        pytest.param(
            ("--layer-idx", "1,2", "--storage-dtype", "int8", "--seed", "0,1", "--k", "2,3"),
            2,
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["one layer", "two layers in 8 bits, lists"],
)
def test_a_stream_through_the_whole_pipeline(tmp_path, tiny_llama, more, n_trained):
    """Two runs: the second is up to date three times, and nothing is left of the parts."""
    rows = [{"text": f"the road number {i} home", "topic": f"t{i % 2}"} for i in range(60)]
    dataset = tmp_path / "texts.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--output-dir", tmp_path / "out", "--dataset-path", dataset, "--model-name", tiny_llama,
        "--layer-idx", 1, "--label-field", "topic", "--device", "cpu", "--m", 16, "--k", 2,
        "--max-norm-ratio", "none", "--stream-bytes", 10**6, "--sample-fraction", 0.4,
        "--buffer-tokens", 600, *more,
    ]  # fmt: skip
    command = [sys.executable, PROJECT / "run_pipeline.py", *words]
    command = list(map(str, command))
    for status in ("written", "unchanged"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found = [(line["stage"], line["status"]) for line in summaries(done.stdout)]
        stages = ["extract_activations", *n_trained * ["train_sae"], "interpret_sae"]
        assert sorted(found) == sorted((stage, status) for stage in stages)
    assert not list((tmp_path / "out").rglob("part-*"))
    runs = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert [name for name in runs if "." not in name] == ["texts", "texts_layer2"][:n_trained]
    if n_trained == 2:
        assert len(list((tmp_path / "out" / "checkpoints" / "texts_layer2").glob("SAE_*.pt"))) == 4
