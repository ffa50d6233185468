"""The tables of stage 3: a CSV for spreadsheets, where no cell may act as a formula, and a JSONL with the exact text."""
import csv
import io

from fastsae import artifacts, storage

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
    lines = [{**metadata, "csv_sha256": sums["interpretations.csv"], "files": {**metadata.get("files", {}), **sums}}, *rows]
    artifacts.write_text(jsonl_path, "".join(artifacts.to_json(line) + "\n" for line in lines), keep_old=True)


def read_labels(jsonl_path, checkpoint_fingerprint: str) -> dict[int, str]:
    """{feature: label} of interpretations.jsonl; {} if it is missing, damaged, or about another checkpoint."""
    try:
        about, *rows = artifacts.read_lines(jsonl_path)
        if about["inputs"]["checkpoint"] != checkpoint_fingerprint:
            return {}
        return {row["feature"]: row["label"] for row in rows}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):  # labels are an extra here
        return {}
