"""What a file without rows of JSON is, by its content, and the command that makes rows of it."""

import csv
import json
import re
import zipfile
from pathlib import Path

from fastsae.data.compression import HEAD, compression_of, head
from fastsae.runtime.errors import InputError
from fastsae.settings import dataset_names
from fastsae.settings.folders import TO_ROWS

TO_TEXT = ', then make one JSON object of each passage: {"text": ...}'
ITEMS = (
    'python -c "import json; [print(json.dumps(row)) for row in '
    "json.load(open('NAME', encoding='utf-8'))FIELD]\" > data.jsonl"
)

# what it begins with, what it is, what makes rows of it (NAME stands for the file)
BEGINNINGS = (
    (b"\x1f\x8b", "is compressed by gzip", "decompress it: gzip -dc NAME > data.jsonl"),
    (b"BZh", "is compressed by bzip2", "decompress it: bzip2 -dc NAME > data.jsonl"),
    (b"\xfd7zXZ\0", "is compressed by xz", "decompress it: xz -dc NAME > data.jsonl"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd", "decompress it: zstd -dc NAME > data.jsonl"),
    (b"\x04\x22\x4d\x18", "is compressed by lz4", "decompress it: lz4 -dc NAME > data.jsonl"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "unpack it: 7z x NAME"),
    (b"Rar!", "is a rar archive", "unpack it: unrar x NAME"),
    (
        b"FEA1",
        "is a Feather table",
        f"convert it: python -c \"import pandas; pandas.read_feather('NAME').{TO_ROWS}\"",
    ),
    (
        b"ORC",
        "is an ORC table",
        f"convert it: python -c \"import pandas; pandas.read_orc('NAME').{TO_ROWS}\"",
    ),
    (b"Obj\x01", "is an Avro file", "convert it: avro cat NAME > data.jsonl (pip install avro)"),
    (
        b"SQLite format 3\0",
        "is an SQLite database",
        'export a table: python -c "import pandas, sqlite3; '
        f"pandas.read_sql('select * from TABLE', sqlite3.connect('NAME')).{TO_ROWS}\"",
    ),
    (b"\x89HDF", "is an HDF5 file", 'write its texts as JSON, one {"text": ...} a line'),
    (b"\x93NUMPY", "is a NumPy array", 'write its texts as JSON, one {"text": ...} a line'),
    (
        b"\xd0\xcf\x11\xe0",
        "is an old Office file (.xls, .doc)",
        f"convert a table: python -c \"import pandas; pandas.read_excel('NAME').{TO_ROWS}\"",
    ),
    (b"%PDF", "is a PDF", f"extract its text: pdftotext NAME data.txt{TO_TEXT}"),
    (
        b"{\\rtf",
        "is a rich text file",
        f"extract its text: pandoc -t plain NAME -o data.txt{TO_TEXT}",
    ),
    (
        b"version https://git-lfs.github.com/",
        "is a pointer of git-lfs, not the data",
        "fetch the data: git lfs pull",
    ),
    (
        b"/annex/objects/",
        "is a pointer of git-annex, not the data",
        "fetch the data: git annex get NAME",
    ),
    (b"\x89PNG", "is an image", "give texts"),
    (b"\xff\xd8\xff", "is an image", "give texts"),
    (b"GIF8", "is an image", "give texts"),
    (b"RIFF", "is sound, video or an image", "give texts"),
    (b"ID3", "is sound", "give texts"),
    (b"OggS", "is sound", "give texts"),
    (b"\x7fELF", "is a program", "give texts"),
    (b"GGUF", "is a model", "give it as --model-name"),
    (b"<?xml", "is XML", 'write its texts as JSON, one {"text": ...} a line'),
)
MEMBERS = (  # of a zip archive
    (
        r"xl/",
        "is an Excel workbook",
        f"convert it: python -c \"import pandas; pandas.read_excel('NAME').{TO_ROWS}\"",
    ),
    (
        r"word/",
        "is a Word document",
        f"extract its text: pandoc -t plain NAME -o data.txt{TO_TEXT}",
    ),
    (r"ppt/", "is a presentation", f"save its text as data.txt{TO_TEXT}"),
    (
        r"content\.xml",
        "is an OpenDocument file",
        "save it as CSV or text in LibreOffice: "
        "soffice --convert-to csv NAME (a table), or --convert-to txt",
    ),
    (
        r"META-INF/container\.xml",
        "is an e-book",
        f"extract its text: pandoc -t plain NAME -o data.txt{TO_TEXT}",
    ),
    (r".*\.npy$", "is a NumPy archive (.npz)", 'write its texts as JSON, one {"text": ...} a line'),
    (
        r".*data\.pkl$",
        "is a PyTorch file",
        "give it as --sae-path or --init-from if it is an autoencoder",
    ),
)


def refuse_foreign(path: Path | str, beginning: bytes, kind: str) -> None:
    """Raise InputError if the beginning of what a file holds shows that it is nothing that is read
    as `kind`: json, csv, tsv or text. Bytes that are not UTF-8 pass."""
    if found := _binary(path, beginning) or _text(path, beginning, kind):
        raise _refusal(path, *found)


def _refusal(path, what, remedy):
    name = str(path) if re.fullmatch(r"[\w./+=,@ -]+", str(path)) else "FILE"
    with open(path, "rb") as file:
        compressed = compression_of(file.read(16))
    if compressed is not None and not remedy.startswith("give it a name"):
        remedy = f"decompress it first: {compressed.command}"
    return InputError(f"{path}: {what}. {remedy.replace('NAME', name)}.")


def not_utf8(path: Path | str, bad: bytes, line: int) -> InputError:
    """The InputError for bytes that are not UTF-8, with the likely encoding: zeros and a byte order
    mark are UTF-16's or 32's."""
    encoding = encoding_of(head(path)[: 1 << 12]) or encoding_of(bad) or "LATIN1"
    return InputError(
        f"{path}:{line}: is not UTF-8. convert it, for example: iconv -f {encoding} -t UTF-8 "
        f"{Path(path).name}."
    )


def encoding_of(head: bytes) -> str | None:
    """ "UTF-16" or "UTF-32" if the bytes look so, by a byte order mark or by zeros; else None."""
    if head[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") or b"\0\0\0" in head[:64]:
        return "UTF-32"
    return "UTF-16" if b"\0" in head or head[:2] in (b"\xff\xfe", b"\xfe\xff") else None


def _binary(path, head):
    """(what, remedy) of a format other than text, or None."""
    for beginning, what, remedy in BEGINNINGS:
        if head.startswith(beginning) and (
            beginning not in (b"RIFF", b"ORC", b"BZh", b"ID3") or _not_text(head)
        ):
            return what, remedy
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _archive(path)
    if head[257:262] == b"ustar":
        return "is a tar archive", "unpack it: tar -xf NAME"
    if re.match(rb"\x80[\x02-\x05][\x95c\]})(]", head):
        return (
            "is a Python pickle",
            'write its texts as JSON, one {"text": ...} a line, where you trust it',
        )
    return None


def _not_text(head):
    try:
        head[:-4].decode()
    except UnicodeDecodeError:
        return True
    return b"\0" in head


def _archive(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        names = []
    for pattern, what, remedy in MEMBERS:
        if any(re.match(pattern, name) for name in names):
            return what, remedy
    return "is a zip archive", "unpack it: unzip NAME, or unzip -p NAME > data.jsonl"


def _text(path, head, kind):
    """(what, remedy) of text that is not of the kind it is taken for, or None: also where its first
    line is JSON, or may be meant as such."""
    try:
        text = head.decode("utf-8-sig", errors="ignore").lstrip()
    except UnicodeDecodeError:
        return None
    start = text[:1024].lower()
    if re.match(r"<!doctype html|<html|<head|<!--.{0,500}?<html", start, re.S):
        return (
            "is a web page, perhaps one about the file",
            "download the file itself (on the Hugging Face hub its address has /resolve/ in "
            "place of /blob/)",
        )
    if b"\0" in head or kind != "json" or start.startswith(("{", "[")):
        return None
    if separator := _separator(text):
        between, ending = {
            ",": ("comma", ".csv"),
            "\t": ("tab", ".tsv"),
            ";": ("semicolon", ".csv"),
            "|": ("bar", ".csv"),
        }[separator]
        return (
            f"is a table of {between}-separated values",
            f"give it a name that ends in {ending}{_compressed_ending(path)}, and name the column "
            "of the texts with --text-field",
        )
    if re.match(r"(---\s*\n|%YAML|- \w+:\s|\w+:\s*\n\s*- )", text) or str(path).endswith(
        (".yaml", ".yml")
    ):
        return (
            "is YAML",
            'convert a list of rows: python -c "import json, yaml; [print(json.dumps(row)) for row '
            "in yaml.safe_load(open('NAME', encoding='utf-8'))]\" > data.jsonl",
        )
    return None


def _compressed_ending(path):
    return str(path)[len(dataset_names.without_compression(path)) :]


def _separator(text):
    """What separates the columns of a table with a header of names and rows of as many cells; None
    if it is not a table."""
    lines = text.splitlines()[:50]
    for separator in ("\t", ",", ";", "|"):
        try:
            rows = list(csv.reader(lines, delimiter=separator))
        except csv.Error:
            continue
        rows = [row for row in rows if row]
        named = bool(rows) and all(
            re.fullmatch(r"[\w .()/#-]{1,64}", name.strip()) for name in rows[0]
        )
        even = len(rows) > 1 and len(rows[1]) == len(rows[0]) > 1
        if named and even and not _is_json(lines[-1]):
            return separator
    return None


def _is_json(line):
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def refuse_shape(path: Path | str) -> None:
    """Raise InputError if a file without a good row is JSON in another shape than one object a
    line, or plain text."""
    beginning = head(path)
    if encoding := encoding_of(beginning[: 1 << 12]):
        raise _refusal(
            path,
            "is not UTF-8",
            f"convert it, for example: iconv -f {encoding} -t UTF-8 NAME > data.jsonl",
        )
    if found := _shape_of_json(beginning.decode("utf-8-sig", errors="ignore").lstrip()):
        raise _refusal(path, *found)


def _shape_of_json(text):
    first = text.split("\n", 1)[0].rstrip()
    lines = [line for line in text.split("\n")[1:20] if line.strip()]
    if sum(map(_is_json, lines)) > len(lines) / 2:  # one object a line, and the first is a bad one
        return None
    if not text.startswith("{"):
        return (
            (
                "is plain text, not JSON",
                "give it a name that ends in .txt, if each line or paragraph is a text",
            )
            if _is_prose(text)
            else None
        )
    if re.match(r"\{\s*'", text):
        return (
            "holds Python's dicts (single quotes), not JSON",
            'convert it: python -c "import ast, json; [print(json.dumps(ast.literal_eval(line))) '
            "for line in open('NAME', encoding='utf-8') if line.strip()]\" > data.jsonl",
        )
    try:
        _, end = json.JSONDecoder().raw_decode(text)
        if (
            end <= len(first)
            and text[end : end + 1] in ("{", " ", ",")
            and text[end:].lstrip(" ,").startswith("{")
        ):
            return (
                "holds several JSON objects in one line",
                "write one a line: jq -c . NAME > data.jsonl",
            )
        spread = end > len(first)
    except json.JSONDecodeError as error:
        spread = error.pos > len(first) and len(first) < HEAD // 2
    except (ValueError, RecursionError):
        return None
    if not spread:
        return None
    if listed := re.match(
        r'\{[^\[{]{0,400}?"(\w{1,60})"\s*:\s*\[\s*\{\s*"(?!role|from|content|value|type)', text
    ):
        return (
            f"is one JSON object whose field {listed[1]} holds the rows",
            "write these one a line: " + ITEMS.replace("FIELD", f"['{listed[1]}']"),
        )
    return (
        "holds JSON objects spread over several lines",
        "write one a line: jq -c . NAME > data.jsonl",
    )


def _is_prose(text):
    lines = [line for line in text.split("\n")[:-1] or [text] if line.strip()][:20]
    return (
        bool(lines)
        and not any(re.match(r'\s*([\[{"\d-]|true|false|null|NaN)', line) for line in lines)
        and (all(line.isprintable() or "\t" in line or "\r" in line for line in lines))
    )
