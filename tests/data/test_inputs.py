"""Whatever is given as a dataset either works or ends in one line that says what it is and what
makes rows of it."""

import gzip
import io
import json
import re
import sqlite3
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from fastsae.data import datasets, rows
from fastsae.data.datasets import read_dataset
from fastsae.runtime.errors import InputError

ROWS = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5)).encode()


def archive(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return buffer.getvalue()


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("data.jsonl"))
    return buffer.getvalue()


def database(folder):
    connection = sqlite3.connect(folder / "a.db")
    connection.execute("create table t (text)")
    connection.commit()
    connection.close()
    return (folder / "a.db").read_bytes()


def arrays():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


KINDS = {  # content, what it is, a part of the remedy
    "zip": (archive("a/data.jsonl"), "is a zip archive", "unzip -p PATH > data.jsonl"),
    "torn zip": (archive("a.txt")[:40], "is a zip archive", "unzip"),
    "xlsx": (
        archive("[Content_Types].xml", "xl/workbook.xml"),
        "is an Excel workbook",
        "read_excel('PATH')",
    ),
    "docx": (archive("[Content_Types].xml", "word/document.xml"), "is a Word document", "pandoc"),
    "ods": (archive("mimetype", "content.xml"), "is an OpenDocument file", "soffice"),
    "npz": (arrays(), "is a NumPy archive", "write its texts"),
    "pt": (archive("archive/data.pkl", "archive/version"), "is a PyTorch file", "--init-from"),
    "tar": (tar(), "is a tar archive", "tar -xf PATH"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(50), "is an old Office file", "read_excel"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\n1 0 obj", "is a PDF", "pdftotext PATH"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "is a pointer of git-lfs",
        "git lfs pull",
    ),
    "html": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "is a web page", "/resolve/"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0]\x94.", "is a Python pickle", "where you trust it"),
    "lz4": (b"\x04\x22\x4d\x18" + ROWS, "is compressed by lz4", "lz4 -dc PATH"),
    "tar.gz": (gzip.compress(tar()), "is a tar archive", "gzip -dc PATH"),
    "csv": (
        b'id,text,label\n1,"hello, you",a\n2,two,b\n',
        "is a table of comma-separated values",
        "give it a name that ends in .csv, and name the column of the texts with --text-field",
    ),
    "csv, quoted header": (
        b'"text","label"\n"a","b"\n"c","d"\n',
        "is a table of comma-separated values",
        "ends in .csv, and",
    ),
    "tsv": (
        b"text\tlabel\na b\tc\nd\te\n",
        "is a table of tab-separated values",
        "ends in .tsv, and",
    ),
    "semicolons": (
        "Überschrift;Text\na;b\n".encode(),
        "is a table of semicolon-separated values",
        "ends in .csv, and",
    ),
    "yaml": (b"- text: a\n- text: b\n", "is YAML", "yaml.safe_load"),
    "plain text": (
        b"Once upon a time.\nThere was a fox.\n",
        "is plain text, not JSON",
        "give it a name that ends in .txt",
    ),
    "python dicts": (
        b"{'text': 'a'}\n{'text': 'b'}\n",
        "holds Python's dicts",
        "ast.literal_eval(line)",
    ),
    "spread": (
        json.dumps({"text": "a"}, indent=1).encode() * 3,
        "holds JSON objects spread over several lines",
        "jq -c .",
    ),
    "data": (
        json.dumps({"version": 1, "data": [{"text": "a"}] * 3}, indent=1).encode(),
        "is one JSON object whose field data holds the rows",
        "['data']]",
    ),
    "joined": (b'{"text": "a"}{"text": "b"}', "holds several JSON objects in one line", "jq -c ."),
    "UTF-16, no mark": (
        ROWS.decode().encode("utf-16-le"),
        "is not UTF-8",
        "iconv -f UTF-16 -t UTF-8",
    ),
    "UTF-32": (ROWS.decode().encode("utf-32-le"), "is not UTF-8", "iconv -f UTF-32"),
}


