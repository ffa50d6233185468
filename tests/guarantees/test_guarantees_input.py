"""Bad input stops before the model loads, in one line that names file and line or setting; whatever
is in a file, nothing else escapes."""

import errno
import json
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import line_of, put_activations, snapshot
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from sampling import points

from fastsae.activations import extraction, files
from fastsae.data.datasets import stream_examples, stream_text
from fastsae.data.tokenization import ChatTokenizer, Example, read_dataset, tokenise
from fastsae.formats.load import load_sae
from fastsae.interpretation.inputs import named_checkpoint
from fastsae.interpretation.llm.client import Journal
from fastsae.lm import decoders, devices, hub, loading, residual
from fastsae.runtime import artifacts
from fastsae.runtime.errors import EnvironmentFailure, InputError, StageError

GOOD = '{"text": "one"}\n'
MESSAGE_ROLES = [
    ("human", "user"),
    ("gpt", "assistant"),
    ("system", "system"),
    ("chatgpt", "assistant"),
    ("function", "tool"),
    ("user", "user"),
    ("assistant", "assistant"),
    ("tool", "tool"),
    ("observation", "tool"),
    ("bing", "assistant"),
    ("bard", "assistant"),
]


@pytest.fixture
def extract(run_main, monkeypatch, smol_tokenizer, tmp_path):
    """Stage 1 through its main, with the tokenizer already there and a model that must not be
    loaded."""

    def load(*_, **__):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(loading, "load_tokenizer", lambda *_, **__: smol_tokenizer)
    monkeypatch.setattr(residual, "ResidualModel", load)
    return lambda path, *flags: run_main(
        "extract_activations",
        "--dataset-path",
        path,
        "--output-dir",
        tmp_path / "out",
        "--device",
        "cpu",
        *flags,
    )


@pytest.fixture
def one_line(capsys):
    """Run something through `main()`; its exit code and its single line on stderr, less the "error:
    "."""

    def run(call):
        capsys.readouterr()
        try:
            code = call()
        except SystemExit as stop:
            code = stop.code
        (line,) = capsys.readouterr().err.splitlines()
        # what is wrong, what to do
        assert (
            line.startswith("error: ")
            and line.endswith(".")
            and line.isprintable()
            and ". " in line
        )
        return code, line.removeprefix("error: ")

    return run


# Datasets


