"""Datasets: rows of a JSONL file, a JSON array, a hub dataset (hf:...) or a plain text, one at a
time; and deduplication."""

import contextlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.data import file_kinds
from fastsae.runtime.artifacts import file_sha256
from fastsae.runtime.digests import reading
from fastsae.runtime.errors import EnvironmentFailure, InputError

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
# kinds of parts of a content, as chat APIs name them
TEXT_PARTS = ("text", "input_text", "output_text")
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
    ("query", "response"),
    ("prompt", "chosen"),
)
MAX_REPORTED = 10  # kinds of bad rows
MAX_BAD_ROWS = 1000  # read in order to count them
PIECE_CHARACTERS = 1 << 16  # of a plain text, tokenised at a time
GRAMS_AT_ONCE = 1 << 13  # n-grams hashed at a time
HUB = "hf:"
TEXT = "text"  # the field that is read unless another is named


@dataclass
class Example:
    """One row of a dataset. `line` is its line number, or its place in a JSON array or on the hub
    (from 1)."""

    line: int
    messages: list  # [{"role", "content"}]
    is_text: bool = False  # the row had a plain text, which became one user turn
    label: str | None = None


def read_dataset(
    path: Path | str, *, only_lines: Iterable[int] | None = None, **how: Any
) -> list[Example]:
    """A list of the examples that `stream_examples` yields, or of those with the given line
    numbers."""
    if only_lines is None:
        return list(stream_examples(path, **how))
    wanted = set(map(int, only_lines))
    last = max(wanted, default=0)
    return [
        example
        for example in stream_examples(path, last_line=last, **how)
        if example.line in wanted
    ]


def stream_examples(
    path: Path | str, *, sha256: str | None = None, **how: Any
) -> Iterator[Example]:
    """Yield the examples of a dataset in order. Raises InputError naming file and line for up to
    ten bad rows, at the end.

    how: `text_field`, `label_field`, `max_examples`, `last_line`. EnvironmentFailure if what was
    read of a file has not the content `sha256`, where that is given: it was replaced since it was
    looked at.
    """
    if str(path).startswith(HUB):
        yield from _examples(path, hub_rows(str(path)), **how)
        return
    with reading(path, sha256) as file:
        yield from _examples(path, _file_rows(Path(path), file), **how)


def _examples(
    path, rows, *, text_field=TEXT, label_field=None, max_examples=None, last_line=math.inf
):
    """The examples that `rows` (number, parsed row or ValueError) hold."""
    n, bad = 0, BadRows(path)
    for number, row in rows:
        if number > last_line:
            return
        if max_examples is not None and n >= max_examples:
            break
        try:
            if isinstance(row, ValueError):
                raise row
            example = _example(number, row, text_field, label_field)
        except ValueError as error:
            bad.add(number, str(error))
            if bad.enough():
                break
            continue
        n += 1
        yield example
    if bad.kinds:
        if not n and not str(path).startswith(HUB):
            file_kinds.refuse_shape(path)
        raise InputError(*bad.lines())
    require_two(n, path)


class BadRows:
    """What is wrong with rows, a line for each kind: its first row, and how many there are."""

    def __init__(self, path: Path | str) -> None:
        self.path, self.kinds, self.n = path, {}, 0

    def add(self, number: int, message: str) -> None:
        """Count a bad row: its number and `what. remedy.`"""
        kind = re.sub(r"\([^)]*\)|'[^']*'|\[\d+\]|\d+", "", message)
        found = self.kinds.setdefault(kind, [number, message, 0, number])
        found[2:] = found[2] + 1, number
        self.n += 1

    def enough(self) -> bool:
        """Whether there are so many that no more need be read."""
        return len(self.kinds) > MAX_REPORTED or self.n >= MAX_BAD_ROWS

    def lines(self) -> list[str]:
        """`file:line: what (and so many more). remedy.`"""
        lines = []
        for first, message, n_rows, last in list(self.kinds.values())[:MAX_REPORTED]:
            what, _, remedy = message.partition(". ")
            least = "at least " if self.enough() else ""
            more = (
                f" (and {least}{n_rows - 1} more like it, the last "
                f"{place(self.path, last, short=True)})"
                if n_rows > 1
                else ""
            )
            lines.append(f"{place(self.path, first)}: {what}{more}. {remedy}")
        return lines + [f"{self.path}: more bad rows follow. fix these first."] * (
            len(self.kinds) > MAX_REPORTED
        )


