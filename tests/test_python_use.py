"""`from fastsae import load_sae` in a notebook, the README's example, and `interpret_sae.py
--text`."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT, planted_tokens, put_activations
from inert_page import read_report
from small import small

import fastsae
from fastsae.formats import load
from fastsae.runtime import artifacts
from fastsae.runtime.errors import InputError
from fastsae.runtime.stage import run_stage
from fastsae.trained_sae import text_table

TEXTS = [
    "The bread rose twice.",
    "Where did I leave the key?",
    "Seven times eight is fifty-six.",
    "We chose the longer road.",
    "Why does the tap drip only at night?",
    "Ada came home late, so I waited on the stairs.",
]
SENTENCE = TEXTS[1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Outputs of all three stages on six texts and the embedded model's second layer."""
    folder = tmp_path_factory.mktemp("use")
    dataset = folder / "texts.jsonl"
    dataset.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    common = [
        "--output-dir",
        str(folder),
        "--dataset-path",
        str(dataset),
        "--layer-idx",
        "2",
        "--device",
        "cpu",
    ]
    own = {
        "extract_activations": [],
        "train_sae": ["--m", "64", "--matryoshka-prefixes", "16,64", "--k", "4", "--n-epochs", "3"],
        "interpret_sae": ["--n-top-neurons", "0"],
    }
    for script, flags in own.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py", *common, *flags])
            assert run_stage(__import__(script).main) == 0
    return folder


@pytest.fixture(scope="module")
def checkpoint(run_folder):
    (path,) = (run_folder / "checkpoints" / "texts").glob("SAE_*.pt")
    return path


@pytest.fixture(scope="module")
def sae(checkpoint):
    return fastsae.load_sae(checkpoint)


def test_importing_fastsae_loads_no_library():
    code = "import sys, fastsae; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0
    with pytest.raises(AttributeError, match="no_such"):
        _ = fastsae.no_such


def test_encode_and_decode_are_hypothesaes_own(sae, checkpoint):
    module, _ = load.load_sae(checkpoint)
    x = torch.randn(2, 7, sae.d, generator=torch.Generator().manual_seed(0)) * 20
    with torch.no_grad():
        reconstruction, info = module(x.reshape(14, -1))
    features = sae.encode(x)
    assert features.shape == (2, 7, 64) and torch.allclose(
        features.reshape(14, 64), info["activations"], atol=1e-4
    )
    assert torch.allclose(sae.decode(features).reshape(14, -1), reconstruction, atol=1e-3)
    assert torch.equal(sae.encode(x.numpy()), features)
    with pytest.raises(InputError, match="are 5 wide"):
        sae.encode(torch.zeros(3, 5))


def test_features_of_a_text_are_those_of_the_activations_file(sae, run_folder):
    """The example of the dataset, through the model again: the same tokens, kinds and features."""
    data = artifacts.read_npz(
        run_folder / "activations" / "activations_layer2.npz", made_by="the test"
    )
    rows = slice(*np.cumsum([0, *data["seq_lengths"]])[1:3])
    found = sae.features_of(SENTENCE, n_top=4)
    expected = sae.encode(data["activations"][rows])
    assert len(found) == len(expected)
    kinds = {0: "content", 1: "template", 2: "shared prefix"}
    assert [token.kind for token in found] == [
        kinds[int(kind)] for kind in data["token_kind"][rows]
    ]
    assert "".join(token.token for token in found if token.kind == "content") == SENTENCE
    for token, row in zip(found, expected):
        assert token.used == (token.kind != "shared prefix")
        assert len(token.features) == int((row > 0).sum()) and [
            v for _, v in token.features
        ] == sorted((v for _, v in token.features), reverse=True)
        for j, value in token.features:
            assert value == pytest.approx(float(row[j]), rel=0.02, abs=0.05)  # the file has float16


