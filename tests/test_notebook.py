"""`extract`, `train` and `interpret` in Python: settings, what is shown, errors, interrupts, and
that nothing of the caller's process changes. Most with a script that only pretends to work; the
notebook of docs/ with the real ones."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import PROJECT

import fastsae
from fastsae import notebook
from fastsae.runtime.errors import EnvironmentFailure, InputError

# the constants of the real stage 2
SETTINGS = (PROJECT / "train_sae.py").read_text("utf-8").partition("# fmt: off")[2]
SETTINGS = SETTINGS.partition("# fmt: on")[0]
SCRIPT = f"""
import sys
sys.path.insert(0, {str(PROJECT)!r})
from fastsae.runtime import early_stop
early_stop.listen()
import json, os, time
from fastsae.runtime import progress, stage, stops
from fastsae.runtime.errors import EnvironmentFailure, InputError

{SETTINGS}

def main():
    started = progress.start(quiet="--quiet" in sys.argv)
    does = [flag.partition("=")[2] for flag in sys.argv if flag.startswith("--run-name=")]
    does = does[0] if does else "write"
    print("flags:", json.dumps(sys.argv[1:]))
    print("at", os.getcwd(), "blocked:", len(__import__("signal").pthread_sigmask(0, [])))
    if does == "refuse":
        raise InputError("M: is odd. give another.", "K: too.")
    if does == "fail":
        raise EnvironmentFailure("disk: full. free some.")
    if does == "break":
        raise ZeroDivisionError("oh")
    if does == "die":
        os.kill(os.getpid(), 9)
    if does == "incomplete":
        print("warning: some have no label", file=sys.stderr)
    if does == "print":
        return
    if does == "work":
        with progress.Task("training", 100, "step") as task, stops.deferred_stop():
            for _ in range(600):
                open("begun", "w").close()
                task.update()
                time.sleep(0.05)
                if stops.stop_asked():
                    open("saved", "w").close()
                    stops.stop()
    folder = os.path.join(os.getcwd(), "run")
    os.makedirs(folder, exist_ok=True)
    json.dump({{"normalized_mse": 0.5}}, open(os.path.join(folder, "metrics.json"), "w"))
    path = os.path.join(folder, "SAE_a.pt")
    progress.summary("train_sae", path, started, names=["SAE_a.pt", "b"])
    return 4 if does == "incomplete" else 0

if __name__ == "__main__":
    stage.end(stage.run_stage(main))
