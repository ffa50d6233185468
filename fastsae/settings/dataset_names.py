"""What the name of a dataset says: its format by its ending, or a set of the hub, its configuration
and its split."""

import re
from pathlib import Path
from typing import NamedTuple

HUB = "hf:"
TEXT = "text"  # the field that is read unless another is named
# a file's own ending is looked for before one of these
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
JSON, CSV, TSV, PLAIN = (".jsonl", ".json", ".ndjson"), (".csv",), (".tsv", ".tab"), (".txt",)
TABLES = (".parquet", ".arrow", ".feather")
# what TEXT_FIELD can say of a plain text: a text each, or by the file's beginning
SAMPLE_BY = ("line", "paragraph")


class HubName(NamedTuple):
    """`hf:owner/name@revision:configuration:split`, of which owner/name alone is needed."""

    name: str
    revision: str | None
    configuration: str | None
    split: str

    def pinned(self, revision: str) -> str:
        """The same with a revision, as a dataset path."""
        more = f":{self.configuration or ''}:{self.split}"
        return f"{HUB}{self.name}@{revision}{'' if more == '::train' else more}"


def hub_name(path: str) -> HubName:
    """The parts of a dataset path that begins with hf:."""
    whole, *more = path.removeprefix(HUB).split(":")
    name, _, revision = whole.partition("@")
    configuration, split, *_ = [*more, "", ""]
    return HubName(name, revision or None, configuration or None, split or "train")


def without_compression(path: str | Path) -> str:
    """The name less .gz, .zst and so on."""
    return re.sub(rf"({'|'.join(map(re.escape, COMPRESSED))})$", "", str(path), flags=re.I)


def ending(path: str | Path) -> str:
    """The ending that names the format, in lower case: ".csv" of "A.CSV.gz"."""
    return Path(without_compression(path)).suffix.lower()


def is_plain_text(path: str | Path) -> bool:
    """Whether the name is that of a text without rows."""
    return not str(path).startswith(HUB) and ending(path) in PLAIN


def stem(path: str) -> str:
    """A dataset's name without its folder and the endings that are read."""
    if path.startswith(HUB):
        return Path(path).name.replace(":", "_")
    name = Path(path).name
    plain = without_compression(name)
    known = (*JSON, *CSV, *TSV, *PLAIN, *TABLES)
    return plain[: -len(ending(name))] if ending(name) in known else name
