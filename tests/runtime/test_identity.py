"""What decides whether work is done already is the whole content of what it was made from: no edit
and no damage passes."""

import json
import os
import shutil

import numpy as np
import pytest

from fastsae.activations import files
from fastsae.data import datasets
from fastsae.interpretation import tables
from fastsae.lm import embedded as embedded_model, sources
from fastsae.runtime import artifacts, digests
from fastsae.runtime.errors import EnvironmentFailure, InputError

EMBEDDED = "SmolLM2-135M-Instruct"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model's folder with weights of 20,000 bytes, of which every edit counts; digests are
    remembered from 1,000 on."""
    monkeypatch.setenv("FASTSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "REMEMBERED_FROM", 1000)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(20_000))
    return folder


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    with open(path, "r+b") as file:  # in place, as a disk or an editor would
        file.write(content)


def test_every_byte_of_a_model_decides(model):
    """What sampling would not see: one byte anywhere, at the same size, with the time of change set
    back."""
    weights = model / "model.safetensors"
    os.truncate(weights, 24 << 20)
    seen = {sources.identity(str(model))}
    for at in (0, 20_001, (1 << 20) + 5, (3 << 19) - 1, (24 << 20) - 1):
        before = weights.stat()
        with open(weights, "r+b") as file:
            file.seek(at)
            file.write(b"!")
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        seen.add(sources.identity(str(model)))
    assert len(seen) == 6


@pytest.mark.parametrize(
    "name", ["additional_chat_templates/rag.jinja", "weights/model-00001.safetensors", "extra.py"]
)
def test_files_of_inner_folders_decide(model, name):
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "weights/model-00001.safetensors"}})
    )
    before = sources.identity(str(model))
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("a")
    first = sources.identity(str(model))
    (model / name).write_text("b")
    assert len({before, first, sources.identity(str(model))}) == 3


def test_what_decides_nothing(model):
    before = sources.identity(str(model))
    (model / "README.md").write_text("a")
    (model / ".cache").mkdir()
    (model / "checkpoint-1").mkdir()
    (model / "checkpoint-1" / "model.safetensors").write_text("a")
    assert sources.identity(str(model)) == before
    shutil.copytree(model, model.with_name("copy"))
    assert sources.identity(str(model.with_name("copy"))) == before


def test_the_base_of_an_adapter_decides(model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(model)})
    )
    before = sources.identity(str(adapter))
    flip(model / "model.safetensors", 7)
    assert sources.identity(str(adapter)) != before


# Remembered digests


@pytest.fixture
def read(monkeypatch):
    """The paths that were read to the end for their digest."""
    paths, whole = [], digests.file_sha256
    monkeypatch.setattr(digests, "file_sha256", lambda path: (paths.append(path), whole(path))[1])
    return paths


def test_a_second_look_reads_nothing(model, tmp_path, read, monkeypatch):
    weights, memory = model / "model.safetensors", tmp_path / "memory"
    monkeypatch.setattr(digests, "SETTLED", -1)
    first = digests.content_sha256(weights, memory)
    assert first == artifacts.file_sha256(weights) and len(read) == 1
    assert digests.content_sha256(weights, memory) == first and len(read) == 1
    before = weights.stat()
    flip(weights, 3)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests.content_sha256(weights, memory) == artifacts.file_sha256(weights) != first


def test_a_file_that_was_written_just_now_is_not_remembered(model, tmp_path, read):
    """Within a tick of the file system's clock a second change would look like none."""
    for n in (1, 2):
        digests.content_sha256(model / "model.safetensors", tmp_path / "memory")
        assert len(read) == n


@pytest.mark.parametrize(
    "note",
    [
        "",
        "[",
        "[]",
        "[" * 100_000,
        '{"state": 1}',
        '{"state": STATE, "sha256": "x"}',
        '{"state": STATE, "sha256": 7}',
    ],
)
def test_a_damaged_note_is_read_over(model, tmp_path, monkeypatch, note):
    monkeypatch.setattr(digests, "SETTLED", -1)
    weights, memory = model / "model.safetensors", tmp_path / "memory"
    expected = digests.content_sha256(weights, memory)
    (path,) = memory.iterdir()
    path.write_text(note.replace("STATE", json.dumps(digests.state_of(weights))))
    assert digests.content_sha256(weights, memory) == expected