def place(path: Path | str, number: int, *, short: bool = False) -> str:
    """How errors name a row: its line in a file, its number in a JSON array or on the hub."""
    if str(path).startswith(HUB):
        return f"row {number}" if short else f"{path}: row {number}"
    start = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    is_array = start.startswith(b"[")
    if short:
        return f"item {number}" if is_array else f"line {number}"
    return f"{path}: item {number}" if is_array else f"{path}:{number}"


def require_two(n: int, path: Path | str) -> None:
    """InputError unless there is an example to train on and one to validate."""
    if n < 2:
        raise InputError(
            f"{path}: has {n} example{'s' * (n != 1)}. at least 2 are needed, "
            "one to train on and one to validate."
        )


def _file_rows(path, file):
    """(number, parsed row or ValueError) of a JSONL file, a line at a time; a JSON array is read
    whole."""
    file_kinds.refuse_foreign(path)
    number, is_array = 0, None
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(path, error, number) from None
        if is_array is None and text.strip():
            is_array = text.lstrip()[0] == "["
            if is_array:
                yield from _array_rows(text + _decoded(file.read(), path, number), path, number)
                return
        if text.strip():
            yield number, _parsed(text)


def _decoded(data, path, lines_before):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error, lines_before + 1 + data[: error.start].count(b"\n")) from None


def not_utf8(path: Path | str, error: UnicodeDecodeError, line: int) -> InputError:
    """The InputError for bytes that are not UTF-8, with the likely encoding: zeros and a byte order
    mark are UTF-16's or 32's."""
    with open(path, "rb") as file:
        encoding = (
            file_kinds.encoding_of(file.read(1 << 12))
            or file_kinds.encoding_of(error.object)
            or "LATIN1"
        )
    return InputError(
        f"{path}:{line}: is not UTF-8. convert it, for example: iconv -f {encoding} -t UTF-8 "
        f"{Path(path).name}."
    )


