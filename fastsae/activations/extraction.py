"""The work of stage 1: the plan of chunks and batches, the forward passes, the parts of an
unfinished run, and several processes."""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastsae.activations import compression
from fastsae.activations.assembly import Assembly
from fastsae.activations.compression import Packing
from fastsae.data.datasets import place
from fastsae.data.token_masks import token_norms
from fastsae.data.tokenization import TokenTable
from fastsae.runtime import artifacts, progress, ranks, storage
from fastsae.runtime.errors import EnvironmentFailure, InputError, StageError
from fastsae.runtime.machine_errors import is_out_of_memory

NOTE = "run.json"  # in a folder of parts: what they are of
MAKER = "extract_activations.py"
# tokens of a part of an unfinished run: the most that an interruption loses
CHUNK_TOKENS = 65536
# larger results are written as numbered shards of about this size
SHARD_BYTES = 16_000_000_000
# bytes of one part in memory, all layers together; two parts are held at a time
PART_BYTES = 192 << 20
# padded tokens of a batch; on a CPU larger batches leave its caches (bench_extract.json)
BATCH_TOKENS = {"cpu": 1024, "mps": 4096, "cuda": 16384}
# tokens below which reusing the prefix saves nothing
SHORTEST_CACHED_PREFIX = 4
# share of all tokens below which it is not reused on CUDA: with it attention builds a mask, which
# its fast kernel does not take
LEAST_CACHED_SHARE = 0.15


def split_chunks(lengths: Sequence[int] | np.ndarray, chunk_tokens: int) -> list[tuple[int, int]]:
    """[(first, last)] ranges of consecutive examples of about `chunk_tokens` tokens each."""
    chunks, first, total = [], 0, 0
    for i, length in enumerate(lengths):
        total += int(length)
        if total >= chunk_tokens or i == len(lengths) - 1:
            chunks.append((first, i + 1))
            first, total = i + 1, 0
    return chunks