def test_a_memory_that_takes_no_files(model, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", -1)
    (tmp_path / "memory").write_text("a file")
    assert digests.content_sha256(model / "model.safetensors", tmp_path / "memory")


def test_a_file_that_changes_while_it_is_read(model, tmp_path, monkeypatch):
    whole = digests.file_sha256

    def changing(path):
        found = whole(path)
        path.write_bytes(path.read_bytes() + b"more")
        return found

    monkeypatch.setattr(digests, "file_sha256", changing)
    with pytest.raises(EnvironmentFailure, match="was replaced or changed"):
        digests.content_sha256(model / "model.safetensors", tmp_path / "memory")


@pytest.mark.parametrize("change", ["replace", "remove", "back"])
def test_held_files(model, change):
    weights, other = model / "model.safetensors", model / "other"
    held = digests.Held([weights, model / "config.json", model / "not there"])
    held.require_unchanged()
    shutil.copy(weights, other)
    kept = model / "kept"
    if change == "replace":
        os.replace(other, weights)
    elif change == "remove":
        weights.unlink()
    else:  # another file with the same content in between
        os.rename(weights, kept)
        os.rename(other, weights)
        os.replace(kept, weights)
    with pytest.raises(EnvironmentFailure, match="model.safetensors: was replaced"):
        held.require_unchanged()


# The embedded model


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """A cache with a stand-in for the embedded model of three small files, and how often it was
    made; "made" writes the same."""
    monkeypatch.setenv("FASTSAE_CACHE", str(tmp_path / "cache"))
    made = []

    def convert(_, folder):
        made.append(folder)
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text(f"the {name}")

    monkeypatch.setattr(embedded_model, "_fetch_gguf", lambda work: work / "m.gguf")
    monkeypatch.setattr(embedded_model, "_convert", convert)
    return made


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        embedded_model.MANIFEST,
        "adapter_config.json",
    ],
)
@pytest.mark.parametrize("how", ["flip", "cut", "remove", "empty"])
def test_a_damaged_embedded_model_is_made_anew(embedded, name, how, capsys):
    folder = embedded_model.ready_folder(None)
    assert len(embedded) == 1 and "is damaged;" not in capsys.readouterr().out
    path = folder / name
    content = path.read_bytes() if path.exists() else b"a file that was not there"
    if how == "flip" and name == embedded_model.MANIFEST:
        content = content.replace(b'"model.safetensors": "', b'"model.safetensors": "0')
    elif how == "flip":
        content = bytes([content[0] ^ 1, *content[1:]])
    path.write_bytes({"flip": content, "cut": content[:-3], "empty": b"", "remove": b""}[how])
    if how == "remove":
        path.unlink()
    absent = name == "adapter_config.json" and how == "remove"
    assert embedded_model.ready_folder(None) == folder and len(embedded) == 2 - absent
    assert absent or f"{folder} is damaged; fetching" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_text() == "the model.safetensors"
    assert embedded_model.ready_folder(None) == folder and len(embedded) == 2 - absent


def test_the_embedded_models_identity_is_that_of_its_content(embedded):
    before = sources.identity(EMBEDDED)
    assert before == embedded_model.EMBEDDED["gguf_sha256"]
    # a conversion that made something else than the one that is known
    embedded_model.ready_folder(None)
    other = sources.identity(EMBEDDED)
    assert other.startswith(before) and len(other) > len(before)
    with pytest.raises(InputError, match="is not the model that it was. run again"):
        sources.require_same(EMBEDDED, None, None, before, "run again")
    sources.require_same(EMBEDDED, None, None, other, "run again")
    flip(embedded_model.path_in(None) / "config.json", 2)
    with pytest.raises(InputError, match="is not the model that it was. run again"):
        sources.require_same(EMBEDDED, None, None, other, "run again")


def test_a_cache_of_an_earlier_version_is_checked_against_the_known_parts(embedded, monkeypatch):
    folder = embedded_model.ready_folder(None)
    manifest = json.loads((folder / embedded_model.MANIFEST).read_text())
    monkeypatch.setitem(embedded_model.EMBEDDED, "parts", manifest.pop("sha256"))
    (folder / embedded_model.MANIFEST).write_text(json.dumps(manifest))
    assert embedded_model.ready_folder(None) == folder and len(embedded) == 1
    flip(folder / "model.safetensors", 2)
    embedded_model.ready_folder(None)
    assert len(embedded) == 2


