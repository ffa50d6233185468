"""Folders and files under proper names: of datasets with strange names, of models given as `.`, of
killed runs, of other people."""

import fcntl
import json
import os
import time
from pathlib import Path

import pytest
from conftest import planted_tokens

import config
from fastsae.activations import extraction
from fastsae.lm import names as model_names
from fastsae.runtime import storage
from fastsae.settings import resolving

SMALL = [
    "--m",
    16,
    "--k",
    2,
    "--matryoshka-prefixes=none",
    "--run-name",
    "test",
    "--device",
    "cpu",
    "--batch-size",
    64,
]
STRANGE = [
    "...jsonl",
    ".jsonl",
    "..jsonl",
    "..",
    ".",
    "",
    "con/.",
    "/",
    "hf:owner/..",
    "hf:..",
    "a\x1b[2J.jsonl",
    "a\nb.jsonl",
    "a\udce9.jsonl",
    "é" * 124 + ".jsonl",
    "x" * 249 + ".jsonl",
    " .jsonl",
    ". .jsonl",
    "a/b/../..jsonl",
    "‮.json",
    "x.jsonl.jsonl",
    "....txt",
]


@pytest.mark.parametrize("dataset", STRANGE)
def test_a_run_has_a_proper_folder_of_its_own(tmp_path, dataset):
    """Below checkpoints/, one level deep, with room in its name for locks, and made of what can be
    printed."""
    name = config.run_name_of(dataset)
    folder = Path(os.path.normpath(tmp_path / "checkpoints" / name))
    assert (
        folder.parent == tmp_path / "checkpoints"
        and name.isprintable()
        and len(name.encode()) <= 200
    )
    folder.with_name(f".{name}.lock").parent.mkdir()
    folder.with_name(f".{name}.lock").touch()
    folder.mkdir()


def test_run_names_that_were_proper_stay():
    for path, name in (
        ("my data.jsonl", "my data"),
        ("d/größe.json", "größe"),
        ("hf:o/set@main", "set@main"),
        ("x.csv", "x"),
        ("x.b.CSV.gz", "x.b"),
        ("hf:o/set:en:test", "set_en_test"),
        ("d/texts/", "texts"),
        (".x.txt", ".x"),
    ):
        assert config.run_name_of(path) == name
    long = ["y" * 240 + end + ".jsonl" for end in ("a", "b")]
    assert config.run_name_of(long[0]) != config.run_name_of(long[1])


@pytest.mark.parametrize("flag", ["--run-name", "--neuronpedia-set"])
def test_a_name_that_is_too_long_is_refused_at_once(capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        config.resolve(config.PROJECT / "interpret_sae.py", argv=[flag, 300 * "r"])
    assert stopped.value.code == 2 and "300 bytes are too long" in capsys.readouterr().err


# Models

HERE = Path.cwd().name


@pytest.mark.parametrize(
    "model, name",
    [
        ("dir/", "dir"),
        ("dir//", "dir"),
        ("./dir/x/..", "dir"),
        ("owner/model", "model"),
        ("/a/m.gguf", "m.gguf"),
        ("/", "model"),
        (".", HERE),
        ("x/..", HERE),
        ("./", HERE),
        ("", HERE),
    ],
)
def test_a_models_short_name_is_never_empty(model, name):
    assert model_names.short_name(model) == name


def test_a_relative_model_is_seen_from_where_it_was_given(tmp_path):
    """From the project in a file, from the working directory as a flag; hub ids and the embedded
    model stay as they are."""
    (tmp_path / "model").mkdir()
    (tmp_path / "owner" / "hub").mkdir(parents=True)
    (tmp_path / resolving.EMBEDDED_MODEL).mkdir()
    (tmp_path / "x").mkdir()
    for given, expected in (
        ("model", "model"),
        ("model/", "model"),
        ("./model", "model"),
        ("x/../model", "model"),
        ("m.gguf", "m.gguf"),
        (".", ""),
        ("owner/hub", "owner/hub"),
        ("./not there", "not there"),
    ):
        assert resolving.absolute("MODEL_NAME", given, tmp_path) == str(tmp_path / expected), given
    for given in ("owner/other", resolving.EMBEDDED_MODEL, "not there", ""):
        assert resolving.absolute("MODEL_NAME", given, tmp_path) == given


# Before slow work


def full_of(*, no_file_named):
    """os.open that refuses to create files under such names, as a folder without rights does."""
    plain = os.open

    def open_file(path, flags, *more, **how):
        if flags & os.O_CREAT and no_file_named in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, flags, *more, **how)

    return open_file


