"""What a user meets at the command line: help, quiet output, summary lines, bars; and the map in
docs/contributing.md."""

import io
import json
import re
import subprocess
import sys

import pytest
from conftest import PROJECT, planted_tokens, summaries
from small import small

import config
from fastsae.runtime import progress

SCRIPTS = ["extract_activations.py", "train_sae.py", "interpret_sae.py", "run_pipeline.py"]
TINY = small(run_name="r")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_enough_to_work_from(script):
    """Grouped by file, 100 columns, defaults as they are typed, examples that parse, exit codes."""
    done = subprocess.run(
        [sys.executable, PROJECT / script, "--m", "8", "-h"]
        if "train" in script
        else [sys.executable, PROJECT / script, "--help"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    text, _, pointed_out = done.stdout.partition("examples:\n")
    assert max(map(len, text.splitlines())) <= 100
    files = re.findall(r"^Main settings \((.*)\):$", text, re.M)
    assert files == ["config.py", *(config.STAGES if script == "run_pipeline.py" else [script])]
    examples = [line for line in pointed_out.split("exit codes:")[0].splitlines() if line.strip()]
    assert examples and all(script in line for line in examples)
    assert all(f"{code} " in pointed_out for code in (0, 1, 2, 3, 4))
    assert "130, 143" in pointed_out
    assert "[demo: 12; llama-3.1-8b: 12]" in text
    shown = re.findall(r"^  --([a-z]\S*)", text, re.M)
    assert len(shown) <= 5 + 5 * (len(files) - 1)  # of config.py, and of each stage
    rest = int(re.search(r"^(\d+) more settings: --help-all$", text, re.M)[1])
    done = subprocess.run(
        [sys.executable, PROJECT / script, "--help-all"], capture_output=True, text=True
    )
    every, _, examples_again = done.stdout.partition("examples:\n")
    assert max(map(len, every.splitlines())) <= 100
    assert examples_again == pointed_out and done.stderr == ""
    assert "[off]" in every and "| --no-quiet" in every
    assert len(re.findall(r"^  --([a-z]\S*)", every, re.M)) == len(shown) + rest


def test_values_that_begin_with_a_dash_and_values_that_are_missing():
    declared = config.read_settings(PROJECT / "config.py") | config.read_settings(
        PROJECT / "interpret_sae.py"
    )
    assert config.parse_flags(
        declared, ["--text", "-h is help", "--quiet", "--no-dry-run"], "interpret_sae.py"
    ) == ({"TEXT": "-h is help", "QUIET": True, "DRY_RUN": False}, [])
    words = ["--text", "--seed", "-3", "--text=--seed", "--quiet=1", "--nothing", "5"]
    given, problems = config.parse_flags(declared, words, "interpret_sae.py")
    assert given == {"SEED": -3, "TEXT": "--seed"}
    assert [problem.split(":")[0] for problem in problems] == ["TEXT", "command line", "--nothing"]


def test_quiet_leaves_the_summary_and_warnings(tmp_path, write_activations, run_main, capsys):
    tokens, _ = planted_tokens(400, 8, 16, 2)
    flags = [*write_activations(tokens, [20] * 20), *TINY]
    assert run_main("train_sae", *flags, "--quiet") == 0
    out, err = capsys.readouterr()
    assert err == "" and all(
        line.startswith(("summary: ", "warning: ")) for line in out.splitlines()
    )
    (line,) = summaries(out)
    metrics = json.loads((tmp_path / "checkpoints" / "r" / "metrics.json").read_text())
    assert (
        line["stage"] == "train_sae"
        and line["status"] == "written"
        and line["path"].endswith(metrics["checkpoint"])
    )
    assert (
        all(line[name] == metrics[name] for name in ("normalized_mse", "l0", "dead_fraction"))
        and line["seconds"] > 0
    )
    assert run_main("train_sae", *flags) == 0  # quiet no more, and nothing to do
    out = capsys.readouterr().out
    assert "up to date" in out and out.splitlines()[-1].startswith("summary: ")
    assert summaries(out)[0]["status"] == "unchanged" and summaries(out)[0]["l0"] == metrics["l0"]


def test_quiet_and_what_is_there_to_be_printed_exclude_each_other(run_script):
    done = run_script("interpret_sae.py", "--quiet", "--text", "a", "--dry-run")
    assert done.returncode == 2 and re.findall(r"^error: (\w+): QUIET", done.stderr, re.M) == [
        "TEXT",
        "DRY_RUN",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_are_for_terminals_only(monkeypatch):
    for terminal, quiet, shown in ((True, False, True), (False, False, False), (True, True, False)):
        err = Terminal() if terminal else io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", err)
            patch.setattr(sys, "stdout", io.StringIO())
            progress.start(quiet=quiet)
            with progress.bar(10, "reading", "token") as bar:
                bar.update(5)
                bar.refresh()
        text = err.getvalue()
        assert bool(text) is shown
        if shown:  # what is done, what is left, and how fast
            assert re.search(r"reading:  50%.*5/10 \[\d\d:\d\d<.*token/s\]", text), text


def test_the_guide_names_every_file():
    guide = (PROJECT / "docs" / "contributing.md").read_text(encoding="utf-8")
    tracked = subprocess.run(
        ["git", "-C", PROJECT, "ls-files", "fastsae", "experiments", "tests", "*.py"],
        capture_output=True,
        text=True,
    ).stdout.split()
    files = {
        name
        for name in tracked
        if name.endswith((".py", ".js", ".css", ".j2")) and not name.startswith("tests/")
    }
    assert len(files) >= 75
    named = set(re.findall(r"`([\w./]+)`", guide))
    missing = {
        name
        for name in files
        if not name.endswith("__init__.py")
        and not named & {name, name.split("/")[-1], name.partition("/")[2]}
    }
    assert not missing, missing