@pytest.mark.parametrize(
    "content, line, what",
    [
        (GOOD + GOOD + '{"text": "a"', 3, "bad JSON (Expecting ',' delimiter, column 13)"),
        (GOOD + "\n" + "text\n", 3, "bad JSON (Expecting value, column 1)"),
        (GOOD + '{"text": "a"} {"text": "b"}', 2, "bad JSON (Extra data, column 15)"),
        (GOOD + '{"text": ' + 5000 * "9" + "}", 2, "bad JSON (Exceeds the limit (4300 digits)"),
        (GOOD + '{"text": ' + 100_000 * "[", 2, "bad JSON (maximum recursion depth exceeded"),
        (
            GOOD + '{"txt": "a", "id": 1}',
            2,
            "has no text, messages or conversations (its fields: txt, id)",
        ),
        (GOOD + "{}", 2, "has no text, messages or conversations (its fields: none)"),
        (GOOD + '"text"', 2, "expected a JSON object, got a string"),
        (GOOD + '{"text": ""}', 2, "text is empty"),
        (GOOD + '{"text": " \\n\\t\\u00a0"}', 2, "text is empty"),
        (GOOD + '{"text": 5}', 2, "text is int, not text"),
        (GOOD + '{"text": ["a"]}', 2, "text is list, not text"),
        (GOOD + '{"text": null}', 2, "text is empty"),
        (GOOD + '{"text": "a\\ud800b"}', 2, "text holds half of a surrogate pair"),
        (GOOD + '{"messages": []}', 2, "messages: expected a list of turns, got an empty list"),
        (GOOD + '{"messages": "hello"}', 2, "messages: expected a list of turns, got a string"),
        (GOOD + '{"messages": ["hello"]}', 2, "messages[0] has no role and content"),
        (GOOD + '{"messages": [{"role": "user"}]}', 2, "messages[0] has no role and content"),
        (
            GOOD
            + '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 1}]}',
            2,
            "messages[1].content is int, not text",
        ),
        (
            GOOD + '{"messages": [{"role": "user", "content": ""}]}',
            2,
            "messages[0].content is empty",
        ),
        (
            GOOD + '{"messages": [{"role": "narrator", "content": "a"}]}',
            2,
            "messages[0] has the unknown role 'narrator'",
        ),
        (
            GOOD + '{"messages": [{"role": ["user"], "content": "a"}]}',
            2,
            "messages[0] has the unknown role ['user']",
        ),
        (
            GOOD + '{"conversations": [{"from": "alien", "value": "a"}]}',
            2,
            "conversations[0] has the unknown from 'alien'",
        ),
        (
            GOOD + '{"conversations": [{"who": "user", "content": "a"}]}',
            2,
            "conversations[0] has no from and value",
        ),
        (GOOD + '{"a\\nb\\u001b[2J": 1}', 2, "has no text, messages or conversations"),
        (
            (GOOD + GOOD).encode("utf-16"),
            1,
            "is not UTF-8. convert it, for example: iconv -f UTF-16 -t UTF-8 d.jsonl.",
        ),
        (
            (GOOD + '{"text": "café"}').encode("utf-16-be"),
            2,
            "is not UTF-8. convert it, for example: iconv -f UTF-16 -t",
        ),
        (
            (GOOD + '{"text": "café"}').encode("latin-1"),
            2,
            "is not UTF-8. convert it, for example: iconv -f LATIN1 -t UTF-8 d.jsonl.",
        ),
        (
            ('[{"text": "a"},\n{"text": "caf\xe9"}]').encode("latin-1"),
            2,
            "is not UTF-8. convert it, for example: iconv -f LATIN1",
        ),
        (GOOD + "\0" * 100, 2, "bad JSON (Expecting value, column 1)"),
        (GOOD + '{"text": "a\tb"}', 2, "bad JSON (Invalid control character at, column 12)"),
        (
            GOOD + '{"messages": {"role": "user", "content": "a"}}',
            2,
            "messages: expected a list of turns, got an object",
        ),
        (
            GOOD + '{"messages": [{"role": "user", "content": ["a"]}]}',
            2,
            "messages[0].content is list, not text",
        ),
        (GOOD + '{"messages": [null]}', 2, "messages[0] has no role and content"),
        (GOOD + "null", 2, "expected a JSON object, got null"),
        (GOOD + "[]", 2, "expected a JSON object, got an empty list"),
        (GOOD + '{"text": ' + '"' + 3_000_000 * "a", 2, "bad JSON (Unterminated string"),
        ("", None, "has 0 examples. at least 2"),
        (GOOD, None, "has 1 example. at least 2"),
        ("[]", None, "has 0 examples. at least 2"),
        ("\n \n", None, "has 0 examples"),
        (
            '[{"text": "a"},\n{"text": "b"}\n{"text": "c"}]',
            3,
            "bad JSON (Expecting ',' delimiter, column 1)",
        ),
        ('[{"text": "a"},\n{"text": "b"}', 2, "bad JSON (Expecting ',' delimiter, column 14)"),
        ('[{"text": "a"}, {"text": 2}]', "item 2", "text is int, not text"),
        ('[{"text": "a"},\n\n\n{"text": ""}]', "item 2", "text is empty"),
        (100_000 * "[", 1, "bad JSON (maximum recursion depth exceeded"),
        ('[{"text": ' + 5000 * "9" + "}]", 1, "bad JSON (Exceeds the limit (4300 digits)"),
    ],
)
def test_a_bad_row_is_one_line_with_its_place(
    dataset, extract, one_line, tally, content, line, what
):
    path = dataset(content)
    code, text = one_line(lambda: extract(path))
    assert code == 2
    where = "" if line is None else f" {line}:" if isinstance(line, str) else f"{line}:"
    assert text.startswith(f"{path}:{where} {what}")
    assert len(text) < len(str(path)) + 250
    tally("named bad inputs refused", 1)


def test_a_label_no_file_can_hold_is_refused(dataset):
    with pytest.raises(InputError, match=r"d\.jsonl:2: topic "):
        read_dataset(dataset(GOOD + '{"text": "two", "topic": "\\ud800"}'), label_field="topic")


