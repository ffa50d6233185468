"""Examples as tokens: rendering the model's chat template, tokenising, and the kind and role of every token."""
import functools
from dataclasses import dataclass

import numpy as np

from fastsae.errors import InputError
from fastsae.sources import Example, place, read_dataset  # noqa: F401  (offered here too: examples and their tokens go together)

CONTENT, TEMPLATE, SHARED_PREFIX = 0, 1, 2          # values of token_kind
ROLES = ("none", "system", "user", "assistant", "tool")  # values of token_role; none = the template itself, or plain text


@dataclass
class Tokens:
    """One tokenised example: arrays of equal length, and what happened on the way."""

    ids: np.ndarray    # (length,) int32
    kind: np.ndarray   # (length,) uint8
    role: np.ndarray   # (length,) uint8
    truncated: bool = False
    n_control_strings: int = 0  # template control strings found in the data, kept as plain text


class ChatTokenizer:
    """Turns examples into tokens as the model's own chat template has them; text from the data stays text.

    `tokenizer`: a fast Hugging Face tokenizer. `chat_template` False gives plain tokenisation of `text` rows (with the
    tokenizer's own BOS). `date` is handed to templates that print today's date, so that runs are repeatable.
    """

    def __init__(self, tokenizer, *, chat_template=True, max_length=None, date="", dataset_name="dataset", special_tokens=True):
        self.special_tokens = special_tokens and not chat_template  # BOS and the like; a template writes its own
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

    @functools.cached_property
    def around(self):
        """(ids before, ids after) every example."""
        return added_tokens(self.tokenizer) if self.special_tokens else ([], [])

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
                raise InputError(f"{place(self.dataset_name, example.line)}: is a dialogue, which needs the chat template. "
                                 "set --use-chat-template.")
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
            raise InputError(f"{place(self.dataset_name, example.line)}: the chat template refuses this dialogue ({what}). "
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
        out = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, **options)
        return [(np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2))
                for ids, offsets in zip(out["input_ids"], out["offset_mapping"])]

    def _tokens(self, parts, spans):
        before, after = (np.array(added, np.int32) for added in self.around)
        ids = np.concatenate([before, *(ids for ids, _, _ in parts), after])
        nowhere = [np.zeros((len(added), 2), np.int64) for added in (before, after)]  # in the text
        offsets = np.concatenate([nowhere[0], *(offsets for _, offsets, _ in parts), nowhere[1]])
        kind = np.full(len(ids), TEMPLATE, np.uint8)
        role = np.zeros(len(ids), np.uint8)
        for start, end, role_number in spans:
            inside = (offsets[:, 0] < end) & (offsets[:, 1] > start)
            kind[inside], role[inside] = CONTENT, role_number
        n = self.max_length
        return Tokens(ids[:n], kind[:n], role[:n], n is not None and len(ids) > n, sum(is_control for *_, is_control in parts))


def added_tokens(tokenizer):
    """(ids before, ids after) that the tokenizer puts around a text: BOS and the like."""
    out = tokenizer("a", return_special_tokens_mask=True)
    own = np.flatnonzero(np.array(out["special_tokens_mask"]) == 0)
    return out["input_ids"][:own[0]], out["input_ids"][own[-1] + 1:]


@dataclass
class TokenTable:
    """All examples of a run: their tokens one after the other, 6 bytes each, and where each example came from."""

    ids: np.ndarray      # (n_tokens,) int32
    kind: np.ndarray     # (n_tokens,) uint8
    role: np.ndarray     # (n_tokens,) uint8
    lengths: np.ndarray  # (n_examples,) int32
    lines: np.ndarray    # (n_examples,) int32, line number in the dataset (in blocks: number of the block)
    n_truncated: int = 0
    n_control_strings: int = 0

    @property
    def starts(self):
        """(n_examples + 1,) first row of each example, and the number of tokens."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])


def tokenise(examples, tokenizer, batch_size=512):
    """A TokenTable of an iterable of examples, by `tokenizer` (a ChatTokenizer), a batch at a time so that no text is kept."""
    columns, lengths, lines, counts = ([], [], []), [], [], [0, 0]

    def take(batch):
        tokens = tokenizer(batch)
        for column, name in zip(columns, ("ids", "kind", "role")):
            column.append(np.concatenate([getattr(t, name) for t in tokens]))
        lengths.extend(len(t.ids) for t in tokens)
        lines.extend(example.line for example in batch)
        counts[0] += sum(t.truncated for t in tokens)
        counts[1] += sum(t.n_control_strings for t in tokens)

    batch = []
    for example in examples:
        batch.append(example)
        if len(batch) == batch_size:
            take(batch)
            batch = []
    if batch:
        take(batch)
    ids, kind, role = (np.concatenate(column) if column else np.zeros(0, np.int32) for column in columns)
    return TokenTable(ids, kind, role, np.array(lengths, np.int32), np.array(lines, np.int32), *counts)


def cut_blocks(table, block_length):
    """The same tokens as blocks of `block_length` (block training): (TokenTable, tokens left over at the end)."""
    n, rest = divmod(len(table.ids), block_length)
    end = n * block_length
    return TokenTable(table.ids[:end], table.kind[:end], table.role[:end], np.full(n, block_length, np.int32),
                      np.arange(1, n + 1, dtype=np.int32), 0, table.n_control_strings), rest


def mark_shared_prefix(table):
    """Set `kind` to SHARED_PREFIX on the leading tokens that all examples have in common; returns how many.

    Causal attention gives these the same activations in every example. If the common part is all of some example (equal
    texts, or one example only), just the template's own leading tokens count.
    """
    starts, shortest = table.starts[:-1], int(table.lengths.min())
    shared = next((i for i in range(shortest) if (table.ids[starts + i] != table.ids[i]).any()), shortest)
    if shared == shortest:
        content = np.flatnonzero(table.kind[:shared] == CONTENT)
        shared = int(content[0]) if len(content) else 0
    for i in range(shared):
        table.kind[starts + i] = SHARED_PREFIX
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
