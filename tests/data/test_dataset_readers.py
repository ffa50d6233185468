"""Tables, compressed files, plain texts and folders as datasets: what is read, what is refused in
one line, and that a number leads back to its row.

What needs pyarrow, zstandard or the datasets library is skipped where that is not installed:
experiments/requirements-bench.txt brings them.
"""

import bz2
import csv
import gzip
import importlib.util
import io
import json
import lzma
import random
import sys

import pytest

from fastsae.data import datasets, readers
from fastsae.data.datasets import read_dataset
from fastsae.data.readers import lines as text_lines
from fastsae.data.readers.plain_text import sample_by
from fastsae.runtime.errors import EnvironmentFailure, InputError

NASTY = "ab ,;\t|\"'\n\r\\é\u2028\x0b{[<"
needs_pyarrow, needs_zstandard, needs_datasets = (
    pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f"{package} is not installed: pip install -r experiments/requirements-bench.txt",
    )
    for package in ("pyarrow", "zstandard", "datasets")
)


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, **how):
    """[(number, text, label)] of what is there, looked at first as stage 1 does."""
    found = read_dataset(path, sha256=datasets.identity(path)[0], **how)
    assert all(example.is_text for example in found)
    return [(e.line, e.messages[0]["content"], e.label) for e in found]


