"""What a folder is that was given as a dataset: one of those that are read, or what makes a file of
rows of it."""

import json
import os
import re
from pathlib import Path

TO_ROWS = "to_json('data.jsonl', orient='records', lines=True)"
SAVED = {"state.json", "dataset_info.json"}  # beside a dataset that the datasets library saved
SPLITS = "dataset_dict.json"  # names the folders of a saved DatasetDict


def folder_format(path: str | Path) -> str | None:
    """saved, tables or texts: how the rows in a folder are read; None where they are not."""
    names = _names(path)
    suffixes = {Path(name).suffix.lower() for name in names}
    if SAVED & set(names):
        return "saved"
    if SPLITS in names:
        return "saved" if len(_splits(path)) == 1 else None
    if ".jsonl" in suffixes:  # which of them is meant is not ours to say
        return None
    if ".parquet" in suffixes:
        return "tables"
    return "texts" if ".txt" in suffixes else None


def data_files(path: str | Path) -> list[str]:
    """The files that a folder's rows are in, relative to it, in their order; none where a saved
    dataset's own list of them cannot be read."""
    kind = folder_format(path)
    if kind == "texts":
        return text_files(path)
    if kind == "tables":
        return [name for name in sorted(_names(path)) if name.lower().endswith(".parquet")]
    below = _splits(path)[0] if SPLITS in _names(path) else ""
    try:
        state = json.loads((Path(path) / below / "state.json").read_text(encoding="utf-8"))
        found = [os.path.join(below, entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    # a name with a folder in it was not written by the library
    return (
        found
        if all(os.path.basename(name) == name[len(below) :].lstrip("/") for name in found)
        else []
    )


def text_files(path: str | Path) -> list[str]:
    """The .txt files in a folder, by name."""
    return [name for name in sorted(_names(path)) if name.lower().endswith(".txt")]


def _names(path):
    try:
        return [name for name in os.listdir(path) if not name.startswith(".")]
    except OSError:
        return []


def _splits(path):
    """The splits of a saved DatasetDict that are there."""
    try:
        found = json.loads((Path(path) / SPLITS).read_text(encoding="utf-8"))["splits"]
        return [
            name
            for name in found
            if isinstance(name, str)
            and name == os.path.basename(name)
            and (Path(path) / name / "state.json").is_file()
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def folder_advice(path: str | Path) -> tuple[str, str]:
    """(what a folder given as a dataset is, what to give instead), of one that is not read."""
    try:
        names = [name for name in os.listdir(path) if not name.startswith(".")]
    except OSError as error:
        return f"is a folder that cannot be read ({error.strerror})", "give one file"
    name = str(path) if re.fullmatch(r"[\w./+=,@ -]+", str(path)) else "FOLDER"
    suffixes = {Path(n).suffix.lower() for n in names}
    if not names:
        return "is an empty folder", "give your data with --dataset-path FILE.jsonl"
    if SPLITS in names:
        splits = _splits(path)
        listed = ", ".join(split if split.isprintable() else repr(split) for split in splits[:8])
        first = "train" if "train" in splits else (splits or ["SPLIT"])[0]
        return (
            f"is a saved DatasetDict (splits: {listed or 'none that is there'})",
            f"give one of its splits: --dataset-path {name.rstrip('/')}/{first}",
        )
    if ".jsonl" in suffixes:
        return (
            "is a folder of .jsonl files",
            f"give one, or join them: cat {name}/*.jsonl > data.jsonl",
        )
    if ".csv" in suffixes:
        return "is a folder of .csv files", "give one of them"
    return "is a folder", "give one file with --dataset-path FILE.jsonl"