def split_batches(lengths: Sequence[int] | np.ndarray, batch_tokens: int) -> list[list[int]]:
    """Lists of example numbers, longest first, of at most `batch_tokens` padded tokens (a longer
    example goes alone)."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def chunk_tokens_for(chunk_tokens: int, d_model: int, n_layers: int, storage_dtype: str) -> int:
    """CHUNK_TOKENS, or fewer where so many rows would not fit into PART_BYTES."""
    return max(
        1, min(chunk_tokens, PART_BYTES // (d_model * n_layers * np.dtype(storage_dtype).itemsize))
    )


def require_disk_space(path: Path, n_bytes: int, unfinished: Path | None = None) -> None:
    """EnvironmentFailure unless the disk has room for `n_bytes` of rows, less what the folder
    `unfinished` of an interrupted run holds of them."""
    storage.make_folder(path.parent)
    there = sum(each.stat().st_blocks * 512 for each in (unfinished or path).glob("rows-*"))
    needed = max(0, int(n_bytes) - there) + (16 << 20)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise EnvironmentFailure(
            f"{path.parent}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free. "
            "free some space, choose another --output-dir, or lower --max-examples."
        )


class World:
    """This process among those that torchrun started: `rank` of `size`, 0 of 1 without it.

    Processes share nothing but the output folder: chunk i belongs to rank i % size, a part is there
    or not, and rank 0 waits for the parts of the others. So it makes no difference to the result
    how many there are, or on how many machines.
    """

    def __init__(self) -> None:
        self.rank, self.size, _, self.local_size = ranks.current()

    def use_own_cores(self) -> None:
        """Let PyTorch use this process's part of the machine's cores."""
        if self.size > 1:  # torchrun gives each process one thread
            import torch

            cores = (
                len(os.sched_getaffinity(0))
                if hasattr(os, "sched_getaffinity")
                else os.cpu_count() or 1
            )
            torch.set_num_threads(max(1, cores // self.local_size))

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind, error, trace):
        """One message for all: what every rank finds wrong, rank 0 says, and torchrun then stops
        the others."""
        if self.size == 1 or error is None:
            return
        try:
            if (
                self.rank
                and isinstance(error, StageError)
                and not getattr(error, "of_this_rank", False)
            ):
                time.sleep(20)
        except BaseException as stop:
            error = stop
            raise
        finally:
            if not isinstance(error, Exception):  # stopped because another one failed
                sys.stderr = open(os.devnull, "w")


class Forward:
    """The model over batches of examples; holds the shared prefix, computed once, and the token
    budget of a batch."""

    def __init__(
        self,
        model: Any,
        table: TokenTable,
        *,
        n_shared: int,
        batch_tokens: int,
        storage_dtype: str,
        dataset_name: Path | str,
        pin: bool = False,
    ) -> None:
        import torch

        firsts = 0 if table.positions is None else table.positions
        model.require_length(int((table.lengths + firsts).max(initial=0)))
        if table.positions is not None:
            model.require_positions()
        self.model, self.table, self.starts = model, table, table.starts
        self.batch_tokens = batch_tokens
        self.storage_dtype = storage_dtype
        self.dataset_name = dataset_name
        self.pin = pin
        self.n_prefix = reused_prefix(table.lengths, n_shared, on_cuda=pin)
        self.prefix = None
        if self.n_prefix:
            self.prefix, streams = model.read_prefix(
                torch.from_numpy(table.ids[: self.n_prefix].astype(np.int64))
            )
            # needed at once, so not pinned: a copy into pinned memory would be on its way still
            real = [(0, self.n_prefix)]
            self.prefix_rows = {}
            for layer, stream in streams.items():
                found = stored(stream, real, self.storage_dtype, pin=False)
                self._require_fits(found.peaks, real)
                self.prefix_rows[layer] = found.rows.numpy()
            self.n_prefix = self.n_prefix if self.prefix else 0

    def chunk(
        self, first: int, last: int, progress: Callable[[int], object]
    ) -> dict[int, np.ndarray]:
        """{layer: (tokens of examples first to last, d_model)} in the storage type; calls
        `progress(n)` as tokens are done."""
        return next(self.each([(first, last)], progress)).rows

    def each(
        self, chunks: Iterable[tuple[int, int]], progress: Callable[[int], object]
    ) -> Iterator["Chunk"]:
        """The Chunk of each range of examples in turn; calls `progress(n)` as tokens are done.

        On a GPU the first batch of the next one is begun before a chunk is given, so that the
        device has work while the chunk is written.
        """
        waiting = None  # a batch that was launched, one at most
        complete = None  # a chunk of which all batches were launched
        for first, last in chunks:
            chunk = self._empty(first, last)
            lengths = self.table.lengths[first:last] - self.n_prefix
            for batch in split_batches(lengths, self.batch_tokens):
                for done in self._launch([first + i for i in batch]):
                    if waiting:
                        self._store(*waiting, progress)
                    waiting = (chunk, done)
                    if complete:
                        yield complete
                        complete = None
            if self.pin:
                complete = chunk
                continue
            if waiting:
                self._store(*waiting, progress)
            waiting = None
            yield chunk
        if complete and waiting:
            self._store(*waiting, progress)
            yield complete

    def _empty(self, first, last):
        """The Chunk of these examples, of which only the prefix's rows are there."""
        starts = self.starts[first:last] - self.starts[first]
        n_tokens = int(self.starts[last] - self.starts[first])
        rows = {
            layer: np.empty((n_tokens, self.model.d_model), self.storage_dtype)
            for layer in self.model.layers
        }
        norms = {layer: np.empty(n_tokens, np.float32) for layer in rows} if self.pin else None
        if self.n_prefix:
            in_prefix = starts[:, None] + np.arange(self.n_prefix)
            for layer, prefix_rows in self.prefix_rows.items():
                rows[layer][in_prefix] = prefix_rows
                if norms is not None:
                    norms[layer][in_prefix] = token_norms(prefix_rows)
        return Chunk(first, rows, norms)

    def _launch(self, batch):
        """[(examples, {layer: Stored}, event)], more than one if memory ran out and the batch was
        halved."""
        import torch

        longest = max(int(self.table.lengths[i]) for i in batch) - self.n_prefix
        # planned before memory ran out
        if len(batch) > 1 and len(batch) * longest > self.batch_tokens:
            return self._halves(batch)
        try:
            streams = self.model(self._padded(batch), self.prefix, self._first_positions(batch))
            real = self._real(batch)
            rows = {
                layer: stored(stream, real, self.storage_dtype, pin=self.pin)
                for layer, stream in streams.items()
            }
            return [(batch, rows, self._copied())]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if len(batch) == 1:  # outside the handler, so that the failed pass's memory is free
            raise self._own(
                EnvironmentFailure(
                    f"MAX_LENGTH: an example of {self.table.lengths[batch[0]]} tokens does not fit "
                    f"into memory on {self.model.device}. lower --max-length."
                )
            )
        print(
            f"out of memory: BATCH_TOKENS {self.batch_tokens} -> {self.batch_tokens // 2}",
            flush=True,
        )
        self.batch_tokens //= 2
        if self.model.device.startswith("cuda"):
            torch.cuda.empty_cache()
        return self._halves(batch)

    def _halves(self, batch):
        middle = len(batch) // 2
        return self._launch(batch[:middle]) + self._launch(batch[middle:])

    def _real(self, batch):
        """[(example, its tokens after the prefix)]."""
        return [(i, int(self.table.lengths[i]) - self.n_prefix) for i in batch]

    def _padded(self, batch):
        import torch

        lengths = [int(self.table.lengths[i]) - self.n_prefix for i in batch]
        ids = torch.zeros((len(batch), max(lengths)), dtype=torch.long, pin_memory=self.pin)
        for row, (i, length) in enumerate(zip(batch, lengths)):
            start = self.starts[i] + self.n_prefix
            ids[row, :length] = torch.from_numpy(self.table.ids[start : start + length])
        return ids

    def _first_positions(self, batch):
        """(len(batch),) int64 position of each row's first token; None where all begin at 0."""
        import torch

        if self.table.positions is None:
            return None
        return torch.from_numpy(self.table.positions[batch].astype(np.int64))

    def _copied(self):
        """A CUDA event that comes when the rows on their way have arrived on the host; None where
        copies are waited for.

        It goes with the stream of the model's own device, which need not be the current one.
        """
        import torch

        if not self.model.device.startswith("cuda"):
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.model.device))
        return event

    def _require_fits(self, peaks, real):
        try:
            require_fits(
                peaks,
                real,
                self.storage_dtype,
                lambda i: place(self.dataset_name, self.table.lines[i]),
            )
        except InputError as error:
            raise self._own(error) from error

    def _store(self, chunk, launched, progress):
        """Put the rows of a batch in their place in the chunk, once they have arrived."""
        batch, found, event = launched
        if event is not None:
            event.synchronize()
        real = self._real(batch)
        for each in found.values():
            self._require_fits(each.peaks, real)
        at = 0
        for i, length in real:
            start = self.starts[i] - self.starts[chunk.first] + self.n_prefix
            for layer, each in found.items():
                rows = slice(at, at + length)
                chunk.rows[layer][start : start + length] = each.rows[rows].numpy()
                if chunk.norms is not None:
                    chunk.norms[layer][start : start + length] = each.norms[rows].numpy()
            at += length
        progress(at + len(batch) * self.n_prefix)

    @staticmethod
    def _own(error):
        error.of_this_rank = True
        return error


