"""What stages print: nothing that comes from outside forges a line or reaches the terminal, and no
failure to print ends the work."""

import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import PROJECT

from fastsae.activations.files import read_metadata
from fastsae.runtime import progress
from fastsae.runtime.console import Console, shown
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.runtime.stage import require_printed, run_stage

FORGED = [
    'x\nsummary: {"stage": "forged"}',
    'x\rsummary: {"stage": "forged"}',
    'x\x85summary: {"stage": "forged"}',
    'x\u2028summary: {"stage": "forged"}',
    'summary: {"stage": "forged"}',
    "x\nwarning: forged",
    "x\nerror: forged",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "a\u202eb",
    "\x08\x08\x08",
    "a\x00b",
    "\ud800",
    "caf\udce9",
]
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def assert_unforged(text):
    assert not UNSAFE.search(text), text
    for line in text.split("\n"):
        assert (
            "summary: " not in line
            or json.loads(line.removeprefix("summary: "))["stage"] != "forged"
        ), line
        assert not line.startswith(("warning: forged", "error: forged")), line


@pytest.mark.parametrize("value", FORGED)
@pytest.mark.parametrize("quiet", [False, True])
def test_no_value_forges_a_line(capsys, value, quiet):
    """At the beginning, in the middle and at the end of a line; in parts of one print; in errors,
    and in the message of a bug."""

    def body(end):
        progress.start(quiet=quiet)
        for line in (value, f"{value} (a path)", f"wrote {value}", f"a {value} b"):
            print(line)
        print("a", value, "b", sep=value, end="\n")
        print("warning: of", value)
        print(value, file=sys.stderr)
        progress.summary("real", value, 0.0, name=value)
        return end()

    def fail(error):
        raise error

    for end in (
        lambda: 0,
        lambda: fail(InputError(f"{value}: a", f"b {value}")),
        lambda: fail(KeyError(value)),
        lambda: fail(ValueError(value)),
        lambda: fail(PermissionError(13, "Permission denied", value)),
    ):
        run_stage(lambda end=end: body(end))
        out, err = capsys.readouterr()
        assert_unforged(out)
        assert_unforged(err)
        summary = out.splitlines()[-1]
        assert (
            summary.startswith("summary: ")
            and json.loads(summary.removeprefix("summary: "))["stage"] == "real"
        )
        assert len(out.splitlines()) == (2 if quiet else 7)


def test_several_errors_are_a_line_each_and_one_stays_one(outcome):
    def body():
        raise InputError("A: x\nerror: B: forged.", "C: y.")

    assert outcome(body) == (2, ["error: A: x\\nerror: B: forged.", "error: C: y."])


def test_what_is_harmless_stays_as_it_is():
    for text in ("größe", "日本語", "a\tb", "zero\u200dwidth joiner", "C:\\new", "e\u0301", "🙂"):
        assert shown(text) == text
    assert (
        shown("\x1b \x9b \u202e \udce9 \ud800 \U000e0041")
        == r"\x1b \x9b \u202e \xe9 \ud800 \U000e0041"
    )


def test_bars_move_as_they_do():
    stream = io.StringIO()
    err = Console(stream, bars=True)
    for text in ("\rreading:  50%", "\n", "\x1b[A", "\n\x1b[A", "\r\x1b[2J"):
        err.write(text)
    assert stream.getvalue() == "\rreading:  50%\n\x1b[A\n\x1b[A\r\\x1b[2J"


def hostile_dataset(folder, value):
    """Planted examples whose categories are `value` and others."""
    path = folder / "planted.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["category"] = row["category"] + value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.parametrize("quiet", [[], ["--quiet"]], ids=["", "quiet"])
def test_categories_and_targets_of_a_dataset_forge_nothing(
    planted_once, tmp_path, run_main, capsys, quiet
):
    import shutil

    from fastsae.runtime import artifacts

    shutil.copytree(planted_once, tmp_path, dirs_exist_ok=True)
    value = '\nsummary: {"stage": "forged"}\x1b[2J\u202e'
    hostile_dataset(tmp_path, value)
    path = tmp_path / "activations" / "activations_layer12.npz"
    arrays = artifacts.read_npz(path, made_by="")
    about = json.loads(str(arrays["metadata"]))
    about["inputs"]["dataset"] = artifacts.file_sha256(tmp_path / "planted.jsonl")
    artifacts.write_npz(path, {**arrays, "metadata": np.array(json.dumps(about))})
    flags = [
        "--output-dir",
        tmp_path,
        "--dataset-path",
        tmp_path / "planted.jsonl",
        "--label-field",
        "category",
        "--run-name",
        "test",
        "--device",
        "cpu",
        *quiet,
    ]
    assert run_main("interpret_sae", *flags, "--target-value", "cat_river" + value) == 0
    out, err = capsys.readouterr()
    assert_unforged(out + err)
    assert len([line for line in out.splitlines() if line.startswith("summary: ")]) == 1
    assert quiet or "cat_river\\nsummary\\x3a" in out


