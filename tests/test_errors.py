"""What a user can cause or meet: one line on stderr, the right exit code, before slow work, and nothing already made is lost."""
import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

import interpret_sae
from fastsae import artifacts, autoencoder, extraction, language_model
from fastsae.errors import EnvironmentFailure, InputError, run_stage
from fastsae.examples import ChatTokenizer, Example, read_dataset

GOOD = '{"text": "one"}\n'
SMALL = ["--m", "8", "--k", "2", "--no-use-matryoshka", "--n-epochs", "1", "--device", "cpu", "--run-name", "r"]
MESSAGE_ROLES = [("human", "user"), ("gpt", "assistant"), ("system", "system"), ("chatgpt", "assistant"), ("function", "tool"),
                 ("user", "user"), ("assistant", "assistant"), ("tool", "tool"), ("observation", "tool"), ("bing", "assistant"),
                 ("bard", "assistant")]


@pytest.fixture(autouse=True)
def own_sigterm_handler():
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture
def outcome(capsys):
    """Run a function as a stage: (exit code, lines on stderr)."""
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


@pytest.fixture
def weights(tmp_path):
    """Write a small checkpoint with known content; returns its path."""
    path = tmp_path / "sae.pt"
    artifacts.write_checkpoint(path, {"config": {"a": 1}, "state_dict": {"w": torch.arange(6.0)}, "meta": {"x": "y"}})
    return path


@pytest.fixture
def rows(tmp_path):
    """Write an .npz with one member that is larger than a read buffer and one small one; returns its path."""
    path = tmp_path / "rows.npz"
    artifacts.write_npz(path, {"activations": np.arange(8000, dtype=np.int16).reshape(2000, 4),
                               "seq_lengths": np.array([1500, 500], np.int32)})
    return path


def one_line(done, code):
    """The single line on stderr of a finished script, less its "error: "."""
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr.removeprefix("error: ").rstrip("\n")


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Datasets

@pytest.mark.parametrize("content, line, what", [
    (GOOD + GOOD + '{"text": "a"', 3, "bad JSON (Expecting ',' delimiter, column 13)"),
    (GOOD + "\n" + "text\n", 3, "bad JSON (Expecting value, column 1)"),
    (GOOD + '{"text": "a"} {"text": "b"}', 2, "bad JSON (Extra data, column 15)"),
    (GOOD + '{"text": ' + 5000 * "9" + "}", 2, "bad JSON (Exceeds the limit (4300 digits)"),
    (GOOD + '{"text": ' + 100_000 * "[", 2, "bad JSON (maximum recursion depth exceeded"),
    (GOOD + '{"txt": "a", "id": 1}', 2, "has no text, messages or conversations (its fields: txt, id)"),
    (GOOD + "{}", 2, "has no text, messages or conversations (its fields: none)"),
    (GOOD + '"text"', 2, "the row is no JSON object"),
    (GOOD + '{"text": ""}', 2, "text is empty"),
    (GOOD + '{"text": " \\n\\t\\u00a0"}', 2, "text is empty"),
    (GOOD + '{"text": 5}', 2, "text is int, not text"),
    (GOOD + '{"text": ["a"]}', 2, "text is list, not text"),
    (GOOD + '{"text": null}', 2, "text is NoneType, not text"),
    (GOOD + '{"text": "a\\ud800b"}', 2, "text holds half of a surrogate pair"),
    (GOOD + '{"messages": []}', 2, "messages is no non-empty list"),
    (GOOD + '{"messages": "hello"}', 2, "messages is no non-empty list"),
    (GOOD + '{"messages": ["hello"]}', 2, "messages[0] has no role and content"),
    (GOOD + '{"messages": [{"role": "user"}]}', 2, "messages[0] has no role and content"),
    (GOOD + '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 1}]}', 2, "messages[1].content is int, not text"),
    (GOOD + '{"messages": [{"role": "user", "content": ""}]}', 2, "messages[0].content is empty"),
    (GOOD + '{"messages": [{"role": "narrator", "content": "a"}]}', 2, "messages[0] has the unknown role 'narrator'"),
    (GOOD + '{"messages": [{"role": ["user"], "content": "a"}]}', 2, "messages[0] has the unknown role ['user']"),
    (GOOD + '{"conversations": [{"from": "alien", "value": "a"}]}', 2, "conversations[0] has the unknown from 'alien'"),
    (GOOD + '{"conversations": [{"role": "user", "content": "a"}]}', 2, "conversations[0] has no from and value"),
    (GOOD + '{"a\\nb\\u001b[2J": 1}', 2, "has no text, messages or conversations"),
    ((GOOD + GOOD).encode("utf-16"), 1, "is not UTF-8. convert it"),
    ((GOOD + '{"text": "café"}').encode("latin-1"), 2, "is not UTF-8. convert it"),
    ('[{"text": "a"},\n{"text": "b"}\n{"text": "c"}]', 3, "bad JSON (Expecting ',' delimiter, column 1)"),
    ('[{"text": "a"},\n{"text": "b"}', 2, "bad JSON (Expecting ',' delimiter, column 14)"),
    ('[{"text": "a"}, {"text": 2}]', 2, "text is int, not text"),
    (100_000 * "[", 1, "bad JSON (maximum recursion depth exceeded"),
    ('[{"text": ' + 5000 * "9" + "}]", 1, "bad JSON (Exceeds the limit (4300 digits)")])