def reused_prefix(lengths: np.ndarray, n_shared: int, *, on_cuda: bool) -> int:
    """How many of the `n_shared` tokens that all examples begin with are read once, if the model
    can; lengths (n_examples,)."""
    if not SHORTEST_CACHED_PREFIX <= n_shared < lengths.min():
        return 0
    if on_cuda and n_shared * len(lengths) < LEAST_CACHED_SHARE * int(lengths.sum()):
        return 0
    return n_shared


class Chunk(NamedTuple):
    """Examples from `first` on: {layer: (n_tokens, d_model)} in the storage type, and their norms
    {layer: (n_tokens,)} float32 where a device computed them."""

    first: int
    rows: dict[int, np.ndarray]
    norms: dict[int, np.ndarray] | None


class Stored(NamedTuple):
    """Real rows (n, d_model) of a batch in the storage type, the largest absolute value (n,) of
    each before that, and their norms (n,) float32, or None: on the host, or on the way there."""

    rows: Any
    peaks: Any
    norms: Any


def stored(
    stream: Any, real: Sequence[tuple[int, int]], storage_dtype: str, *, pin: bool
) -> Stored:
    """(batch, length, d_model) or (length, d_model) -> the real rows, one after the other.

    `real`: (example, length) of each row of the batch. pin: into pinned memory, without waiting;
    nothing of it may be read before an event that follows.
    """
    import torch

    stream = stream[None] if stream.ndim == 2 else stream
    # (real tokens, d_model)
    rows = torch.cat([stream[row, :length] for row, (_, length) in enumerate(real)])
    # (real tokens,)
    peaks = rows.abs().amax(1).float()
    rows = rows.to(getattr(torch, np.dtype(storage_dtype).name))
    if not pin:
        return Stored(rows.cpu(), peaks.cpu(), None)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    # PyTorch keeps pinned memory that is free again for the next batches
    return Stored(
        *(
            torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            for x in (rows, peaks, norms)
        )
    )


