import csv
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

# Before numpy and torch are loaded, and for all processes that tests start: their threads would
# spend more time waiting for each other than on arrays of this size.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import sampling  # noqa: E402
import scheduling  # noqa: E402
from tiny_world import forks, tiny_llama, two_processes, worker, world  # noqa: E402, F401  (fixtures)

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
# a developer's own endpoint is never asked by tests
for name in ("OPENAI_API_KEY", "OPENAI_KEY_SAE", "OPENAI_BASE_URL"):
    os.environ.pop(name, None)

from fastsae.runtime.packages import postpone_init  # noqa: E402

postpone_init("hypothesaes")  # tests need its autoencoder, and seldom the rest

COUNTS = {}  # {what: [tried, of how many]} by the tests of the guarantees, for the end of a run
LEFT_OUT = {}  # {test: (cases tried, of how many)} in the quick run


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="try every kill point, flipped bit, hostile reply ...; without it a few of each, "
        "others every day",
    )
    parser.addoption(
        "--rest",
        action="store_true",
        help="--exhaustive, but only the tests of which the quick run leaves something out",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in as many processes as there are cores, at most four, if pytest-xdist
    is there. Named files run in this process, and so does all with `-n 0`."""
    option, n = config.option, min(4, len(sampling.cores()))
    given = getattr(option, "numprocesses", 0) is not None  # or pytest-xdist is not there
    if given or n < 2 or hasattr(config, "workerinput"):
        return
    whole = config.args_source is config.ArgsSource.TESTPATHS and not option.keyword
    if whole and not (option.usepdb or option.collectonly):
        option.numprocesses = n


def pytest_configure(config):
    config.option.loadscopereorder = False  # of pytest-xdist: files keep their order
    sampling.exhaustive = config.getoption("--exhaustive") or config.getoption("--rest")
    os.environ["TEST_DAY"] = str(sampling.day)  # of all processes, also after midnight


def pytest_report_header():
    if sampling.exhaustive:
        return "exhaustive run: every point is tried"
    return f"quick run: TEST_DAY={sampling.day} repeats its points; --exhaustive tries all"


def pytest_collection_modifyitems(config, items):
    """In the quick run: `@pytest.mark.sampled(n)` keeps about n of a test's cases, and
    `@pytest.mark.exhaustive` none. With --rest: the marked tests only."""
    cases = {}
    for item in items:
        if item.get_closest_marker("sampled") or item.get_closest_marker("exhaustive"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    dropped = set()
    if config.getoption("--rest"):
        dropped = set(items).difference(*cases.values())
    elif not sampling.exhaustive:
        n_cases = Counter(item.nodeid.partition("[")[0] for item in items)
        for name, group in cases.items():
            left_out = set(group) - set(_kept(group))
            dropped |= left_out
            if left_out:
                n = n_cases[name]
                LEFT_OUT[name.rpartition("::")[2]] = (n - len(left_out), n)
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=list(dropped))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: scheduling.rank(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Unless another --dist is given, the tests of a file stay in one process."""
    return scheduling.scheduler(config, log) if config.getvalue("dist") == "load" else None


def _kept(group):
    """The cases of one marked test that the quick run tries."""
    if group[0].get_closest_marker("exhaustive"):
        return []
    (n,) = group[0].get_closest_marker("sampled").args or (len(group),)
    return sampling.points(group, n)


@pytest.fixture
def tally():
    """Call `tally(what, n, of)` for n trials, of so many that there are, that were survived; the
    sums are printed at the end."""

    def add(what, n, of=None):
        counts = COUNTS.setdefault(what, [0, 0])
        counts[0] += n
        counts[1] += n if of is None else of

    return add


def pytest_sessionfinish(session):
    """Of several processes each tells the first what it tried."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = [COUNTS, LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    counts, left_out = getattr(node, "workeroutput", {}).get("tried", ({}, {}))
    for what, (n, of) in counts.items():
        sums = COUNTS.setdefault(what, [0, 0])
        sums[0] += n
        sums[1] += of
    LEFT_OUT.update(left_out)


def pytest_terminal_summary(terminalreporter):
    def shown(n, of):
        return f"{n:,}" if n == of else f"{n:,} of {of:,}"

    if COUNTS:
        found = ", ".join(f"{shown(*counts)} {what}" for what, counts in COUNTS.items())
        terminalreporter.write_line(f"guarantees: {found}")
    some = [f"{n} of {of} of {name}" for name, (n, of) in LEFT_OUT.items() if n]
    none = [name for name, (n, _) in LEFT_OUT.items() if not n]
    if some:
        terminalreporter.write_line(f"quick run, cases: {', '.join(some)}")
    if none:
        terminalreporter.write_line(f"quick run, left out: {', '.join(none)}")
    if some or none:
        terminalreporter.write_line("--exhaustive tries all of these and all points")


@pytest.fixture(scope="session")
def smol_tokenizer():
    from fastsae.lm.loading import load_tokenizer

    return load_tokenizer("SmolLM2-135M-Instruct")


@pytest.fixture
def run_script(tmp_path):
    """Run one of the scripts as a user does, outputs under tmp_path; returns the finished
    process."""

    def run(script, *flags, env=None, cwd=None):
        command = [
            sys.executable,
            str(PROJECT / script),
            "--output-dir",
            str(tmp_path),
            *map(str, flags),
        ]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            timeout=300,
        )

    return run


@pytest.fixture
def write_activations(tmp_path):
    """Write an activations file as stage 1 would, from made-up numbers; returns the flags that make
    stages 2 and 3 use it."""

    def write(activations, lengths, **more):
        return put_activations(tmp_path, activations, lengths, **more)

    return write


@pytest.fixture
def outcome(capsys):
    """Run a function as a stage: (exit code, lines on stderr)."""
    from fastsae.runtime.stage import run_stage

    def run(main):
        capsys.readouterr()
        code = run_stage(main)
        return code, capsys.readouterr().err.splitlines()

    return run


@pytest.fixture
def dataset(tmp_path):
    """Write a dataset from text or bytes; returns its path."""

    def write(content):
        path = tmp_path / "d.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def line_of(done, code):
    """The single line on stderr of a finished script, less its "error: "."""
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr.removeprefix("error: ").rstrip("\n")


def summaries(text):
    """What the summary lines in a script's output hold."""
    return [
        json.loads(line.removeprefix("summary: "))
        for line in text.splitlines()
        if line.startswith("summary: ")
    ]


CONSTANTS = """\
import importlib.util
import sys

VALUES = {values!r}  # by module


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name not in VALUES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        run = spec.loader.exec_module

        def run_and_set(module):
            run(module)
            assert set(VALUES[name]) <= set(vars(module))
            vars(module).update(VALUES[name])

        spec.loader.exec_module = run_and_set
        return spec


sys.meta_path.insert(0, Finder())
"""


def other_constants(folder, values):
    """Variables of the environment in which every Python process, those that it starts included,
    has other values of constants: {module: {NAME: value}}."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CONSTANTS.format(values=values))
    return {"PYTHONPATH": str(folder)}


def snapshot(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def put_activations(folder, activations, lengths, *, dataset=None, kind=None, token_ids=None):
    from fastsae.lm import embedded
    from fastsae.runtime import artifacts

    n = len(activations)
    inputs = {
        "dataset": artifacts.file_sha256(dataset) if dataset else "made up",
        "model": embedded.EMBEDDED["gguf_sha256"],
    }
    metadata = artifacts.new_metadata(
        "activations",
        {"LAYER_IDX": 12},
        inputs,
        model_name="SmolLM2-135M-Instruct",
        model_revision=None,
        n_examples=len(lengths),
        dataset_path=str(dataset or "made-up.jsonl"),
    )
    artifacts.write_npz(
        folder / "activations" / "activations_layer12.npz",
        {
            "activations": activations,
            "seq_lengths": np.array(lengths, np.int32),
            "token_ids": np.arange(n, dtype=np.int32) % 1000
            if token_ids is None
            else np.asarray(token_ids, np.int32),
            "token_kind": np.zeros(n, np.uint8) if kind is None else np.asarray(kind, np.uint8),
            "token_role": np.zeros(n, np.uint8),
            "example_ids": np.arange(1, len(lengths) + 1, dtype=np.int32),
            "metadata": np.array(artifacts.to_json(metadata)),
        },
    )
    return ["--output-dir", str(folder), *(["--dataset-path", str(dataset)] if dataset else [])]


def called(monkeypatch, script, *flags):
    """The exit code of a script's `main()`, called in this process with the given flags.
    `fastsae.MODULE.NAME=value` among them is another value of a constant."""
    from experiments.shared.constants import value_of
    from fastsae.runtime.stage import run_stage
    from fastsae.settings.values import SHOWN

    words = list(map(str, flags))
    constants = [word for word in words if word.startswith("fastsae.")]
    given = [word for word in words if word not in constants]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *given])
    with monkeypatch.context() as patched:
        patched.setenv(SHOWN, "1")
        for place, text in (word.split("=", 1) for word in constants):
            patched.setattr(place, value_of(text))
        return run_stage(importlib.import_module(script).main)


def put_part(stream, number, rows, lengths=None, kind=None):
    """Write a part as stage 1 would, from made-up rows (n, d)."""
    from fastsae.runtime import artifacts

    n = len(rows)
    metadata = {"format": artifacts.FORMAT, "fingerprint": stream.about["fingerprint"]}
    artifacts.write_npz(
        stream.part_path(number),
        {
            "activations": rows,
            "seq_lengths": np.array([n] if lengths is None else lengths, np.int32),
            "token_ids": np.zeros(n, np.int32),
            "token_kind": np.zeros(n, np.uint8) if kind is None else np.asarray(kind, np.uint8),
            "token_role": np.zeros(n, np.uint8),
            "example_ids": np.array([1], np.int32),
            "metadata": np.array(artifacts.to_json({**metadata, "part": number})),
        },
    )


@pytest.fixture
def run_main(monkeypatch):
    """Call a script's `main()` in this process with the given flags, through `run_stage`; returns
    the exit code."""
    return functools.partial(called, monkeypatch)


def planted_tokens(n, d, n_directions, n_active, seed=0, noise=0.0):
    """Tokens made of a few known unit directions each: (tokens (n, d), directions (n_directions,
    d)) float32."""
    generator = np.random.default_rng(seed)
    directions = generator.standard_normal((n_directions, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    codes = np.zeros((n, n_directions))
    for row in codes:
        row[generator.choice(n_directions, n_active, replace=False)] = generator.uniform(
            1, 2, n_active
        )
    tokens = codes @ directions + noise * generator.standard_normal((n, d))
    return tokens.astype(np.float32), directions.astype(np.float32)


WORDS = ("apple", "river", "engine", "music")


PLANTED_FLAGS = ["--label-field", "category", "--run-name", "test", "--device", "cpu"]


@pytest.fixture(scope="session")
def planted_once(tmp_path_factory, smol_tokenizer):
    """Examples about four words; each word's token has its own direction; an autoencoder trained on
    them."""
    folder, generator = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    directions = np.linalg.qr(generator.standard_normal((16, 16)))[0]
    rows, ids, tokens, lengths = [], [], [], []
    filler = smol_tokenizer(" the a of and to in it was", add_special_tokens=False)["input_ids"]
    for i in range(120):
        word = WORDS[i % 4]
        rows.append(
            {"text": f"=about {word} {i} <script>alert(1)</script>", "category": f"cat_{word}"}
        )
        word_id = smol_tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        assert len(word_id) == 1
        example = [*generator.choice(filler, 9), word_id[0]]
        ids += example
        lengths.append(len(example))
        causes = [4 + filler.index(t) if t in filler else WORDS.index(word) for t in example]
        tokens.append(directions[causes] * generator.uniform(5, 6, (len(example), 1)))
    dataset = folder / "planted.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = put_activations(
        folder, np.concatenate(tokens).astype(np.float32), lengths, dataset=dataset, token_ids=ids
    )
    training = [
        "--m",
        20,
        "--k",
        1,
        "--matryoshka-prefixes=none",
        "--n-epochs",
        60,
        "--learning-rate",
        0.01,
        "--batch-size",
        64,
    ]
    with pytest.MonkeyPatch.context() as patch:
        assert called(patch, "train_sae", *flags, *PLANTED_FLAGS, *training) == 0
    return folder


@pytest.fixture
def planted(tmp_path, planted_once, monkeypatch, smol_tokenizer):
    """The flags of stage 3 for a fresh copy of `planted_once` under tmp_path."""
    from fastsae.interpretation import run_table
    from fastsae.lm import loading
    from fastsae.lm.names import EMBEDDED

    def load_tokenizer(name, *source, plain=loading.load_tokenizer, **more):
        return smol_tokenizer if name == EMBEDDED else plain(name, *source, **more)

    monkeypatch.setattr(loading, "load_tokenizer", load_tokenizer)  # read once
    monkeypatch.setattr(run_table, "N_SPLITS", 2)  # half splits enough for tables
    shutil.copytree(planted_once, tmp_path, dirs_exist_ok=True)
    return [
        "--output-dir",
        str(tmp_path),
        "--dataset-path",
        str(tmp_path / "planted.jsonl"),
        *PLANTED_FLAGS,
    ]


def read_table(tmp_path, name="interpretations.csv"):
    with open(tmp_path / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
