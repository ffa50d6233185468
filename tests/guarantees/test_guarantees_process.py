"""One place that writes, one writer per output, stages that end with their pipeline, no network
unasked, no code of models."""

import ast
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import PROJECT, other_constants
from loopback import Endpoint
from small import small
from source_tree import python_files
from tiny_world import replay

from fastsae.lm import hub
from fastsae.runtime import storage
from fastsae.runtime.errors import EnvironmentFailure
from fastsae.runtime.stage import run_stage

SOURCES = python_files(".", "fastsae")
STORAGE = "fastsae/runtime/storage.py"
WRITERS = {
    "write_text",
    "write_bytes",
    "unlink",
    "rmdir",
    "mkdir",
    "makedirs",
    "removedirs",
    "rmtree",
    "copyfile",
    "copy2",
    "copytree",
    "symlink_to",
    "hardlink_to",
    "mkstemp",
    "mkdtemp",
    "NamedTemporaryFile",
    "TemporaryDirectory",
    "savez",
    "savez_compressed",
    "save",
    "savetxt",
    "savefig",
    "to_csv",
    "tofile",
    "memmap",
    "touch",
    "truncate",
    "ftruncate",
    "save_pretrained",
    "save_file",
    "extract",
    "extractall",
    "SummaryWriter",
    "pwrite",
    "writev",
    "mknod",
    "chmod",
}
OF_OS = {"replace", "rename", "renames", "remove", "link", "symlink", "write", "open"}
ALLOWED = {  # (path, call): why
    ("fastsae/runtime/early_stop.py", "os.write"): "to stderr",
    ("fastsae/runtime/artifacts.py", "torch.save"): "into memory",
    ("fastsae/runtime/artifacts.py", "write_text"): "storage's own",
    ("fastsae/training/monitoring.py", "figure.savefig"): "into memory",
    ("fastsae/formats/export.py", "save"): "into memory",
    ("fastsae/formats/export.py", "torch.save"): "into memory",
    ("fastsae/runtime/progress.py", "os.write"): "into the pipe of a notebook",
    (
        "fastsae/training/loop.py",
        "run.save",
    ): "TrainingRun.save, which calls artifacts.write_checkpoint",
    (
        "fastsae/runtime/artifacts.py",
        "archive.open",
    ): "a member of a zip archive in a file of storage",
    ("fastsae/training/monitoring.py", "SummaryWriter"): "TensorBoard's own log, if asked for",
    ("fastsae/activations/files.py", "np.memmap"): "mode r",
    ("fastsae/activations/foreign.py", "np.memmap"): "mode r",
    ("fastsae/lm/embedded.py", "model.save_pretrained"): "into a scratch folder of storage",
    ("fastsae/lm/embedded.py", "archive.extract"): "the same",
    ("fastsae/lm/embedded.py", "tokenizer.save_pretrained"): "the same",
}


def test_nothing_writes_but_storage():
    assert len(SOURCES) >= 45 and STORAGE in SOURCES
    found = writers(SOURCES, PROJECT)
    assert found <= set(ALLOWED), found - set(ALLOWED)


def writers(paths, root):
    """{(path, call)} of what changes the disk by another way than storage."""
    found = {
        (path, ast.unparse(node.func))
        for path in paths
        if path != STORAGE
        for node in ast.walk(ast.parse((root / path).read_text()))
        if isinstance(node, ast.Call) and changes_disk(node)
    }
    return {(path, call) for path, call in found if not call.startswith(("artifacts.", "storage."))}


def test_a_writer_in_a_sub_folder_is_seen(tmp_path):
    for name in ("fastsae/deep/storage.py", STORAGE):  # the first has that name, but is another
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("import os\nos.replace(a, b)\n")
    paths = python_files("fastsae", root=tmp_path)
    assert writers(paths, tmp_path) == {("fastsae/deep/storage.py", "os.replace")}