"""


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A project whose stage 2 is SCRIPT, and this process in a folder of its own."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "train_sae.py").write_text(SCRIPT)
    shutil.copy(PROJECT / "config.py", project)
    monkeypatch.setattr(notebook, "PROJECT", project)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_settings_reach_the_script_and_its_results_come_back(pretended, capsys):
    note = "a 'b' \"c\"\n--m=3"
    trained = fastsae.train(m=16, layer_idx=[1, 2], quiet=False, init_from=note)
    out, err = capsys.readouterr()
    flags = json.loads(next(x for x in out.splitlines() if x.startswith("flags: "))[7:])
    assert flags == ["--m=16", "--layer-idx=1,2", "--no-quiet", f"--init-from={note}"] and not err
    assert f"at {pretended} blocked: 0" in out and "summary" not in out
    assert (
        trained.path == pretended / "run" / "SAE_a.pt" and trained.metrics["normalized_mse"] == 0.5
    )
    assert [path.name for path in trained.paths] == ["SAE_a.pt", "b"]
    assert trained.summary["stage"] == "train_sae" and "SAE_a.pt" in repr(trained)


def test_nothing_of_this_process_changes(pretended):
    import torch

    def everything():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        files = sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []
        return (
            handlers,
            signal.pthread_sigmask(signal.SIG_BLOCK, []),
            list(sys.argv),
            list(sys.path),
            dict(os.environ),
            os.getcwd(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            threading.active_count(),
            (sys.stdout, sys.stderr, sys.excepthook, sys.unraisablehook),
            files,
        )

    fastsae.train(run_name="print_nothing")  # what is imported at the first call
    before = everything()
    fastsae.train(run_name="print_nothing")
    with pytest.raises(InputError):
        fastsae.train(run_name="refuse")
    assert everything() == before


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"layer_index": 3}, "layer_index: no such setting of train. perhaps layer_idx is meant."),
        ({"layers": 3}, "layers: not a setting any more. give layer_idx=(12, 18)."),
        ({"pooling": 3}, "pooling: not a setting any more. edit the constant in fastsae/"),
        ({"pooling_of": 3}, "pooling_of: no such setting of train. docs/settings.md has them all."),
        ({"use_chat_template": 1}, "use_chat_template: no such setting of train, but of extract."),
        ({"m": "many"}, "M: expected int, got 'many'. give another value."),
        ({"m": 8.0}, "M: expected int, got 8.0. give another value, for example 8."),
        ({"m": True}, "M: expected int, got True."),
        ({"m": None}, "M: expected int, got None."),
        ({"stream_bytes": 1}, "STREAM_BYTES: stages 1 and 2 then run at once"),
    ],
)
def test_settings_that_are_refused_start_nothing(pretended, monkeypatch, settings, line):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(InputError, match=re.escape(line)) as refused:
        fastsae.train(**settings, init_from=5)
    # all at once
    assert "INIT_FROM: expected str or none, got 5. give another value." in str(refused.value)


def test_values_of_numpy_and_paths_are_plain_ones(pretended, capsys):
    import numpy as np

    fastsae.train(M=np.int64(3), init_from=Path("a") / "b", layer_idx=np.array([1, 2]).tolist())
    assert '["--m=3", "--init-from=a/b", "--layer-idx=1,2"]' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("does", "kind", "message"),
    [
        ("refuse", InputError, "M: is odd. give another.\nK: too."),
        ("fail", EnvironmentFailure, "disk: full. free some."),
        ("break", RuntimeError, "this is a bug. report it with"),
        ("die", EnvironmentFailure, "train_sae.py was killed by signal 9"),
    ],
)
def test_an_error_of_the_stage_is_raised_here(pretended, capsys, does, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        fastsae.train(run_name=does)
    err = capsys.readouterr().err
    assert "error: " not in err and ("ZeroDivisionError: oh" in err) == (does == "break")
    for path in Path(sys.modules["tempfile"].gettempdir()).glob("error-*.log"):
        if (
            "ZeroDivisionError: oh" in path.read_text()
            and str(pretended.parent) in path.read_text()
        ):
            path.unlink()


def test_quiet_shows_nothing_and_gives_the_same(pretended, capsys):
    states = []

    class Bars(notebook._Bar):
        def show(self, line):
            states.append(line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebook, "_Bar", Bars)
        trained = fastsae.train(quiet=True)
    assert trained.path.name == "SAE_a.pt" and not states
    assert capsys.readouterr() == ("", "")


def test_features_without_a_label_are_no_error(pretended, capsys):
    assert fastsae.train(run_name="incomplete").path.name == "SAE_a.pt"
    assert "warning: some have no label" in capsys.readouterr().err


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt here, also where the tests were started in the background,
    which a shell does with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_saves_and_is_raised(pretended, capsys, interruptible):
    """As a notebook interrupts its kernel: a signal to this process, which the stage is told of."""

    def interrupt():
        while not (pretended / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fastsae.train(run_name="work")
    thread.join()
    assert (pretended / "saved").exists() and time.monotonic() - began < 20
    assert "stopped: what was finished is kept" in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_stage_ends_with_its_notebook(pretended):
    """A kernel that is killed leaves no stage behind."""
    code = (
        f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n"
        "import pathlib\nfrom fastsae import notebook\n"
        f"notebook.PROJECT = pathlib.Path({str(notebook.PROJECT)!r})\n"
        "notebook.train(run_name='work')\n"
    )
    kernel = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 40
    for name in ("begun", "saved"):
        while not (pretended / name).exists() and time.monotonic() < end:
            time.sleep(0.02)
        kernel.kill()
    assert (pretended / "saved").exists() and kernel.wait() == -signal.SIGKILL


class Bar:
    """tqdm's interface, as far as it is used."""

    def __init__(self, **options):
        self.seen, self.options, self.closed = [], options, False
        self.total = self.bar_format = None
        self.n = self.initial = 0
        self.unit, self.desc, self.note, self.written = "it", "", "", []

    def reset(self, total):
        self.total, self.n = total, 0

    def set_description_str(self, text, refresh):
        self.desc = text

    def set_postfix_str(self, text, refresh):
        self.note = text

    def refresh(self):
        self.seen.append((self.desc, self.n, self.total, self.unit, self.note))

    def write(self, line, file):
        self.written.append(line)

    def close(self):
        self.closed = True


def state(name, n, total, unit="", note=""):
    return json.dumps({"name": name, "n": n, "total": total, "unit": unit, "note": note})


def test_the_bar_follows_the_stage():
    bars = []
    bar = notebook._Bar(lambda **options: bars.append(Bar(**options)) or bars[-1])
    bar.show(state("loading the model", 0, None))
    assert bars[0].bar_format == "{desc} {elapsed}"
    bar.show(state("training", 3.5, 10, "step", "loss 2"))
    bar.print("a line", sys.stdout)
    bar.show(state("training", 4, 10, "step", "loss 1"))
    bar.close()
    assert bars[0].seen == [
        ("loading the model", 0, None, "", ""),
        ("training", 3.5, 10, "step", "loss 2"),
        ("training", 4, 10, "step", "loss 1"),
    ]
    assert bars[0].written == ["a line"] and bars[0].closed and bars[0].bar_format is None
    assert bars[0].options == {"leave": False}


