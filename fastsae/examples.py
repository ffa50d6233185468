"""Examples: reading a dataset, rendering the model's chat template, tokenising, and the kind and role of every token."""
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastsae.errors import InputError

CONTENT, TEMPLATE, SHARED_PREFIX = 0, 1, 2          # values of token_kind
ROLES = ("none", "system", "user", "assistant", "tool")  # values of token_role; none = the template itself, or plain text
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
                  "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool", "function": "tool",
                  "observation": "tool"}
MAX_REPORTED = 10


@dataclass
class Example:
    """One row of a dataset. `line` is its line number, or its place in a JSON array (both from 1)."""

    line: int
    messages: list          # [{"role", "content"}]
    is_text: bool = False   # the row had a plain text, which became one user turn
    label: str | None = None


@dataclass
class Tokens:
    """One tokenised example: arrays of equal length, and what happened on the way."""

    ids: np.ndarray    # (length,) int32
    kind: np.ndarray   # (length,) uint8
    role: np.ndarray   # (length,) uint8
    truncated: bool = False
    n_control_strings: int = 0  # template control strings found in the data, kept as plain text
    spans: list = field(default_factory=list)


def read_dataset(path, *, text_field="text", label_field=None, max_examples=None):
    """Examples of a JSONL file or a JSON array, in order. Raises InputError naming file and line for up to ten bad rows."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: is not UTF-8. convert it, for example: iconv -f UTF-16 -t UTF-8 {path.name}.") from None
    examples, problems = [], []
    for number, row in _rows(text, path):
        if max_examples is not None and len(examples) >= max_examples:
            break
        try:
            if isinstance(row, ValueError):
                raise row
            examples.append(_example(number, row, text_field, label_field))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            if len(problems) > MAX_REPORTED:
                break
    if problems:
        more = [f"{path}: more bad rows follow. mend these first."] if len(problems) > MAX_REPORTED else []
        raise InputError("\n".join(problems[:MAX_REPORTED] + more))
    if len(examples) < 2:
        raise InputError(f"{path}: has {len(examples)} examples. at least 2 are needed, one to train on and one to validate.")
    return examples


def _rows(text, path):
    """(number, parsed row or ValueError) for each row of JSONL text, or each item of a JSON array."""
    if text.lstrip()[:1] == "[":
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: bad JSON ({error.msg}, column {error.colno}). mend the array.") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:1: bad JSON ({error}). mend the array.") from None
        yield from enumerate(items, 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            yield number, ValueError(f"bad JSON ({error.msg}, column {error.colno}). each line must be one JSON object.")
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"bad JSON ({str(error).split(';')[0]}). each line must be one JSON object.")


def _example(number, row, text_field, label_field):
    if not isinstance(row, dict):
        raise ValueError("the row is no JSON object. write {\"text\": ...}.")
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages", "role", "content")
    elif row.get("conversations") is not None:
        messages = _messages(row["conversations"], "conversations", "from", "value")
    elif text_field in row:
        messages = [{"role": "user", "content": _content(row[text_field], text_field)}]
    else:
        fields = ", ".join(name if name.isprintable() else repr(name) for name in list(row)[:8]) or "none"
        raise ValueError(f"has no {text_field}, messages or conversations (its fields: {fields}). add one, or name yours with --text-field.")
    label = row.get(label_field) if label_field else None
    is_text = row.get("messages") is None and row.get("conversations") is None
    return Example(number, messages, is_text, None if label is None else _encodable(str(label), label_field))


def _messages(turns, name, role_key, content_key):
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name} is no non-empty list. write [{{\"{role_key}\": ..., \"{content_key}\": ...}}].")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
            raise ValueError(f"{name}[{i}] has no {role_key} and {content_key}. write both.")
        role = SHAREGPT_ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise ValueError(f"{name}[{i}] has the unknown {role_key} {turn[role_key]!r:.40}. use system, user, assistant or tool.")
        messages.append({"role": role, "content": _content(turn[content_key], f"{name}[{i}].{content_key}")})
    return messages


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
        raise ValueError(f"{name} holds half of a surrogate pair, which no tokenizer and no file can hold. remove it.") from None
    return value


class ChatTokenizer:
    """Turns examples into tokens as the model's own chat template has them; text from the data stays text.

    `tokenizer`: a fast Hugging Face tokenizer. `chat_template` False gives plain tokenisation of `text` rows (with the
    tokenizer's own BOS). `date` is handed to templates that print today's date, so that runs are repeatable.
    """

    def __init__(self, tokenizer, *, chat_template=True, max_length, date="", dataset_name="dataset"):
        self.tokenizer, self.max_length, self.date, self.dataset_name = tokenizer, max_length, date, dataset_name
        self.chat_template = chat_template
        if chat_template and not tokenizer.chat_template:
            raise InputError("MODEL_NAME: this model has no chat template. choose an instruct model, or set --no-use-chat-template.")
        template_text = str(tokenizer.chat_template) if chat_template else ""
        special = set(tokenizer.all_special_tokens)
        self.control_strings = sorted(
            (token for token in tokenizer.get_added_vocab() if token.strip() and (token in special or token in template_text
             or (token.startswith("<") and token.endswith(">")))), key=len, reverse=True)
        self._pieces = {}

    def __call__(self, examples, batch_size=512):
        """A list of Tokens for a list of Examples; tokenises in batches (the tokenizer's own threads)."""
        result = []
        for start in range(0, len(examples), batch_size):
            result += self._batch(examples[start:start + batch_size])
        return result

    def _batch(self, examples):
        rendered = [self.render(example) for example in examples]
        segments, owner = [], []  # whole texts, cut only around control strings found in the data
        for i, (text, spans) in enumerate(rendered):
            for start, end, is_control in self._cut(text, spans):
                segments.append((start, text[start:end], is_control))
                owner.append(i)
        encoded = self._encode([s for _, s, c in segments if not c], split_special=False)
        encoded_control = self._encode([s for _, s, c in segments if c], split_special=True)
        plain, control = iter(encoded), iter(encoded_control)
        parts = [[] for _ in examples]
        for i, (start, _, is_control) in zip(owner, segments):
            ids, offsets = next(control if is_control else plain)
            parts[i].append((ids, offsets + start, is_control))
        return [self._tokens(parts[i], rendered[i][1]) for i in range(len(examples))]

    def render(self, example):
        """(text, spans): the templated text and the (start, end, role number) of each message's content in it."""
        if not self.chat_template:
            if not example.is_text:
                raise InputError(f"{self.dataset_name}:{example.line}: is a dialogue, which needs the chat template. set --use-chat-template.")
            text = example.messages[0]["content"]
            return text, [(0, len(text), 0)]
        text = self._apply(example, example.messages)
        key = tuple(message["role"] for message in example.messages)
        if key not in self._pieces:  # what the template writes around the contents, found with marks nobody types
            marks = [f"\ue000{i}\ue001" for i in range(len(key))]
            try:
                skeleton = self._apply(example, [{"role": role, "content": mark} for role, mark in zip(key, marks)])
                pieces = [skeleton]
                for mark in marks:
                    before, found, after = pieces.pop().partition(mark)
                    pieces += [before, after] if found else [None, ""]
                self._pieces[key] = None if None in pieces else pieces
            except InputError:
                self._pieces[key] = None
        return text, self._content_spans(text, self._pieces[key], example.messages)

    def _apply(self, example, messages):
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, date_string=self.date)
        except Exception as error:  # templates refuse by raising whatever their author chose
            what = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
            raise InputError(f"{self.dataset_name}:{example.line}: the chat template refuses this dialogue ({what}). "
                             "reorder or remove its turns.") from None

    @staticmethod
    def _content_spans(text, pieces, messages):
        roles = [ROLES.index(message["role"]) for message in messages]
        for change in (str, str.strip):  # most templates insert contents as they are or trimmed
            contents = [change(message["content"]) for message in messages]
            if pieces and "".join(a + b for a, b in zip(pieces, contents)) + pieces[-1] == text:
                spans, position = [], 0
                for piece, content, role in zip(pieces, contents, roles):
                    position += len(piece)
                    spans.append((position, position + len(content), role))
                    position += len(content)
                return spans
        spans, position = [], 0  # a template that rewrites contents: find what is left of each, in order
        for message, role in zip(messages, roles):
            content = message["content"].split("</think>")[-1].strip()
            found = text.find(content, position) if content else -1
            if found >= 0:
                spans.append((found, found + len(content), role))
                position = found + len(content)
        return spans

    def _cut(self, text, spans):
        """Pieces (start, end, is_control) of a text, cut around each control string inside a message."""
        cuts = []
        for start, end, _ in spans:
            for control in self.control_strings:
                at = text.find(control, start, end)
                while at >= 0:
                    if not any(a < at + len(control) and at < b for a, b in cuts):
                        cuts.append((at, at + len(control)))
                    at = text.find(control, at + 1, end)
        pieces, position = [], 0
        for start, end in sorted(cuts):
            pieces += [(position, start, False)] * (position < start) + [(start, end, True)]
            position = end
        return pieces + [(position, len(text), False)] * (position < len(text) or not pieces)

    def _encode(self, texts, *, split_special):
        """[(ids, offsets)] of texts; with `split_special` no control token is recognised in them."""
        if not texts:
            return []
        options = {"split_special_tokens": True} if split_special else {}
        out = self.tokenizer(texts, add_special_tokens=not self.chat_template and not split_special,
                             return_offsets_mapping=True, return_attention_mask=False, **options)
        return [(np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2))
                for ids, offsets in zip(out["input_ids"], out["offset_mapping"])]

    def _tokens(self, parts, spans):
        ids = np.concatenate([ids for ids, _, _ in parts])
        offsets = np.concatenate([offsets for _, offsets, _ in parts])
        kind = np.full(len(ids), TEMPLATE, np.uint8)
        role = np.zeros(len(ids), np.uint8)
        for start, end, role_number in spans:
            inside = (offsets[:, 0] < end) & (offsets[:, 1] > start)
            kind[inside], role[inside] = CONTENT, role_number
        n = self.max_length
        return Tokens(ids[:n], kind[:n], role[:n], len(ids) > n, sum(is_control for *_, is_control in parts))


