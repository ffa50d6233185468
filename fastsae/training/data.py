"""The tokens that train, validate and test, and the order in which they come: from memory, or
through a mixing buffer from the disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsae.activations.files import open_activations, release
from fastsae.data.token_masks import (
    TEST,
    TRAIN,
    VALIDATION,
    chosen_tokens,
    split_texts,
    text_numbers,
    token_norms,
    usable_tokens,
)
from fastsae.runtime import distributed
from fastsae.runtime.errors import InputError
from fastsae.training.feeding import room_for

# rows that are read together, at most: neighbours in the file, so their examples are the same few
CHUNK_ROWS = 1024
# and at least so many chunks come into the pool at a time, so that it holds many examples
CHUNKS_PER_PART = 64
BLOCK_VALUES = 1 << 24  # of activations whose norms are taken at a time: 64 MB as float32


class Tokens:
    """The activations of stage 1, mapped from the disk, and which of their rows are for what.

    `train` (n,) decides the weights, `validation` the best epoch, `test` nothing: rows that
    training uses; `all_validation` and `all_test` hold every row of those examples. What the data
    decide before training, the bound on norms, is decided by the training examples.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        validation_fraction: float,
        seed: int,
        exclude_shared_prefix: bool,
        max_norm_ratio: float | None,
        use: str,
        test_fraction: float = 0.0,
        max_train_tokens: int | None = None,
    ) -> None:
        data = open_activations(path)
        lengths, kind = data["seq_lengths"], data["token_kind"]
        # (n_tokens, d) on the disk
        self.activations = data["activations"]
        self.fingerprint = json.loads(str(data["metadata"]))["fingerprint"]
        norms = np.concatenate([token_norms(block) for block in self._blocks()])
        is_foreign = "groups" in data
        if not np.isfinite(norms).all():
            what, remedy = (
                "token",
                "delete the file and run extract_activations.py with --dtype float32",
            )
            if is_foreign:
                what, remedy = "row", "leave such rows out"
            raise InputError(
                f"{path}: {what} {int(np.argmin(np.isfinite(norms)))} holds NaN or infinity, "
                f"or is too long. {remedy}."
            )
        if is_foreign:  # an array of another program, which says what belongs together
            texts = data["groups"]
        else:
            texts = text_numbers(
                data["token_ids"], np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            )
        self.part = split_texts(texts, validation_fraction, test_fraction, seed)  # (n_examples,)
        self.example = np.repeat(np.arange(len(lengths)), lengths)  # (n_tokens,)
        part = self.part[self.example]  # (n_tokens,)
        usable, self.max_norm = usable_tokens(
            norms,
            kind,
            exclude_shared_prefix=exclude_shared_prefix,
            max_norm_ratio=max_norm_ratio,
            deciding=part == TRAIN,
        )
        in_prefix, _ = usable_tokens(
            norms, kind, exclude_shared_prefix=exclude_shared_prefix, max_norm_ratio=None
        )
        self.n_prefix, self.n_sinks = int((~in_prefix).sum()), int((in_prefix & ~usable).sum())
        chosen = usable & chosen_tokens(use, kind, data["token_role"])
        self.n_filtered = int(usable.sum() - chosen.sum())
        # (n_tokens,) written by the chat template
        self.special = kind != 0
        self.train = np.flatnonzero(chosen & (part == TRAIN))[:max_train_tokens]
        self.n_trained = len(self.train)  # of a stream: the tokens of its parts
        self.validation = np.flatnonzero(chosen & (part == VALIDATION))
        self.test = np.flatnonzero(chosen & (part == TEST))
        self.all_validation = np.flatnonzero(part == VALIDATION)
        self.all_test = np.flatnonzero(part == TEST)
        self._require_enough(path, use, usable, chosen)

    def _require_enough(self, path, use, usable, chosen):
        """InputError unless there are tokens to train on and tokens to validate on."""
        if use != "all" and not chosen.any():
            raise InputError(
                f"USE_TOKENS: {path} has no token that is {use}. set --use-tokens all."
            )
        if not usable.any():
            raise InputError(
                f"{path}: every token is of the prefix that all examples share, "
                "or an attention sink. raise --max-length, or give stage 2 "
                "--use-tokens all+prefix."
            )
        if len(self.train) < 2 or len(self.validation) < 2:
            raise InputError(
                f"VALIDATION_FRACTION: {len(self.train)} tokens are left for training and "
                f"{len(self.validation)} for validation (USE_TOKENS {use}). give more examples, "
                "or longer ones."
            )

    def examples_of(self, part: int) -> list[int]:
        """Numbers of the examples of a part, a list."""
        return np.flatnonzero(self.part == part).tolist()

    @property
    def has_test(self) -> bool:
        """Whether the test part has tokens of which figures can be made."""
        return len(self.test) >= 2

    def _blocks(self):
        size = max(1, BLOCK_VALUES // self.activations.shape[1])
        for start in range(0, len(self.activations), size):
            yield np.asarray(self.activations[start : start + size])
            release(self.activations)

    def rows(self, rows: np.ndarray) -> torch.Tensor:
        """(n, d) float32 tensor of the rows numbered."""
        out = torch.empty(len(rows), self.activations.shape[1])
        # the system maps 64 KiB around each row that is read
        for start in range(0, len(rows), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            out[part] = torch.from_numpy(np.ascontiguousarray(self.activations[rows[part]]))
            release(self.activations)
        return out


def print_split(
    tokens: Tokens, path: Path | str, use: str, test_fraction: float, trained: str | None = None
) -> None:
    """Which tokens are for what, and which are left out.

    path, use, test_fraction: what `tokens` was made from. trained: what is trained on, of a stream.
    """
    trained = trained or f"{len(tokens.train):,} tokens"
    filtered = f", {tokens.n_filtered:,} tokens that are not {use}" if tokens.n_filtered else ""
    print(
        f"training on {trained}; validating on {len(tokens.validation):,} of "
        f"{len(tokens.examples_of(VALIDATION))} other examples, testing on {len(tokens.test):,} of "
        f"{len(tokens.examples_of(TEST))}; left out: {tokens.n_prefix:,} of the shared prefix, "
        f"{tokens.n_sinks:,} attention sinks{filtered}"
    )
    if test_fraction and not tokens.has_test:
        print(
            f"warning: {path} has too few different texts for a test part of "
            f"TEST_FRACTION {test_fraction}: the figures are of the validation examples, "
            "which also choose the best epoch."
        )


class TrainingRows:
    """Batches of the rows `rows` of mapped `activations` (n_tokens, d), each epoch in an order that
    only (seed, epoch) decides.

    If all rows fit into `buffer_tokens` they are kept in memory and shuffled as a whole. If not,
    the scheme of FAST: chunks in random order fill a pool, half of the shuffled pool is served, and
    new chunks take its place; they are read ahead by a thread, into a third part of the same
    buffer. The buffer is on the `device` where that has room (training/feeding.py). Under torchrun
    each process has such a buffer and takes its slice of every batch.
    """

    def __init__(
        self,
        activations: Any,
        rows: np.ndarray,
        *,
        batch_size: int,
        buffer_tokens: int,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.activations = activations
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.part = None if len(rows) <= buffer_tokens else max(1, buffer_tokens // 3)
        self.size = len(rows) if self.part is None else 3 * self.part
        self.buffer = room_for(self.size, activations.shape[1], activations.dtype, device)
        if self.part is None:
            self._read_ahead(rows, np.arange(self.size)).finish()

    def n_batches(self) -> int:
        """Batches in an epoch."""
        return len(batch_ends(len(self.rows), self.batch_size))

    def batches(self, epoch: int, first: int = 0) -> Iterator[torch.Tensor]:
        """(batch, d) float32 tensors of one epoch on the device, from batch number `first` on."""
        ends = [0, *batch_ends(len(self.rows), self.batch_size)]
        if self.part is None:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
            for a, b in zip(ends[first:], ends[first + 1 :]):
                yield self.buffer.take(order[a:b][distributed.share(b - a)]).float()
        else:
            for piece in _regrouped(self._served(epoch, ends[first]), np.diff(ends[first:])):
                yield piece[distributed.share(len(piece))].float()

    def order(self, epoch: int) -> np.ndarray:
        """The rows of one epoch as they are served."""
        if self.part is None:
            return self.rows[np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))]
        return np.concatenate(
            [pool[:n_served] for pool, n_served, _ in mixed(self.rows, self.part, self.seed, epoch)]
        )

    def _served(self, epoch, skip):
        """Tensors of activations in the order of the epoch, less the first `skip` rows."""
        assert self.part is not None  # only what does not fit into memory comes through a pool
        slot_of = np.full(len(self.activations), -1, np.int32)  # where in the buffer a row lies
        free = None
        for pool, n_served, new in mixed(self.rows, self.part, self.seed, epoch):
            if skip >= n_served:
                skip -= n_served
                continue
            if free is None:  # here an epoch begins, or an interrupted one goes on
                slot_of[pool] = np.arange(len(pool))
                in_order = np.sort(pool)
                self._read_ahead(in_order, slot_of[in_order]).finish()
                free = np.arange(len(pool), self.size)
            staged, served = free[: len(new)], slot_of[pool[:n_served]]
            reading = self._read_ahead(new, staged)
            try:
                for start in range(skip, n_served, self.batch_size):
                    yield self.buffer.take(served[start : min(start + self.batch_size, n_served)])
            except GeneratorExit:  # nobody wants the rest
                reading.stop()
                raise
            reading.finish()
            skip = 0
            slot_of[new] = staged
            free = np.concatenate([free[len(new) :], served])

    def _read_ahead(self, rows, slots):
        """The Reading of these rows from the disk into slots of the buffer."""

        def read(part):
            found = self.activations[rows[part]]
            release(self.activations)
            return found

        return self.buffer.fill_ahead(read, slots)


def batch_ends(n: int, size: int) -> list[int]:
    """Where batches of `size` of n rows end; a last row left alone joins the batch before: it has
    no variance to divide its loss by."""
    ends = [*range(size, n, size), n]
    if len(ends) > 1 and ends[-1] - ends[-2] < max(2, distributed.world()[1]):
        del ends[-2]
    return ends


def mixed(
    rows: np.ndarray, part: int, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
    """The mixing buffer in row numbers alone: (shuffled pool, how many of it are served, the rows
    that then come in), step by step.

    The pool holds twice `part` rows, of which `part` are served; at the end of the rows all that is
    left is.
    """
    random = np.random.default_rng((seed, epoch))
    size = min(CHUNK_ROWS, max(1, part // CHUNKS_PER_PART))
    chunks = np.split(rows, range(size, len(rows), size))
    stream = np.concatenate([chunks[i] for i in random.permutation(len(chunks))])
    pool, at = stream[: 2 * part], 2 * part
    while at < len(stream):
        pool = random.permutation(pool)
        new = stream[at : at + part]
        yield pool, part, new
        pool, at = np.concatenate([pool[part:], new]), at + part
    yield random.permutation(pool), len(pool), stream[:0]


def _regrouped(arrays, sizes):
    """The rows of consecutive tensors cut into tensors of the given sizes."""
    waiting, n = [], 0
    sizes = iter(sizes)
    wanted = next(sizes, None)
    for array in arrays:
        while len(array):
            assert wanted is not None  # the sizes add up to the arrays' lengths
            taken, array = array[: wanted - n], array[wanted - n :]
            waiting.append(taken)
            n += len(taken)
            if n == wanted:
                yield waiting[0] if len(waiting) == 1 else torch.cat(waiting)
                waiting, n, wanted = [], 0, next(sizes, None)