def test_a_bad_row_is_one_line_with_its_place(dataset, outcome, content, line, what):
    path = dataset(content)
    code, (text,) = outcome(lambda: read_dataset(path))
    assert code == 2
    assert text.startswith(f"error: {path}:{line}: {what}")
    assert text.endswith(".") and text.isprintable() and len(text) < len(str(path)) + 250


def test_a_label_no_file_can_hold_is_refused(dataset):
    with pytest.raises(InputError, match=r"d\.jsonl:2: topic "):
        read_dataset(dataset(GOOD + '{"text": "two", "topic": "\\ud800"}'), label_field="topic")


@pytest.mark.parametrize("content, lines", [
    (GOOD + GOOD, [1, 2]), ("\ufeff" + GOOD + GOOD, [1, 2]), (GOOD.replace("\n", "\r\n") * 2, [1, 2]), (GOOD + GOOD.rstrip("\n"), [1, 2]),
    ("\n\n" + GOOD + "  \t\n" + GOOD + "\n\n", [3, 5]), ('\ufeff\n [{"text": "one"},\n\n{"text": "one"}]\n', [1, 2]),
    (GOOD + '{"text": "one", "score": NaN, "messages": null}', [1, 2])],
    ids=["plain", "bom", "crlf", "no last newline", "blank lines", "array", "null messages"])
def test_accepted_files(dataset, content, lines):
    assert read_dataset(dataset(content)) == [Example(line, [{"role": "user", "content": "one"}], is_text=True) for line in lines]


def test_sharegpt_roles_are_mapped(dataset):
    row = {"conversations": [{"from": role, "value": "v"} for role, _ in MESSAGE_ROLES], "label": 7}
    example = read_dataset(dataset(f"{json.dumps(row)}\n{GOOD}"), label_field="label")[0]
    assert example == Example(1, [{"role": role, "content": "v"} for _, role in MESSAGE_ROLES], is_text=False, label="7")


@pytest.mark.parametrize("content, n", [("", 0), (GOOD, 1), ("\n \n", 0), ("[]", 0)])
def test_too_few_rows(dataset, content, n):
    path = dataset(content)
    with pytest.raises(InputError) as error:
        read_dataset(path)
    assert str(error.value) == f"{path}: has {n} examples. at least 2 are needed, one to train on and one to validate."


