"""Tokens of texts of any length: a window at a time, with the tokens that the whole text would
have.

A *joint* is a place that no token of the vocabulary crosses, for example between a letter and a
blank. Byte pair encoding and unigram models never merge across it, so what stands between two
joints has its tokens whatever stands elsewhere. What a pre-tokeniser or a normaliser looks at
beyond a joint is covered by CONTEXT joints on either side of a window, and neighbouring windows are
compared there.
"""

import re
import string
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

WINDOW = 1 << 16  # characters tokenised at a time
CONTEXT = 8  # joints tokenised on either side of a window, whose tokens are not kept
CALL_CHARACTERS = 1 << 20  # of several texts in one call of the tokenizer, about a second
CALL_PIECES = 4096  # likewise
NON_ASCII_RIGHT = "\u3001\u3002\uff0c"  # ideographic comma, full stop, full-width comma


class NotLocal(Exception):
    """Two windows disagree on tokens that both have: the tokenizer looks further than assumed."""


def is_long(n_characters: int) -> bool:
    """Whether a text is to be tokenised in windows."""
    return n_characters > 2 * WINDOW


def in_groups(pieces: Iterable, *, size: Callable[[Any], int] = len) -> Iterator[list]:
    """Lists of consecutive pieces of at most CALL_CHARACTERS together, by `size(piece)`; a long one
    goes alone."""
    group, total = [], 0
    for piece in pieces:
        characters = size(piece)
        if group and (
            total + characters > CALL_CHARACTERS or is_long(characters) or len(group) == CALL_PIECES
        ):
            yield group
            group, total = [], 0
        group.append(piece)
        total += characters
        if is_long(characters):
            yield group
            group, total = [], 0
    if group:
        yield group


def any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """A compiled pattern of the given strings, the longest first, in time that their number hardly
    changes."""
    tree = {}
    for text in strings:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(_alternatives(tree) or "(?!)")


def _alternatives(node):
    branches = [
        re.escape(first) + _alternatives(rest) for first, rest in sorted(node.items()) if first
    ]
    if not branches:
        return ""
    if len(branches) == 1 and "" not in node:
        return branches[0]
    return f"(?:{'|'.join(branches)}){'?' if '' in node else ''}"


def joint_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """A pattern that matches, with no width, at the joints of a fast tokenizer; None if none can be
    shown."""
    model = tokenizer.backend_tokenizer.model
    if type(model).__name__ not in ("BPE", "Unigram") or getattr(model, "end_of_word_suffix", None):
        return None
    known, content = _vocabulary(tokenizer)
    # these three can compose with what follows
    punctuation = "".join(set(string.punctuation) - set("<=>"))
    right = [c for c in " \n\t" + punctuation + NON_ASCII_RIGHT if known(c)]
    digits = [c for c in string.digits if known(c)]
    ideograph = rb"(?:[\xe4-\xe9][\x80-\xbf]{2}|\0[\x80-\xbf]{1,2})"
    sides = [
        ("(?<=[A-Za-z])", rb"[A-Za-z]", right + digits),
        ("(?<=[0-9])", rb"[0-9]", right),
        (r"(?<=[^\W\d_])(?<=[^\x00-\x7f])", rb"[\x80-\xff]", [c for c in right if c.isascii()]),
        ("(?<=[\u4e00-\u9fff])", ideograph, NON_ASCII_RIGHT),
    ]
    found = []
    for left, left_bytes, characters in sides:
        apart = [c for c in characters if not _crossed(content, left_bytes, c.encode())]
        if apart:
            found.append(f"{left}(?=[{re.escape(''.join(apart))}])")
    return re.compile("|".join(found)) if found else None


def _crossed(content, left, right):
    """Whether a token holds `left` and then `right`, or ends in a part of it (bytes of one
    character)."""
    parts = [re.escape(right)] + [re.escape(right[:i]) + rb"\0" for i in range(1, len(right))]
    return re.search(left + rb"(?:" + rb"|".join(parts) + rb")", content) is not None


def _vocabulary(tokenizer):
    """(whether a character has a token or bytes of its own, all tokens as UTF-8 between NULs)."""
    added = tokenizer.get_added_vocab()
    tokens = [token for token in tokenizer.get_vocab() if token not in added]
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is not None and b"ByteLevel" in decoder.__getstate__():
        of_character = {character: byte for byte, character in _byte_characters().items()}
        encoded = [bytes(of_character[c] for c in token if c in of_character) for token in tokens]
        return lambda c: True, b"\0".join(
            [b"", *encoded, *(token.encode() for token in added), b""]
        )
    plain = {token.replace("\u2581", " ") for token in tokens}
    return plain.__contains__, b"\0".join(
        [b"", *(t.encode() for t in plain), *(t.encode() for t in added), b""]
    )


def _byte_characters():
    """{byte: the character that stands for it} of byte-level vocabularies (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{b: chr(b) for b in shown}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


def windows(text: str, joints: re.Pattern[str]) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (low, start, end, high, middle): the text from `start` to `end`, to be tokenised from
    `low` to `high`.

    All five are joints or ends of the text. The tokens from `end` to `middle` are to be those that
    the next window has there.
    """
    low = start = 0
    near = deque(maxlen=2 * CONTEXT + 1)
    for match in joints.finditer(text):
        near.append(match.start())
        if len(near) == near.maxlen and near[CONTEXT] - start >= WINDOW:
            yield low, start, near[CONTEXT], near[-1], near[CONTEXT + CONTEXT // 2]
            low, start = near[0], near[CONTEXT]
    yield low, start, len(text), len(text), len(text)


def encode_windows(
    text: str, joints: re.Pattern[str], encode: Callable[[str], tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids (n,), offsets (n, 2) in the text) of one window after the other. `encode` gives
    both for a piece of text.

    Raises NotLocal where windows disagree; what was yielded before is then not to be used.
    """
    ahead = np.zeros(0, np.int32)  # tokens that the window before saw at the beginning of this one
    until = 0
    for low, start, end, high, middle in windows(text, joints):
        ids, offsets = encode(text[low:high])
        offsets = offsets + low
        first, last, seen = (
            int(np.searchsorted(offsets[:, 0], place)) for place in (start, end, until)
        )
        for place in (start, end):
            if ((offsets[:, 0] < place) & (offsets[:, 1] > place)).any():
                raise NotLocal
        if not np.array_equal(ids[first:seen], ahead) and start:
            raise NotLocal
        yield ids[first:last], offsets[first:last]
        ahead, until = ids[last : int(np.searchsorted(offsets[:, 0], middle))], middle
