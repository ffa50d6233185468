"""What is refused of a dataset once its texts are tokens, and what is counted on the way."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from fastsae.data import reading
from fastsae.data.datasets import Example
from fastsae.data.tokenization import CONTENT, TokenTable
from fastsae.runtime.errors import InputError


def settings(**values):
    source = {"LABEL_FIELD": values.pop("said_by", "flag")}
    return SimpleNamespace(
        source=source, **{"DATASET_PATH": "d.jsonl", "LABEL_FIELD": "topic", **values}
    )


def examples(*labels):
    return [Example(i, [], label=label) for i, label in enumerate(labels, 1)]


@pytest.mark.parametrize(
    "labels, more",
    [
        ((None, "a", None), {}),
        ((None, None), {"LABEL_FIELD": None}),
        ((None, None), {"said_by": "preset demo"}),
    ],
)
def test_examples_pass_where_one_has_the_label_or_nobody_chose_it(labels, more):
    given = examples(*labels)
    assert list(reading.labelled(settings(**more), given)) == given


def test_a_label_that_no_row_has_is_refused_after_the_last_row():
    passing = reading.labelled(settings(), examples(None, None))
    assert [next(passing).line, next(passing).line] == [1, 2]
    with pytest.raises(InputError, match="^LABEL_FIELD: no row of d.jsonl has topic. name another"):
        next(passing)


@pytest.mark.parametrize("n_tokens, n_blocks", [(9, 2), (8, 2), (7, 1), (3, 0)])
def test_fewer_than_two_blocks_are_refused(n_tokens, n_blocks):
    ids = np.arange(n_tokens, dtype=np.int32)
    kind = np.full(n_tokens, CONTENT, np.uint8)
    one = np.array([1], np.int32)
    table = TokenTable(ids, kind, kind, np.array([n_tokens], np.int32), one, 0, 0)
    if n_blocks < 2:
        said = f"BLOCK_LENGTH: {n_tokens} tokens make {n_blocks} blocks of 4; at least 2 are needed"
        with pytest.raises(InputError, match=re.escape(said)):
            reading.blocks_of(table, 4)
    else:
        blocks, n_left_over = reading.blocks_of(table, 4)
        assert list(blocks.lengths) == [4, 4] and n_left_over == n_tokens - 8


def test_a_plain_text_gets_no_template_and_no_cut_in_blocks(smol_tokenizer):
    how = {
        "PROCESSING": "block",
        "MAX_LENGTH": 5,
        "TEMPLATE_DATE": "26 Jul 2024",
        "USE_CHAT_TEMPLATE": True,
    }
    chat = reading.chat_tokenizer(settings(DATASET_PATH="d.txt", **how), smol_tokenizer)
    assert not chat.chat_template and chat.max_length is None
    rows = reading.chat_tokenizer(settings(**{**how, "PROCESSING": "example"}), smol_tokenizer)
    assert rows.chat_template and rows.max_length == 5
