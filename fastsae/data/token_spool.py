"""The tokens of all examples of a run in files, 6 bytes each, so that memory does not grow with
them; and which examples are kept out of a stream."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fastsae.data.datasets import Example
from fastsae.data.tokenization import (
    CONTENT,
    SHARED_PREFIX,
    ChatTokenizer,
    TokenTable,
    token_batches,
)
from fastsae.runtime import storage

COLUMNS: dict[str, np.dtype] = {
    "ids": np.dtype("<i4"),
    "kind": np.dtype("u1"),
    "role": np.dtype("u1"),
}
READ_TOKENS = 1 << 20  # about so many are read at a time


class TokenSpool:
    """What a TokenTable holds, with the columns of tokens in files of `folder`.

    lengths, lines (n_examples,) int32; n_shared: leading tokens that all examples share, which
    `table` marks. n_truncated, n_control_strings: as in TokenTable.
    """

    def __init__(self, folder: Path, name: str = "tokens") -> None:
        self.paths = {column: folder / f"{name}.{column}" for column in COLUMNS}
        self.lengths, self.lines = np.zeros(0, np.int32), np.zeros(0, np.int32)
        self.n_truncated = self.n_control_strings = self.n_shared = 0
        self.has_content = False

    def fill(
        self, examples: Iterable[Example], tokenizer: ChatTokenizer, enough: int | None = None
    ) -> bool:
        """Tokenise the examples; stop after those with which there are `enough` tokens in all, and
        return whether it did."""
        lengths: list[int] = []
        all_lines: list[int] = []
        n_tokens = 0
        with contextlib.ExitStack() as opened:
            files = {
                column: opened.enter_context(storage.committed(path))
                for column, path in self.paths.items()
            }
            for tokens, lines in token_batches(examples, tokenizer):
                for line, each in zip(lines, tokens):
                    if enough is not None and n_tokens >= enough:
                        break
                    for column, dtype in COLUMNS.items():
                        files[column].write(np.asarray(getattr(each, column), dtype).tobytes())
                    lengths.append(len(each.ids))
                    all_lines.append(line)
                    n_tokens += len(each.ids)
                    self.n_truncated += each.truncated
                    self.n_control_strings += each.n_control_strings
                    self.has_content |= bool((each.kind == CONTENT).any())
                if enough is not None and n_tokens >= enough:
                    break
        self.lengths, self.lines = np.array(lengths, np.int32), np.array(all_lines, np.int32)
        return enough is not None and n_tokens >= enough

    @property
    def starts(self) -> np.ndarray:
        """(n_examples + 1,) first token of each example, and the number of tokens."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def cut_blocks(self, block_length: int) -> int:
        """Let blocks of so many tokens take the place of the examples (block training); returns the
        tokens left over at the end."""
        n, rest = divmod(int(self.lengths.sum()), block_length)
        self.lengths = np.full(n, block_length, np.int32)
        self.lines = np.arange(1, n + 1, dtype=np.int32)
        return rest

    def column(self, name: str, first: int, n: int) -> np.ndarray:
        """(n,) of the column `ids`, `kind` or `role`, from token `first` on."""
        dtype = COLUMNS[name]
        return np.fromfile(self.paths[name], dtype, n, offset=first * dtype.itemsize)

    def examples(self) -> Iterator[np.ndarray]:
        """Yield the ids (length,) of each example, in order."""
        starts = self.starts
        first = 0
        while first < len(self.lengths):
            last = int(np.searchsorted(starts, starts[first] + READ_TOKENS, side="right")) - 1
            last = max(first + 1, min(last, len(self.lengths)))
            ids = self.column("ids", int(starts[first]), int(starts[last] - starts[first]))
            yield from np.split(ids, starts[first + 1 : last] - starts[first])
            first = last

    def find_shared_prefix(self) -> None:
        """Set `n_shared` as `tokenization.mark_shared_prefix` finds it."""
        first = next(self.examples())
        shared = len(first)
        for ids in self.examples():
            n = min(shared, len(ids))
            differs = np.flatnonzero(ids[:n] != first[:n])
            shared = int(differs[0]) if len(differs) else n
        if shared == int(self.lengths.min()):
            content = np.flatnonzero(self.column("kind", 0, shared) == CONTENT)
            shared = int(content[0]) if len(content) else 0
        self.n_shared = shared

    def chosen(self, fraction: float, seed: int) -> np.ndarray:
        """(n_examples,) bool: about that part of the examples, by the hash of (seed, tokens).

        So the choice needs no count, and examples of one text are on one side.
        """
        below = int(fraction * 2**64)
        key = seed.to_bytes(8, "little")
        return np.array(
            [
                int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8, key=key).digest())
                < below
                for ids in self.examples()
            ],
            bool,
        )

    def table(self, numbers: np.ndarray) -> TokenTable:
        """The TokenTable of the examples numbered (rising), their shared prefix marked."""
        starts, lengths = self.starts, self.lengths[numbers]
        columns = [[self.column(name, 0, 0)] for name in COLUMNS]
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
            if len(run):  # neighbours are read together
                first, n = int(starts[run[0]]), int(starts[run[-1] + 1] - starts[run[0]])
                for column, name in zip(columns, COLUMNS):
                    column.append(self.column(name, first, n))
        ids, kind, role = (np.concatenate(column) for column in columns)
        table = TokenTable(ids, kind, role, lengths, self.lines[numbers])
        rows = table.starts[:-1][:, None] + np.arange(self.n_shared)
        table.kind[rows.reshape(-1)] = SHARED_PREFIX
        return table
