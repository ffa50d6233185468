"""The tables of stage 3: a CSV for spreadsheets, where no cell may act as a formula, and a JSONL
with the exact text."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsae.runtime import artifacts, storage
from fastsae.runtime.errors import EnvironmentFailure

RULE = "rule"  # the label_source of a label that no language model wrote
# what a language model's tests of a label give a row: with the label, another feature's, the rule
JUDGED = (
    "judged_detection",
    "judged_detection_other",
    "judged_detection_rule",
    "judged_fuzzing",
    "judged_fuzzing_other",
    "judged_fuzzing_rule",
    "judged_intruder",
)
SEAL = "sha256"  # the last key of the first line of interpretations.jsonl
# Programs cut a CSV at commas, semicolons, tabs or bars, whatever stands around these, and lines at
# line breaks; a cell acts as a formula if it begins with one of FORMULA (also full-width, small,
# raised or lowered), before which they drop blanks, quotes and characters without width.
CUT = r";\t\n|"  # not the comma: a text that holds one is in quotes
FORMULA = (
    r"=+@\-"
    "\u2212\uff1d\uff0b\uff0d\uff20\ufe66\ufe62\ufe63\ufe6b"
    "\u207c\u208c\u207a\u208a\u207b\u208b"
)
DROPPED = (
    r"\s\x00-\x1f\x7f-\xa0"
    "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff\"'`\xb4\xab\xbb\u2018-\u201f\u2039\u203a\uff02\uff07"
)
BEFORE_FORMULA = re.compile(
    f"(?:^|(?<=[{CUT}]))(?=(?:(?![{CUT}])[{DROPPED}])*[{FORMULA}])"
    r"|^(?=[\t\n])"
)

OCCASIONAL = ("hypotheses.csv", "hypotheses.json")  # written by some runs only


def by_language_model(row: Mapping[str, Any]) -> bool:
    """Whether a language model wrote the label of this row."""
    return row["label_source"] not in (None, "", RULE)


def with_interval(found: Mapping[str, Any], digits: int = 2) -> str:
    """'0.85 [0.80, 0.90]' of an estimate as JSON holds it; without an interval only its value."""
    value = f"{found['value']:.{digits}f}"
    if not found["interval"]:
        return value
    return f"{value} [{', '.join(f'{end:.{digits}f}' for end in found['interval'])}]"


def csv_text(rows: list[dict], columns: Sequence[str]) -> str:
    """CSV of dicts; numbers with six digits.

    Where a spreadsheet could begin a cell with a formula, which is at the start of a text and after
    `;`, tab, `|` and line break, an apostrophe stands before it. Otherwise `csv.reader` gives back
    the text, with line breaks as "\\n".
    """
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
    # csv does not quote a lone CR, which would end the row
    value = value.replace("\r\n", "\n").replace("\r", "\n")
    return BEFORE_FORMULA.sub("'", value)


def write_outputs(
    folder: Path,
    texts: Mapping[str, str],
    jsonl_path: Path,
    rows: list[dict],
    metadata: Mapping[str, Any],
) -> None:
    """Write the named texts, then the JSONL whose first line names their checksums: while that is
    missing, nothing counts as done."""
    for name, text in texts.items():
        artifacts.write_text(folder / name, text, keep_old=True)
    # what an earlier run wrote does not belong to this one
    for name in set(OCCASIONAL) - set(texts):
        if (folder / name).exists():
            storage.set_aside([folder / name])
    sums = {name: artifacts.file_sha256(folder / name) for name in texts}
    about = {
        **metadata,
        "csv_sha256": sums["interpretations.csv"],
        "files": {**metadata.get("files", {}), **sums},
    }
    artifacts.write_text(jsonl_path, sealed(about, rows), keep_old=True)


def sealed(about: dict, rows: list[dict]) -> str:
    """JSON lines of `about` and the rows; the first ends with the digest of all the rest, so that
    no line can be lost or changed."""
    text = "".join(artifacts.to_json(row) + "\n" for row in rows)
    digest = hashlib.sha256(storage.as_utf8(f"{artifacts.to_json(about)}\n{text}")).hexdigest()
    return artifacts.to_json({**about, SEAL: digest}) + "\n" + text


def read_sealed(path: Path | str) -> list[dict]:
    """The lines of a file that holds what `sealed` gave. EnvironmentFailure if a byte of it was
    lost, added or changed."""
    content = Path(path).read_bytes()
    try:
        about, *rows = map(json.loads, content.decode("utf-8").removesuffix("\n").split("\n"))
        plain = {name: value for name, value in about.items() if name != SEAL}
        if storage.as_utf8(sealed(plain, rows)) == content:
            return [about, *rows]
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass
    raise EnvironmentFailure(
        f"{path}: was changed by hand, damaged, or made by an earlier version. "
        "run interpret_sae.py to make it anew."
    )


def read_labels(jsonl_path: Path | str, checkpoint_fingerprint: str) -> dict[int, str]:
    """{feature: label} of interpretations.jsonl; {} if it is missing, damaged, or about another
    checkpoint."""
    try:
        about, *rows = read_sealed(jsonl_path)
        if about["inputs"]["checkpoint"] != checkpoint_fingerprint:
            return {}
        return {row["feature"]: row["label"] for row in rows}
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
        KeyError,
        TypeError,
        EnvironmentFailure,
    ):  # labels are an extra here
        return {}
