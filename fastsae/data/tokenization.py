"""Examples as tokens: rendering the model's chat template, tokenising, and the kind and role of
every token."""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.data import long_texts

# offered here too: examples and their tokens go together
from fastsae.data.datasets import Example, place, read_dataset  # noqa: F401
from fastsae.runtime.errors import InputError

# for templates that print today's date, pinned so that runs repeat
TEMPLATE_DATE = "26 Jul 2024"
CONTENT, TEMPLATE, SHARED_PREFIX = 0, 1, 2  # values of token_kind
BATCH_CHARACTERS = 1 << 22  # of the examples tokenised together
# characters searched for a content when others were missing
NEIGHBOURHOOD = 1 << 16
# turns of the longest dialogues whose template text is kept for the next one
REMEMBERED_TURNS = 100
# values of token_role; none = the template itself, or plain text
ROLES = ("none", "system", "user", "assistant", "tool")


@dataclass
class Tokens:
    """One tokenised example: arrays of equal length, and what happened on the way."""

    ids: np.ndarray  # (length,) int32
    kind: np.ndarray  # (length,) uint8
    role: np.ndarray  # (length,) uint8
    truncated: bool = False
    n_control_strings: int = 0  # template control strings found in the data, kept as plain text


class ChatTokenizer:
    """Turns examples into tokens as the model's own chat template has them; text from the data
    stays text.

    `tokenizer`: a fast Hugging Face tokenizer. `chat_template` False gives plain tokenisation of
    `text` rows (with the tokenizer's own BOS), as does a tokenizer without a template: then
    `lacks_template` is True. `date` is handed to templates that print today's
    date, so that runs are repeatable.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: bool = True,
        max_length: int | None = None,
        date: str = "",
        dataset_name: Path | str = "dataset",
        special_tokens: bool = True,
    ) -> None:
        self.lacks_template = chat_template and not tokenizer.chat_template
        chat_template = chat_template and not self.lacks_template
        # BOS and the like; a template writes its own
        self.special_tokens = special_tokens and not chat_template
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.date = date
        self.dataset_name = dataset_name
        self.chat_template = chat_template
        template_text = str(tokenizer.chat_template) if chat_template else ""
        special = set(tokenizer.all_special_tokens)
        self._control = long_texts.any_of(
            token
            for token in tokenizer.get_added_vocab()
            if token.strip()
            and (
                token in special
                or token in template_text
                or (token.startswith("<") and token.endswith(">"))
            )
        )
        self._pieces, self._control_ids = {}, {}

    @functools.cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """(ids before, ids after) every example."""
        return added_tokens(self.tokenizer) if self.special_tokens else ([], [])

    @functools.cached_property
    def joints(self) -> re.Pattern[str] | None:
        """Where long texts may be cut (long_texts.joint_pattern); None if this tokenizer has to
        read them whole."""
        return long_texts.joint_pattern(self.tokenizer)

    def __call__(self, examples: Sequence[Example], batch_size: int = 512) -> list[Tokens]:
        """A list of Tokens for a list of Examples; tokenises in batches (the tokenizer's own
        threads)."""
        result = []
        for start in range(0, len(examples), batch_size):
            result += self._batch(examples[start : start + batch_size])
        return result

    def _batch(self, examples):
        rendered = [self.render(example) for example in examples]
        short = [i for i, (text, _) in enumerate(rendered) if not long_texts.is_long(len(text))]
        # whole but for control strings in the data
        segments = [(i, *piece) for i in short for piece in self._cut(*rendered[i])]
        encoded = self._encoded(
            [(rendered[i][0][start:end], is_control) for i, start, end, is_control in segments]
        )
        parts, n_control = {i: [] for i in short}, dict.fromkeys(short, 0)
        for (i, start, _, is_control), (ids, offsets) in zip(segments, encoded):
            parts[i].append((ids, offsets + start))
            n_control[i] += is_control
        return [
            self._tokens(parts[i], n_control[i], spans) if i in parts else self._long(text, spans)
            for i, (text, spans) in enumerate(rendered)
        ]

    def _long(self, text, spans):
        """Tokens of a long text: no more of it is tokenised than `max_length` needs."""
        n_control = sum(is_control for *_, is_control in self._cut(text, spans))
        try:
            return self._tokens(self._long_parts(text, spans), n_control, spans)
        except long_texts.NotLocal:
            self.joints = None  # no windows for this tokenizer
            return self._tokens(self._long_parts(text, spans), n_control, spans)

    def _long_parts(self, text, spans):
        """Yield (ids, offsets): pieces between control strings, short ones together and long ones
        window by window."""
        for group in long_texts.in_groups(
            self._cut(text, spans), size=lambda piece: piece[1] - piece[0]
        ):
            start, end, _ = group[0]
            if self.joints and long_texts.is_long(end - start):
                parts = long_texts.encode_windows(
                    text[start:end], self.joints, lambda piece: self._encode([piece])[0]
                )
                yield from ((ids, offsets + start) for ids, offsets in parts)
            else:
                encoded = self._encoded(
                    [(text[start:end], is_control) for start, end, is_control in group]
                )
                yield from (
                    (ids, offsets + start) for (ids, offsets), (start, *_) in zip(encoded, group)
                )

    def render(self, example: Example) -> tuple[str, list[tuple[int, int, int]]]:
        """(text, spans): the templated text and the (start, end, role number) of each message's
        content in it."""
        if not self.chat_template:
            if not example.is_text:
                why = (
                    "and this model has no chat template. choose an instruct model, "
                    "or give each text without roles."
                    if self.lacks_template
                    else "which needs the chat template. set --use-chat-template."
                )
                raise InputError(f"{place(self.dataset_name, example.line)}: is a dialogue, {why}")
            text = example.messages[0]["content"]
            return text, [(0, len(text), 0)]
        text = self._apply(example, example.messages)
        return text, self._content_spans(text, self._template_pieces(example), example.messages)

    def _template_pieces(self, example):
        """What the template writes around the contents, found with marks nobody types; None if it
        does not insert them so."""
        key = tuple(message["role"] for message in example.messages)
        if key in self._pieces:
            return self._pieces[key]
        marks = [f"\ue000{i}\ue001" for i in range(len(key))]
        try:
            skeleton = self._apply(
                example, [{"role": role, "content": mark} for role, mark in zip(key, marks)]
            )
            pieces = _around(skeleton, marks)
        except InputError:
            pieces = None
        if len(key) <= REMEMBERED_TURNS:
            self._pieces[key] = pieces
        return pieces

    def _apply(self, example, messages):
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, date_string=self.date
            )
        except Exception as error:  # templates refuse by raising whatever their author chose
            what = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
            raise InputError(
                f"{place(self.dataset_name, example.line)}: the chat template refuses this "
                f"dialogue ({what}). reorder or remove its turns."
            ) from None

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
        return _spans_found(text, messages, roles)

    def _cut(self, text, spans):
        """Yield the pieces (start, end, is_control) of a text, cut around each control string
        inside a message."""
        position = 0
        for start, end, _ in spans:
            for control in self._control.finditer(text, start, end):
                if position < control.start():
                    yield position, control.start(), False
                yield control.start(), control.end(), True
                position = control.end()
        if position < len(text) or not position:
            yield position, len(text), False

    def _encoded(self, segments):
        """(ids, offsets) of each (text, is_control), in order."""
        plain = iter(self._encode([text for text, is_control in segments if not is_control]))
        return [
            self._encoded_control(text) if is_control else next(plain)
            for text, is_control in segments
        ]

    def _encoded_control(self, text):
        if text not in self._control_ids:
            self._control_ids[text] = self._encode([text], split_special=True)[0]
        return self._control_ids[text]

    def _encode(self, texts, *, split_special=False):
        """[(ids, offsets)] of texts; `split_special`: no control token is recognised in them."""
        options = {"split_special_tokens": True} if split_special else {}
        found = []
        for group in long_texts.in_groups(texts):
            out = self.tokenizer(
                group,
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                **options,
            )
            found += [
                (np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2))
                for ids, offsets in zip(out["input_ids"], out["offset_mapping"])
            ]
        return found

    def _tokens(self, parts, n_control, spans):
        """Tokens of (ids, offsets in the text), of which no more are taken than needed.

        Those that overlap a span are content, with the span's role.
        """
        n, (before, after) = self.max_length, self.around
        # in order, none within another
        begins, ends, numbers = np.array(spans, np.int64).reshape(-1, 3).T
        columns = [_of_template(before)]
        n_tokens = len(before)
        for ids, offsets in parts:
            # (n,) span that begins last before the token's end, -1: none
            last = np.searchsorted(begins, offsets[:, 1]) - 1
            inside = (last >= 0) & (np.append(ends, 0)[last] > offsets[:, 0])
            columns.append(
                (
                    ids,
                    np.where(inside, CONTENT, TEMPLATE).astype(np.uint8),
                    np.where(inside, np.append(numbers, 0)[last], 0).astype(np.uint8),
                )
            )
            n_tokens += len(ids)
            if n is not None and n_tokens > n:
                break
        columns.append(_of_template(after))
        ids, kind, role = map(np.concatenate, zip(*columns))
        return Tokens(ids[:n], kind[:n], role[:n], n is not None and len(ids) > n, n_control)


def _of_template(ids):
    """(ids, kinds, roles) of tokens that the tokenizer adds."""
    return (
        np.array(ids, np.int32),
        np.full(len(ids), TEMPLATE, np.uint8),
        np.zeros(len(ids), np.uint8),
    )


def _around(skeleton, marks):
    """The text before, between and behind the marks; None if one is missing or out of order."""
    pieces, position = [], 0
    for mark in marks:
        found = skeleton.find(mark, position)
        if found < 0:
            return None
        pieces.append(skeleton[position:found])
        position = found + len(mark)
    return [*pieces, skeleton[position:]]


def _spans_found(text, messages, roles):
    """Spans for a template that rewrites contents: what is left of each, in order.

    Contents that are not there cost a search of all that follows; when that has been searched 64
    times over, only the neighbourhood is.
    """
    spans, position, budget = [], 0, 64 * len(text)
    for message, role in zip(messages, roles):
        content = message["content"].split("</think>")[-1].strip()
        end = len(text) if budget > 0 else position + len(content) + NEIGHBOURHOOD
        found = text.find(content, position, end) if content else -1
        if found < 0:
            budget -= len(text) - position
            continue
        spans.append((found, found + len(content), role))
        position = found + len(content)
    return spans


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids before, ids after) that the tokenizer puts around a text: BOS and the like."""
    out = tokenizer("a", return_special_tokens_mask=True)
    own = np.flatnonzero(np.array(out["special_tokens_mask"]) == 0)
    return out["input_ids"][: own[0]], out["input_ids"][own[-1] + 1 :]