@pytest.mark.parametrize("n_bad, n_lines", [(2, 2), (10, 10), (11, 11), (12, 11), (500, 11)])
def test_more_than_ten_bad_rows_are_cut(dataset, outcome, n_bad, n_lines):
    path = dataset(GOOD + n_bad * '{"text": ""}\n')
    code, lines = outcome(lambda: read_dataset(path))
    assert (code, len(lines)) == (2, n_lines)
    assert lines[:10] == [f"error: {path}:{i}: text is empty. remove the row or give it text." for i in range(2, 2 + min(n_bad, 10))]
    assert lines[10:] == [f"error: {path}: more bad rows follow. mend these first."] * (n_bad > 10)


def test_rows_beyond_max_examples_are_not_looked_at(dataset):
    assert len(read_dataset(dataset(GOOD + GOOD + "bad"), max_examples=2)) == 2


def test_a_bad_dataset_stops_the_script_and_harms_nothing(run_script, write_activations, dataset, tmp_path):
    write_activations(np.ones((4, 2), np.float16), [2, 2])
    path = dataset((GOOD + GOOD).encode("utf-16"))
    before = snapshot(tmp_path)
    done = run_script("extract_activations.py", "--dataset-path", path, "--no-print-settings")
    assert one_line(done, 2) == f"{path}:1: is not UTF-8. convert it, for example: iconv -f UTF-16 -t UTF-8 d.jsonl."
    assert len(done.stdout.splitlines()) == 1 and done.stdout.startswith("changed: ") and snapshot(tmp_path) == before


def test_dialogues_that_no_template_takes():
    dialogue, text = Example(7, [{"role": "tool", "content": "a"}]), Example(8, [{"role": "user", "content": "a"}], is_text=True)
    tokenizer = SimpleNamespace(chat_template=None, all_special_tokens=[], get_added_vocab=dict)
    with pytest.raises(InputError, match="^MODEL_NAME: this model has no chat template"):
        ChatTokenizer(tokenizer, max_length=8)
    with pytest.raises(InputError, match="^d.jsonl:7: is a dialogue.*--use-chat-template"):
        ChatTokenizer(tokenizer, chat_template=False, max_length=8, dataset_name="d.jsonl").render(dialogue)
    tokenizer.chat_template, tokenizer.apply_chat_template = "x", lambda *_, **__: {}["roles must alternate\nsecond line"]
    with pytest.raises(InputError, match=r"^d.jsonl:8: the chat template refuses this dialogue \('roles must alternate") as error:
        ChatTokenizer(tokenizer, max_length=8, dataset_name="d.jsonl").render(text)
    assert "\n" not in str(error.value)


# Settings, models and devices

def test_impossible_settings_are_reported_at_once_before_anything_runs(run_script, tmp_path):
    done = run_script("run_pipeline.py", "--k", "999", "--layer-idx", "0", "--device", "tpu", "--dataset-path", tmp_path / "nowhere.jsonl")
    assert (done.returncode, done.stdout, snapshot(tmp_path)) == (2, "", {})
    assert sorted(done.stderr.splitlines()) == [
        f"error: DATASET_PATH: {tmp_path / 'nowhere.jsonl'} is no file. give your data with --dataset-path FILE.jsonl.",
        "error: DEVICE: 'tpu' is unknown. choose auto, cpu, mps, cuda or cuda:0.",
        "error: K: 999 active features of only M=256. lower --k or raise --m to at least 999.",
        "error: LAYER_IDX: 0 is below 1. give 1 or more."]


def test_a_layer_beyond_the_model(run_script, dataset):
    done = run_script("extract_activations.py", "--dataset-path", dataset(GOOD + GOOD), "--layer-idx", "31")
    assert one_line(done, 2) == "LAYER_IDX: 31 is beyond the 30 layers of SmolLM2-135M-Instruct. give 1 to 30."