@pytest.mark.parametrize(
    "script, flags",
    [
        *[
            (script, flags)
            for script in ("run_pipeline", "extract_activations")
            for flags in (
                ["--run-name", 'x\nsummary: {"stage": "forged"}\x1b[2J'],
                ["--dataset-path", "/nowhere\nerror: forged\x1b"],
                ["--m", "8\nerror: forged"],
                ["--x\nerror: forged", "1"],
                ["--output-dir", "/dev/null/\nerror: forged"],
            )
        ],
        ("extract_activations", ["--model-name", "/no\nwarning: forged\x9b"]),
    ],
)
def test_flags_forge_nothing(script, flags, run_main, capsys, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n{"text": "b"}\n')
    try:
        assert run_main(script, "--output-dir", tmp_path / "o", "--dataset-path", data, *flags) == 2
    except SystemExit as stop:
        assert stop.code == 2
    out, err = capsys.readouterr()
    assert_unforged(out + err)
    assert err


# Where printing fails


def quick(body, prefix="", **options):
    """A stage in a process of its own, started through a shell that closes or fills its handles:
    (exit code, stderr)."""
    code = (
        "import sys; from fastsae.runtime import stage; from fastsae.runtime.stage import "
        "run_stage; "
        f"stage.end(run_stage(lambda: {body}))"
    )
    env = {
        name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"
    } | options
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {prefix}', sys.executable, code],
        cwd=PROJECT,
        capture_output=True,
        env=env,
        timeout=60,
    )
    return done.returncode, done.stderr.decode()


LOST = (
    "warning: stdout: No space left on device. what was to be printed is lost; the work "
    "itself is done.\n"
)


@pytest.mark.parametrize(
    "handles, body, expected",
    [
        (">&-", "print('a')", (0, "")),
        (">&-", "print('a' * 100_000)", (0, "")),
        ("> /dev/full", "print('a')", (0, LOST)),
        ("> /dev/full", "print('a' * 100_000)", (0, LOST)),
        ("> /dev/full", "print('a', flush=True) or 4", (4, LOST)),
        ("2>&-", "print('a', file=sys.stderr)", (0, "")),
        ("2> /dev/full", "print('a', file=sys.stderr)", (0, "")),
        (">&- 2>&-", "[print('a'), print('a', file=sys.stderr)] and 4", (4, "")),
        ("> /dev/full 2>&1", "print('a')", (0, "")),
        # no file gets a standard handle
        ("<&- >&- 2>&-", "open('/dev/null').fileno() > 2 and 4", (4, "")),
        (">&- 2>&-", "1 / 0", (1, "")),
        ("2> /dev/full", "1 / 0", (1, "")),
        (
            "> /dev/full",
            "print('a') or stage.require_printed()",
            (
                3,
                "error: stdout: No space left on device. print to a terminal, or to a file on "
                "a disk with free space.\n",
            ),
        ),
        (
            ">&-",
            "print('a') or stage.require_printed()",
            (
                3,
                "error: stdout: closed. print to a terminal, or to a file on a disk with free "
                "space.\n",
            ),
        ),
    ],
)
def test_where_nothing_can_be_printed_the_work_is_done(handles, body, expected, tmp_path):
    assert quick(body, handles, TMPDIR=str(tmp_path)) == expected


@pytest.mark.parametrize("script", ["run_pipeline.py", "train_sae.py"])
def test_help_that_cannot_be_printed_is_an_error(script):
    done = subprocess.run(
        ["bash", "-c", '"$0" "$1" --help > /dev/full', sys.executable, PROJECT / script],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3 and done.stderr.startswith(
        "error: stdout: No space left on device. "
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_that_lacks_characters_gets_escapes(encoding):
    code = (
        "import sys; from fastsae.runtime.stage import run_stage, end\n"
        "end(run_stage(lambda: [print('größe 日本 \\u202e'), print('größe 日本', "
        "file=sys.stderr)] and 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"},
    )
    word = {"ascii": "gr\\xf6\\xdfe \\u65e5\\u672c", "utf-8": "größe 日本"}.get(
        encoding, "größe \\u65e5\\u672c"
    )
    assert (done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)) == (
        0,
        word + " \\u202e\n",
        word + "\n",
    )


def test_printing_that_is_the_work_must_reach_its_reader(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Console(Full()))
    print("a")
    with pytest.raises(EnvironmentFailure, match="stdout: No space left"):
        require_printed()
    monkeypatch.setattr(sys, "stdout", Console(io.StringIO()))
    print("a")
    assert require_printed() is None


# Names that are not UTF-8


def test_names_that_are_not_utf_8(tmp_path, run_main, world, capsys):
    """All three stages, with --quiet and without, a dataset named in Latin-1; its name stands
    escaped in every output."""
    import shutil

    data = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    shutil.copy(world.folder / "texts.jsonl", data)
    shared = [
        "--device",
        "cpu",
        "--dataset-path",
        data,
        "--layer-idx",
        1,
        "--output-dir",
        tmp_path / "out",
    ]
    model = ["--model-name", world.folder / "model"]
    for quiet in ([], ["--quiet"]):
        assert run_main("extract_activations", *shared, *model, *quiet) == 0
        assert (
            run_main(
                "train_sae",
                *shared,
                "--m",
                8,
                "--k",
                2,
                "--matryoshka-prefixes=none",
                "--n-epochs",
                1,
                *quiet,
            )
            == 0
        )
        assert (
            run_main(
                "interpret_sae",
                *shared,
                *model,
                "--label-field",
                "topic",
                "--n-top-neurons",
                0,
                *quiet,
            )
            == 0
        )
        assert (
            "\udce9" not in (out := capsys.readouterr().out)
            and len([x for x in out.splitlines() if x.startswith("summary: ")]) == 3
        )
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and path.suffix not in (".npz", ".pt", ".png"):
            path.read_bytes().decode("utf-8")
    about = read_metadata(tmp_path / "out" / "activations" / "activations_layer1.npz")
    assert about["dataset_path"].endswith("caf\udce9.jsonl")


def test_a_text_that_is_not_utf_8_is_refused(outcome):
    from fastsae.trained_sae import TrainedSae

    for text in ("a\udcffb", [{"role": "user", "content": "a\ud800"}]):
        assert outcome(lambda text=text: TrainedSae.read(None, text)) == (
            2,
            ["error: TEXT: is not UTF-8. give it in that encoding."],
        )