def test_the_real_one_is_the_one_that_is_known(smol_tokenizer):
    assert sources.identity(EMBEDDED) == embedded_model.EMBEDDED["gguf_sha256"]


# What is read is what was looked at


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_a_dataset_that_was_replaced_before_it_was_read(tmp_path, name):
    """And put back afterwards: what counts is the content that was read."""
    path = tmp_path / name
    one, other = (
        "".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(9))
        for word in ("one", "two")
    )
    stream = datasets.stream_text if name.endswith(".txt") else datasets.stream_examples
    path.write_text(one)
    looked_at, _ = datasets.identity(str(path))
    assert list(stream(path, sha256=looked_at))
    path.write_text(other)
    with pytest.raises(
        EnvironmentFailure, match="was replaced or changed while this run read it. run again"
    ):
        for _ in stream(path, sha256=looked_at):
            path.write_text(one)
    path.write_text(one)
    assert list(stream(path, sha256=looked_at))


@pytest.mark.parametrize("how", [{"max_examples": 3}, {"last_line": 3}, {"only_lines": [1, 3]}])
def test_what_is_not_needed_of_a_dataset_is_looked_at_as_well(tmp_path, how):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i}"}) + "\n" for i in range(9)))
    looked_at, _ = datasets.identity(str(path))
    assert len(datasets.read_dataset(path, sha256=looked_at, **how)) in (2, 3)
    with open(path, "a") as file:
        file.write("one more line")
    with pytest.raises(EnvironmentFailure, match="was replaced or changed"):
        datasets.read_dataset(path, sha256=looked_at, **how)


def test_activations_that_are_replaced_while_they_are_opened(
    tmp_path, write_activations, monkeypatch
):
    """Their members are read one after the other: they must not come from two files of equal
    sizes."""
    write_activations(np.zeros((6, 4), np.float16), [2, 4])
    path, plain = tmp_path / "activations" / "activations_layer12.npz", files.read_npz
    assert len(files.open_activations(path)["token_ids"]) == 6

    def replaced(*arguments, **how):
        found = plain(*arguments, **how)
        write_activations(np.ones((6, 4), np.float16), [4, 2])
        return found

    monkeypatch.setattr(files, "read_npz", replaced)
    with pytest.raises(
        EnvironmentFailure, match="activations_layer12.npz: was replaced or changed"
    ):
        files.open_activations(path)


@pytest.mark.parametrize("name", ["checkpoint", "activations", "dataset", "model"])
def test_what_stage_3_describes_is_what_it_read(
    tmp_path, planted, run_main, monkeypatch, capsys, name
):
    """Each input replaced between the first look and the reading stops it before anything is
    written."""
    import interpret_sae

    describe = interpret_sae.describe
    path = {
        "dataset": tmp_path / "planted.jsonl",
        "activations": tmp_path / "activations" / "activations_layer12.npz",
        "checkpoint": tmp_path / "checkpoints" / "test" / "SAE_M=20_K=1.pt",
    }.get(name)

    def replace(value):
        if name == "checkpoint":
            content = artifacts.read_checkpoint(path)
            content["meta"]["fingerprint"] = value
            artifacts.write_checkpoint(path, content, keep_old=False)
        elif name == "dataset":
            path.write_text(path.read_text().replace("=about", value))
        else:
            monkeypatch.setitem(embedded_model.EMBEDDED, "gguf_sha256", value)

    def described(*arguments):
        metadata = describe(*arguments)
        if name == "activations":  # others while it looked, and these again
            metadata["inputs"]["activations"] = "others"
        else:
            replace("other")
        return metadata

    monkeypatch.setattr(interpret_sae, "describe", described)
    code = run_main("interpret_sae", *planted, "--n-top-neurons", 0)
    (line,) = capsys.readouterr().err.splitlines()
    said = {
        "dataset": "is not the file the activations were made from",
        "model": "is not the model that it was",
    }
    assert (
        code in (2, 3) and said.get(name, "was replaced while this run began. run again.") in line
    )
    assert not (tmp_path / "interpretations.jsonl").exists()


def test_a_model_that_changes_while_stage_1_runs_leaves_no_part(tmp_path, monkeypatch):
    """Weights are mapped from their file: what was computed since is of no one model."""
    from types import SimpleNamespace

    import extract_activations

    model, parts = tmp_path / "model", tmp_path / ".parts-x"
    model.mkdir()
    parts.mkdir()
    (model / "config.json").write_text("{}")
    inputs = {"model": sources.identity(str(model))}
    settings = SimpleNamespace(MODEL_NAME=str(model), MODEL_REVISION=None, CACHE_DIR=None)
    extract_activations.require_same_model(settings, inputs, parts)
    assert parts.exists()
    (model / "config.json").write_text("{ }")
    with pytest.raises(InputError, match="it was changed while this run read it. run again"):
        extract_activations.require_same_model(settings, inputs, parts)
    assert not parts.exists()


