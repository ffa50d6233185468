"""What reading a dataset takes in each format: memory and time for a gigabyte of texts.

    python -m experiments.benchmarks.datasets           # some minutes; 2 GB of disk

Needs pyarrow, zstandard and datasets (experiments/requirements-bench.txt). Each file is read in a
process of its own, row by row as stage 1 does, without tokenising. Writes
experiments/results/datasets.json, from which docs/files.md has its table.
"""

import argparse
import csv
import gzip
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.shared.provenance import environment, module_command, write_result
from fastsae.data import datasets, readers

BYTES = 1_000_000_000  # of texts in each file
N_BLOCK = 1000  # rows that are made, and written over and over
WORDS = [f"{a}{b}{c}" for a in "bdgklmnprst" for b in "aeiou" for c in ("n", "rt", "lla", "sh", "")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=int, default=BYTES, help="of texts in each file")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(measured(args.read)))
        return
    block = rows()
    n_blocks = max(1, args.bytes // sum(len(row["text"]) for row in block))
    found = {}
    for name, make in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = make(Path(folder), block, n_blocks)
            size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
            found[name] = {"bytes": size, **in_a_process(path)}
        print(name, json.dumps(found[name]), flush=True)
    settings = {"bytes_of_texts": args.bytes, "bytes_of_a_text": len(block[0]["text"])}
    write_result("datasets", settings, {"formats": found})


def rows() -> list[dict[str, str]]:
    """N_BLOCK rows with texts of about 1,000 characters and a label."""
    chosen = random.Random(0)
    return [
        {"text": " ".join(chosen.choices(WORDS, k=250))[:1000], "topic": f"t{i % 7}"}
        for i in range(N_BLOCK)
    ]


def in_a_process(path: Path) -> dict[str, Any]:
    """`measured` in a fresh process."""
    command = module_command("experiments.benchmarks.datasets", "--read", path)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measured(path: str) -> dict[str, Any]:
    """Rows, seconds and the most memory that the process had, Python and libraries included."""
    form = readers.FORMATS[readers.format_of(path)]
    started, n = time.perf_counter(), 0
    for _ in datasets.stream_examples(path, label_field="topic"):
        n += 1
    seconds = time.perf_counter() - started
    return {
        "format": form.name,
        "rows": n,
        "seconds": round(seconds, 2),
        "peak_bytes": peak_memory(),
    }


def peak_memory() -> int:
    """The most resident memory of this process so far, in bytes (of Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def _lines(block):
    return "".join(json.dumps(row) + "\n" for row in block).encode()


def _table(block, separator, *, header):
    text = io.StringIO()
    table = csv.DictWriter(text, list(block[0]), delimiter=separator)
    if header:
        table.writeheader()
    table.writerows(block)
    return text.getvalue().encode()


def _repeated(name: str, first: Callable, one: Callable) -> Callable:
    """What makes a file of `first(block)` and n times `one(block)`."""

    def make(folder, block, n_blocks):
        path, piece = folder / name, one(block)
        with open(path, "wb") as file:
            file.write(first(block))
            for _ in range(n_blocks):
                file.write(piece)
        return path

    return make


def _nothing(block):
    return b""


def _zstd(block):
    import zstandard

    return zstandard.ZstdCompressor().compress(_lines(block))


def _array(folder, block, n_blocks):
    path = folder / "d.json"
    piece = b",\n".join(_lines([row]).rstrip() for row in block)
    with open(path, "wb") as file:
        file.write(b"[" + piece)
        for _ in range(n_blocks - 1):
            file.write(b",\n" + piece)
        file.write(b"]\n")
    return path


def _parquet(folder, block, n_blocks):
    import pyarrow
    from pyarrow import parquet

    path, table = folder / "d.parquet", pyarrow.Table.from_pylist(block)
    group = pyarrow.concat_tables([table] * min(100, n_blocks))
    with parquet.ParquetWriter(path, table.schema, use_dictionary=False) as file:
        for _ in range(max(1, n_blocks // 100)):  # row groups of 100 MB
            file.write_table(group, row_group_size=len(group))
    return path


def _saved(folder, block, n_blocks):
    from datasets import Dataset, concatenate_datasets

    dataset = concatenate_datasets([Dataset.from_list(block)] * n_blocks)
    dataset.save_to_disk(folder / "saved")
    return folder / "saved"


def _texts(folder, block, n_blocks):
    text = "\n".join(row["text"] for row in block[:100])
    (folder / "texts").mkdir()
    for i in range(n_blocks * len(block) // 100):
        (folder / "texts" / f"{i:06d}.txt").write_text(text, encoding="utf-8")
    return folder / "texts"


FORMATS = {
    "JSON lines": _repeated("d.jsonl", _nothing, _lines),
    "JSON array": _array,
    "gzip of JSON lines": _repeated("d.jsonl.gz", _nothing, lambda b: gzip.compress(_lines(b))),
    "zstd of JSON lines": _repeated("d.jsonl.zst", _nothing, _zstd),
    "CSV": _repeated(
        "d.csv", lambda b: _table(b[:1], ",", header=True), lambda b: _table(b, ",", header=False)
    ),
    "TSV": _repeated(
        "d.tsv", lambda b: _table(b[:1], "\t", header=True), lambda b: _table(b, "\t", header=False)
    ),
    "plain text, a line each": _repeated(
        "d.txt", _nothing, lambda b: "".join(row["text"] + "\n" for row in b).encode()
    ),
    "folder of .txt": _texts,
    "Parquet": _parquet,
    "folder saved by datasets": _saved,
}


if __name__ == "__main__":
    main()