@pytest.mark.parametrize(
    "content, lines",
    [
        (GOOD + GOOD, [1, 2]),
        ("\ufeff" + GOOD + GOOD, [1, 2]),
        (GOOD.replace("\n", "\r\n") * 2, [1, 2]),
        (GOOD + GOOD.rstrip("\n"), [1, 2]),
        ("\n\n" + GOOD + "  \t\n" + GOOD + "\n\n", [3, 5]),
        ('\ufeff\n [{"text": "one"},\n\n{"text": "one"}]\n', [1, 2]),
        (GOOD + '{"text": "one", "score": NaN, "messages": null}', [1, 2]),
    ],
    ids=["plain", "bom", "crlf", "no last newline", "blank lines", "array", "null messages"],
)
def test_accepted_files(dataset, content, lines):
    assert read_dataset(dataset(content)) == [
        Example(line, [{"role": "user", "content": "one"}], is_text=True) for line in lines
    ]


def test_empty_labels_are_none(dataset):
    rows = "".join(
        f'{{"text": "one", "topic": {label}}}\n'
        for label in ('""', '" "', "NaN", "null", "0", '"nan"', "false")
    )
    labels = [example.label for example in read_dataset(dataset(rows), label_field="topic")]
    assert labels == [None, None, None, None, "0", "nan", "False"]


def test_a_text_field_that_was_named_goes_before_messages(dataset):
    path = dataset(
        '{"text": "t", "summary": "s", "messages": [{"role": "user", "content": "m"}]}\n'
        '{"summary": null, "messages": [{"role": "user", "content": "m"}]}\n'
    )
    for field, first in (("summary", "s"), ("text", "m")):
        found = read_dataset(path, text_field=field)
        assert [(e.messages[0]["content"], e.is_text) for e in found] == [
            (first, field == "summary"),
            ("m", False),
        ]


def test_the_last_line_wanted_is_found_once(dataset):
    from unittest.mock import patch

    with patch("fastsae.data.datasets.max", wraps=max, create=True) as largest:
        assert [e.line for e in read_dataset(dataset(GOOD * 50), only_lines=[2, 40])] == [
            2,
            40,
        ] and largest.call_count <= 1


def test_sharegpt_roles_are_mapped(dataset):
    row = {"conversations": [{"from": role, "value": "v"} for role, _ in MESSAGE_ROLES], "label": 7}
    example = read_dataset(dataset(f"{json.dumps(row)}\n{GOOD}"), label_field="label")[0]
    assert example == Example(
        1, [{"role": role, "content": "v"} for _, role in MESSAGE_ROLES], is_text=False, label="7"
    )


@pytest.mark.parametrize(
    "n_bad, more",
    [
        (1, ""),
        (2, " (and 1 more like it, the last line 3)"),
        (500, " (and 499 more like it, the last line 501)"),
        (1500, " (and at least 999 more like it, the last line 1001)"),
    ],
)
def test_bad_rows_of_one_kind_are_one_line_with_their_number(dataset, outcome, n_bad, more):
    path = dataset(GOOD + n_bad * '{"text": ""}\n')
    code, lines = outcome(lambda: read_dataset(path))
    assert (code, lines) == (
        2,
        [f"error: {path}:2: text is empty{more}. remove the row or give it text."],
    )


def test_more_than_ten_kinds_of_bad_rows_are_cut(dataset, outcome):
    roles = [
        f'{{"messages": [{{"role": "user", "content": "a", "{key}": [1]}}]}}\n'
        for key in ("tool_calls", "function_call")
    ]
    others = [f'{{"{name}": 1}}\n' for name in ("text", "messages", "conversations", "other")]
    values = [
        f'{{"text": {value}}}\n'
        for value in ('""', "[1]", "null", "{}", "1.5", "true", '"\\ud800"')
    ]
    path = dataset(GOOD + "".join([*roles, *others, *values]) * 2)
    code, lines = outcome(lambda: read_dataset(path))
    assert (code, len(lines)) == (2, 11) and lines[
        -1
    ] == f"error: {path}: more bad rows follow. fix these first."


def test_rows_beyond_max_examples_are_not_looked_at(dataset):
    assert len(read_dataset(dataset(GOOD + GOOD + "bad"), max_examples=2)) == 2