def require_fits(
    peaks: Any, real: Sequence[tuple[int, int]], storage_dtype: str, where: Callable[[int], str]
) -> None:
    """InputError if a number was lost to overflow, or is NaN.

    peaks: (n,) of `Stored`, on the host; real: (example, length) as there; `where(example)` names
    one.
    """
    peaks = peaks.numpy()
    fits = peaks <= float(np.finfo(storage_dtype).max)  # NaN is not <= anything
    if fits.all():
        return
    at = int(np.argmin(fits))
    ends = np.cumsum([length for _, length in real])
    example = real[int(np.searchsorted(ends, at, side="right"))][0]
    if not np.isfinite(peaks[at]):
        raise InputError(
            f"{where(example)}: the model gives NaN or infinity here. set --dtype float32 or "
            "bfloat16."
        )
    raise InputError(
        f"{where(example)}: an activation of {float(peaks[at]):.0f} does not fit into "
        f"{storage_dtype}. set --storage-dtype float32."
    )


def extract_parts(
    forward: Forward,
    chunks: Sequence[tuple[int, int]],
    folder: Path,
    plan: str,
    world: World,
    assemblies: Mapping[int, Assembly],
    packing: Packing | None = None,
) -> list[Path]:
    """Put the activations of each chunk in place, {layer: Assembly}, and then a note of it under
    `folder`; returns the notes' paths in order once all are there.

    A note says that the rows are on the disk, so a run that was stopped goes on after it. A chunk
    is written while the next one is computed. packing: how rows are packed, which the first chunk
    decides.
    """
    paths = [folder / f"part-{plan}-{i:05}.npz" for i in range(len(chunks))]
    places = places_of(forward.table, chunks)
    n_tokens = [n for _, n in places]
    with progress.bar(sum(n_tokens), "extracting", "token", unit_scale=True) as bar:
        missing = []
        for i, path in enumerate(paths):
            decided = i or packing is None or packing.is_decided()
            in_place = all(each.holds(*places[i]) for each in assemblies.values())
            if path.exists() and decided and in_place:
                bar.already(n_tokens[i])
            else:
                missing.append(i)
        own = [i for i in missing if i % world.size == world.rank]
        with ThreadPoolExecutor(1) as writer:
            writing = None
            computed = forward.each([chunks[i] for i in own], bar.update)
            for i in own:
                started = time.perf_counter()
                chunk = next(computed)
                seconds = time.perf_counter() - started
                if writing:
                    writing.result()
                if packing is not None:
                    if i == 0:
                        packing.decide(chunk.rows, forward.table.kind[: places[0][1]])
                    else:
                        await_first_chunk(packing)
                writing = writer.submit(
                    place_chunk, assemblies, places[i][0], chunk, paths[i], seconds, packing
                )
                del chunk
            if writing:
                try:
                    writing.result()
                # rank 0 has seen the last part, used it and cleared up before this process had its
                # fsync
                except FileNotFoundError:
                    if not world.rank:
                        raise
        if world.rank == 0:
            await_parts(
                {i: paths[i] for i in missing if i % world.size}, n_tokens, world, bar.update
            )
    return paths