def changes_disk(call):
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    to_devnull = bool(call.args) and ast.unparse(call.args[0]) == "os.devnull"
    if name == "open" or (name == "fdopen"):
        modes = [
            ast.unparse(part)
            for part in [*call.args, *(keyword.value for keyword in call.keywords)]
        ]
        return not to_devnull and (
            owner == "os"
            or any(re.search(r"^'[^']*[wax+][^']*'$", mode) and len(mode) < 7 for mode in modes)
        )
    if owner == "shutil" and name != "disk_usage":
        return True
    return name in WRITERS or (owner == "os" and name in OF_OS)


@pytest.mark.parametrize(
    "code, expected",
    [
        ("open(p, 'w')", True),
        ("open(p, mode='ab')", True),
        ("open(p)", False),
        ("open(p, 'rb')", False),
        ("open(os.devnull, 'w')", False),
        ("os.replace(a, b)", True),
        ("text.replace('a', 'b')", False),
        ("path.write_text('x')", True),
        ("os.open(p, os.O_WRONLY)", True),
        ("shutil.rmtree(p)", True),
        ("torch.save(x, p)", True),
        ("path.open('x')", True),
        ("rows.copy()", False),
    ],
)
def test_the_search_for_writers_sees_them(code, expected):
    assert changes_disk(ast.parse(code).body[0].value) is expected


def test_code_of_models_is_never_asked_for():
    """All models, configurations and tokenizers are loaded by `hub.read_pretrained`, which says so
    each time."""
    texts = {path: (PROJECT / path).read_text() for path in SOURCES}
    said = {path: text.count("trust_remote_code") for path, text in texts.items()}
    loaders = {
        path: re.findall(r"(.{7})\w*(?<!def )\.from_pretrained\b(?=\()", text)
        for path, text in texts.items()
    }
    assert {path: n for path, n in said.items() if n} == {"fastsae/lm/hub.py": 1} and not any(
        loaders.values()
    )
    seen = {}
    hub.read_pretrained(lambda located, **options: seen.update(options), "org/model", "org/model")
    assert seen["trust_remote_code"] is False