def test_a_bad_dataset_stops_the_script_and_harms_nothing(forks, dataset, tmp_path):
    put_activations(tmp_path / "out", np.ones((4, 2), np.float16), [2, 2])
    path = dataset((GOOD + GOOD).encode("utf-16"))
    before = snapshot(tmp_path / "out")
    flags = ["--dataset-path", path, "--device", "cpu"]
    done = forks[0].run("extract_activations", *flags, output=tmp_path / "out")
    assert done["code"] == 2 and done["err"] == (
        f"error: {path}:1: is not UTF-8. convert it, for example: "
        "iconv -f UTF-16 -t UTF-8 d.jsonl.\n"
    )
    model, changed = done["out"].splitlines()
    assert model.startswith("model: ") and changed.startswith("changed: ")
    assert snapshot(tmp_path / "out") == before


def test_dialogues_that_no_template_takes():
    dialogue, text = (
        Example(7, [{"role": "tool", "content": "a"}]),
        Example(8, [{"role": "user", "content": "a"}], is_text=True),
    )
    tokenizer = SimpleNamespace(chat_template=None, all_special_tokens=[], get_added_vocab=dict)
    without = ChatTokenizer(tokenizer, max_length=8, dataset_name="d.jsonl")
    assert without.lacks_template and without.special_tokens
    assert without.render(text) == ("a", [(0, 1, 0)])
    with pytest.raises(
        InputError, match="^d.jsonl:7: is a dialogue, and this model has no chat template. choose"
    ):
        without.render(dialogue)
    with pytest.raises(InputError, match="^d.jsonl:7: is a dialogue.*--use-chat-template"):
        ChatTokenizer(tokenizer, chat_template=False, max_length=8, dataset_name="d.jsonl").render(
            dialogue
        )
    tokenizer.chat_template, tokenizer.apply_chat_template = (
        "x",
        lambda *_, **__: {}["roles must alternate\nsecond line"],
    )
    with pytest.raises(
        InputError,
        match=r"^d.jsonl:8: the chat template refuses this dialogue \('roles must alternate",
    ) as error:
        ChatTokenizer(tokenizer, max_length=8, dataset_name="d.jsonl").render(text)
    assert "\n" not in str(error.value)


# Settings, models and devices


def test_impossible_settings_are_reported_at_once_before_anything_runs(run_script, tmp_path):
    done = run_script(
        "run_pipeline.py",
        "--k",
        "999",
        "--layer-idx",
        "0",
        "--device",
        "tpu",
        "--dataset-path",
        tmp_path / "nowhere.jsonl",
    )
    assert (done.returncode, done.stdout, snapshot(tmp_path)) == (2, "", {})
    assert sorted(done.stderr.splitlines()) == [
        f"error: DATASET_PATH: {tmp_path / 'nowhere.jsonl'} is not a file. give your data with "
        f"--dataset-path FILE.jsonl.",
        "error: DEVICE: 'tpu' is unknown. choose auto, cpu, mps, cuda or cuda:0.",
        "error: K: 999 active features of only M=256. lower --k or raise --m to at least 999.",
        "error: LAYER_IDX: 0 is below 1. give 1 or more.",
    ]


def test_a_chain_that_would_break_later_is_refused_at_once(run_script, tmp_path):
    done = run_script("run_pipeline.py", "--layer-idx", "12,12", "--block-length", "64")
    assert (done.returncode, done.stdout, snapshot(tmp_path)) == (2, "", {})
    assert [line.partition(": ")[2].partition(":")[0] for line in done.stderr.splitlines()] == [
        "LAYER_IDX"
    ]


def test_a_hub_model_that_is_not_cached_without_network(run_script, dataset, tmp_path):
    done = run_script(
        "extract_activations.py",
        "--dataset-path",
        dataset(GOOD + GOOD),
        "--model-name",
        "some-org/some-model",
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )
    assert line_of(done, 3).startswith(
        "MODEL_NAME: some-org/some-model is not in the local cache and the hub cannot be reached. "
    )


