"""Tokens as people read them: names to count by, texts to show, excerpts, and a
feature's most characteristic tokens."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def token_names(tokenizer: Any, token_ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Readable names of token ids (n,): ((n,) number of each one's name, list of names).

    Names are decoded tokens without surrounding spaces and in lower case, so that ' We' and 'we'
    count as one; white space and special tokens keep a visible form.
    """
    unique, inverse = np.unique(token_ids, return_inverse=True)
    numbers, names = {}, []
    of_unique = np.empty(len(unique), np.int64)
    for i, token in enumerate(unique.tolist()):
        text = tokenizer.decode([token])
        name = visible(text.strip().lower() or text)
        of_unique[i] = numbers.setdefault(name, len(names))
        if of_unique[i] == len(names):
            names.append(name)
    return of_unique[inverse], names


def visible(text: str) -> str:
    """Text with newlines, tabs and a lone space in visible form."""
    return "␠" if text == " " else text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


class TokenTexts:
    """Texts of tokens in a row, one each, that join to the decoded whole.

    A character cut into several tokens is given to the first of them, the others get "".
    SentencePiece's leading space, which decoding a single token drops, is put back.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.single = tokenizer, {}

    def __call__(self, token_ids: Iterable[int]) -> list[str]:
        """The texts of the token ids (n,), a list of n."""
        texts, run = [], []
        for token in map(int, token_ids):
            text = self.single.get(token)
            if text is None:
                piece = self.tokenizer.convert_ids_to_tokens(token) or ""
                text = self.tokenizer.decode([token])
                if piece.startswith("▁") and not text.startswith(" "):
                    text = " " + text
                self.single[token] = text
            if "\ufffd" in text:
                run.append(token)
                whole = self.tokenizer.decode(run)
                if "\ufffd" not in whole:
                    texts += [whole] + [""] * (len(run) - 1)
                    run = []
                continue
            texts += ["\ufffd"] * len(run) + [text]
            run = []
        return texts + ["\ufffd"] * len(run)


def with_text(texts: Sequence[str]) -> np.ndarray:
    """(n,) for each token the position where it is seen: its own, or that of the nearest earlier
    one where its own text is ""."""
    return np.maximum.accumulate(
        np.array([i if text else 0 for i, text in enumerate(texts)], np.int64)
    )


def seen_values(
    texts: Sequence[str], positions: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(positions, values) of activations on tokens, moved to where the tokens are seen; where
    several meet, the largest stays."""
    seen, of = np.unique(with_text(texts)[positions], return_inverse=True)
    largest = np.zeros(len(seen), np.float32)
    np.maximum.at(largest, of, values)
    return seen, largest


def characteristic_tokens(
    name_mass: Any, name_count: np.ndarray, names: Sequence[str], n_top: int
) -> list[list[tuple[str, float]]]:
    """For each feature its most characteristic tokens, [(name, share of the feature's activation),
    ...], best first.

    name_mass: CSR (M, n_names), each feature's activation by token name; name_count (n_names,), how
    many tokens have it. A token scores share * log(share / base rate), its term in the divergence
    of "where the feature's activation lies" from "which tokens there are"; tokens that are not
    above their base rate are left out.
    """
    base = name_count / max(name_count.sum(), 1)
    result = []
    for j in range(name_mass.shape[0]):
        row = slice(name_mass.indptr[j], name_mass.indptr[j + 1])
        column = name_mass.indices[row]
        share = name_mass.data[row] / max(name_mass.data[row].sum(), 1e-30)
        score = share * np.log(np.maximum(share, 1e-30) / base[column])
        order = np.lexsort((column, -score))[:n_top]
        result.append([(names[column[i]], float(share[i])) for i in order if score[i] > 0])
    return result


def excerpt(texts: list[str], peak: int, start: int = 0, width: int = 14) -> str:
    """One example around the token `peak`, that token between « and », as one line of text.

    texts: its tokens' texts (a peak without one is marked where it is seen, see `with_text`);
    `width` tokens are shown on each side, none before `start` unless the peak is there.
    """
    peak = int(with_text(texts)[peak])
    left, right = max(min(start, peak), peak - width), min(len(texts), peak + width + 1)
    before, marked, after = "".join(texts[left:peak]), texts[peak], "".join(texts[peak + 1 : right])
    space = marked[: len(marked) - len(marked.lstrip(" "))] if marked.strip() else ""
    text = f"{before}{space}«{visible(marked.strip() or marked)}»{after}"
    return (
        ("…" if left > start else "") + " ".join(text.split()) + ("…" if right < len(texts) else "")
    )