@pytest.mark.parametrize("kind", [*KINDS, "sqlite"])
@pytest.mark.parametrize("name", ["d.jsonl", "d"])
def test_a_file_of_another_kind_is_one_line_with_what_makes_rows_of_it(
    tmp_path, outcome, kind, name
):
    content, what, remedy = KINDS.get(kind) or (
        database(tmp_path),
        "is an SQLite database",
        "select * from TABLE",
    )
    path = tmp_path / name
    path.write_bytes(content)
    code, lines = outcome(lambda: read_dataset(path))
    assert (code, len(lines)) == (2, 1), lines
    assert (
        lines[0].startswith(f"error: {path}: {what}")
        and remedy.replace("PATH", str(path)) in lines[0]
    )
    assert "iconv" not in lines[0] or kind.startswith("UTF")


@pytest.mark.parametrize("kind", ["yaml", "python dicts", "data"])
def test_the_command_that_is_named_makes_rows(tmp_path, outcome, kind):
    """What stands in the message is run in a shell, and the result read."""
    (tmp_path / "d.jsonl").write_bytes(KINDS[kind][0])
    _, lines = outcome(lambda: read_dataset(tmp_path / "d.jsonl"))
    command = re.search(r'python -c ".*" > data\.jsonl', lines[0])[0].replace(
        "python", sys.executable, 1
    )
    subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        check=True,
        env={"PYTHONUTF8": "1"},
        executable="/bin/bash",
    )
    assert len(read_dataset(tmp_path / "data.jsonl")) >= 2


@pytest.mark.parametrize("kind", ["csv", "csv, quoted header", "tsv", "semicolons", "plain text"])
def test_the_name_that_is_named_is_read(tmp_path, outcome, kind):
    (tmp_path / "d.jsonl").write_bytes(KINDS[kind][0])
    _, lines = outcome(lambda: read_dataset(tmp_path / "d.jsonl"))
    path = tmp_path / f"d{re.search(r'ends in (.[a-z]+)', lines[0])[1]}"
    path.write_bytes(KINDS[kind][0] + KINDS[kind][0].splitlines(True)[-1])
    field = "Text" if kind == "semicolons" else "text"
    assert len(read_dataset(path, text_field=field)) >= 2


def folder_of(path, **files):
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("_dot_", ".")).write_text(content)
    return path


@pytest.mark.parametrize(
    "files, what, remedy",
    [
        ({}, "is an empty folder", "--dataset-path FILE.jsonl"),
        (
            {"dataset_dict_dot_json": '{"splits": ["train", "test"]}'},
            "is a saved DatasetDict (splits: none that is there)",
            "PATH/SPLIT",
        ),
        ({"a_dot_jsonl": "{}"}, "is a folder of .jsonl files", "cat PATH/*.jsonl > data.jsonl"),
        ({"a_dot_csv": ""}, "is a folder of .csv files", "give one of them"),
        ({"a_dot_bin": ""}, "is a folder", "--dataset-path FILE.jsonl"),
    ],
)
def test_a_folder_is_one_line_by_what_is_in_it(tmp_path, run_main, capsys, files, what, remedy):
    folder = folder_of(tmp_path / "texts", **files)
    with pytest.raises(SystemExit, match="2"):
        run_main(
            "extract_activations",
            "--dataset-path",
            folder,
            "--output-dir",
            tmp_path / "out",
            "--device",
            "cpu",
        )
    with pytest.raises(InputError, match="^DATASET_PATH: "):
        datasets.identity(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith(f"error: DATASET_PATH: {folder} {what}")
        and remedy.replace("PATH", str(folder)) in line
    )


def one(row, **how):
    return rows.example_of(1, row, how.get("text_field", "text"), how.get("label_field")).messages