BAD_FLAGS = [  # script, flags, what the line begins with
    (
        "extract_activations",
        ["--layer-idx", 31],
        "LAYER_IDX: 31 is beyond the 30 layers of SmolLM2-135M-Instruct. give 1 to 30.",
    ),
    ("extract_activations", ["--layer-idx", "12,31"], "LAYER_IDX: 31 is beyond the 30 layers"),
    (
        "extract_activations",
        ["--layer-idx", "12,12"],
        "LAYER_IDX: (12, 12) are not different values",
    ),
    ("extract_activations", ["--dataset-path", "nowhere.jsonl"], "DATASET_PATH: "),
    ("extract_activations", ["--dataset-path", "/"], "DATASET_PATH: /"),
    ("extract_activations", ["--dataset-path="], "DATASET_PATH: "),
    ("extract_activations", ["--dataset-path"], "DATASET_PATH: no value is given"),
    ("extract_activations", ["--max-length", 1], "MAX_LENGTH: 1 is below 2"),
    ("extract_activations", ["--dtype", "float64"], "DTYPE: 'float64'"),
    (
        "extract_activations",
        ["--model-name", "./nowhere"],
        f"MODEL_NAME: {os.path.abspath('nowhere')} does not exist",
    ),
    ("extract_activations", ["--model-name", "EMPTY"], "MODEL_NAME: "),
    ("extract_activations", ["--model-name", "BROKEN"], "MODEL_NAME: "),
    ("extract_activations", ["--model-name", "STRANGE"], "MODEL_NAME: "),
    ("extract_activations", ["--output-dir", "DATASET"], "OUTPUT_DIR: "),
    ("extract_activations", ["--output-dir", "DATASET/out"], "OUTPUT_DIR: "),
    ("extract_activations", ["--bogus", 1], "--bogus: no such setting"),
    ("extract_activations", ["--block-length", 100000], "BLOCK_LENGTH: "),
    ("extract_activations", ["--k", 8], "--k: no such setting"),
    (
        "extract_activations",
        ["--layer_idx", 8],
        "--layer_idx: no such setting. perhaps --layer-idx is meant",
    ),
    (
        "train_sae",
        ["--no-matryoshka"],
        "--no-matryoshka: no such setting. perhaps --matryoshka-prefixes is meant",
    ),
    ("extract_activations", ["--label-field", "colour"], "LABEL_FIELD: no row of "),
    ("extract_activations", ["--device", "tpu"], "DEVICE: 'tpu' is unknown"),
    ("extract_activations", ["--device", "cuda:9"], "DEVICE: cuda:9 is not available here"),
    (
        "train_sae",
        [],
        "FOLDER/activations/activations_layer12.npz: not found. run extract_activations.py first",
    ),
    ("train_sae", ["--k", 257], "K: 257 active features of only M=256"),
    ("train_sae", ["--m", 8.5], "M: expected int, got '8.5'"),
    (
        "train_sae",
        ["--learning-rate", "nan"],
        "LEARNING_RATE: expected a finite float or none, got nan",
    ),
    (
        "train_sae",
        ["--m", 512, "--matryoshka-prefixes", "64,256"],
        "MATRYOSHKA_PREFIXES: the last of",
    ),
    ("train_sae", ["--architecture", "vanilla"], "ARCHITECTURE: 'vanilla' is unknown"),
    ("train_sae", ["--seed", -1], "SEED: -1 is below 0"),
    (
        "train_sae",
        ["--architecture", "gated", "--matryoshka-prefixes", "64,256"],
        "MATRYOSHKA_PREFIXES: gated has no prefixes",
    ),
    ("train_sae", ["--run-name", "a/b"], "RUN_NAME: "),
    ("train_sae", ["--validation-fraction", 1], "VALIDATION_FRACTION: "),
    ("train_sae", ["--output-dir", "DATASET"], "OUTPUT_DIR: "),
    ("interpret_sae", [], "FOLDER/checkpoints/d/metrics.json: not found. run train_sae.py first"),
    ("interpret_sae", ["--llm-protocol", "sum"], "LLM_PROTOCOL: 'sum' is unknown"),
    ("interpret_sae", ["--n-fidelity-examples", 3], "N_FIDELITY_EXAMPLES: 3"),
    ("interpret_sae", ["--n-judged-examples", 5], "N_JUDGED_EXAMPLES: 5 are too few"),
    ("interpret_sae", ["--run-name", ".."], "RUN_NAME: '..' cannot be a folder's name"),
    ("interpret_sae", ["--llm-timeout", 0], "LLM_TIMEOUT: 0.0 is not above 0"),
    ("interpret_sae", ["--output-dir", "DATASET/out"], "OUTPUT_DIR: "),
]


