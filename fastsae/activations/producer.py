"""Stage 1 of a stream: makes the parts in order, each as soon as the budget has room for it."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.activations import compression
from fastsae.activations.compression import Calibration, bytes_of, computed_dtype
from fastsae.activations.extraction import Forward, World
from fastsae.activations.stream import POLL, TRAINER, Stream, part_bytes
from fastsae.data.token_spool import TokenSpool
from fastsae.data.tokenization import TokenTable
from fastsae.runtime import artifacts, progress

Make = Callable[[int, Callable[[int], object]], dict[int, dict[str, Any]]]


def sizes_of(
    spool: TokenSpool, parts: Sequence[np.ndarray], d_model: int, storage_dtype: str
) -> list[int]:
    """Bytes of each part, at most."""
    sizes = []
    for part in parts:
        n = int(spool.lengths[part].sum())
        sizes.append(part_bytes(n, len(part), bytes_of(n, d_model, storage_dtype)))
    return sizes


def part_maker(
    model: Any,
    spool: TokenSpool,
    parts: Sequence[np.ndarray],
    metadata: Mapping[int, Mapping[str, Any]],
    *,
    batch_tokens: int,
    storage_dtype: str,
    calibrations: Mapping[int, Calibration],
    dataset_name: Path | str,
    require_same: Callable[[], object],
    pin: bool = False,
) -> Make:
    """A function that runs the model over part number n (from 1) and returns {layer: members of its
    file}. Batches are planned within a part, so it depends on its own examples only.

    calibrations: {layer: Calibration} of those that are packed.
    """

    def make(number: int, done: Callable[[int], object]) -> dict[int, dict[str, Any]]:
        table = spool.table(parts[number - 1])
        forward = Forward(
            model,
            table,
            n_shared=spool.n_shared,
            batch_tokens=batch_tokens,
            storage_dtype=computed_dtype(storage_dtype),
            dataset_name=dataset_name,
            pin=pin,
        )
        rows = forward.chunk(0, len(table.lengths), done)
        require_same()  # weights are mapped from their file until they are used
        return {
            layer: members_of(
                table, rows[layer], {**metadata[layer], "part": number}, calibrations.get(layer)
            )
            for layer in rows
        }

    return make


def members_of(
    table: TokenTable,
    rows: np.ndarray,
    metadata: Mapping[str, Any],
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """The members of an activations file with these examples, their rows packed by `calibration` if
    there is one."""
    stored = {"activations": rows}
    if calibration is not None:
        stored = compression.members_of(compression.pack(rows, calibration), calibration)
    return {
        **stored,
        "seq_lengths": table.lengths,
        "token_ids": table.ids,
        "token_kind": table.kind,
        "token_role": table.role,
        "example_ids": table.lines,
        "metadata": np.array(artifacts.to_json(metadata)),
    }


def write_parts(
    streams: Mapping[int, Stream],
    n_tokens: Sequence[int],
    make: Make,
    world: World,
    run: str | None = None,
) -> int:
    """Make the parts that are neither there nor trained on, until all are or stage 2 of the same
    pipeline `run` needs no more; returns how many were made.

    streams: {layer: Stream}, announced. n_tokens: of each part. A part is written while the next
    one is computed. Within a pipeline stage 2 shows how far both are.
    """
    announced = streams
    made, writing = 0, Writing()
    own = [n for i, n in enumerate(n_tokens) if i % world.size == world.rank]
    hidden = run is not None
    shown = progress.bar(sum(own), "extracting", "token", unit_scale=True, hidden=hidden)
    with shown as bar, writing:
        first = next_missing(streams, world, writing)
        bar.already(sum(n_tokens[: (first or len(n_tokens) + 1) - 1]) if world.size == 1 else 0)
        while True:
            streams = still_needed(announced, run)
            if not streams:
                return made
            number = next_missing(streams, world, writing)
            if number is None:
                writing.finish()
                if run is None or all(s.answered(run) is not None for s in streams.values()):
                    number = next_missing(streams, world, writing)
                    if number is None:
                        return made
                else:
                    time.sleep(POLL)
                    continue
            waiting = [
                layer
                for layer, stream in streams.items()
                if not stream.part_path(number).exists() and number > stream.released()
            ]
            if not waiting:  # it was just deleted and noted
                continue
            if not all(streams[layer].is_due(number) for layer in waiting):
                writing.finish()
                bar.set_postfix_str(waiting_note(streams, waiting))
                time.sleep(POLL)
                continue
            bar.set_postfix_str("")
            members = make(number, bar.update)
            writing.begin(
                number, {streams[layer].part_path(number): members[layer] for layer in waiting}
            )
            made += 1


def still_needed(streams: Mapping[int, Stream], run: str | None) -> dict[int, Stream]:
    """Those of the streams whose stage 2, of the pipeline `run`, has not said that it needs no
    parts."""
    return {
        layer: stream
        for layer, stream in streams.items()
        if run is None or stream.answered(run) is not False
    }


def next_missing(streams: Mapping[int, Stream], world: World, writing: "Writing") -> int | None:
    """The first part of this process that some layer lacks; None if no layer lacks one."""
    found = [stream.next_part(world.rank, world.size, writing) for stream in streams.values()]
    return min((number for number in found if number is not None), default=None)


def waiting_note(streams: Mapping[int, Stream], layers: Sequence[int]) -> str:
    """For whom stage 1 waits, and how full the budget is."""
    full = [streams[layer].fullness() for layer in layers]
    of_layers = " and ".join(str(layer) for layer in layers) if len(streams) > 1 else ""
    return (
        f"waiting for {TRAINER}{f' of layer {of_layers}' if of_layers else ''}, "
        f"{' and '.join(full)}"
    )


class Writing:
    """The part that a thread is writing. A context: the last one is on the disk at its end."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.number: int | None = None
        self.result: Future | None = None

    def __contains__(self, number: object) -> bool:
        return self.number is not None and number == self.number

    def begin(self, number: int, files: Mapping[Path, Mapping[str, Any]]) -> None:
        """Write {path: members} of part `number`, once the part before is written."""
        self.finish()

        def write():
            for path, members in files.items():
                artifacts.write_npz(path, members)

        self.number, self.result = number, self.thread.submit(write)

    def finish(self) -> None:
        """Wait until the part is on the disk; raises what its writing raised."""
        if self.result is not None:
            result, self.result = self.result, None
            result.result()
            self.number = None

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.thread.shutdown(wait=kind is None)