def places_of(table: TokenTable, chunks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """[(first row, number of rows)] of each chunk in the whole result."""
    starts = table.starts
    return [(int(starts[first]), int(starts[last] - starts[first])) for first, last in chunks]


def place_chunk(
    assemblies: Mapping[int, Assembly],
    first_row: int,
    chunk: Chunk,
    note: Path,
    seconds: float,
    packing: Packing | None = None,
) -> None:
    """Put a chunk's rows in place, then write the note of it: checksums, norms, and how long the
    forward passes took; of rows that are packed, what packs them."""
    placed: dict[str, np.ndarray] = {}
    for layer, assembly in assemblies.items():
        rows = chunk.rows[layer]
        if packing is not None:
            packed = compression.pack(rows, packing.of(layer))
            rows = packed.codes
            placed |= compression.note_of(packed, layer, first_row)
        checksums = assembly.place(first_row, rows)
        placed[f"crc32_{layer}"] = np.array(checksums, np.uint32)
    given = chunk.norms
    norms = {
        f"norms_{layer}": token_norms(chunk.rows[layer]) if given is None else given[layer]
        for layer in assemblies
    }
    artifacts.write_npz(note, {**placed, "seconds": np.float64(seconds), **norms})


def await_first_chunk(packing: Packing) -> None:
    """Return when rank 0 has decided how rows are packed; says that it waits."""
    waiting = ranks.Waiting()
    while not packing.is_decided():
        waiting.say(ranks.listed([0]), "to write how rows are packed")
        time.sleep(0.2)


def await_parts(
    others: dict[int, Path],
    n_tokens: Sequence[int],
    world: World,
    progress: Callable[[int], object],
) -> None:
    """Return when all parts {number: path} of the other ranks are there; says for whom it waits."""
    waiting = ranks.Waiting()
    while others:
        for i in [i for i, path in others.items() if path.exists()]:
            progress(n_tokens[i])
            del others[i]
        if others:
            waiting.say(
                ranks.listed({i % world.size for i in others}), f"to write {len(others)} more parts"
            )
            time.sleep(0.2)


def name_parts(folder: Path, by_layer: Mapping[int, Mapping[str, Any]]) -> None:
    """Note in a folder of parts which results {layer: metadata} they will make, and by which
    command."""
    path = folder / NOTE
    about = {
        "fingerprints": [metadata["fingerprint"] for metadata in by_layer.values()],
        "command": shlex.join(["python", *sys.argv]),
    }
    if not path.exists():
        artifacts.write_json(path, about)


def clear_parts(folder: Path, finished: Mapping[int, Mapping[str, Any]]) -> None:
    """Remove the parts in `folder`, and others of results that are `finished` {layer: metadata};
    name those of other settings.

    These may be hours of work that their command goes on from, so they are nobody else's to delete.
    """
    storage.remove(folder)
    done = {metadata["fingerprint"] for metadata in finished.values()}
    for other in sorted(folder.parent.glob(".parts-*")):
        try:
            about = json.loads((other / NOTE).read_text(encoding="utf-8"))
            fingerprints, command = set(about["fingerprints"]), str(about["command"])
        # of an earlier version, or killed before it was written
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            fingerprints, command = {"unknown"}, "the same command as then"
        if fingerprints <= done:
            storage.remove(other)
        else:
            size = sum(path.stat().st_size for path in other.glob("*"))
            command = "".join(c if c.isprintable() else "?" for c in command)
            print(
                f"unfinished: {other} ({size / 1e6:.1f} MB) is of a run with other settings. "
                f"finish it with: {command}; or delete it."
            )


def split_shards(lengths: Sequence[int] | np.ndarray, shard_tokens: int) -> list[tuple[int, int]]:
    """[(first, last)] ranges of consecutive examples of at most `shard_tokens` tokens (a longer
    example has its own)."""
    shards, first, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > first and total + int(length) > shard_tokens:
            shards.append((first, i))
            first, total = i, 0
        total += int(length)
    return [*shards, (first, len(lengths))]
