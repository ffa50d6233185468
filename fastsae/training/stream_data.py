"""The tokens of a stream in the order in which they train: in rounds, each of half of one part and
half of the next, shuffled together. So every part is needed for two rounds and can then go."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastsae.activations.files import rows_of
from fastsae.activations.stream import MAKER, POLL, Stream
from fastsae.data.token_masks import chosen_tokens, token_norms, usable_tokens
from fastsae.runtime import artifacts, distributed
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.training.feeding import host_batch

ORDER, SHUFFLE = 0, 1  # what a random order is of, beside seed and number


def halves(n: int, seed: int, part: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows of part number `part` that its own round serves, rows that the next round serves), of
    its n rows: a function of the arguments alone."""
    order = np.random.default_rng((seed, ORDER, part)).permutation(n)
    return order[: (n + 1) // 2], order[(n + 1) // 2 :]


def shuffled(n: int, seed: int, number: int) -> np.ndarray:
    """(n,) the order in which round `number` serves its n rows."""
    return np.random.default_rng((seed, SHUFFLE, number)).permutation(n)


def batch_bounds(n: int, size: int) -> list[int]:
    """[0, ..., n]: where the batches of a round of n rows end. They differ by one row at most and
    have `size` rows or a few more, so that no small one is left over."""
    n_batches = max(1, n // size) if n else 0
    return [n * i // n_batches for i in range(n_batches)] + [n] if n else [0]


def chain(digests: Sequence[str]) -> str:
    """One digest for parts one after the other: c_i = sha256(c_(i-1) + sha256 of part i)."""
    link = ""
    for digest in digests:
        link = hashlib.sha256((link + digest).encode()).hexdigest()
    return link


class Use(NamedTuple):
    """Which tokens of a part train: `usable_tokens` and `chosen_tokens` with these."""

    chosen: str
    exclude_shared_prefix: bool
    max_norm: float | None


class Part(NamedTuple):
    """What is held of a part: the rows (n, d) that train, in the type in which they are stored, or
    float16 where that is int8."""

    rows: np.ndarray
    sha256: str


def read_part(stream: Stream, number: int, use: Use) -> Part:
    """Part `number`, every byte of it checked.

    EnvironmentFailure, with what to do, if it is damaged or not of this stream; InputError if a
    token holds NaN or infinity.
    """
    path = stream.part_path(number)
    remedy = f"delete it and run {MAKER}, which makes it again; the same training then goes on."
    try:
        found = artifacts.read_npz(path, made_by=MAKER)
        metadata = artifacts.metadata_of(found, path)
        rows = rows_of(path, found)  # (n, d)
        digest = artifacts.file_sha256(path)
    except EnvironmentFailure as error:
        raise EnvironmentFailure(f"{str(error).partition('. run ')[0]}. {remedy}") from None
    if (metadata["fingerprint"], metadata.get("part")) != (stream.about["fingerprint"], number):
        raise EnvironmentFailure(f"{path}: is a part of another run. {remedy}")
    norms = token_norms(rows)
    if not np.isfinite(norms).all():
        raise InputError(
            f"{path}: token {int(np.argmin(np.isfinite(norms)))} holds NaN or infinity, or is too "
            f"long. delete {stream.folder} and run {MAKER} with --dtype float32."
        )
    keep, _ = usable_tokens(
        norms,
        found["token_kind"],
        exclude_shared_prefix=use.exclude_shared_prefix,
        max_norm_ratio=None,
    )
    if use.max_norm is not None:
        keep &= norms <= use.max_norm
    keep &= chosen_tokens(use.chosen, found["token_kind"], found["token_role"])
    return Part(rows[keep], digest)


class StreamRows:
    """Batches of a stream's tokens, round by round.

    Round r, from 1 to the number of parts + 1, serves the rows that round r - 1 left of part r - 1
    and half of those of part r. The order is a function of the seed and the parts alone. While a
    round is served a thread reads the part of the next one; `waiting(number)` is called again and
    again while part `number` is not there. `digests` has the sha256 of each part that was read, in
    order, those of an earlier process included.
    """

    def __init__(
        self,
        stream: Stream,
        use: Use,
        *,
        batch_size: int,
        seed: int,
        waiting: Callable[[int], object],
        digests: Sequence[str] = (),
        device: str = "cpu",
    ) -> None:
        self.stream, self.use, self.device = stream, use, device
        self.batch_size, self.seed = batch_size, seed
        self.waiting = waiting
        self.digests = list(digests)
        self.n_rounds = stream.n_parts + 1
        self.n_batches = 0  # of the round that is being served
        # of the last round's part the rows that it left: (its number, (n, d))
        self.left: tuple[int, np.ndarray] | None = None
        self.reading: Reading | None = None

    def batches(self, number: int, first: int = 0) -> Iterator[torch.Tensor]:
        """(batch, d) float32 tensors of round `number` on the device, from batch `first` on; of
        several processes each gets its slice."""
        left = self._left_of(number - 1)  # (n_left, d)
        rows = self._read(number) if number <= self.stream.n_parts else left[:0]
        own, later = halves(len(rows), self.seed, number)
        self._read_ahead(number + 1)
        order = shuffled(len(left) + len(own), self.seed, number)
        bounds = batch_bounds(len(order), self.batch_size)
        self.n_batches = len(bounds) - 1
        for a, b in list(zip(bounds, bounds[1:]))[first:]:
            piece = order[a:b][distributed.share(b - a)]
            is_new = piece >= len(left)
            batch = host_batch(len(piece), rows.shape[1], rows.dtype, self.device)
            x = batch.numpy()  # (batch, d)
            x[is_new] = rows[own[piece[is_new] - len(left)]]
            x[~is_new] = left[piece[~is_new]]
            yield batch.to(self.device, non_blocking=True).float()
        self.left = (number, rows[later])

    def close(self) -> None:
        """Stop reading ahead."""
        if self.reading is not None:
            self.reading.stop()
            self.reading = None

    def _left_of(self, part):
        """(n, d) what round `part` left of its part."""
        if part < 1:
            return self._read(1, keep=True)[:0]
        if self.left is None or self.left[0] != part:
            rows = self._read(part)
            self.left = (part, rows[halves(len(rows), self.seed, part)[1]])
        return self.left[1]

    def _read(self, part, keep=False):
        """(n, d) the rows of a part that train; keep: they are read once more."""
        if self.reading is None or self.reading.number != part:
            self.close()
            self.reading = Reading(self.stream, part, self.use)
        found = self.reading.result(self.waiting)
        if not keep:
            self.reading = None
        if len(self.digests) < part:
            self.digests.append(found.sha256)
        elif self.digests[part - 1] != found.sha256:
            self._replaced(part, found)
        return found.rows

    def _replaced(self, part, found):
        """A part that was trained on was made again, and differs."""
        if self.stream.about.get("device") == "cpu":
            raise EnvironmentFailure(
                f"{self.stream.part_path(part)}: is not the part that was trained on, whose sha256 "
                f"was {self.digests[part - 1][:16]}. bring that back, or delete the run's "
                ".resume.pt to train from the beginning."
            )
        print(f"warning: part {part} was made again and has other last bits, as on GPUs.")
        self.digests[part - 1] = found.sha256

    def _read_ahead(self, part):
        if part <= self.stream.n_parts and self.reading is None:
            self.reading = Reading(self.stream, part, self.use)


class Reading:
    """A part that a thread reads as soon as it is there."""

    def __init__(self, stream: Stream, number: int, use: Use) -> None:
        self.stream, self.number, self.use = stream, number, use
        self.path: Path = stream.part_path(number)
        self.part: Part | None = None
        self.error: BaseException | None = None
        self.stopped = threading.Event()
        self.is_there = self.path.exists()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        try:
            while not self.path.exists():
                if self.stopped.wait(POLL):
                    return
            self.is_there = True
            self.part = read_part(self.stream, self.number, self.use)
        except BaseException as error:  # it would otherwise end nothing but the thread
            self.error = error

    def result(self, waiting: Callable[[int], object]) -> Part:
        """The part; calls `waiting(number)` as long as it is not there."""
        while self.thread.is_alive():
            if not self.is_there:
                waiting(self.number)
            self.thread.join(POLL)
        if self.error is not None:
            raise self.error
        assert self.part is not None  # else there is an error
        return self.part

    def stop(self) -> None:
        """Read no more."""
        self.stopped.set()
        self.thread.join()


def periods(tokens: Sequence[int], measure_every: int) -> list[int]:
    """The rounds after which an autoencoder is measured: those in which another `measure_every`
    tokens of parts have come, and the last.

    tokens: of each part; round r brings those of part r.
    """
    found, since = [], 0
    for number, n in enumerate(tokens, 1):
        since += n
        if since >= measure_every:
            found.append(number)
            since = 0
    last = len(tokens) + 1
    # a period of less than half joins the one before
    if found and since < measure_every / 2:
        del found[-1]
    return [*found, last]


def n_steps(tokens: Sequence[int], batch_size: int) -> int:
    """Steps of the whole stream, if all tokens train; a schedule that ends with it needs them."""
    rounds = [a // 2 + (b + 1) // 2 for a, b in zip([0, *tokens], [*tokens, 0])]
    return sum(max(1, n // batch_size) for n in rounds)