def _array_rows(text, path, first_line):
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno + first_line - 1}: bad JSON ({error.msg}, "
            f"column {error.colno}). correct the array."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:1: bad JSON ({error}). correct the array.") from None
    yield from enumerate(items, 1)


def _parsed(line):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return ValueError(
            f"bad JSON ({error.msg}, column {error.colno}). each line must be one JSON object."
        )
    except (ValueError, RecursionError) as error:
        return ValueError(
            f"bad JSON ({str(error).split(';')[0]}). each line must be one JSON object."
        )


def stream_text(path: Path | str, sha256: str | None = None) -> Iterator[Example]:
    """Yield pieces of a plain UTF-8 text as examples, cut at line ends; `line` counts the pieces.
    sha256: as `stream_examples`."""
    file_kinds.refuse_foreign(path)
    piece, size, n = [], 0, 0
    try:
        with reading(path, sha256) as raw:
            file = io.TextIOWrapper(raw, encoding="utf-8-sig")
            while line := file.readline(PIECE_CHARACTERS):
                piece.append(line)
                size += len(line)
                if size >= PIECE_CHARACTERS:
                    n += 1
                    yield Example(n, [{"role": "user", "content": "".join(piece)}], is_text=True)
                    piece, size = [], 0
    except UnicodeDecodeError:
        with open(path, "rb") as once_more:
            for _ in _file_rows(Path(path), once_more):  # finds the line
                pass
        raise
    if size:
        yield Example(n + 1, [{"role": "user", "content": "".join(piece)}], is_text=True)


def identity(path: Path | str) -> tuple[str, Path | str]:
    """(what decides a dataset's content, as text; the path to read it by, a hub dataset's revision
    pinned)."""
    if not str(path).startswith(HUB):
        file_kinds.refuse_folder(path)
        return file_sha256(path), path
    name, _, revision = str(path).removeprefix(HUB).partition("@")
    try:
        import huggingface_hub

        sha = huggingface_hub.HfApi().dataset_info(name, revision=revision or None, timeout=30).sha
    except Exception as error:  # the hub's client raises types of several libraries
        if type(error).__name__ in (
            "RepositoryNotFoundError",
            "RevisionNotFoundError",
            "GatedRepoError",
            "HFValidationError",
        ):
            raise InputError(
                f"DATASET_PATH: {path} is not on the hub, or not open to you. check its name, "
                "or run: hf auth login."
            ) from None
        raise EnvironmentFailure(
            f"DATASET_PATH: {path}: the hub cannot be reached ({type(error).__name__}). connect, "
            "or give a local file with --dataset-path FILE.jsonl."
        ) from None
    return f"{HUB}{name}@{sha}", f"{HUB}{name}@{sha}"


def hub_rows(path: str) -> Iterator[tuple[int, Any]]:
    """(number, row) of the `train` split of a hub dataset, streamed without being stored."""
    try:
        import datasets
    except ImportError:
        raise EnvironmentFailure(
            f"DATASET_PATH: {path} needs the datasets package. run: pip install datasets."
        ) from None
    name, _, revision = path.removeprefix(HUB).partition("@")
    try:
        yield from enumerate(
            datasets.load_dataset(name, revision=revision or None, split="train", streaming=True), 1
        )
    except Exception as error:  # as above
        brief = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise EnvironmentFailure(
            f"DATASET_PATH: {path} could not be read ({brief}). connect and check its name, "
            "or give a local file."
        ) from None


class Deduplicator:
    """Says whether an example shares `n` words in a row with one that it let pass before (FAST
    drops such examples; n = 20).

    Remembers 64-bit hashes, 8 bytes a word, in sorted runs that double in length; so two different
    n-grams are taken for one with a chance of about 1e-11 a look-up among a hundred million.
    """

    def __init__(self, n: int) -> None:
        self.n, self.runs, self.n_dropped = n, [], 0
        # (n,) wraps around, as is meant
        self.powers = np.cumprod(np.full(n, 0x9E3779B97F4A7C15, np.uint64))

    def is_new(self, example: Example) -> bool:
        """Whether no earlier example shares n words in a row with this one, which is then kept."""
        grams = self._grams(" ".join(message["content"] for message in example.messages).lower())
        if not len(grams):
            return True
        for run in self.runs:
            if (run[np.minimum(np.searchsorted(run, grams), len(run) - 1)] == grams).any():
                self.n_dropped += 1
                return False
        self.runs.append(grams)
        while len(self.runs) > 1 and len(self.runs[-2]) <= 2 * len(self.runs[-1]):
            self.runs[-2:] = [np.sort(np.concatenate(self.runs[-2:]), kind="stable")]
        return True

    def _grams(self, text):
        """Sorted hashes of the n-grams of a text; so many at a time that a long text takes little
        memory besides."""
        words = (match.group() for match in re.finditer(r"\S+", text))
        found, rest = [], np.zeros(0, np.uint64)
        while hashed := [
            blake2b(word.encode(), digest_size=8).digest()
            for word in itertools.islice(words, GRAMS_AT_ONCE)
        ]:
            word = np.concatenate([rest, np.frombuffer(b"".join(hashed), "<u8")])
            if len(word) >= self.n:
                found.append(
                    np.unique(
                        (np.lib.stride_tricks.sliding_window_view(word, self.n) * self.powers).sum(
                            1, dtype=np.uint64
                        )
                    )
                )
            rest = word[max(0, len(word) - self.n + 1) :]
        return np.unique(np.concatenate(found)) if found else rest[:0]


def _example(number, row, text_field, label_field):
    if not isinstance(row, dict):
        raise ValueError(f'expected a JSON object, got {_json_kind(row)}. write {{"text": ...}}.')
    # a field that was named goes before all others
    is_text = text_field != TEXT and row.get(text_field) is not None
    if is_text:
        messages = [{"role": "user", "content": _content(row[text_field], text_field)}]
    elif row.get("messages") is not None:
        messages = _messages(row["messages"], "messages", "role", "content", row.get("system"))
    elif row.get("conversations") is not None:
        messages = _messages(
            row["conversations"], "conversations", "from", "value", row.get("system")
        )
    elif text_field in row:
        is_text = True
        messages = [{"role": "user", "content": _content(row[text_field], text_field)}]
    else:
        raise ValueError(_without_text(row, text_field))
    return Example(number, messages, is_text, _label(row, label_field))


def _json_kind(value):
    """What JSON calls a value, for messages."""
    if value == [] or value == {}:
        return f"an empty {'list' if value == [] else 'object'}"
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), "a boolean" if isinstance(value, bool) else "a number")