def test_a_hub_model_that_is_not_cached_without_network(run_script, dataset, tmp_path):
    done = run_script("extract_activations.py", "--dataset-path", dataset(GOOD + GOOD), "--model-name", "some-org/some-model",
                      env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")})
    assert one_line(done, 3).startswith("MODEL_NAME: some-org/some-model is not in the local cache and the hub cannot be reached. ")


@pytest.mark.parametrize("output_is", ["a file", "below a file"])
@pytest.mark.parametrize("script", ["extract_activations", "train_sae", "interpret_sae"])
def test_an_output_folder_that_is_a_file(run_main, capsys, dataset, script, output_is):
    path = dataset(GOOD + GOOD)
    try:
        code = run_main(script, "--dataset-path", path, "--output-dir", path if output_is == "a file" else path / "out", "--device", "cpu")
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_mistaken_model_name_leaves_the_activations_where_they_are(run_main, capsys, write_activations, dataset, tmp_path):
    flags = write_activations(np.ones((4, 2), np.float16), [2, 2], dataset=dataset(GOOD + GOOD))
    before = snapshot(tmp_path)
    assert run_main("extract_activations", *flags, "--model-name", "./nowhere") == 2
    assert capsys.readouterr().err == ("error: MODEL_NAME: ./nowhere does not exist. give a folder, a .gguf file, a hub id or "
                                       "SmolLM2-135M-Instruct.\n")
    assert snapshot(tmp_path) == before


def caused(error, cause):
    error.__cause__ = cause
    return error


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize("error, kind, what", [
    (GatedRepoError("403 Client Error", response=RESPONSE), EnvironmentFailure, "hf auth login"),
    (caused(OSError("you cannot\nread this"), GatedRepoError("403", response=RESPONSE)), EnvironmentFailure, "hf auth login"),
    (caused(OSError("cannot connect"), LocalEntryNotFoundError("offline")), EnvironmentFailure, "the hub cannot be reached"),
    (ImportError("No module named 'x'"), EnvironmentFailure, "pip install"),
    (OSError(errno.ENOSPC, "No space left on device"), EnvironmentFailure, "No space left on device"),
    (ValueError("unknown\narchitecture"), InputError, "could not be loaded (unknown)"),
    (OSError(), InputError, "could not be loaded")])
def test_a_model_that_does_not_load(error, kind, what):
    def loader(*_, **__):
        raise error

    with pytest.raises(kind) as raised:
        language_model._load(loader, "org/model", "org/model")
    message = str(raised.value)
    assert "org/model" in message and what in message and "\n" not in message


def test_a_damaged_local_model(tmp_path, outcome):
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 1, "vocab_size": 5}))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    code, lines = outcome(lambda: language_model.ResidualModel(str(tmp_path), 1, dtype=torch.float32))
    assert (code, len(lines)) == (2, 1) and lines[0].startswith(f"error: MODEL_NAME: {tmp_path} could not be loaded (")


@pytest.mark.parametrize("setting", ["cuda", "cuda:7", "mps"])
def test_a_device_that_is_not_there(monkeypatch, setting):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"^DEVICE: {setting} is not available here. use --device auto, or cpu.$"):
        language_model.choose_device(setting)
    assert language_model.choose_device("auto") == "cpu"


def test_a_model_that_is_not_built_like_llama():
    with pytest.raises(InputError, match="^MODEL_NAME: Linear is not built like Llama"):
        language_model.decoder_stack(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("number, where", [(np.nan, "--dtype"), (np.inf, "--dtype"), (70000, "--storage-dtype float32")])
def test_activations_that_cannot_be_stored(number, where):
    def storable(last):
        stream = torch.tensor([[[1.0, 2.0], [5e9, 5e9]], [[1.0, 3.0], [2.0, last]]])  # a padded row of example 0, two rows of example 1
        return extraction.storable(stream, [(0, 1), (1, 2)], "float16", lambda i: f"d.jsonl:{[3, 4][i]}")

    with pytest.raises(InputError, match=f"^d.jsonl:4: .*{where}"):
        storable(number)
    assert storable(65504).dtype == torch.float16 and storable(65504).tolist() == [[1, 2], [1, 3], [2, 65504]]


# Damaged, foreign and hostile files

def call_on_load(path):
    """A pickle, written by hand, that makes a folder at `path` when it is loaded."""
    return f"cos\nmkdir\n(V{path}\ntR.".encode()


def object_array(path):
    """An .npz whose member `activations` is an object array with that pickle."""
    member, archive = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "|O", "fortran_order": False, "shape": ()})
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("activations.npy", member.getvalue() + call_on_load(path))
        file.writestr("metadata.npy", member.getvalue() + call_on_load(path))
    return archive.getvalue()