def test_features_of_a_dialogue(sae, monkeypatch):
    dialogue = [
        {"role": "user", "content": "Two plus two?"},
        {"role": "assistant", "content": "Four."},
    ]
    found = sae.features_of(dialogue)
    assert (
        "".join(token.token for token in found if token.kind == "content") == "Two plus two?Four."
    )
    monkeypatch.setitem(sae.meta["settings"], "USE_TOKENS", "assistant")
    assert "".join(token.token for token in sae.features_of(dialogue) if token.used) == "Four."
    # a user's turn, shown nevertheless
    assert text_table(sae.features_of("Four."), {}).splitlines()[1].startswith("'Four'")
    with pytest.raises(InputError, match="^TEXT: is empty"):
        sae.features_of("  ")


def test_it_says_what_it_is(sae):
    lines = repr(sae).splitlines()
    assert lines[0] == "topk autoencoder: 64 features of 576 dimensions, K = 4, prefixes 16, 64"
    assert lines[1] == "layer 2 of SmolLM2-135M-Instruct, 4-bit (Q4_1), dequantised"
    assert re.fullmatch(r"normalised MSE [\d.]+, L0 4, dead [\d.e-]+", lines[2])


def test_a_runs_folder_stands_for_its_checkpoint(sae, checkpoint):
    assert repr(fastsae.load_sae(checkpoint.parent)) == repr(sae)


def test_without_a_model_it_still_encodes(tmp_path, run_main):
    tokens, _ = planted_tokens(300, 16, 20, 2)
    flags = put_activations(tmp_path, tokens, [10] * 30)
    assert run_main("train_sae", *flags, *small(m=20, run_name="r")) == 0
    (path,) = (tmp_path / "checkpoints" / "r").glob("SAE_*.pt")
    sae = fastsae.load_sae(path)
    assert sae.encode(tokens).shape == (300, 20)
    with pytest.raises(InputError, match="576 wide and this autoencoder takes 16"):
        sae.features_of("a key")
    sae.meta["activations"] = {}
    with pytest.raises(InputError, match="does not name its model and layer"):
        sae.features_of("a key")


def test_an_autoencoder_of_another_library_is_told_its_model(sae, checkpoint, tmp_path):
    from fastsae.formats.export import export

    copy = tmp_path / checkpoint.name
    copy.write_bytes(checkpoint.read_bytes())
    export(copy, ("sparsify",))
    folder = next(tmp_path.glob("**/sae.safetensors")).parent
    with pytest.raises(InputError, match="does not name its model and layer. give them"):
        fastsae.load_sae(folder).features_of(SENTENCE)
    other = fastsae.load_sae(folder, model_name="SmolLM2-135M-Instruct", layer=2)
    for found, expected in zip(other.features_of(SENTENCE), sae.features_of(SENTENCE)):
        assert found.token == expected.token and dict(found.features) == pytest.approx(
            dict(expected.features), rel=1e-2
        )


def test_the_guides_example_runs(checkpoint, tmp_path, monkeypatch, capsys):
    code = next(
        block
        for block in re.findall(
            r"```python\n(.*?)```",
            (PROJECT / "docs" / "python.md").read_text(encoding="utf-8"),
            re.S,
        )
        if "from fastsae import load_sae" in block
    )
    named = tmp_path / re.search(r'load_sae\("(.*?)"\)', code)[1]
    named.parent.mkdir(parents=True)
    named.write_bytes(checkpoint.read_bytes())
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    out = capsys.readouterr().out
    assert "layer 2 of SmolLM2-135M-Instruct" in out and re.search(
        r"^' key': \d+ \(\d+\.\d\d\)", out, re.M
    )
    assert len(names["error"]) == len(names["features"]) == len(names["activations"]) and bool(
        names["error"].isfinite().all()
    )


def test_the_guides_example_for_a_whole_dataset_runs(checkpoint, run_folder, monkeypatch, recwarn):
    code = next(
        block
        for block in re.findall(
            r"```python\n(.*?)```",
            (PROJECT / "docs" / "python.md").read_text(encoding="utf-8"),
            re.S,
        )
        if "open_activations" in block
    )
    sae = fastsae.load_sae(checkpoint)
    names = {"sae": sae}
    monkeypatch.chdir(run_folder)
    exec(code.replace("layer12", "layer2"), names)
    assert (
        len(names["features"]) == names["data"]["seq_lengths"][-1]
        and names["features"].shape[1] == sae.n_features
    )
    assert (names["features"] > 0).any() and not [
        w for w in recwarn if "writable" in str(w.message)
    ]