def test_what_cannot_be_written_is_said_before_training(
    tmp_path, write_activations, run_main, monkeypatch, capsys
):
    import train_sae

    flags = [
        *write_activations(planted_tokens(400, 8, 16, 2)[0], [20] * 20),
        *SMALL,
        "--n-epochs",
        1,
    ]
    monkeypatch.setattr(train_sae, "train_all", lambda *_: pytest.fail("it began"))
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "open", full_of(no_file_named="checkpoints/test/"))
        assert run_main("train_sae", *flags) == 3
    out, err = capsys.readouterr()
    assert (
        "checkpoints/test/SAE_M=16_K=2.resume.jsonl: Permission denied. check the folder's rights"
        in err
    )
    assert (
        ".tmp" not in err
        and len(err.splitlines()) == 1
        and not list((tmp_path / "checkpoints" / "test").iterdir())
    )
    names = ",".join(map(str, [*range(1, 80), 256]))
    assert run_main("train_sae", *flags[:-2], "--m", 256, "--matryoshka-prefixes", names) == 3
    assert "File name too long. give shorter names" in capsys.readouterr().err


def test_what_cannot_be_written_is_said_before_interpreting(
    tmp_path, planted, run_main, monkeypatch, capsys
):
    import interpret_sae

    monkeypatch.setattr(interpret_sae, "Features", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(storage.os, "open", full_of(no_file_named="/.hypotheses.csv."))
    assert (
        run_main("interpret_sae", *planted, "--target-value", "cat_apple", "--n-top-neurons", 0)
        == 3
    )
    assert f"{tmp_path / 'hypotheses.csv'}: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["checkpoints/test", "checkpoints"])
def test_the_pipeline_looks_at_the_folders_of_later_stages_first(
    tmp_path, run_main, monkeypatch, capsys, place
):
    import run_pipeline

    (tmp_path / place).mkdir(parents=True)
    data = tmp_path / "d.jsonl"
    data.write_text("{}")
    plain = os.access
    monkeypatch.setattr(
        run_pipeline.os,
        "access",
        lambda path, mode: str(path) != str(tmp_path / place) and plain(path, mode),
    )
    monkeypatch.setattr(run_pipeline, "run", lambda *_: pytest.fail("it began"))
    flags = ["--output-dir", tmp_path, "--dataset-path", data, "--run-name", "test"]
    assert run_main("run_pipeline", *flags) == 3
    assert capsys.readouterr().err == (
        f"error: {tmp_path / place}: takes no files. check its rights, or choose another "
        "--output-dir or --run-name.\n"
    )


def test_a_probe_leaves_nothing_behind(tmp_path):
    storage.require_writable([tmp_path / "run" / "a.pt", tmp_path / "run" / "b" / "c.json"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "run"]
    (tmp_path / "run" / "a.pt").write_text("kept")
    storage.require_writable([tmp_path / "run" / "a.pt"])
    assert (tmp_path / "run" / "a.pt").read_text() == "kept"
    with pytest.raises(OSError, match="Is a directory"):
        storage.require_writable([tmp_path / "run"])


# What killed runs leave


def test_only_our_temporary_files_are_swept(tmp_path):
    ours = [".a.csv.0123abcd.tmp", ".hypotheses.csv.00000000.tmp"]
    others = [".a.tmp", ".mine.csv.tmp", "a.csv.0123abcd.tmp", ".a.csv.0123abcg.tmp"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("")
    (tmp_path / ".export.saelens.99999999.tmp").mkdir()
    storage.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_stage_3_sweeps_what_it_left(tmp_path, planted, run_main):
    (tmp_path / "neuronpedia" / "11-x").mkdir(parents=True)
    left = [
        tmp_path / name
        for name in (
            ".hypotheses.csv.0123abcd.tmp",
            "neuronpedia/11-x/.batch-000.json.0123abcd.tmp",
            ".interpretations.html.0123abcd.tmp",
        )
    ]
    other = tmp_path / "neuronpedia" / "11-x" / ".notes.tmp"
    for path in (*left, other):
        path.write_text("")
    assert run_main("interpret_sae", *planted, "--n-top-neurons", 0) == 0
    assert not any(path.exists() for path in left) and other.exists()


def test_scratch_folders_of_the_dead_go(tmp_path):
    old = time.time() - 3600
    dead, alive, young = (tmp_path / f".scratch-{name}" for name in ("dead", "alive", "young"))
    for folder in (dead, alive, young):
        folder.mkdir()
        (folder / "large").write_text("")
        if folder != young:
            os.utime(folder, (old, old))
    handle = os.open(alive, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with storage.scratch_folder(tmp_path) as work:
        assert Path(work).is_dir() and not dead.exists() and alive.exists() and young.exists()
    os.close(handle)
    assert not Path(work).exists()


def test_parts_of_other_settings_are_named_and_those_of_finished_work_go(tmp_path, capsys):
    metadata = {name: {1: {"fingerprint": name}} for name in "abc"}
    for name in "abc":
        extraction.name_parts(tmp_path / f".parts-{name}", metadata[name])
        (tmp_path / f".parts-{name}" / "part.npz").write_bytes(bytes(3_000_000))
    (tmp_path / ".parts-earlier").mkdir()
    extraction.clear_parts(
        tmp_path / ".parts-a", {1: {"fingerprint": "a"}, 2: {"fingerprint": "b"}}
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [".parts-c", ".parts-earlier"]
    one, other = capsys.readouterr().out.splitlines()
    assert (
        f"unfinished: {tmp_path / '.parts-c'} (3.0 MB) is of a run with other settings. finish "
        f"it with: python " in one
    )
    assert f"{tmp_path / '.parts-earlier'} (0.0 MB)" in other


# One run's files together


@pytest.fixture
def stopped_retraining(tmp_path, write_activations, run_main):
    """The flags of a run that is finished, and of one with other settings that was stopped in its
    third epoch; the first one's files."""
    from fastsae.training import loop

    flags = [
        *write_activations(planted_tokens(600, 8, 16, 2)[0], [20] * 30),
        *SMALL,
        "--n-epochs",
        5,
    ]
    other, folder = [*flags, "--learning-rate", 0.002], tmp_path / "checkpoints" / "test"
    assert run_main("train_sae", *flags) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    plain, epochs = loop.end_epoch, []

    def end_epoch(run, tokens):
        epochs.append(plain(run, tokens))
        if len(epochs) == 2:
            os.kill(os.getpid(), 15)
        return epochs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "end_epoch", end_epoch)
        assert run_main("train_sae", *other) == 143
    return flags, other, before


def test_a_stopped_retraining_leaves_the_old_files_together(
    tmp_path, stopped_retraining, run_main, capsys
):
    flags, other, before = stopped_retraining
    folder = tmp_path / "checkpoints" / "test"
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    new = {name for name in set(after) - set(before) if not name.startswith(".")}
    assert new == {"SAE_M=16_K=2.resume.pt", "SAE_M=16_K=2.resume.jsonl"}
    assert len(after["SAE_M=16_K=2.resume.jsonl"].splitlines()) == 2
    capsys.readouterr()
    assert run_main("train_sae", *flags) == 0  # up to date, and the unfinished one stays
    out = capsys.readouterr().out
    assert "up to date" in out and "SAE_M=16_K=2.resume.pt is of a run with other settings" in out
    assert run_main("train_sae", *other) == 0
    assert "going on in epoch 3" in capsys.readouterr().out
    meta = json.loads((folder / "metrics.json").read_text())
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == meta["epochs"] and not list(
        folder.glob("*.resume.*")
    )


def test_an_unfinished_state_is_not_replaced_without_a_word(stopped_retraining, run_main, capsys):
    flags, _, _ = stopped_retraining
    capsys.readouterr()
    assert run_main("train_sae", *flags, "--learning-rate", 0.003) == 0
    assert (
        "SAE_M=16_K=2.resume.pt is of an unfinished run with other settings"
        in capsys.readouterr().out
    )


# Other people's files


@pytest.mark.parametrize(
    "content",
    [
        "my notes\n",
        "---\nlicense: mit\n---\n",
        "",
        "# as written by train_sae.py: " + 64 * "0" + "\n",
    ],
)
def test_a_readme_that_was_there_stays(tmp_path, write_activations, run_main, capsys, content):
    readme = tmp_path / "checkpoints" / "test" / "README.md"
    readme.parent.mkdir(parents=True)
    readme.write_text(content)
    flags = [
        *write_activations(planted_tokens(400, 8, 16, 2)[0], [20] * 20),
        *SMALL,
        "--n-epochs",
        1,
    ]
    assert run_main("train_sae", *flags) == 0
    assert readme.read_text() == content and "is left as it is" in capsys.readouterr().out