def test_progress_comes_through(pretended):
    states = []

    class Bars(notebook._Bar):
        def show(self, line):
            states.append(json.loads(line))
            if states[-1]["n"] > 1:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebook, "_Bar", Bars)
        with pytest.raises(KeyboardInterrupt):
            fastsae.train(run_name="work")
    assert states[-1]["name"] == "training" and states[-1]["unit"] == "step"
    assert states[-1]["total"] == 100 and [s["n"] for s in states] == sorted(s["n"] for s in states)


def test_without_the_scripts(monkeypatch, tmp_path):
    monkeypatch.setattr(notebook, "PROJECT", tmp_path)
    with pytest.raises(EnvironmentFailure, match="extract_activations.py: not found. keep fastsae"):
        fastsae.extract()


NOTEBOOK = PROJECT / "docs" / "notebook.ipynb"
# what the summary of each stage names
WRITTEN = {
    "extract": "activations_layer1.npz",
    "train": "SAE_a.pt",
    "interpret": "interpretations.html",
}


def test_the_guides_example_has_settings_that_exist(monkeypatch, tmp_path):
    """The calls of docs/python.md; what runs when they are made, the notebook's test tries."""
    page = (PROJECT / "docs" / "python.md").read_text("utf-8")
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", page, re.S) if "import extract" in x)
    (tmp_path / "metrics.json").write_text("{}")
    given = {}

    def run(stage, settings):
        given[stage] = notebook.flags_of(stage, PROJECT / notebook.SCRIPTS[stage], settings)
        path = tmp_path / WRITTEN[stage]
        return {"path": str(path), "layers": [1], "n_examples": 2, "n_tokens": 9}

    monkeypatch.setattr(notebook, "_run", run)
    names = {}
    exec(code, names)
    assert "--m=1024" in given["train"] and "--label-field=topic" in given["interpret"]
    assert names["activations"].n_tokens == 9 and hasattr(names["trained"], "load")
    assert names["interpreted"].html == tmp_path / "interpretations.html"
    assert names["interpreted"].csv == tmp_path / "interpretations.csv"


def test_an_array_of_another_program_has_no_report(monkeypatch, tmp_path):
    """Stage 3 then names its table, and there are the table's two forms."""
    path = tmp_path / "interpretations.csv"
    monkeypatch.setattr(notebook, "_run", lambda stage, settings: {"path": str(path)})
    found = fastsae.interpret()
    assert found.html is None and found.csv == path
    assert found.jsonl == tmp_path / "interpretations.jsonl"


def test_the_notebook_is_kept_without_outputs():
    pages = json.loads(NOTEBOOK.read_text("utf-8"))
    code = [cell for cell in pages["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 5 and all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in code
    )
    assert {"nbformat": 4, "nbformat_minor": 5}.items() <= pages.items()


@pytest.mark.exhaustive
def test_the_notebook_runs(tiny_llama, tmp_path):
    """In a kernel of Jupyter, with a tiny model, few texts and few features in its cells."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    import nbformat
    from tiny_world import WORDS

    dataset = tmp_path / "texts.jsonl"
    rows = [
        {"text": " ".join((WORDS * 3)[i : i + 6 + i % 9]) + f" {i}", "topic": f"t{i % 2}"}
        for i in range(40)
    ]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {
        "../data/cognitive_actions.jsonl": str(dataset),
        'label_field="cognitive_action"': 'label_field="topic"',
        "layer_idx=12": f'layer_idx=1, model_name="{tiny_llama}", device="cpu"',
        "../results/notebook": str(tmp_path / "out"),
        "m=256, k=8": "m=16, k=4, n_epochs=2",
    }
    text = NOTEBOOK.read_text("utf-8")
    for long, short in small.items():
        escaped = json.dumps(long)[1:-1]
        assert escaped in text
        text = text.replace(escaped, json.dumps(short)[1:-1])
    pages = nbformat.reads(text, as_version=4)
    nbformat.validate(pages)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(pages, timeout=300, kernel_name="python3", resources=where).execute()
    shown = [json.dumps(cell.get("outputs", [])) for cell in pages.cells]
    assert "n_examples=40" in shown[5] and "(16," not in shown[5]
    assert "'l0': 4.0" in shown[8] and "interpretations.html" in shown[10]
    assert "label_f1" in shown[11] and "TqdmWarning" not in "".join(shown)
    assert "epochs: no such setting of train. perhaps n_epochs is meant." in shown[-1]
    assert (tmp_path / "out" / "interpretations.csv").exists()