def test_the_guides_example_of_a_data_frame_runs(run_folder, monkeypatch, capsys):
    pytest.importorskip("pandas")
    page = (PROJECT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(run_folder)
    names = {}
    exec(next(block for block in blocks if "read_table" in block), names)
    assert len(names["table"]) == 64 and "label_f1" in capsys.readouterr().out
    assert {"neuron_idx", "interpretation"} <= set(names["hypotheses"].columns)


def test_a_forgotten_dataset_path_does_not_train_under_another_name(run_folder, run_main, capsys):
    before = tree_of(run_folder)
    flags = [
        "--output-dir",
        run_folder,
        "--layer-idx",
        2,
        "--m",
        64,
        "--matryoshka-prefixes",
        "16,64",
        "--k",
        4,
        "--n-epochs",
        1,
    ]
    assert run_main("train_sae", *flags) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert (
        "made from texts.jsonl, not from cognitive_actions.jsonl" in error
        and f"--dataset-path {run_folder / 'texts.jsonl'}" in error
    )
    assert tree_of(run_folder) == before
    assert run_main("train_sae", *flags, "--run-name", "mine") == 0


def test_the_report_shows_as_many_features_as_asked_and_names_no_folder(
    run_folder, run_main, tmp_path
):
    shutil.copytree(run_folder, tmp_path / "copy")
    folder = tmp_path / "copy"
    assert (
        run_main(
            "interpret_sae",
            "--output-dir",
            folder,
            "--dataset-path",
            folder / "texts.jsonl",
            "--layer-idx",
            2,
            "--n-top-neurons",
            0,
            "--device",
            "cpu",
            "--n-report-features",
            3,
        )
        == 0
    )
    text = (folder / "interpretations.html").read_text(encoding="utf-8")
    data = read_report(text)
    assert (
        len(data["features"]) == 3
        and not any(str(path) in json.dumps(data) + text for path in (tmp_path, run_folder))
        and "texts.jsonl" in text
    )


def tree_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_text_on_the_command_line(run_folder, run_main, capsys):
    """Labels are shown; nothing is written; neither the activations nor the dataset are needed."""
    flags = [
        "--output-dir",
        run_folder,
        "--run-name",
        "texts",
        "--device",
        "cpu",
        "--text",
        SENTENCE,
    ]
    before = tree_of(run_folder)
    assert run_main("interpret_sae", *flags, "--dataset-path", run_folder / "texts.jsonl") == 0
    out = capsys.readouterr().out
    rows = [
        json.loads(line) for line in (run_folder / "interpretations.jsonl").read_text().splitlines()
    ][1:]
    label_of = {row["feature"]: row["label"] for row in rows}
    found = re.findall(r"^(?:'(.*?)')? +(\d+) +([\d.]+)(?:  (.*))?$", out, re.M)
    assert "".join(token for token, *_ in found if token).startswith(SENTENCE) and len(found) > len(
        SENTENCE.split()
    )
    assert all(
        label == label_of[int(feature)][:90].rstrip() for _, feature, _, label in found
    ) and any(label for *_, label in found)
    assert tree_of(run_folder) == before
    (run_folder / "activations").rename(run_folder / "away")
    (run_folder / "interpretations.jsonl").rename(run_folder / "interpretations.away")
    try:
        assert run_main("interpret_sae", *flags, "--dataset-path", "missing.jsonl") == 0
        assert SENTENCE.split()[-1].rstrip("?") in capsys.readouterr().out
        assert run_main("interpret_sae", *flags[:-1], " ", "--dataset-path", "missing.jsonl") == 2
        assert capsys.readouterr().err == "error: TEXT: is empty. give a sentence.\n"
    finally:
        (run_folder / "away").rename(run_folder / "activations")
        (run_folder / "interpretations.away").rename(run_folder / "interpretations.jsonl")