@dataclass
class TokenTable:
    """All examples of a run: their tokens one after the other, 6 bytes each, and where each example
    came from."""

    ids: np.ndarray  # (n_tokens,) int32
    kind: np.ndarray  # (n_tokens,) uint8
    role: np.ndarray  # (n_tokens,) uint8
    lengths: np.ndarray  # (n_examples,) int32
    # (n_examples,) int32, line number in the dataset (in blocks: number of the block)
    lines: np.ndarray
    n_truncated: int = 0
    n_control_strings: int = 0
    # (n_examples,) int32, position of each example's first token; None: 0 for all
    positions: np.ndarray | None = None

    @property
    def has_content(self) -> bool:
        """Whether any token is of a text rather than of the template."""
        return bool((self.kind == CONTENT).any())

    @property
    def starts(self) -> np.ndarray:
        """(n_examples + 1,) first row of each example, and the number of tokens."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])


def token_batches(
    examples: Iterable[Example], tokenizer: ChatTokenizer, batch_size: int = 512
) -> Iterator[tuple[list[Tokens], list[int]]]:
    """Yield (the Tokens of some examples, their lines) until all are done; no text is kept."""
    batch: list[Example] = []
    size = 0
    for example in examples:
        batch.append(example)
        size += sum(len(message["content"]) for message in example.messages)
        if len(batch) == batch_size or size > BATCH_CHARACTERS:
            yield tokenizer(batch), [example.line for example in batch]
            batch, size = [], 0
    if batch:
        yield tokenizer(batch), [example.line for example in batch]


def tokenise(
    examples: Iterable[Example], tokenizer: ChatTokenizer, batch_size: int = 512
) -> TokenTable:
    """A TokenTable of an iterable of examples, by `tokenizer` (a ChatTokenizer), a batch at a time
    so that no text is kept."""
    columns: tuple[list[np.ndarray], ...] = ([], [], [])
    lengths: list[int] = []
    all_lines: list[int] = []
    counts = [0, 0]
    for tokens, lines in token_batches(examples, tokenizer, batch_size):
        for column, name in zip(columns, ("ids", "kind", "role")):
            column.append(np.concatenate([getattr(t, name) for t in tokens]))
        lengths.extend(len(t.ids) for t in tokens)
        all_lines.extend(lines)
        counts[0] += sum(t.truncated for t in tokens)
        counts[1] += sum(t.n_control_strings for t in tokens)
    ids, kind, role = (
        np.concatenate(column) if column else np.zeros(0, np.int32) for column in columns
    )
    return TokenTable(
        ids,
        kind,
        role,
        np.array(lengths, np.int32),
        np.array(all_lines, np.int32),
        n_truncated=counts[0],
        n_control_strings=counts[1],
    )


def cut_blocks(table: TokenTable, block_length: int) -> tuple[TokenTable, int]:
    """The same tokens as blocks of `block_length` (block training): (TokenTable, tokens left over
    at the end)."""
    n, rest = divmod(len(table.ids), block_length)
    end = n * block_length
    return TokenTable(
        table.ids[:end],
        table.kind[:end],
        table.role[:end],
        np.full(n, block_length, np.int32),
        np.arange(1, n + 1, dtype=np.int32),
        0,
        table.n_control_strings,
    ), rest


def cut_apart(
    table: TokenTable, block_length: int, *, own_positions: bool = False
) -> tuple[TokenTable, int]:
    """The tokens of `cut_blocks`, each dialogue's part of a block as an example of its own, so that
    no dialogue sees another: (TokenTable, tokens left over at the end).

    This is block-diagonal attention. Tokens have the positions that they have in the block, or
    with `own_positions` those from 0 on. The line of an example is the number of its block.
    """
    n, rest = divmod(len(table.ids), block_length)
    end = n * block_length
    edges = np.arange(0, end + 1, block_length)
    starts = np.unique(np.concatenate([table.starts[table.starts < end], edges]))
    begins = starts[:-1]
    return TokenTable(
        table.ids[:end],
        table.kind[:end],
        table.role[:end],
        np.diff(starts).astype(np.int32),
        (begins // block_length + 1).astype(np.int32),
        0,
        table.n_control_strings,
        None if own_positions else (begins % block_length).astype(np.int32),
    ), rest


def mark_shared_prefix(table: TokenTable) -> int:
    """Set `kind` to SHARED_PREFIX on the leading tokens that all examples have in common; returns
    how many.

    Causal attention gives these the same activations in every example. If the common part is all of
    some example (equal texts, or one example only), just the template's own leading tokens count.
    """
    starts, shortest = table.starts[:-1], int(table.lengths.min())
    shared = next(
        (i for i in range(shortest) if (table.ids[starts + i] != table.ids[i]).any()), shortest
    )
    if shared == shortest:
        content = np.flatnonzero(table.kind[:shared] == CONTENT)
        shared = int(content[0]) if len(content) else 0
    for i in range(shared):
        table.kind[starts + i] = SHARED_PREFIX
    return shared


def pad_activations(
    flat: np.ndarray, seq_lengths: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(n_tokens, d) rows of consecutive examples -> ((n_examples, longest, d) zero-padded,
    (n_examples, longest) mask)."""
    lengths = np.asarray(seq_lengths)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    padded = np.zeros((*mask.shape, flat.shape[1]), flat.dtype)
    padded[mask] = flat
    return padded, mask


def flatten_activations(
    padded: np.ndarray, mask: np.ndarray, exclude_padding: bool = True
) -> np.ndarray:
    """The inverse of `pad_activations`: (n_tokens, d) real rows in order, or all positions if
    `exclude_padding` is False."""
    return padded[mask] if exclude_padding else padded.reshape(-1, padded.shape[-1])
