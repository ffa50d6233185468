"""The dataset of a run as tokens: read, deduplicated, tokenised, and refused where nothing could be
learned from it."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastsae.data import tokenization
from fastsae.data.datasets import (
    Deduplicator,
    Example,
    require_same,
    require_two,
    stream_examples,
    stream_text,
)
from fastsae.data.readers.plain_text import sample_by
from fastsae.data.token_spool import TokenSpool
from fastsae.data.tokenization import (
    ChatTokenizer,
    TokenTable,
    cut_apart,
    cut_blocks,
    mark_shared_prefix,
    tokenise,
)
from fastsae.runtime import progress, ranks
from fastsae.runtime.errors import InputError
from fastsae.settings import dataset_names
from fastsae.settings.values import Settings

# What the dialogues of a block see of each other with BLOCK_LENGTH, for studies: joined: all that
# stands before them in the block; apart: nothing, at the same positions (block-diagonal attention);
# apart, positions from 0: nothing, each part of a dialogue as if it were read alone. A part is an
# example of the file, and its number is that of its block.
DIALOGUES_IN_BLOCKS = "joined"


def read_tokens(
    settings: Settings, dataset_path: Path | str, sha256: str, tokenizer: Any
) -> tuple[TokenTable, dict[str, int]]:
    """(tokens of the dataset, what was counted on the way). Texts pass through and are not kept.

    dataset_path, sha256: what `datasets.identity` gave for DATASET_PATH. Raises InputError where
    the settings leave nothing of the texts, or too few examples.
    """
    in_blocks = settings.PROCESSING == "block"
    incoming = Incoming(settings, dataset_path, sha256, tokenizer)
    table = tokenise(incoming.examples, incoming.chat)
    counts = incoming.counts(table)
    if in_blocks:
        table, counts["n_left_over"] = blocks_of(table, settings.BLOCK_LENGTH)
    require_two(len(table.lengths), settings.DATASET_PATH)
    n_shared_prefix = 0 if in_blocks else mark_shared_prefix(table)
    return table, {"n_shared_prefix": n_shared_prefix, **counts}


def spool_tokens(
    settings: Settings, dataset_path: Path | str, sha256: str, tokenizer: Any, folder: Path | str
) -> tuple[TokenSpool, dict[str, int]]:
    """`read_tokens` for a stream: the tokens are in files of `folder`, and there are no more of
    them than MAX_TRAIN_TOKENS needs beside the sample."""
    in_blocks = settings.PROCESSING == "block"
    if in_blocks and DIALOGUES_IN_BLOCKS != "joined":
        raise InputError(
            f"STREAM_BYTES: a stream cannot read the dialogues of blocks {DIALOGUES_IN_BLOCKS}. "
            "leave it out."
        )
    incoming = Incoming(settings, dataset_path, sha256, tokenizer)
    spool = TokenSpool(Path(folder))
    enough = None
    if settings.MAX_TRAIN_TOKENS is not None:
        enough = int(settings.MAX_TRAIN_TOKENS / (1 - settings.SAMPLE_FRACTION))
    is_cut = spool.fill(incoming.examples, incoming.chat, enough)
    if is_cut:  # the rest of the file must be as it was, too
        require_same(dataset_path, sha256)
    counts = incoming.counts(spool)
    if in_blocks:
        n_tokens = int(spool.lengths.sum())
        counts["n_left_over"] = spool.cut_blocks(settings.BLOCK_LENGTH)
        require_blocks(len(spool.lengths), n_tokens, settings.BLOCK_LENGTH)
    require_two(len(spool.lengths), settings.DATASET_PATH)
    if not in_blocks:
        spool.find_shared_prefix()
    return spool, {"n_shared_prefix": spool.n_shared, **counts}


class Incoming:
    """The dataset on its way to tokens: its `examples`, less duplicates, and the ChatTokenizer
    `chat` for them."""

    def __init__(
        self, settings: Settings, dataset_path: Path | str, sha256: str, tokenizer: Any
    ) -> None:
        self.settings = settings
        self.chat = announced_tokenizer(settings, tokenizer)
        self.duplicates = Deduplicator(settings.DEDUP_NGRAM) if settings.DEDUP_NGRAM else None
        found = examples_of(settings, dataset_path, sha256)
        self.examples = filter(self.duplicates.is_new, found) if self.duplicates else found

    def counts(self, tokens: TokenTable | TokenSpool) -> dict[str, int]:
        """What was counted on the way to `tokens`, made of all `examples`. InputError where
        MAX_LENGTH cuts all text off."""
        require_content(self.settings, self.chat, tokens.n_truncated, tokens.has_content)
        counts = {
            "n_truncated": tokens.n_truncated,
            "n_control_strings": tokens.n_control_strings,
            "n_duplicates": self.duplicates.n_dropped if self.duplicates else 0,
        }
        if self.chat.lacks_template:
            counts["has_chat_template"] = False
        return counts


def require_content(
    settings: Settings, chat: ChatTokenizer, n_truncated: int, has_content: bool
) -> None:
    """InputError where MAX_LENGTH cuts all text off."""
    if n_truncated and not has_content:
        only = "the chat template" if chat.chat_template else "what the tokenizer puts before it"
        raise InputError(
            f"MAX_LENGTH: {settings.MAX_LENGTH} tokens hold no text, only {only}. raise it."
        )


def is_plain_text(settings: Settings) -> bool:
    """Whether the dataset is one text that is joined and cut into blocks."""
    in_blocks = settings.PROCESSING == "block"
    return in_blocks and dataset_names.is_plain_text(settings.DATASET_PATH)


def announced_tokenizer(settings: Settings, tokenizer: Any) -> ChatTokenizer:
    """`chat_tokenizer`; says so where the model has no chat template."""
    chat = chat_tokenizer(settings, tokenizer)
    if chat.lacks_template and ranks.current().rank == 0:
        print("chat template: this model has none, texts go in as they are", flush=True)
    return chat


def chat_tokenizer(settings: Settings, tokenizer: Any) -> ChatTokenizer:
    """How the settings have examples rendered and cut."""
    rows = not is_plain_text(settings)
    return ChatTokenizer(
        tokenizer,
        max_length=None if settings.PROCESSING == "block" else settings.MAX_LENGTH,
        date=tokenization.TEMPLATE_DATE,
        chat_template=settings.USE_CHAT_TEMPLATE and rows,
        dataset_name=settings.DATASET_PATH,
        special_tokens=rows,
    )


def examples_of(settings: Settings, dataset_path: Path | str, sha256: str) -> Iterator[Example]:
    """The examples one after the other, or pieces of a plain text, with a bar that counts them."""
    if is_plain_text(settings):
        return progress.counted(stream_text(dataset_path, sha256), "tokenising", "text")
    if dataset_names.is_plain_text(dataset_path) and ranks.current().rank == 0:
        print(f"texts: one a {sample_by(str(dataset_path), settings.TEXT_FIELD)}", flush=True)
    examples = stream_examples(
        dataset_path,
        text_field=settings.TEXT_FIELD,
        label_field=settings.LABEL_FIELD,
        max_examples=settings.MAX_EXAMPLES,
        sha256=sha256,
    )
    return progress.counted(labelled(settings, examples), "tokenising", "example")


def labelled(settings: Settings, examples: Iterable[Example]) -> Iterator[Example]:
    """Pass the examples on. A LABEL_FIELD that was chosen and that none of them has is said now
    rather than after training."""
    found = settings.LABEL_FIELD is None or settings.source["LABEL_FIELD"].startswith("preset")
    for example in examples:
        found = found or example.label is not None
        yield example
    if not found:
        raise InputError(
            f"LABEL_FIELD: no row of {settings.DATASET_PATH} has {settings.LABEL_FIELD}. name "
            "another field, or set --label-field none."
        )


def blocks_of(table: TokenTable, block_length: int) -> tuple[TokenTable, int]:
    """(all tokens in blocks of equal length, or with DIALOGUES_IN_BLOCKS their parts, how many are
    left over); InputError below two blocks."""
    require_blocks(len(table.ids) // block_length, len(table.ids), block_length)
    if DIALOGUES_IN_BLOCKS == "joined":
        return cut_blocks(table, block_length)
    own_positions = {"apart": False, "apart, positions from 0": True}[DIALOGUES_IN_BLOCKS]
    return cut_apart(table, block_length, own_positions=own_positions)


def require_blocks(n_blocks: int, n_tokens: int, block_length: int) -> None:
    """InputError below two blocks."""
    if n_blocks < 2:
        raise InputError(
            f"BLOCK_LENGTH: {n_tokens} tokens make {n_blocks} blocks of {block_length}; at least 2 "
            "are needed. lower --block-length, or give more data."
        )