def test_a_model_with_code_of_its_own_is_refused_and_not_run(
    tmp_path, run_main, capsys, monkeypatch
):
    canary = tmp_path / "canary"
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps(
            {
                "model_type": "own",
                "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
            }
        )
    )
    (model / "own.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n{"text": "b"}\n')
    code = run_main(
        "extract_activations",
        "--dataset-path",
        data,
        "--output-dir",
        tmp_path / "out",
        "--model-name",
        model,
    )
    assert code == 2 and len(capsys.readouterr().err.splitlines()) == 1 and not canary.exists()


# Network


@pytest.fixture
def no_network(monkeypatch):
    """Any connection, and any look-up of a name, is an error that no library's retry hides."""
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError(errno.ENETUNREACH, "the test allows no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return asked


def test_stages_2_and_3_ask_nothing_of_the_network(planted, run_main, no_network, tmp_path):
    assert (
        run_main(
            "train_sae",
            *planted,
            "--m",
            20,
            "--k",
            2,
            "--matryoshka-prefixes=none",
            "--n-epochs",
            1,
        )
        == 0
    )
    assert run_main("interpret_sae", *planted, "--target-value", "cat_river") == 0
    assert (tmp_path / "interpretations.html").exists() and no_network == []


def test_a_configured_endpoint_is_asked(planted, run_main, no_network, monkeypatch):
    """The counterpart, so that the test above cannot pass for want of a trap."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:9/v1")
    monkeypatch.setattr("fastsae.interpretation.llm.client.FIRST_WAIT", 0.01)
    assert run_main("interpret_sae", *planted, "--n-top-neurons", 1) == 4 and no_network


# Locks


def test_a_second_run_is_told_who_writes(tmp_path, capsys):
    path = tmp_path / "out" / "a.npz"
    inner = []

    def second():
        storage.claim(path, "--output-dir")

    def first():
        storage.claim(path, "--output-dir")
        inner.append(run_second())

    def run_second():
        pid = os.fork()  # flock belongs to an open file, and a fork's own claim opens another
        if not pid:
            try:
                storage.claim(path, "--output-dir")
                os._exit(0)
            except EnvironmentFailure as error:
                os._exit(3 if str(os.getppid()) in str(error) else 1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert run_stage(first) == 0 and inner == [3]
    assert run_stage(second) == 0 and list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_run_left_is_no_obstacle(tmp_path):
    path = tmp_path / "a.npz"
    (tmp_path / ".a.npz.lock").write_text("process 1 on nowhere, since 01 Jan 00:00:00")
    mine = (".a.npz.0123abcd.tmp", ".a-00001-of-00002.npz.45454545.tmp")
    others = (".ab.npz.67676767.tmp", ".a.npz.mine.tmp")  # of another output, of another program
    for name in (*mine, *others):
        (tmp_path / name).touch()
    assert run_stage(lambda: storage.claim(path, "--output-dir")) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, capsys, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(storage.fcntl, "flock", refuse)
    assert run_stage(lambda: storage.claim(tmp_path / "a.npz", "--output-dir")) == 0
    assert capsys.readouterr().out.startswith(f"warning: {tmp_path / 'a.npz'}: cannot be locked (")


def test_a_read_only_folder_can_still_be_up_to_date(tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(storage.os, "open", refuse)
    assert run_stage(lambda: storage.claim(tmp_path / "a.npz", "--output-dir")) == 0
    assert "cannot be locked (Permission denied)" in capsys.readouterr().out


def test_other_ranks_take_no_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_stage(lambda: storage.claim(tmp_path / "none" / "a.npz", "--output-dir")) == 0
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_all_processes_end_where_one_may_not_write(tmp_path, world, two_processes):
    path, done = tmp_path / "out" / "activations" / "activations_layer1.npz", []
    flags = [*world.flags["extract_activations"], "--layer-idx", 1]

    def held():
        storage.claim(path, "--output-dir")
        done.append(two_processes("extract_activations", *flags, output=tmp_path / "out"))

    assert run_stage(held) == 0
    code, err = done[0]
    assert code
    assert (
        [line for line in err.splitlines() if line.startswith(("error", "stopped"))]
        == [line for line in err.splitlines() if f"process {os.getpid()} on" in line]
        != []
    )


# Bugs


def test_a_bug_leaves_its_traceback_in_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")

    def main():
        storage.claim(tmp_path / "a.npz", "--output-dir")
        raise KeyError("sk-secret-0123456789")

    assert run_stage(main) == 1
    err = capsys.readouterr().err
    (log,) = tmp_path.iterdir()
    assert err.startswith("Traceback") and err.splitlines()[-1] == (
        f"error: this is a bug. report it with {log}; the same command goes on from what is "
        f"finished."
    )
    assert "KeyError" in log.read_text() and "sk-secret" not in log.read_text() + err


# Signals


def children_of(folder):
    """Command lines of running processes that name the folder."""
    listing = subprocess.run(
        ["ps", "-eo", "pid,stat,args"], capture_output=True, text=True
    ).stdout.splitlines()
    return [line for line in listing if str(folder) in line and " Z" not in line[:14]]


def wait_for_file(process, folder, pattern, since):
    """Until the running process has written a file of that pattern."""
    assert until(
        lambda: (
            [p for p in folder.glob(pattern) if p.stat().st_mtime > since]
            or process.poll() is not None
        )
    )
    assert process.poll() is None, process.stderr.read()


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def pipeline(tmp_path, tmp_path_factory, smol_tokenizer):
    """Start the pipeline on a tiny model, stopped in the stage that is asked for; returns (process,
    the dataset's flags)."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    smol_tokenizer.save_pretrained(model)
    data = tmp_path / "d.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"{i} bread and rain " * 12}) + "\n" for i in range(400))
    )
    flags = [
        "--dataset-path",
        data,
        "--output-dir",
        tmp_path / "out",
        "--model-name",
        model,
        "--layer-idx",
        3,
        "--device",
        "cpu",
        "--m",
        64,
        "--matryoshka-prefixes",
        "16,64",
        "--run-name",
        "r",
    ]
    command = [sys.executable, str(PROJECT / "run_pipeline.py"), *map(str, flags)]
    constants = other_constants(
        tmp_path / "constants",
        {
            "fastsae.activations.extraction": {"CHUNK_TOKENS": 1500},
            "fastsae.training.loop": {"SAVE_EVERY": 0.2},
        },
    )

    def start(*more):
        return subprocess.Popen(
            [*command, *map(str, more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **constants},
        )

    return start


PART, STATE = "activations/.parts-*/part-*", "checkpoints/r/*.resume.pt"


@pytest.mark.sampled(1)
@pytest.mark.parametrize("signs", [(PART, STATE), (STATE, STATE)], ids=["part-state", "states"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_a_pipeline_that_ends_leaves_no_child(tmp_path, pipeline, number, signs):
    """Ended in stage 1 after its first parts, or in stage 2 after a save, and again; the same
    command goes on."""
    out, out_of_last = tmp_path / "out", ""
    for sign in signs:
        process = pipeline("--n-epochs", 5000, "--patience", 5000)
        wait_for_file(process, out, sign, time.time())
        process.send_signal(number)
        started = time.monotonic()
        assert process.wait(10) == (143 if number == signal.SIGTERM else -9)
        assert until(lambda: not children_of(tmp_path), 10), children_of(tmp_path)
        out_of_last, err = process.communicate()
        assert number == signal.SIGKILL or (
            time.monotonic() - started < 5 and "the same command continues" in err
        )
    assert signs[0] == PART or "going on in epoch" in out_of_last


def test_sigterm_does_not_wait_for_an_endpoint(tmp_path, world, worker):
    asked, done = [], {}

    def silent(prompt):
        asked.append(time.monotonic())
        (tmp_path / "asked").touch()
        time.sleep(20)
        return (200, {})

    server = Endpoint(reply=silent)
    try:
        done = replay(world, worker, "interpret_sae", url=server.url, stop_when=tmp_path / "asked")
        assert asked and time.monotonic() - asked[0] < 5
    finally:
        server.close()
    assert done["code"] == 143 and "the same command continues" in done["err"]


def test_works_without_terminal_and_stdin(tmp_path, write_activations):
    flags = write_activations(
        np.random.default_rng(0).standard_normal((60, 4)).astype(np.float16), 6 * [10]
    )
    command = [
        sys.executable,
        str(PROJECT / "train_sae.py"),
        *flags,
        *small(m=8, n_epochs=1, run_name="r"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: os.close(0),
        timeout=120,
    )
    assert done.returncode == 0 and list((tmp_path / "checkpoints" / "r").glob("SAE_*.pt")), (
        done.stderr
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("more", [[], ["--quiet"]], ids=["", "quiet"])
def test_a_reader_that_leaves_ends_no_work(tmp_path, write_activations, more):
    """`| head -1`: the stage goes on, and its files are whole."""
    flags = write_activations(
        np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32), [10] * 20
    )
    command = [
        sys.executable,
        "-u",
        PROJECT / "train_sae.py",
        *flags,
        "--m",
        "8",
        "--k",
        "2",
        "--matryoshka-prefixes=none",
        "--n-epochs",
        "2",
        "--run-name",
        "test",
        *more,
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if not more:
        process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0, process.stderr.read()
    folder = tmp_path / "checkpoints" / "test"
    assert {"metrics.json", "SAE_M=8_K=2.pt", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