def torch_archive(path):
    """A .pt as torch.save lays it out, with that pickle inside."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in (("data.pkl", call_on_load(path)), ("byteorder", b"little"), ("version", b"3\n")):
            file.writestr(f"archive/{name}", content)
    return archive.getvalue()


def npy(_):
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


def test_the_canary_sings(tmp_path):
    for i, load in enumerate((lambda path: pickle.loads(call_on_load(path)),
                              lambda path: np.load(io.BytesIO(object_array(path)), allow_pickle=True)["activations"],
                              lambda path: torch.load(io.BytesIO(torch_archive(path)), weights_only=False))):
        load(tmp_path / f"canary{i}")
        assert (tmp_path / f"canary{i}").is_dir()


@pytest.mark.parametrize("content", [object_array, torch_archive, call_on_load, npy, lambda _: b"", lambda _: b"no archive at all"],
                         ids=["object array", "torch archive", "pickle", "npy", "empty", "foreign"])
def test_foreign_files_are_refused_and_run_nothing(tmp_path, outcome, run_main, capsys, content):
    canary = tmp_path / "canary"
    path = tmp_path / "activations" / "activations_layer12.npz"
    path.parent.mkdir()
    path.write_bytes(content(canary))
    code, (line,) = outcome(lambda: artifacts.read_npz(path, ["activations"], made_by="make.py"))
    assert code == 3 and line.startswith(f"error: {path}: ") and line.endswith("run make.py.")
    assert run_main("train_sae", "--output-dir", tmp_path) == 3 and len(capsys.readouterr().err.splitlines()) == 1

    run = tmp_path / "checkpoints" / "r"
    run.mkdir(parents=True)
    (run / "sae.pt").write_bytes(content(canary))
    (run / "metrics.json").write_text('{"checkpoint": "sae.pt"}')
    code, (line,) = outcome(lambda: artifacts.read_checkpoint(run / "sae.pt"))
    assert code == 3 and line.startswith(f"error: {run / 'sae.pt'}: ") and line.endswith("delete it and run train_sae.py.")
    assert run_main("interpret_sae", "--output-dir", tmp_path, "--run-name", "r") == 3 and len(capsys.readouterr().err.splitlines()) == 1
    assert not canary.exists()


@pytest.mark.parametrize("checkpoint", [{"a": 1}, [1], {"config": {}, "state_dict": {}, "meta": {"format": 1, "fingerprint": "f"}},
                                        {"config": {"input_dim": 1}, "state_dict": {}}, {"meta": {"format": 0, "fingerprint": "f"}},
                                        {"meta": {"w": torch.ones(2)}}])
def test_checkpoints_of_others_are_refused(tmp_path, checkpoint):
    artifacts.write_checkpoint(tmp_path / "a.pt", checkpoint)
    with pytest.raises(EnvironmentFailure, match="run train_sae.py"):
        autoencoder.load_sae(tmp_path / "a.pt")
        pytest.fail("read as an autoencoder")
    if "config" not in checkpoint:
        with pytest.raises(EnvironmentFailure, match="run train_sae.py"):
            artifacts.read_checkpoint_metadata(tmp_path / "a.pt")


def test_an_npz_of_others_is_refused(rows):
    with pytest.raises(EnvironmentFailure, match=r"rows\.npz: has no member .*metadata"):
        artifacts.read_npz_metadata(rows)
    artifacts.write_npz(rows, {"metadata": np.array('{"format": 0, "fingerprint": "f"}')})
    with pytest.raises(EnvironmentFailure, match="is not of this version"):
        artifacts.read_npz_metadata(rows)


def reads_as(kind, path, content):
    """What a file with this content reads as: None if it is refused, else the numbers and their names."""
    path.write_bytes(content)
    try:
        if kind == "npz":
            found = artifacts.read_npz(path, ["activations", "seq_lengths"], made_by="extract_activations.py")
            return {name: array.tolist() for name, array in found.items()}
        found = artifacts.read_checkpoint(path)
        return {**found, "state_dict": {name: tensor.tolist() for name, tensor in found["state_dict"].items()}}
    except EnvironmentFailure as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None


ROWS = {"activations": np.arange(8000).reshape(2000, 4).tolist(), "seq_lengths": [1500, 500]}
WEIGHTS = {"config": {"a": 1}, "state_dict": {"w": [0, 1, 2, 3, 4, 5]}, "meta": {"x": "y"}}


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_every_truncation_is_refused(rows, weights, kind):
    path, expected = (rows, ROWS) if kind == "npz" else (weights, WEIGHTS)
    whole = path.read_bytes()
    assert reads_as(kind, path, whole) == expected
    for size in (*range(0, len(whole), 97), *range(len(whole) - 40, len(whole))):
        assert reads_as(kind, path, whole[:size]) is None, size


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_no_flipped_bit_gives_other_numbers(rows, weights, kind):
    path, expected = (rows, ROWS) if kind == "npz" else (weights, WEIGHTS)
    whole = path.read_bytes()
    name, tail = (b"activations.npy", 60) if kind == "npz" else (b"archive/data/0", 22)
    first, last = whole.index(name), whole.rindex(name)  # the member itself, and its entry in the list at the end
    densely = {*range(first - 30, first + 200), *range(last - 46, last + len(name)), *range(len(whole) - tail, len(whole))}
    for at in densely | set(range(0, len(whole), 61)):
        for bit in range(8) if at in densely else [at % 8]:
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            assert reads_as(kind, path, changed) in (None, expected), (at, bit)


@pytest.mark.parametrize("old, new", [(b"(2000, 4)", b"(0000, 4)"), (b"(2000, 4)", b"(200 , 4)"), (b"(2000, 4)", b"(2000, 0)"),
                                      (b"NUMPY\x01\x00\xb5", b"NUMPY\x01\x00\xa5")])
def test_a_damaged_header_never_gives_fewer_rows(rows, old, new):
    whole = rows.read_bytes()
    assert old in whole
    assert reads_as("npz", rows, whole.replace(old, new, 1)) is None


def test_a_member_that_a_flipped_bit_hides(rows, run_main, write_activations, capsys, tmp_path):
    flags = write_activations(np.ones((4, 2), np.float16), [2, 2])
    path = tmp_path / "activations" / "activations_layer12.npz"
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"PK\x01\x02") + 33] ^= 8  # the length of the first entry's comment: it swallows the entries that follow
    path.write_bytes(whole)
    assert run_main("train_sae", *flags, *SMALL) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


# One stage without the one before

def test_stages_out_of_order(run_script, tmp_path):
    path = tmp_path / "activations" / "activations_layer12.npz"
    assert one_line(run_script("train_sae.py"), 2) == f"{path}: not found. run extract_activations.py first, or check --output-dir."
    path = tmp_path / "checkpoints" / "cognitive_actions" / "metrics.json"
    assert one_line(run_script("interpret_sae.py"), 2) == (
        f"{path}: not found. run train_sae.py first, or check --run-name and --output-dir.")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"5", b'{"checkpoint": 5}', b'{"checkpoint": null}', b"\xff\xfe{"])
def test_damaged_metrics(tmp_path, outcome, content):
    (tmp_path / "metrics.json").write_bytes(content)
    assert outcome(lambda: interpret_sae.named_checkpoint(tmp_path)) == (
        3, [f"error: {tmp_path / 'metrics.json'}: damaged. run train_sae.py again."])


def test_metrics_that_name_a_checkpoint_which_is_gone(run_main, capsys, tmp_path):
    (tmp_path / "checkpoints" / "r").mkdir(parents=True)
    (tmp_path / "checkpoints" / "r" / "metrics.json").write_text('{"checkpoint": "gone.pt"}')
    assert run_main("interpret_sae", "--output-dir", tmp_path, "--run-name", "r") == 2
    assert capsys.readouterr().err == (f"error: {tmp_path / 'checkpoints/r/gone.pt'}: not found. run train_sae.py first, "
                                       "or check --output-dir.\n")


def test_training_again_mends_what_is_damaged(run_main, write_activations, capsys, tmp_path):
    flags = [*write_activations(np.random.default_rng(0).standard_normal((60, 4)).astype(np.float16), 6 * [10]), *SMALL]
    run = tmp_path / "checkpoints" / "r"
    assert run_main("train_sae", *flags) == 0
    named = json.loads((run / "metrics.json").read_text())["checkpoint"]
    whole = (run / named).read_bytes()

    (run / "metrics.json").write_bytes(b"{")
    assert run_main("train_sae", *flags) == 0
    assert json.loads((run / "metrics.json").read_text())["checkpoint"] == named and (run / named).read_bytes() == whole

    (run / named).write_bytes(whole[:-1])
    capsys.readouterr()
    assert run_main("train_sae", *flags) == 0
    assert "not reused: " in capsys.readouterr().out
    assert artifacts.read_checkpoint(run / named)["state_dict"].keys() == torch.load(io.BytesIO(whole))["state_dict"].keys()
    assert [path.read_bytes() for path in run.glob("*.old-1.pt")] == [whole[:-1]]


def test_a_refused_run_leaves_the_results_of_earlier_ones(run_main, write_activations, capsys, tmp_path):
    flags = [*write_activations(np.random.default_rng(0).standard_normal((60, 4)).astype(np.float16), 6 * [10]), *SMALL]
    assert run_main("train_sae", *flags) == 0
    path = tmp_path / "activations" / "activations_layer12.npz"
    path.write_bytes(path.read_bytes()[:-1])
    before = snapshot(tmp_path)
    assert run_main("train_sae", *flags, "--seed", 1) == 3
    assert snapshot(tmp_path) == before


# Disk, rights, signals

WRITERS = {"text": lambda path: artifacts.write_text(path, "new"), "npz": lambda path: artifacts.write_npz(path, {"a": np.ones(9000)}),
           "pt": lambda path: artifacts.write_checkpoint(path, {"a": torch.ones(9000)})}


def fail_with(error):
    def fail(*_, **__):
        raise error
    return fail


def full_device(*, dir, **_):
    """In place of tempfile.mkstemp: a real temporary name, whose writes go to a device that is always full."""
    path = os.path.join(dir, ".x.tmp")
    open(path, "w").close()
    return os.open("/dev/full", os.O_WRONLY), path


@pytest.mark.parametrize("point", ["write", "fsync", "rename"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_leaves_the_previous_file(monkeypatch, tmp_path, outcome, write, point):
    path = tmp_path / "file.x"
    path.write_bytes(b"previous")
    full = OSError(errno.ENOSPC, "No space left on device")
    if point == "write":
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full here")
        monkeypatch.setattr(artifacts.tempfile, "mkstemp", full_device)
    else:
        monkeypatch.setattr(os, "fsync" if point == "fsync" else "replace", fail_with(full))
    assert outcome(lambda: write(path)) == (3, ["error: output: No space left on device. free some space, or choose another --output-dir; "
                                                "nothing that was complete is lost."])
    assert path.read_bytes() == b"previous"
    assert {content for content in snapshot(tmp_path).values()} == {b"previous"} and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), EnvironmentFailure("part: damaged."), MemoryError()])
def test_a_write_that_is_cut_off_leaves_the_previous_file(tmp_path, error):
    def rows():
        yield np.ones((1, 2))
        raise error

    path = tmp_path / "a.npz"
    path.write_bytes(b"previous")
    with pytest.raises(type(error)):
        artifacts.write_npz(path, {"a": ((2, 2), "float32", rows())})
    assert snapshot(tmp_path) == {"a.npz": b"previous"}


def test_a_failing_folder_sync_leaves_the_new_file_whole(monkeypatch, tmp_path):
    steps = iter([os.fsync, fail_with(OSError(errno.EIO, "Input/output error"))])  # the file, then its folder
    monkeypatch.setattr(os, "fsync", lambda handle: next(steps)(handle))
    with pytest.raises(OSError, match="Input/output error"):
        artifacts.write_text(tmp_path / "a", "new")
    assert snapshot(tmp_path) == {"a": b"new"}


def test_a_torn_journal_line_loses_nothing_else(tmp_path):
    path = tmp_path / "j.jsonl"
    artifacts.append_line(path, {"a": 1})
    with open(path, "ab") as file:
        file.write(b'{"b": ')
    artifacts.append_line(path, {"c": "\u00e9"})
    assert artifacts.read_lines(path) == [{"a": 1}, {"c": "\u00e9"}]


def test_a_disk_that_is_too_small_is_noticed_before_the_model_loads(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500_000_000))
    with pytest.raises(EnvironmentFailure) as error:  # 10^9 numbers of 2 bytes, twice, and 16 MiB: 4.0168 GB
        extraction.require_disk_space(tmp_path / "activations" / "a.npz", 10 ** 9, "float16")
    assert str(error.value) == (f"{tmp_path / 'activations'}: 4.02 GB are needed while this runs and 0.50 GB are free. "
                                "free some space, choose another --output-dir, or lower --max-examples.")
    extraction.require_disk_space(tmp_path / "activations" / "a.npz", 10 ** 8, "float16")


@pytest.mark.parametrize("error, code, text", [
    (InputError("M: a. b.\nK: c. d."), 2, ["error: M: a. b.", "error: K: c. d."]),
    (EnvironmentFailure("a.npz: damaged. delete it."), 3, ["error: a.npz: damaged. delete it."]),
    (PermissionError(errno.EACCES, "Permission denied", "/o/a"), 3, ["error: /o/a: Permission denied. check the folder's rights, or choose "
                                                                     "another --output-dir; nothing that was complete is lost."]),
    (KeyboardInterrupt(), 130, ["stopped: what was finished is kept; the same command continues."])])
def test_exit_codes(outcome, error, code, text):
    assert outcome(fail_with(error)) == (code, text)


def test_a_stage_s_own_code_is_kept(outcome):
    assert outcome(lambda: None) == (0, [])
    assert outcome(lambda: 4) == (4, [])


def test_sigterm(outcome):
    assert outcome(lambda: signal.raise_signal(signal.SIGTERM)) == (
        143, ["stopped: what was finished is kept; the same command continues."])


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyError("a"), FileNotFoundError(errno.ENOENT, "x")])
def test_a_bug_is_not_hidden(error):
    with pytest.raises(type(error)):
        run_stage(fail_with(error))


def stage_process(body, stdout):
    code = f"import sys; from fastsae.errors import run_stage; sys.exit(run_stage(lambda: {body}))"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", code], cwd=PROJECT, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env, timeout=60)


def test_a_bug_keeps_its_traceback():
    done = stage_process("1 / 0", subprocess.DEVNULL)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("body", ["print('x', flush=True)", "print('x')", "print('x' * 100_000)"], ids=["flushed", "buffered", "long"])
def test_a_reader_that_left_is_no_error(body):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = stage_process(body, writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