@pytest.mark.parametrize(
    "script, flags, what", BAD_FLAGS, ids=[" ".join(map(str, flags)) for _, flags, _ in BAD_FLAGS]
)
def test_a_bad_setting_is_one_line_with_its_name(
    dataset, extract, run_main, one_line, tmp_path, tally, script, flags, what
):
    path, folder = dataset(GOOD + GOOD), tmp_path / "out"
    for name, config in (
        ("EMPTY", None),
        ("BROKEN", "{"),
        ("STRANGE", '{"model_type": "no-such-type"}'),
    ):
        (tmp_path / name).mkdir()
        if config:
            (tmp_path / name / "config.json").write_text(config)
    flags = [
        str(tmp_path / flag)
        if flag in ("EMPTY", "BROKEN", "STRANGE")
        else str(flag).replace("DATASET", str(path))
        for flag in flags
    ]
    before = snapshot(tmp_path)
    code, text = one_line(
        lambda: run_main(
            script, "--dataset-path", path, "--output-dir", folder, "--device", "cpu", *flags
        )
    )
    assert code == 2 and text.startswith(
        what.replace("DATASET:", f"{path}:").replace("FOLDER", str(folder))
    ), text
    assert snapshot(tmp_path) == before
    tally("named bad inputs refused", 1)


def mutated(content, chance):
    """The bytes with one to four changes: a bit, a byte, a piece gone, doubled or moved, or
    something nasty put in."""
    nasty = (
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b'"',
        b"\\ud800",
        b"[" * 50,
        b"{" * 50,
        b"9" * 5000,
        b"NaN",
        b"1e999",
        b"null",
        b"\xed\xa0\x80",
        b"\xe2\x80\xa8",
        b"<|im_end|>",
        b"-",
        b"\\u0000",
        "\U0001f600".encode(),
        b"\xf4\x90\x80\x80",
        b"messages",
        b"''",
    )
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at, size = chance.randrange(len(content) + 1), chance.randint(1, 12)
        kind = chance.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 2:
            del content[at : at + size]
        elif kind == 3:
            content[at:at] = content[at : at + size]
        elif kind == 4:
            content[at:at] = chance.choice(nasty)
        else:
            piece = content[at : at + size]
            del content[at : at + size]
            at = chance.randrange(len(content) + 1)
            content[at:at] = piece
    return bytes(content)


ROWS = [
    {"text": "one café"},
    {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "id": 1,
    },
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"text": "two \u2028 \U0001f600", "topic": 3},
]


def readers(folder, write_activations, smol_tokenizer):
    """{kind: (whole content, what reads a file)} of every kind of input."""
    write_activations(np.arange(24, dtype=np.float16).reshape(6, 4), [2, 4])
    npz = folder / "activations" / "activations_layer12.npz"
    artifacts.write_checkpoint(
        folder / "a.pt",
        {"config": {"a": 1}, "state_dict": {"w": torch.arange(3.0)}, "meta": {"x": "y"}},
    )
    Journal(folder / "j.jsonl", ["m", None, {}]).add("p", "a reply", usage={"prompt_tokens": 3})
    chat = ChatTokenizer(smol_tokenizer, max_length=64, dataset_name="d")

    def dataset(path):
        tokenise(stream_examples(path, label_field="topic"), chat) if int(
            path.stem
        ) % 20 == 0 else list(stream_examples(path, label_field="topic"))

    def metrics(path):
        (path.parent / "metrics.json").write_bytes(path.read_bytes())
        named_checkpoint(path.parent)

    lines = "".join(
        json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(ROWS)
    ).encode()
    return {
        "JSONL": (7000, lines, dataset),
        "JSON array": (5000, json.dumps(ROWS, indent=1, ensure_ascii=False).encode(), dataset),
        "plain text": (
            2000,
            "A café.\nTwo lines.\r\n".encode() * 5,
            lambda path: list(stream_text(path)),
        ),
        "activations": (1500, npz.read_bytes(), files.open_activations),
        "checkpoint": (2500, (folder / "a.pt").read_bytes(), load_sae),
        "metrics": (1000, b'{"checkpoint": "sae.pt", "mse": 1.5}', metrics),
        "journal": (
            2000,
            (folder / "j.jsonl").read_bytes(),
            lambda path: Journal(path, ["m", None, {}]).get("p"),
        ),
    }