TABLES = {
    "plain": ("d.csv", "text,topic\none,a\ntwo,b\n", [(1, "one", "a"), (2, "two", "b")]),
    "a mark": ("d.csv", "\ufefftext,topic\none,a\ntwo,b", [(1, "one", "a"), (2, "two", "b")]),
    "CRLF": ("d.csv", "topic,text\r\na,one\r\n,two\r\n", [(1, "one", "a"), (2, "two", None)]),
    "CR": ("d.csv", "topic,text\ra,one\r,two\r", [(1, "one", "a"), (2, "two", None)]),
    "quotes": (
        "d.csv",
        'id,text,topic\n1,"one, ""two""\nthree",a\n2,four,"b\n"\n',
        [(1, 'one, "two"\nthree', "a"), (2, "four", "b\n")],
    ),
    "numbers as they stand": (
        "d.csv",
        "text,topic\none,007\ntwo,1.0\nthree,1e3\nfour, 5\nfive,NA\nsix, \n",
        [
            (1, "one", "007"),
            (2, "two", "1.0"),
            (3, "three", "1e3"),
            (4, "four", " 5"),
            (5, "five", "NA"),
            (6, "six", None),
        ],
    ),
    "empty lines": ("d.csv", "\ntext\n\none\n\n\ntwo\n", [(1, "one", None), (2, "two", None)]),
    "semicolons": (
        "d.csv",
        "id;text\n1;one, two\n2;three\n",
        [(1, "one, two", None), (2, "three", None)],
    ),
    "bars": ("d.csv", "id|text\n1|one\n2|two\n", [(1, "one", None), (2, "two", None)]),
    "tabs in .csv": ("d.csv", "id\ttext\n1\tone\n2\ttwo\n", [(1, "one", None), (2, "two", None)]),
    "TSV": (
        "d.tsv",
        'text\tid\nso "x", y\t1\n"a\tb"\t2\n',
        [(1, 'so "x", y', None), (2, "a\tb", None)],
    ),
    "TAB": ("d.TAB", "text\tid\none\t1\ntwo\t2\n", [(1, "one", None), (2, "two", None)]),
    "spaces in the header": (
        "D.CSV",
        "id, text\n1,one\n2,two\n",
        [(1, "one", None), (2, "two", None)],
    ),
    "a header of two lines": (
        "d.csv",
        '"a\nb",text\n1,one\n2,two\n',
        [(1, "one", None), (2, "two", None)],
    ),
    "long cells": (
        "d.csv",
        f"text\n{'x' * 200_000}\ny\n",
        [(1, "x" * 200_000, None), (2, "y", None)],
    ),
    "compressed": (
        "d.csv.gz",
        gzip.compress(b"text,topic\none,a\ntwo,b\n"),
        [(1, "one", "a"), (2, "two", "b")],
    ),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_that_are_read(tmp_path, kind):
    name, content, rows = TABLES[kind]
    assert read(put(tmp_path, name, content), label_field="topic") == rows


def test_any_cells_that_csv_writes_come_back(tmp_path):
    """Against csv's own writer, in every dialect, with cells of what separates, quotes and ends."""
    chosen, limit = random.Random(0), csv.field_size_limit()
    for i in range(60):
        rows = [
            ["x" + "".join(chosen.choices(NASTY, k=chosen.randrange(9))), chosen.choice(NASTY)]
            for _ in range(2 + i % 5)
        ]
        text = io.StringIO()
        how = {"delimiter": ",;\t|"[i % 4], "lineterminator": ("\n", "\r\n", "\r")[i % 3]}
        # csv quotes the line ends that it writes itself, and no others
        quoting = csv.QUOTE_MINIMAL if how["lineterminator"] == "\r\n" else csv.QUOTE_ALL
        csv.writer(text, quoting=quoting, **how).writerows([["text", "topic"], *rows])
        name = "d.tsv" if how["delimiter"] == "\t" else "d.csv"
        found = read(put(tmp_path, name, text.getvalue()), label_field="topic")
        expected = [(n, one, two if two.strip() else None) for n, (one, two) in enumerate(rows, 1)]
        assert found == expected
    assert csv.field_size_limit() == limit


def test_the_number_of_a_row_is_its_place_in_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    path = put(tmp_path, "d.csv", 'text,n\n"a\nb",1\n\nc,2\n"d, e",3\n')
    table = pandas.read_csv(path)
    assert [table.text[number - 1] for number, *_ in read(path)] == [t for _, t, _ in read(path)]
    assert [e.messages[0]["content"] for e in read_dataset(path, only_lines=[2])] == ["c"]


BAD_TABLES = {  # content, place, what is said of it
    "more cells": (
        "text,b\none,x\ntwo,y,z\nthree\n",
        ": row 2 (line 3)",
        "has 3 cells, the header 2 (and 1 more like it, the last row 3 (line 4)). put cells that "
        "hold commas or line ends in quotes",
    ),
    "an open quote": (
        'text,b\none,x\n"two,y\nthree,z\n',
        ": row 2 (line 3)",
        "bad quotes (a quote is opened and never closed). put a cell that holds quotes, commas",
    ),
    "text behind a quote": (
        'text,b\n"one" two,x\nthree,z\n',
        ": row 1 (line 2)",
        "bad quotes (',' expected after '\"').",
    ),
    "no header": (
        "A first text, it says.,x\nA second.,y\n",
        ":1",
        "has no column text (its first line: A first text,  it says., x). name the column of the "
        "texts with --text-field, or write a first line with the columns' names.",
    ),
    "doubled": ("text,text\na,b\nc,d\n", ":1", "has several columns text. give them"),
    "an empty text": ("text,b\none,x\n,y\n", ": row 2 (line 3)", "text is empty. remove the row"),
    "a line before": ('text\n"a\nb"\n" "\n', ": row 2 (line 4)", "text is empty."),
    "NUL": ("text\none\nt\0o\n", ":3", "holds a NUL byte, which no text does. remove it"),
    "Latin-1": ("text\none\nzwölf\n".encode("latin-1"), ":3", "is not UTF-8. convert it, for"),
    "UTF-16": ("text\none\ntwo\n".encode("utf-16"), ":1", "is not UTF-8. convert it, for "),
    "no mark": ("text\none\ntwo\n".encode("utf-16-be"), ":1", "is not UTF-8. convert it, for "),
    "empty": ("", "", "has 0 examples. at least 2 are needed"),
    "a header only": ("text,b\n", "", "has 0 examples. at least 2 are needed"),
    "JSON lines": ('{"text": "a, b"}\n{"text": "c"}\n', "", "is JSON, not a table. give it a name"),
    "an array": ('[{"text": "a"},\n{"text": "b"}]', "", "is JSON, not a table. give it a name"),
    "a page": ("<!doctype html><p>404", "", "is a web page, perhaps one about the file."),
    "a workbook": (b"PK\x03\x04\x14\0", "", "is a zip archive. unpack it"),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_a_bad_table_is_one_line_with_its_place(tmp_path, outcome, kind):
    content, where, what = BAD_TABLES[kind]
    path = put(tmp_path, "d.csv", content)
    code, lines = outcome(lambda: read(path))
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: {path}{where}: {what}") and lines[0].isprintable()


def test_a_cell_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, outcome):
    monkeypatch.setattr("fastsae.data.readers.delimited.LONGEST", 1000)
    monkeypatch.setattr("fastsae.data.readers.plain_text.LONGEST", 1000)
    monkeypatch.setattr(text_lines, "LONGEST", 1000)
    path = put(tmp_path, "d.csv", 'text\n"' + 30 * (99 * "x" + "\n"))
    assert "row 1 (line 2): bad quotes (a cell of more than" in outcome(lambda: read(path))[1][0]
    for name in ("d.csv", "d.txt"):
        path = put(tmp_path, name, "text\n" + 3000 * "x")
        assert f"{path}:2: has a line of more than" in outcome(lambda: read(path))[1][0]
    path = put(tmp_path, "d.txt", "a\n\nb\n\n" + 30 * (99 * "x" + "\n"))
    assert f"{path}:5: begins a paragraph of more than" in outcome(lambda: read(path))[1][0]


MUTATED = {
    "d.csv": 'id,text,topic\r\n1,"one, ""x""\r\nmore",a\r\n2,two,b\r\n3,"three",\r\n',
    "d.tsv": 'text\tb\nx "y"\t1\n"q\tr"\t2\n',
    "d.txt": "One.\nTwo é.\n\nThree\n",
    "d.csv.gz": "text,b\none,x\ntwo,y\n",
}
INSERTED = (b'"', b"\0", b"\r", b"\n", b",", b"\xff\xfe", b"\xef\xbb\xbf", b'{"a": 1}', b"")


@pytest.mark.parametrize("name", MUTATED)
def test_mutated_texts_meet_the_documented_errors_only(tmp_path, name):
    whole, n_refused = MUTATED[name].encode(), 0
    whole = gzip.compress(whole) if name.endswith(".gz") else whole
    for i in range(120):
        chosen, content = random.Random(f"{name} {i}"), bytearray(whole)
        for _ in range(1 + i % 3):
            at = chosen.randrange(len(content))
            content[at : at + chosen.randrange(6)] = chosen.choice(INSERTED)
        path = put(tmp_path, name, bytes(content))
        try:
            read(path, label_field="topic")
        except InputError as error:
            n_refused += 1
            lines = str(error).splitlines()
            assert all(". " in line and line.isprintable() for line in lines), content
    assert 30 <= n_refused <= 120


# Compressed files

KINDS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
ROWS = "".join(
    json.dumps({"text": f"row {i} {random.Random(i).random()}"}) + "\n" for i in range(9)
)


@needs_zstandard
def test_zstd_is_read_in_all_its_frames(tmp_path):
    import zstandard

    compress = zstandard.ZstdCompressor(write_checksum=True).compress
    check_compressed(tmp_path, "zst", compress)


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_files_are_read_in_all_their_parts(tmp_path, kind):
    check_compressed(tmp_path, kind, KINDS[kind])


def check_compressed(folder, kind, compress):
    """The rows are the plain file's, in one part and in two; cut anywhere, or with a changed byte,
    the file is refused or gives exactly these rows."""
    plain = read(put(folder, "d.jsonl", ROWS))
    half = ROWS.index("\n", 200) + 5  # within a row
    whole = compress(ROWS[:half].encode()) + compress(ROWS[half:].encode())
    for name, content in (("a", compress(ROWS.encode())), ("b", whole)):
        assert read(put(folder, f"{name}.jsonl.{kind}", content)) == plain
    first = len(compress(ROWS[:half].encode()))
    for end in {*range(12, len(whole), 11), len(whole) - 1} - {first}:
        path = put(folder, f"c.jsonl.{kind}", whole[:end])
        with pytest.raises(InputError, match=f"^{path}: is compressed by .* damaged or cut off"):
            read(path)
    for at in range(len(whole) // 2, len(whole), 13):
        changed = bytearray(whole)
        changed[at] ^= 0x10
        path = put(folder, f"d.jsonl.{kind}", bytes(changed))
        try:
            assert read(path) == plain
        except InputError as error:
            assert "\n" not in str(error)


def test_an_empty_compressed_file_has_no_examples(tmp_path, outcome):
    path = put(tmp_path, "d.csv.gz", gzip.compress(b""))
    assert outcome(lambda: read(path))[1][0].startswith(f"error: {path}: has 0 examples.")


def test_the_name_says_what_is_compressed_and_the_content_whether(tmp_path):
    plain = read(put(tmp_path, "d.jsonl", ROWS))
    assert read(put(tmp_path, "e.jsonl.gz", ROWS)) == plain
    assert read(put(tmp_path, "f.jsonl", gzip.compress(ROWS.encode()))) == plain
    with pytest.raises(InputError, match="separated values. give it a name that ends in .csv.gz,"):
        read(put(tmp_path, "g.jsonl.gz", gzip.compress(b"text,b\none,x\ntwo,y\n")))


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl.gz", "d.txt"])
def test_what_is_read_is_what_was_looked_at(tmp_path, name):
    contents = {"d.jsonl.gz": (ROWS, ROWS + '{"text": "more"}\n')}
    one, other = (
        gzip.compress(content.encode()) if name.endswith(".gz") else content.encode()
        for content in contents.get(name, ("text\n1\n1\n", "text\n2\n2\n"))
    )
    looked_at = datasets.identity(put(tmp_path, name, one))[0]
    path = put(tmp_path, name, other)
    with pytest.raises(EnvironmentFailure, match="was replaced or changed"):
        read_dataset(path, sha256=looked_at)
    with pytest.raises(EnvironmentFailure, match="was replaced or changed"):
        read_dataset(path, sha256=looked_at, only_lines=[1])
    with pytest.raises(EnvironmentFailure, match="was replaced or changed"):
        datasets.require_same(path, looked_at)
    assert read_dataset(put(tmp_path, name, one), sha256=looked_at)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    for package, content in (("zstandard", b"\x28\xb5\x2f\xfd"), ("pyarrow", b"PAR1\x15\x04")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(EnvironmentFailure, match=f"run: pip install {package}.$"):
            read_dataset(put(tmp_path, "d", content))


# Plain texts


@pytest.mark.parametrize(
    "content, by, rows",
    [
        ("one\ntwo\n", "line", [(1, "one"), (2, "two")]),
        ("\ufeffone\r\n \r\ntwo", "paragraph", [(1, "one"), (3, "two")]),
        ("\none\ntwo\n\n\n three\n", "paragraph", [(2, "one\ntwo"), (6, " three")]),
        ("one\n" * 40 + "\ntwo\n", "line", [*((i, "one") for i in range(1, 41)), (42, "two")]),
        ("one\rtwo\x0b\u2028x\n", "line", [(1, "one"), (2, "two\x0b\u2028x")]),
        ('a, "b\nc\n', "line", [(1, 'a, "b'), (2, "c")]),
    ],
)
def test_plain_texts(tmp_path, content, by, rows):
    path = put(tmp_path, "d.txt", content)
    assert sample_by(path) == by
    assert read(path) == [(*row, None) for row in rows]


def test_text_field_says_what_a_text_is(tmp_path, outcome):
    path = put(tmp_path, "d.txt", "one\ntwo\n\nthree\n")
    assert len(read(path, text_field="line")) == 3 and len(read(path, text_field="paragraph")) == 2
    code, lines = outcome(lambda: read(path, text_field="body"))
    assert code == 2 and lines == [
        "error: TEXT_FIELD: a .txt has no field 'body'. set --text-field line or paragraph, or "
        "leave it out."
    ]


@pytest.mark.parametrize(
    "content, what",
    [
        ('{"text": "a"}\n{"text": "b"}\n', ": is JSON, not plain text. give it a name that ends"),
        (b"one\ntw\xe9\n", ":2: is not UTF-8."),
        (b"one\nt\0o\n", ":2: holds a NUL byte"),
        (
            "one\ntwo\n".encode("utf-16-le"),
            ":1: is not UTF-8. convert it, for example: iconv -f UTF-16",
        ),
        ("one\n", ": has 1 example."),
        (b"%PDF-1.7\n", ": is a PDF."),
    ],
)
def test_bad_plain_texts(tmp_path, outcome, content, what):
    path = put(tmp_path, "d.txt", content)
    code, (line,) = outcome(lambda: read(path))
    assert code == 2 and line.startswith(f"error: {path}{what}")


def test_a_folder_of_texts_is_an_example_each(tmp_path, outcome):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in (
        ("b.txt", "two\n\nlines\n"),
        ("a.TXT", "\ufeffone"),
        (".c.txt", "x"),
        ("d.md", "x"),
    ):
        put(folder, name, text)
    assert read(folder) == [(1, "one", None), (2, "two\n\nlines", None)]
    looked_at = datasets.identity(folder)[0]
    put(folder, "d.md", "y")
    assert datasets.identity(folder)[0] == looked_at
    (folder / "a.TXT").rename(folder / "z.txt")
    assert datasets.identity(folder)[0] != looked_at
    put(folder, "b.txt", b"tw\xf6")
    code, (line,) = outcome(lambda: read(folder))
    assert code == 2 and line.startswith(f"error: {folder / 'b.txt'}:1: is not UTF-8.")
    put(folder, "b.txt", " \n")
    code, (line,) = outcome(lambda: read(folder))
    assert code == 2 and line.startswith(f"error: {folder / 'b.txt'}: text is empty.")
    with pytest.raises(EnvironmentFailure, match="was replaced or changed"):
        read_dataset(folder, sha256=looked_at)


# Arrow


def arrow_file(path, table):
    import pyarrow
    from pyarrow import feather, parquet

    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=2)
    elif path.suffix == ".feather":
        feather.write_feather(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as file:
            file.write_table(table, max_chunksize=2)
    return path


@needs_pyarrow
@pytest.mark.parametrize("ending", [".parquet", ".feather", ".arrow", ".jsonl"])
def test_arrow_tables(tmp_path, outcome, ending):
    """Also under a name that is another format's. Only the columns that are asked for are read."""
    import pyarrow

    table = pyarrow.table(
        {
            "text": ["one", "two\n", "three", "four", "five"],
            "topic": [1, None, 3, 1, 2],
            "score": [1.0, 2.5, None, float("nan"), 0.0],
            "image": [bytes(9)] * 5,
        }
    )
    path = arrow_file(tmp_path / f"d{ending}", table)
    texts = ["one", "two\n", "three", "four", "five"]
    assert read(path, label_field="topic") == list(
        zip(range(1, 6), texts, ["1", None, "3", "1", "2"])
    )
    labels = [label for *_, label in read(path, label_field="score")]
    assert labels == ["1.0", "2.5", None, None, "0.0"]
    assert [e.line for e in read_dataset(path, only_lines=[2, 4])] == [2, 4]
    for field, what in (
        ("body", "has no column body, messages or conversations (its columns: text, topic, score"),
        ("topic", "its column topic is int64, not text. name another with --text-field."),
        ("image", "its column image is binary, not text."),
    ):
        code, (line,) = outcome(lambda: read(path, text_field=field))
        assert code == 2 and line.startswith(f"error: {path}: {what}")


@needs_pyarrow
def test_rows_of_arrow_tables(tmp_path, outcome):
    import pyarrow

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "extra": "x"}]
    table = pyarrow.table({"messages": [turns, turns[:1]], "label": ["x", "y"]})
    found = read_dataset(arrow_file(tmp_path / "d.parquet", table), label_field="label")
    assert [(len(e.messages), e.label, e.is_text) for e in found] == [
        (2, "x", False),
        (1, "y", False),
    ]

    table = pyarrow.table(
        {"text": pyarrow.array(["a", None, ""] + ["b"] * 600).dictionary_encode()}
    )
    path = arrow_file(tmp_path / "d.parquet", table)
    code, (line,) = outcome(lambda: read(path))
    assert code == 2 and line == (
        f"error: {path}: row 2: text is empty (and 1 more like it, the last row 3). remove the row "
        "or give it text."
    )
    bad = pyarrow.array([b"a", b"\xff\xfe", b"b"]).view(pyarrow.string())
    path = arrow_file(tmp_path / "d.arrow", pyarrow.table({"text": bad}))
    code, (line,) = outcome(lambda: read(path))
    assert code == 2 and line.startswith(f"error: {path}: row 2: holds text that is not UTF-8.")


@needs_pyarrow
@pytest.mark.parametrize("ending", [".parquet", ".feather", ".arrow"])
def test_damaged_arrow_tables_are_one_line(tmp_path, ending):
    import pyarrow

    table = pyarrow.table({"text": [f"text {i}" for i in range(40)], "b": list(range(40))})
    whole = arrow_file(tmp_path / f"d{ending}", table).read_bytes()
    rows = read(tmp_path / f"d{ending}")
    n_refused = 0
    for i in range(60):
        chosen, changed = random.Random(i), bytearray(whole)
        if i % 2:
            changed = changed[: chosen.randrange(8, len(whole))]
        else:
            changed[chosen.randrange(6, len(whole))] ^= 1 << chosen.randrange(8)
        path = put(tmp_path, f"e{ending}", bytes(changed))
        try:
            found = read(path)
        except MemoryError:  # a changed length can be any
            n_refused += 1
        except InputError as error:
            n_refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            assert len(found) == len(rows)  # without checksums a changed text is that text
    assert n_refused >= 20


@needs_pyarrow
def test_a_folder_of_parquet_tables(tmp_path):
    import pyarrow

    (tmp_path / "d").mkdir()
    for name in "ba":
        arrow_file(tmp_path / "d" / f"{name}.parquet", pyarrow.table({"text": [name, name * 2]}))
    put(tmp_path / "d", "README.md", "x")
    rows = read(tmp_path / "d")
    assert [row[:2] for row in rows] == [(1, "a"), (2, "aa"), (3, "b"), (4, "bb")]
    looked_at = datasets.identity(tmp_path / "d")[0]
    put(tmp_path / "d", "README.md", "y")
    assert datasets.identity(tmp_path / "d")[0] == looked_at
    arrow_file(tmp_path / "d" / "b.parquet", pyarrow.table({"text": ["b", "c"]}))
    with pytest.raises(EnvironmentFailure, match="was replaced or changed"):
        read_dataset(tmp_path / "d", sha256=looked_at)


@needs_pyarrow
def test_a_table_that_changes_while_it_is_read(tmp_path):
    import pyarrow

    table = pyarrow.table({"text": [f"text {i}" for i in range(1000)]})
    path = arrow_file(tmp_path / "d.parquet", table)
    looked_at = datasets.identity(path)[0]
    stream = datasets.stream_examples(path, sha256=looked_at)
    next(stream)
    with open(path, "r+b") as file:
        file.write(b"PAR1")
    with pytest.raises(EnvironmentFailure, match="was replaced or changed"):
        list(stream)


@needs_pyarrow
@needs_datasets
def test_what_the_datasets_library_saves(tmp_path, outcome):
    """Class labels are their names, in the saved folder and in its Parquet."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "topic": ClassLabel(names=["sea", "sky"])})
    plain = {"text": [f"t{i}" for i in range(6)], "topic": [0, 1, 0, 1, 1, None]}
    rows = [(i + 1, f"t{i}", (["sea", "sky", "sea", "sky", "sky", None])[i]) for i in range(6)]
    dataset = Dataset.from_dict(plain, features=features)
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    assert read(tmp_path / "saved", label_field="topic") == rows
    dataset.select([5, 2, 0]).save_to_disk(tmp_path / "chosen")
    assert [text for _, text, _ in read(tmp_path / "chosen")] == ["t5", "t2", "t0"]
    dataset.to_parquet(tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet", label_field="topic") == rows
    DatasetDict(train=dataset).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one", label_field="topic") == rows
    DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "two")
    code, (line,) = outcome(lambda: read(tmp_path / "two"))
    assert code == 2 and line == (
        f"error: DATASET_PATH: {tmp_path / 'two'} is a saved DatasetDict (splits: train, test). "
        f"give one of its splits: --dataset-path {tmp_path / 'two' / 'train'}."
    )
    assert read(tmp_path / "two" / "test", label_field="topic") == rows
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
    code, (line,) = outcome(lambda: read(tmp_path / "saved"))
    assert code == 2 and "its state.json names no tables that are there." in line


# The hub


def test_a_hub_dataset_with_configuration_and_split(monkeypatch):
    calls = []

    class Library:
        @staticmethod
        def load_dataset(path, **options):
            calls.append((path, options))
            if options["split"] == "nowhere":
                raise ValueError("Bad split: nowhere. Available splits: ['train', 'test']")
            return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setitem(sys.modules, "datasets", Library)
    stream = {"streaming": True}
    for path, name, options in (
        ("hf:o/n", "o/n", {"revision": None, "split": "train"}),
        ("hf:o/n:en", "o/n", {"name": "en", "revision": None, "split": "train"}),
        ("hf:o/n@r/v:en:test", "o/n", {"name": "en", "revision": "r/v", "split": "test"}),
        ("hf:o/n@r::test", "o/n", {"revision": "r", "split": "test"}),
    ):
        assert [e.line for e in read_dataset(path)] == [1, 2]
        assert calls.pop() == (name, options | stream)
    with pytest.raises(InputError, match="Available splits.*name its configuration and split"):
        read_dataset("hf:o/n::nowhere")


@pytest.mark.parametrize(
    "path, pinned",
    [("hf:o/n", "hf:o/n@s"), ("hf:o/n@r:en", "hf:o/n@s:en:train"), ("hf:o/n::t", "hf:o/n@s::t")],
)
def test_a_revision_is_pinned(monkeypatch, path, pinned):
    import huggingface_hub

    class About:
        sha = "s"

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **_: About)
    assert datasets.identity(path) == (pinned, pinned)


def test_every_format_has_a_reader_and_every_reader_a_format():
    for form in readers.FORMATS.values():
        reader = importlib.import_module(f"fastsae.data.readers.{form.reader}")
        assert callable(reader.opened)