def test_an_autoencoder_to_start_from_is_the_one_that_was_planned(tmp_path, monkeypatch):
    """Its digest is part of the run's fingerprint before it is read: no other one may be read."""
    from fastsae.formats.source import locate
    from fastsae.sae import autoencoder

    sizes = {"input_dim": 4, "m_total_neurons": 6, "k_active_neurons": 2, "prefix_lengths": None}
    path = tmp_path / "SAE_M=6_K=2.pt"
    one, other = (autoencoder.new_sae(sizes).eval() for _ in range(2))
    autoencoder.save_sae(path, one, {"settings": {}})
    planned = locate(path)
    sha256 = planned.sha256()
    weights = planned.load("cpu", sha256)[0].encoder.weight
    assert np.array_equal(weights.detach(), one.encoder.weight.detach())

    autoencoder.save_sae(path, other, {"settings": {}})
    with pytest.raises(EnvironmentFailure, match="was replaced while this run began. run again."):
        planned.load("cpu", sha256)
    planned.load("cpu")  # where nothing was planned, what is there counts

    load = autoencoder.load_checkpoint

    def replaced(*arguments):
        found = load(*arguments)
        autoencoder.save_sae(path, one, {"settings": {}})
        return found

    monkeypatch.setattr(autoencoder, "load_checkpoint", replaced)
    with pytest.raises(EnvironmentFailure, match="was replaced or changed while this run read it"):
        planned.load("cpu", planned.sha256())


# The table that vouches for the others

ROWS = [{"feature": i, "label": f"words \u2028 like {i}", "density": 1 / (3 + i)} for i in range(5)]


def test_sealed_lines_come_back(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        tables.sealed({"inputs": {"checkpoint": "f"}, "é": 0.1}, ROWS), encoding="utf-8"
    )
    about, *rows = tables.read_sealed(path)
    assert rows == ROWS and about["inputs"] == {"checkpoint": "f"}
    assert tables.read_labels(path, "f") == {row["feature"]: row["label"] for row in ROWS}


def test_no_changed_table_counts(tmp_path, tally):
    """Every cut, every flipped bit, a row that is lost, doubled, moved or edited, and a seal that
    is gone."""
    path = tmp_path / "a.jsonl"
    whole = tables.sealed({"inputs": {"checkpoint": "f"}}, ROWS).encode()
    lines = whole.splitlines(keepends=True)
    changed = [whole[:n] for n in range(len(whole))]
    changed += [
        whole[: n // 8] + bytes([whole[n // 8] ^ 1 << n % 8]) + whole[n // 8 + 1 :]
        for n in range(0, 8 * len(whole), 3)
    ]
    changed += [
        b"".join(lines[:-2]),
        whole + lines[-1],
        whole + b"\n",
        b"".join([lines[0], *lines[:0:-1]]),
        whole.replace(b"like 3", b"like 8"),
        whole.replace(b'"sha256"', b'"sha257"'),
        b"[" * 100_000,
        b"1\n2\n",
        b"{}\n",
    ]
    for content in changed:
        path.write_bytes(content)
        with pytest.raises(EnvironmentFailure, match="was changed by hand"):
            tables.read_sealed(path)
        assert tables.read_labels(path, "f") == {}
    tally("changed tables refused", len(changed))


def test_a_changed_table_is_made_anew(tmp_path, planted, run_main, capsys):
    flags, path = [*planted, "--n-top-neurons", 0], tmp_path / "interpretations.jsonl"
    assert run_main("interpret_sae", *flags) == 0
    whole = path.read_text()
    for content in (
        "".join(whole.splitlines(keepends=True)[:9]),
        whole.replace("apple", "orange", 1),
    ):
        path.write_text(content)
        capsys.readouterr()
        assert run_main("interpret_sae", *flags) == 0
        assert (
            "was changed by hand, damaged" in capsys.readouterr().out and path.read_text() == whole
        )
    assert run_main("interpret_sae", *flags) == 0 and "up to date" in capsys.readouterr().out