@pytest.mark.parametrize(
    "row, messages",
    [
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    }
                ]
            },
            ["user: a\nb"],
        ),
        (
            {
                "messages": [
                    {"role": "developer", "content": "a"},
                    {"role": "User", "content": "b", "tool_calls": []},
                ]
            },
            ["system: a", "user: b"],
        ),
        ({"messages": [{"role": "function", "name": "f", "content": "a"}]}, ["tool: a"]),
        (
            {
                "system": "s",
                "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            },
            ["system: s", "user: a"],
        ),
        ({"system": "s", "messages": [{"role": "system", "content": "own"}]}, ["system: own"]),
        ({"system": 3, "messages": [{"role": "user", "content": "a"}]}, ["user: a"]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "model", "value": "b"}]},
            ["user: a", "assistant: b"],
        ),
        ({"conversations": [{"role": "user", "content": "a"}]}, ["user: a"]),
        ({"messages": [{"from": "human", "value": "a"}]}, ["user: a"]),
        ({"conversations": [{"from": "gpt", "content": "a"}]}, ["assistant: a"]),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "id": "c1",
                                "type": "function",
                                "function": {"name": "find", "arguments": '{"x":  "é"}'},
                            },
                            {"name": "add", "arguments": {"a": [1, "ü"]}},
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c1", "content": [{"text": "4"}]},
                ],
                "tools": [{"type": "function"}],
            },
            [
                'assistant: {"name": "find", "arguments": {"x":  "é"}}\n'
                '{"name": "add", "arguments": {"a": [1, "ü"]}}',
                "tool: 4",
            ],
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": "I look.",
                        "function_call": {"name": "look", "arguments": ""},
                    }
                ]
            },
            ['assistant: I look.\n{"name": "look", "arguments": {}}'],
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "reasoning_content": "Hm.",
                        "reasoning": "Hm.",
                        "content": "Yes.",
                    }
                ]
            },
            ["assistant: Hm.\nYes."],
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "refusal": "I cannot."}]},
            ["assistant: I cannot."],
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                            {
                                "type": "reasoning",
                                "summary": [{"type": "summary_text", "text": "So"}],
                            },
                            {"type": "output_text", "text": "I ask.", "annotations": []},
                            {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
                        ],
                    },
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "tool_result",
                                "tool_use_id": "t",
                                "content": [{"type": "text", "text": "2"}],
                            }
                        ],
                    },
                ]
            },
            ['assistant: Hm.\nSo\nI ask.\n{"name": "f", "arguments": {"a": 1}}', "user: 2"],
        ),
    ],
)
def test_dialogues_of_other_tools_are_read(row, messages):
    assert [f"{m['role']}: {m['content']}" for m in one(row)] == messages


@pytest.mark.parametrize(
    "row, what",
    [
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
            'messages[0].tool_calls[0] names no tool. write it as {"function": {"name"',
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": {"name": "f"}}]},
            "messages[0].tool_calls: expected a list, got an object. write",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}]},
            "messages[0].content[0] is a part of type \"['text']\", not text.",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "reasoning_content": ""}]},
            "messages[0].content is empty. remove",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "a"},
                            {"type": "image_url", "image_url": {}},
                        ],
                    }
                ]
            },
            "messages[0].content[1] is a part of type 'image_url', not text. remove the part",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a"}]}]},
            "messages[0].content[0] names no tool.",
        ),
        ({"instruction": "i", "input": "", "output": "o"}, "--text-field instruction."),
        ({"prompt": "p", "response": "r"}, '{"role": "assistant", "content": response}'),
        ({"question": "q", "answer": "a"}, "--text-field question."),
        (
            {"chosen": [{"role": "user", "content": "a"}]},
            "its field chosen holds a dialogue: name it messages.",
        ),
        ({"train": [{"text": "a"}]}, "its field train holds rows: write these one a line."),
        ({"id": "1", "review": "a long text"}, "name yours, for example --text-field review."),
        ({"id": 1}, "name yours with --text-field."),
    ],
)
def test_rows_of_other_tools_say_what_to_write(row, what):
    with pytest.raises(ValueError) as error:
        one(row)
    assert (
        what in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value)
    )


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "a,b"}\n{"text": "c,d"}\n',
        b'\n {"text": "PAR1"}\n{"text": "b"}\n',
        b'[{"text": "a"}, {"text": "b"}]',
        b'{"text": "<!doctype html>"}\n{"text": "---"}\n',
        b'{"a": {"b": 1}, "text": "a"}\n{"text": "b"}\n',
    ],
)
def test_rows_of_json_are_not_taken_for_something_else(dataset, content):
    assert len(read_dataset(dataset(content))) == 2


@pytest.mark.parametrize(
    "text",
    [
        b"ORC is a word.\n",
        b"BZh, he said.\n",
        b"RIFFS of guitars.\n",
        b"a,b\nc,d\n",
        b"- a: list\n",
        b"ID3\n",
    ],
)
def test_plain_text_is_not_taken_for_something_else(tmp_path, text):
    (tmp_path / "a.txt").write_bytes(text)
    (piece,) = datasets.stream_text(tmp_path / "a.txt")
    assert piece.messages[0]["content"] == text.decode()


def test_a_compressed_plain_text_is_read(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text\n"))
    (piece,) = datasets.stream_text(tmp_path / "a.txt.gz")
    assert piece.messages[0]["content"] == "text\n"