@pytest.mark.sampled
def test_mutated_files_meet_the_documented_errors_only(
    tmp_path, write_activations, smol_tokenizer, tally
):
    n, refused, of = 0, 0, 0
    for kind, (n_files, whole, read) in readers(
        tmp_path, write_activations, smol_tokenizer
    ).items():
        of += n_files
        for i in points(range(n_files), n_files // 12):
            path = tmp_path / f"{i}.x"
            path.write_bytes(mutated(whole, random.Random(f"{kind} {i}")))
            try:
                read(path)
            except StageError as error:
                refused += 1
                assert all(
                    ". " in line and line.isprintable() for line in str(error).splitlines()
                ), (kind, str(error))
            except Exception as error:
                pytest.fail(f"{kind}: {path.read_bytes()!r} gives {error!r}")
            path.unlink()
            n += 1
    assert refused > n / 3
    tally("mutated files read or refused", n, of)


def test_a_mistaken_model_name_leaves_the_activations_where_they_are(
    run_main, capsys, write_activations, dataset, tmp_path
):
    flags = write_activations(np.ones((4, 2), np.float16), [2, 2], dataset=dataset(GOOD + GOOD))
    before = snapshot(tmp_path)
    assert run_main("extract_activations", *flags, "--model-name", "./nowhere") == 2
    assert capsys.readouterr().err == (
        f"error: MODEL_NAME: {os.path.abspath('nowhere')} does not exist. give a folder, a "
        f".gguf file, a hub id or "
        "SmolLM2-135M-Instruct.\n"
    )
    assert snapshot(tmp_path) == before


def caused(error, cause):
    error.__cause__ = cause
    return error


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    "error, kind, what",
    [
        (
            GatedRepoError("403 Client Error", response=RESPONSE),
            EnvironmentFailure,
            "hf auth login",
        ),
        (
            caused(OSError("you cannot\nread this"), GatedRepoError("403", response=RESPONSE)),
            EnvironmentFailure,
            "hf auth login",
        ),
        (
            caused(OSError("cannot connect"), LocalEntryNotFoundError("offline")),
            EnvironmentFailure,
            "the hub cannot be reached",
        ),
        (ImportError("No module named 'x'"), EnvironmentFailure, "pip install"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            EnvironmentFailure,
            "No space left on device",
        ),
        (ValueError("unknown\narchitecture"), InputError, "could not be loaded (unknown)"),
        (OSError(), InputError, "could not be loaded"),
    ],
)
def test_a_model_that_does_not_load(error, kind, what):
    def loader(*_, **__):
        raise error

    with pytest.raises(kind) as raised:
        hub.read_pretrained(loader, "org/model", "org/model")
    message = str(raised.value)
    assert "org/model" in message and what in message and "\n" not in message


def test_a_damaged_local_model(tmp_path, outcome):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 4,
                "intermediate_size": 4,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "vocab_size": 5,
            }
        )
    )
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    code, lines = outcome(lambda: residual.ResidualModel(str(tmp_path), 1, dtype=torch.float32))
    assert (code, len(lines)) == (2, 1) and lines[0].startswith(
        f"error: MODEL_NAME: {tmp_path} could not be loaded ("
    )


@pytest.mark.parametrize("setting", ["cuda", "cuda:7", "mps"])
def test_a_device_that_is_not_there(monkeypatch, setting):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(
        InputError, match=f"^DEVICE: {setting} is not available here. use --device auto, or cpu.$"
    ):
        devices.choose_device(setting)
    assert devices.choose_device("auto") == "cpu"


def test_a_model_without_a_list_of_blocks():
    with pytest.raises(InputError, match="^MODEL_NAME: Linear is not built as one list of blocks"):
        decoders.decoder_stack(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    "number, where", [(np.nan, "--dtype"), (np.inf, "--dtype"), (70000, "--storage-dtype float32")]
)
def test_activations_that_cannot_be_stored(number, where):
    def storable(last):
        # a padded row of example 0, two rows of example 1
        stream = torch.tensor([[[1.0, 2.0], [5e9, 5e9]], [[1.0, 3.0], [2.0, last]]])
        real = [(0, 1), (1, 2)]
        found = extraction.stored(stream, real, "float16", pin=False)
        extraction.require_fits(found.peaks, real, "float16", lambda i: f"d.jsonl:{[3, 4][i]}")
        return found.rows

    with pytest.raises(InputError, match=f"^d.jsonl:4: .*{where}"):
        storable(number)
    assert storable(65504).dtype == torch.float16 and storable(65504).tolist() == [
        [1, 2],
        [1, 3],
        [2, 65504],
    ]
