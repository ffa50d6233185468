"""The tables of stage 3: a CSV for spreadsheets, where no cell may act as a formula, and a JSONL with the exact text."""
import csv
import hashlib
import io
import json
from pathlib import Path

from fastsae import artifacts, storage
from fastsae.errors import EnvironmentFailure

SEAL = "sha256"  # the last key of the first line of interpretations.jsonl
OCCASIONAL = ("hypotheses.csv",)  # written by some runs only


def csv_text(rows: list[dict], columns) -> str:
    """CSV of dicts; numbers with six digits, and text that a spreadsheet would take for a formula behind an apostrophe."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(row.get(name)) for name in columns} for row in rows)
    return table.getvalue()


def _cell(value):
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, str):
        return value
    value = value.replace("\r\n", "\n").replace("\r", "\n")  # csv does not quote a lone CR, which would end the row
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\n")) else value


def write_outputs(folder, texts, jsonl_path, rows, metadata):
    """Write the named texts, then the JSONL whose first line names their checksums: while that is missing, nothing counts as done."""
    for name, text in texts.items():
        artifacts.write_text(folder / name, text, keep_old=True)
    for name in set(OCCASIONAL) - set(texts):  # what an earlier run wrote does not belong to this one
        if (folder / name).exists():
            storage.set_aside([folder / name])
    sums = {name: artifacts.file_sha256(folder / name) for name in texts}
    about = {**metadata, "csv_sha256": sums["interpretations.csv"], "files": {**metadata.get("files", {}), **sums}}
    artifacts.write_text(jsonl_path, sealed(about, rows), keep_old=True)


def sealed(about: dict, rows: list[dict]) -> str:
    """JSON lines of `about` and the rows; the first ends with the digest of all the rest, so that no line can be lost or changed."""
    text = "".join(artifacts.to_json(row) + "\n" for row in rows)
    digest = hashlib.sha256(f"{artifacts.to_json(about)}\n{text}".encode()).hexdigest()
    return artifacts.to_json({**about, SEAL: digest}) + "\n" + text


def read_sealed(path) -> list[dict]:
    """The lines of a file that holds what `sealed` gave. EnvironmentFailure if a byte of it was lost, added or changed."""
    content = Path(path).read_bytes()
    try:
        about, *rows = map(json.loads, content.decode("utf-8").removesuffix("\n").split("\n"))
        plain = {name: value for name, value in about.items() if name != SEAL}
        if sealed(plain, rows).encode() == content:
            return [about, *rows]
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass
    raise EnvironmentFailure(f"{path}: was changed by hand, damaged, or made by an earlier version. run interpret_sae.py to make it anew.")


def read_labels(jsonl_path, checkpoint_fingerprint: str) -> dict[int, str]:
    """{feature: label} of interpretations.jsonl; {} if it is missing, damaged, or about another checkpoint."""
    try:
        about, *rows = read_sealed(jsonl_path)
        if about["inputs"]["checkpoint"] != checkpoint_fingerprint:
            return {}
        return {row["feature"]: row["label"] for row in rows}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError,
            EnvironmentFailure):  # labels are an extra here
        return {}
