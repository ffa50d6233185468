"""What decides whether work is done already is the whole content of what it was made from: no edit and no damage passes."""
import json
import os
import shutil

import numpy as np
import pytest

from fastsae import artifacts, digests, language_model
from fastsae.errors import EnvironmentFailure, InputError

EMBEDDED = "SmolLM2-135M-Instruct"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model's folder with weights of 20,000 bytes, of which every edit counts; digests are remembered from 1,000 on."""
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
    """What sampling would not see: one byte anywhere, at the same size, with the time of change set back."""
    weights = model / "model.safetensors"
    os.truncate(weights, 24 << 20)
    seen = {language_model.identity(str(model))}
    for at in (0, 20_001, (1 << 20) + 5, (3 << 19) - 1, (24 << 20) - 1):
        before = weights.stat()
        with open(weights, "r+b") as file:
            file.seek(at)
            file.write(b"!")
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        seen.add(language_model.identity(str(model)))
    assert len(seen) == 6


@pytest.mark.parametrize("name", ["additional_chat_templates/rag.jinja", "weights/model-00001.safetensors", "extra.py"])
def test_files_of_inner_folders_decide(model, name):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "weights/model-00001.safetensors"}}))
    before = language_model.identity(str(model))
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("a")
    first = language_model.identity(str(model))
    (model / name).write_text("b")
    assert len({before, first, language_model.identity(str(model))}) == 3


def test_what_decides_nothing(model):
    before = language_model.identity(str(model))
    (model / "README.md").write_text("a")
    (model / ".cache").mkdir()
    (model / "checkpoint-1").mkdir()
    (model / "checkpoint-1" / "model.safetensors").write_text("a")
    assert language_model.identity(str(model)) == before
    shutil.copytree(model, model.with_name("copy"))
    assert language_model.identity(str(model.with_name("copy"))) == before


def test_the_base_of_an_adapter_decides(model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    before = language_model.identity(str(adapter))
    flip(model / "model.safetensors", 7)
    assert language_model.identity(str(adapter)) != before


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


@pytest.mark.parametrize("note", ["", "[", "[]", "[" * 100_000, '{"state": 1}', '{"state": STATE, "sha256": "x"}',
                                  '{"state": STATE, "sha256": 7}'])
def test_a_damaged_note_is_read_over(model, tmp_path, monkeypatch, note):
    monkeypatch.setattr(digests, "SETTLED", -1)
    weights, memory = model / "model.safetensors", tmp_path / "memory"
    expected = digests.content_sha256(weights, memory)
    path, = memory.iterdir()
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
    """A cache with a stand-in for the embedded model of three small files, and how often it was made; "made" writes the same."""
    monkeypatch.setenv("FASTSAE_CACHE", str(tmp_path / "cache"))
    made = []

    def convert(_, folder):
        made.append(folder)
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text(f"the {name}")

    monkeypatch.setattr(language_model, "_fetch_gguf", lambda work: work / "m.gguf")
    monkeypatch.setattr(language_model, "_convert", convert)
    return made


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", language_model.MANIFEST, "adapter_config.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove", "empty"])
def test_a_damaged_embedded_model_is_made_anew(embedded, name, how, capsys):
    folder = language_model._embedded_folder(None)
    assert len(embedded) == 1 and "is damaged;" not in capsys.readouterr().out
    path = folder / name
    content = path.read_bytes() if path.exists() else b"a file that was not there"
    if how == "flip" and name == language_model.MANIFEST:
        content = content.replace(b'"model.safetensors": "', b'"model.safetensors": "0')
    elif how == "flip":
        content = bytes([content[0] ^ 1, *content[1:]])
    path.write_bytes({"flip": content, "cut": content[:-3], "empty": b"", "remove": b""}[how])
    if how == "remove":
        path.unlink()
    absent = name == "adapter_config.json" and how == "remove"
    assert language_model._embedded_folder(None) == folder and len(embedded) == 2 - absent
    assert absent or f"{folder} is damaged; fetching" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_text() == "the model.safetensors"
    assert language_model._embedded_folder(None) == folder and len(embedded) == 2 - absent


def test_the_embedded_models_identity_is_that_of_its_content(embedded):
    before = language_model.identity(EMBEDDED)
    assert before == language_model.EMBEDDED["gguf_sha256"]
    language_model._embedded_folder(None)  # a conversion that made something else than the one that is known
    other = language_model.identity(EMBEDDED)
    assert other.startswith(before) and len(other) > len(before)
    with pytest.raises(InputError, match="is not the model that it was. run again"):
        language_model.require_same(EMBEDDED, None, None, before, "run again")
    language_model.require_same(EMBEDDED, None, None, other, "run again")
    flip(language_model._embedded_path(None) / "config.json", 2)
    with pytest.raises(InputError, match="is not the model that it was. run again"):
        language_model.require_same(EMBEDDED, None, None, other, "run again")


def test_a_cache_of_an_earlier_version_is_checked_against_the_known_parts(embedded, monkeypatch):
    folder = language_model._embedded_folder(None)
    manifest = json.loads((folder / language_model.MANIFEST).read_text())
    monkeypatch.setitem(language_model.EMBEDDED, "parts", manifest.pop("sha256"))
    (folder / language_model.MANIFEST).write_text(json.dumps(manifest))
    assert language_model._embedded_folder(None) == folder and len(embedded) == 1
    flip(folder / "model.safetensors", 2)
    language_model._embedded_folder(None)
    assert len(embedded) == 2


def test_the_real_one_is_the_one_that_is_known(smol_tokenizer):
    assert language_model.identity(EMBEDDED) == language_model.EMBEDDED["gguf_sha256"]