def _label(row, field):
    """The label as text; None where there is none, also where tables write an empty cell or NaN."""
    label = row.get(field) if field else None
    if label is None or label != label or not str(label).strip():
        return None
    return _encodable(str(label), field)


def _without_text(row, text_field):
    """What is wrong with a row that has none of the fields that are read, and what its fields
    suggest."""

    def shown(name):
        return (name if name.isprintable() else repr(name))[:60]

    what = (
        f"has no {text_field}, messages or conversations (its fields: "
        f"{', '.join(shown(name) for name in list(row)[:8]) or 'none'})"
    )
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            is_dialogue = set(ROLE_KEYS) & set(value[0]) and set(CONTENT_KEYS) & set(value[0])
            return f"{what}. " + (
                f"its field {shown(name)} holds a dialogue: name it messages."
                if is_dialogue
                else f"its field {shown(name)} holds rows: write these one a line."
            )
    for first, second in PAIRS:
        if isinstance(row.get(first), str) and isinstance(row.get(second), str):
            return (
                f'{what}. write {{"messages": [{{"role": "user", "content": {first}}}, {{"role": '
                '"assistant", "content": '
                f"{second}}}]}}, or take one of them with --text-field {first}."
            )
    texts = [name for name, value in row.items() if isinstance(value, str) and shown(name) == name]
    example = (
        f", for example --text-field {max(texts, key=lambda name: len(row[name]))}"
        if texts
        else " with --text-field"
    )
    return f"{what}. add one, or name yours{example}."


def _messages(turns, name, role_key, content_key, system=None):
    """The turns of a dialogue as [{"role", "content"}]; a text in the row's field `system` is its
    first turn."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(
            f"{name}: expected a list of turns, got {_json_kind(turns)}. "
            f'write [{{"{role_key}": ..., "{content_key}": ...}}].'
        )
    messages = []
    for i, turn in enumerate(turns):
        keys = [
            next((key for key in known if key in turn), None) if isinstance(turn, dict) else None
            for known in (ROLE_KEYS, CONTENT_KEYS)
        ]
        calls = [
            key
            for key in ("tool_calls", "function_call")
            if isinstance(turn, dict) and turn.get(key)
        ]
        if calls:
            raise ValueError(
                f"{name}[{i}] calls a tool ({calls[0]}), which is not text. write the call into "
                f"its {content_key} and remove {calls[0]}, or remove the row."
            )
        if None in keys:
            raise ValueError(f"{name}[{i}] has no {role_key} and {content_key}. write both.")
        role, content = (turn[key] for key in keys)
        known = SHAREGPT_ROLES.get(role.strip().lower()) if isinstance(role, str) else None
        if known is None:
            raise ValueError(
                f"{name}[{i}] has the unknown {keys[0]} {role!r:.40}. use system, user, "
                "assistant or tool."
            )
        where = f"{name}[{i}].{keys[1]}"
        messages.append({"role": known, "content": _content(_joined_parts(content, where), where)})
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _content(system, "system")})
    return messages


def _joined_parts(content, where):
    """A content that is a list of parts as one text, a line for each; parts other than text are
    refused."""
    if (
        not isinstance(content, list)
        or not content
        or not all(isinstance(part, dict) for part in content)
    ):
        return content
    for i, part in enumerate(content):
        kind = part.get("type", "text")
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where}[{i}] is a part of type {kind!r:.40}, not text. remove the part or the "
                "row, or write it as text."
            )
    return "\n".join(part["text"] for part in content)


def _content(value, name):
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not text. write a JSON string.")
    if not value.strip():
        raise ValueError(f"{name} is empty. remove the row or give it text.")
    return _encodable(value, name)


def _encodable(value, name):
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} holds half of a surrogate pair, which no tokenizer and no file can hold. "
            "remove it."
        ) from None
    return value
