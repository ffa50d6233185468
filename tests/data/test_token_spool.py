"""Tokens on the disk are those that a TokenTable holds in memory; which examples a stream keeps."""

import json

import numpy as np
import pytest

from fastsae.data.datasets import Example
from fastsae.data.token_spool import TokenSpool
from fastsae.data.tokenization import Tokens, TokenTable, cut_blocks, mark_shared_prefix, tokenise


class Words:
    """A tokenizer of numbers: each message is ids that are its words."""

    def __call__(self, examples):
        found = []
        for example in examples:
            ids = np.array(example.messages[0]["content"].split(), np.int32)
            kind = (ids < 10).astype(np.uint8)
            found.append(Tokens(ids, kind, kind * 2, truncated=len(ids) > 6, n_control_strings=1))
        return found


def examples_of(*texts):
    return [Example(3 * i + 1, [{"role": "user", "content": t}]) for i, t in enumerate(texts)]


CASES = {
    "a prefix of two": ["1 2 30 40", "1 2 31", "1 2 30 41 42 43 44 45"],
    "nothing shared": ["30 1", "40 1 2"],
    "one text": ["1 2 30", "1 2 30"],
    "one example": ["1 2 30 40"],
    "one begins another": ["1 2 30 40", "1 2 30"],
}


@pytest.mark.parametrize("texts", CASES.values(), ids=CASES)
def test_a_spool_holds_what_a_table_holds(tmp_path, texts, monkeypatch):
    from fastsae.data import token_spool

    monkeypatch.setattr(token_spool, "READ_TOKENS", 3)
    table = tokenise(examples_of(*texts), Words())
    spool = TokenSpool(tmp_path)
    spool.fill(examples_of(*texts), Words())
    spool.find_shared_prefix()
    assert [ids.tolist() for ids in spool.examples()] == [
        ids.tolist() for ids in np.split(table.ids, table.starts[1:-1])
    ]
    assert spool.n_shared == mark_shared_prefix(table)
    same(spool.table(np.arange(len(texts))), table)
    assert spool.n_truncated == table.n_truncated
    assert spool.n_control_strings == table.n_control_strings
    last = spool.table(np.array([len(texts) - 1]))
    assert last.ids.tolist() == table.ids[table.starts[-2] :].tolist()


def same(found: TokenTable, expected: TokenTable):
    for name in ("ids", "kind", "role", "lengths", "lines"):
        a, b = getattr(found, name), getattr(expected, name)
        assert np.array_equal(a, b) and a.dtype == b.dtype, name


def test_blocks_are_those_of_a_table(tmp_path):
    texts = ["1 2 30 40", "31 1 2", "30 41 42 43 44"]
    spool = TokenSpool(tmp_path)
    spool.fill(examples_of(*texts), Words())
    blocks, rest = cut_blocks(tokenise(examples_of(*texts), Words()), 5)
    assert spool.cut_blocks(5) == rest == 2
    same(spool.table(np.arange(2)), blocks)


def test_it_ends_with_the_example_that_makes_enough(tmp_path):
    texts = [f"1 {i} 50" for i in range(20, 40)]
    spool = TokenSpool(tmp_path)
    spool.fill(examples_of(*texts), Words(), enough=10)
    assert spool.lengths.tolist() == [3, 3, 3, 3]
    assert spool.column("ids", 0, 100).tolist() == [
        int(word) for text in texts[:4] for word in text.split()
    ]


def test_the_choice_is_of_the_text_and_needs_no_count(tmp_path):
    texts = [f"{i} {i % 7} 3" for i in range(10, 2010)]
    spool, fewer, again = (TokenSpool(tmp_path, name) for name in "abc")
    spool.fill(examples_of(*texts), Words())
    fewer.fill(examples_of(*texts[:500]), Words())
    again.fill(examples_of(*texts[:10], *texts[:10]), Words())
    chosen = spool.chosen(0.25, seed=0)
    assert 420 < chosen.sum() < 580
    assert np.array_equal(fewer.chosen(0.25, seed=0), chosen[:500])  # appending changes nothing
    assert not np.array_equal(spool.chosen(0.25, seed=1), chosen)
    assert not (fewer.chosen(0.1, seed=0) & ~chosen[:500]).any()
    copies = again.chosen(0.5, seed=0)  # copies of a text are on one side
    assert np.array_equal(copies[:10], copies[10:])


def test_memory_does_not_grow_with_the_tokens(tmp_path):
    """80 MB of tokens: what Python allocates at a time stays below 20."""
    import tracemalloc

    text = " ".join(map(str, range(100, 3100)))

    class Long(Words):
        def __call__(self, examples):
            ids = np.arange(100, 13_100, dtype=np.int32)
            kind = np.zeros(len(ids), np.uint8)
            return [Tokens(ids, kind, kind) for _ in examples]

    def many():
        for i in range(1000):
            yield Example(i, [{"role": "user", "content": text}])

    spool = TokenSpool(tmp_path)
    tracemalloc.start()
    spool.fill(many(), Long())
    spool.find_shared_prefix()
    assert spool.chosen(0.5, 0).all() in (True, False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert int(spool.lengths.sum()) * 6 == 78_000_000 and peak < 20_000_000, json.dumps(peak)
