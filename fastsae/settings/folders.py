"""What a folder is that was given as a dataset, and the command that makes a file of rows of it."""

import os
import re
from pathlib import Path

TO_ROWS = "to_json('data.jsonl', orient='records', lines=True)"


def folder_advice(path: str | Path) -> tuple[str, str]:
    """(what a folder given as a dataset is, what makes one file of what is in it)."""
    try:
        names = [name for name in os.listdir(path) if not name.startswith(".")]
    except OSError as error:
        return f"is a folder that cannot be read ({error.strerror})", "give one file"
    name = str(path) if re.fullmatch(r"[\w./+=,@ -]+", str(path)) else "FOLDER"
    load = f"python -c \"import datasets; datasets.load_from_disk('{name}')"
    suffixes = {Path(n).suffix.lower() for n in names}
    if not names:
        what, remedy = "is an empty folder", "give your data with --dataset-path FILE.jsonl"
    elif "dataset_dict.json" in names:
        what, remedy = "is a saved DatasetDict", f"{load}['train'].to_json('data.jsonl')\""
    elif {"state.json", "dataset_info.json"} & set(names):
        what, remedy = "is a saved dataset", f"{load}.to_json('data.jsonl')\""
    elif ".jsonl" in suffixes:
        what, remedy = (
            "is a folder of .jsonl files",
            "give one, or join them: cat FOLDER/*.jsonl > data.jsonl",
        )
    elif ".parquet" in suffixes:
        what = "is a folder of Parquet tables"
        remedy = f"convert it: python -c \"import pandas; pandas.read_parquet('{name}').{TO_ROWS}\""
    elif ".txt" in suffixes:
        what, remedy = (
            "is a folder of .txt files",
            (
                'make a row of each: python -c "import json, pathlib; '
                "[print(json.dumps({'text': p.read_text(encoding='utf-8')})) "
                f"for p in sorted(pathlib.Path('{name}').glob('*.txt'))]\" > data.jsonl"
            ),
        )
    else:
        what, remedy = "is a folder", "give one file with --dataset-path FILE.jsonl"
    return what, remedy.replace("FOLDER", name)
