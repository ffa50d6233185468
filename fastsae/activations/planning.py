"""In which order examples go through the model: on a CPU in that of the dataset, with batches
planned within a chunk; on a GPU by length over a window of millions of tokens, for a batch of
unlike lengths is mostly padding. Rows lie in the order of the dataset either way."""

from typing import NamedTuple

import numpy as np

from fastsae.activations.extraction import split_batches, split_chunks
from fastsae.data.tokenization import TokenTable

# tokens over which batches are planned: rows of a window go to one shard or two, so that few files
# are open, and 99 % of a batch are tokens (experiments/results/feeding.json)
WINDOW_TOKENS = 1 << 22


class Plan(NamedTuple):
    """Examples in the order of the model, and [(first, last)] ranges of them that are kept
    together; order (n_examples,) holds their numbers in the dataset, None if they are the same."""

    order: np.ndarray | None
    chunks: list[tuple[int, int]]


def plan_by_chunks(lengths: np.ndarray, chunk_tokens: int) -> Plan:
    """The order of the dataset, in chunks."""
    return Plan(None, split_chunks(lengths, chunk_tokens))


def plan_by_length(
    lengths: np.ndarray, batch_tokens: int, chunk_tokens: int, window_tokens: int = WINDOW_TOKENS
) -> Plan:
    """Batches of like lengths, planned over each window of the dataset; a chunk is as many of them
    as `chunk_tokens` allow.

    lengths (n_examples,): tokens that go through the model. The first chunk is one batch of middle
    length, since it decides how 8-bit rows are packed.
    """
    order: list[int] = []
    chunks = []
    for first, last in split_chunks(lengths, window_tokens):
        batches = split_batches(lengths[first:last], batch_tokens)
        groups = []
        if not first:
            groups.append(batches.pop(len(batches) // 2))
        groups += _joined(batches, lengths[first:last], chunk_tokens)
        for group in groups:
            chunks.append((len(order), len(order) + len(group)))
            order += [first + i for i in group]
    return Plan(np.array(order, np.int64), chunks)


def _joined(batches, lengths, chunk_tokens):
    """Consecutive batches joined as long as their tokens are within `chunk_tokens`."""
    groups: list[list[int]] = []
    n_tokens = 0
    for batch in batches:
        n = int(lengths[batch].sum())
        if groups and n_tokens + n <= chunk_tokens:
            groups[-1] = groups[-1] + batch
            n_tokens += n
        else:
            groups.append(batch)
            n_tokens = n
    return groups


def efficiency(lengths: np.ndarray, plan: Plan, batch_tokens: int) -> float:
    """Tokens over padded tokens of all batches."""
    ordered = lengths if plan.order is None else lengths[plan.order]
    padded = 0
    for first, last in plan.chunks:
        here = ordered[first:last]
        padded += sum(
            len(batch) * int(here[batch[0]]) for batch in split_batches(here, batch_tokens)
        )
    return float(lengths.sum() / padded)


def reordered(table: TokenTable, order: np.ndarray) -> TokenTable:
    """The examples of `table` in another order (n_examples,)."""
    lengths = table.lengths[order]
    tokens = rows_of(table.starts[:-1][order], lengths)  # (n_tokens,)
    return TokenTable(
        table.ids[tokens],
        table.kind[tokens],
        table.role[tokens],
        lengths,
        table.lines[order],
        table.n_truncated,
        table.n_control_strings,
        None if table.positions is None else table.positions[order],
    )


def rows_of(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(sum of lengths,) the rows from each start on, one example after the other."""
    before = np.cumsum(lengths, dtype=np.int64) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


class Moves:
    """Where the rows of examples in the order of the model lie in the finished file.

    order (n_examples,): as of a Plan; lengths (n_examples,): in the order of the dataset.
    """

    def __init__(self, order: np.ndarray, lengths: np.ndarray) -> None:
        self.lengths = lengths[order]
        self.starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        file_starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.file_starts = file_starts[:-1][order]
        self.order = order
        # where each example of the dataset is in the order of the model
        self.rank = np.empty(len(order), np.int64)
        self.rank[order] = np.arange(len(order))

    def runs(self, first_row: int, n_rows: int) -> list[tuple[int, int]]:
        """[(first row in the file, number of rows)] of the given rows, which are whole examples;
        neighbours are one run."""
        a, b = np.searchsorted(self.starts, [first_row, first_row + n_rows])
        found: list[tuple[int, int]] = []
        for start, length in zip(self.file_starts[a:b].tolist(), self.lengths[a:b].tolist()):
            if found and sum(found[-1]) == start:
                found[-1] = (found[-1][0], found[-1][1] + length)
            else:
                found.append((start, length))
        return found

    def rows_of_examples(self, first: int, last: int) -> np.ndarray:
        """(n,) the rows, in the order of the model, of examples `first` to `last` of the
        dataset."""
        ranks = self.rank[first:last]
        return rows_of(self.starts[ranks], self.lengths[ranks])