def mark_shared_prefix(tokens):
    """Set `kind` to SHARED_PREFIX on the leading tokens that all examples have in common; returns how many.

    Causal attention gives these the same activations in every example. If the common part is all of some example (equal
    texts, or one example only), just the template's own leading tokens count.
    """
    first = tokens[0].ids
    shared = min(len(t.ids) for t in tokens)
    for t in tokens[1:]:
        different = np.flatnonzero(first[:shared] != t.ids[:shared])
        shared = int(different[0]) if len(different) else shared
    if shared == min(len(t.ids) for t in tokens):
        content = np.flatnonzero(tokens[0].kind[:shared] == CONTENT)
        shared = int(content[0]) if len(content) else 0
    for t in tokens:
        t.kind[:shared] = SHARED_PREFIX
    return shared


def pad_activations(flat, seq_lengths):
    """(n_tokens, d) rows of consecutive examples -> ((n_examples, longest, d) zero-padded, (n_examples, longest) mask)."""
    lengths = np.asarray(seq_lengths)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    padded = np.zeros((*mask.shape, flat.shape[1]), flat.dtype)
    padded[mask] = flat
    return padded, mask


def flatten_activations(padded, mask, exclude_padding=True):
    """The inverse of `pad_activations`: (n_tokens, d) real rows in order, or all positions if `exclude_padding` is False."""
    return padded[mask] if exclude_padding else padded.reshape(-1, padded.shape[-1])
