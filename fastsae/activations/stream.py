"""A stream: numbered parts of activations in a folder, written by stage 1 while stage 2 trains on
them and deletes what it has safely trained on. Nothing but files passes between the two.

    stream_layer12/
        stream.json      by stage 1: which parts there will be, how large, and the budget
        part-000007.npz  by stage 1: complete, with the members of an activations file
        trainer.json     by stage 2: who trains on the parts, and whether it has ended
        answer.json      by stage 2 under run_pipeline.py: whether it needs parts at all
        released.jsonl   by stage 2: a line for each part that was trained on and deleted

Stage 2 saves its state, then deletes, then notes the deletion. So whenever either side is killed,
a part is there, or noted, or is made again.
"""

import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.activations.files import find_shards, read_metadata
from fastsae.runtime import artifacts, storage
from fastsae.runtime.errors import EnvironmentFailure, InputError

MAKER, TRAINER = "extract_activations.py", "train_sae.py"
PARTS_NEEDED = 4  # at a time: two that are mixed, one that is read, one that is written
POLL = 0.2  # seconds between looks at the folder
SECOND_LOOK = 1.0  # seconds in which a deleted part is noted
OVERHEAD = 1 << 14  # bytes of a part besides its rows and tokens
PER_TOKEN, PER_EXAMPLE = 6, 8  # bytes besides the row


def folder_of(activations_path: Path) -> Path:
    """The stream's folder beside a layer's activations file, which holds its sample."""
    return activations_path.with_name(activations_path.stem.replace("activations", "stream", 1))


def split_parts(lengths: np.ndarray, numbers: np.ndarray, part_tokens: int) -> list[np.ndarray]:
    """The examples numbered, in order, cut into parts of about `part_tokens` tokens; a last part
    of less than half as many joins the one before.

    lengths (n_examples,) of all examples; numbers (n,), rising. A function of these alone.
    """
    if not len(numbers):
        return []
    ends, total = [], 0
    for i, length in enumerate(lengths[numbers]):
        total += int(length)
        if total >= part_tokens:
            ends.append(i + 1)
            total = 0
    if total and ends and total < part_tokens / 2:
        ends[-1] = len(numbers)
    elif total:
        ends.append(len(numbers))
    return np.split(numbers, ends[:-1])


def part_tokens(buffer_tokens: int) -> int:
    """Tokens of a part: two are mixed in a buffer of so many while the next one is read."""
    return max(1, buffer_tokens // 3)


def part_bytes(n_tokens: int, n_examples: int, bytes_of_rows: int) -> int:
    """At most so many bytes a part takes on the disk."""
    return bytes_of_rows + n_tokens * PER_TOKEN + n_examples * PER_EXAMPLE + OVERHEAD


def require_budget(budget: int, sizes: Sequence[int]) -> None:
    """InputError unless any PARTS_NEEDED parts of these sizes (bytes) in a row fit into it."""
    windows = range(max(1, len(sizes) - PARTS_NEEDED + 1))
    needed = max(sum(sizes[i : i + PARTS_NEEDED]) for i in windows)
    if needed > budget:
        raise InputError(
            f"STREAM_BYTES: {budget:,} bytes for a layer do not hold {PARTS_NEEDED} parts, which "
            f"take {needed:,}. give at least --stream-bytes {needed} for each layer, or lower "
            "--buffer-tokens."
        )


class Stream:
    """The folder of one layer's stream, as both sides see it. `about` is the content of stream.json
    ({} before it is read)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = {}
        self._missed: dict[int, float] = {}  # when a part was first neither there nor noted

    # What both sides read

    @property
    def notes(self) -> Path:
        """The file that has a line for each part that was trained on and deleted."""
        return self.folder / "released.jsonl"

    @property
    def trainer_lock(self) -> Path:
        """What stage 2 claims, so that one run of it consumes the parts."""
        return self.folder / "trainer"

    def part_path(self, number: int) -> Path:
        """Where part `number` (from 1) lies."""
        return self.folder / f"part-{number:06}.npz"

    def read(self) -> bool:
        """Read stream.json; False if there is none, or none that is whole."""
        self.about = _read_json(self.folder / "stream.json")
        return bool(self.about.get("fingerprint"))

    @property
    def sizes(self) -> list[int]:
        """Bytes of each part, at most; [] before they are known."""
        return self.about.get("sizes", [])

    @property
    def n_parts(self) -> int:
        """Parts that there are or will be, and were."""
        return len(self.sizes)

    def released(self) -> int:
        """All parts up to this number are noted as trained on and deleted."""
        numbers = {line.get("part") for line in storage.read_lines(self.notes)}
        n = 0
        while n + 1 in numbers:
            n += 1
        return n

    def in_words(self) -> str:
        """How much there is in all."""
        return f"{sum(self.about['n_tokens']):,} tokens in {self.n_parts} parts of a stream"

    def on_disk(self) -> int:
        """Bytes of the complete parts that lie in the folder."""
        total = 0
        for path in self.folder.glob("part-*.npz"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:  # deleted meanwhile
                pass
        return total

    def fullness(self) -> str:
        """How much of the budget is on the disk."""
        unit, name = (1e9, "GB") if self.about["budget"] >= 1e9 else (1e6, "MB")
        return f"{self.on_disk() / unit:.1f} of {self.about['budget'] / unit:.1f} {name} on disk"

    # Stage 1

    def announce(self, about: Mapping[str, Any]) -> None:
        """Write stream.json."""
        storage.make_folder(self.folder)
        self.about = dict(about)
        path = self.folder / "stream.json"
        if _read_json(path) != self.about:
            storage.write_json(path, self.about)

    def require_own_parts(self, fingerprint: str) -> None:
        """InputError if an .npz in the folder is not a part of this stream; notes of another one
        that was trained on go."""
        for path in sorted(self.folder.glob("*.npz")):
            try:
                found = artifacts.read_npz_metadata(path, made_by=MAKER)
            except EnvironmentFailure:  # damaged: stage 2 says so when it comes to it
                continue
            if found["fingerprint"] != fingerprint:
                raise InputError(
                    f"{path}: is of another run, which was not trained on to its end. finish that "
                    f"with its own settings, or delete {self.folder}."
                )
        old = _read_json(self.folder / "stream.json").get("fingerprint")
        if old != fingerprint:
            for name in ("stream.json", "trainer.json", "released.jsonl"):
                storage.remove(self.folder / name)

    def next_part(self, rank: int = 0, size: int = 1, besides: Container[int] = ()) -> int | None:
        """The first part that is neither there nor noted, of those of process `rank` of `size`;
        None if there is none. besides: parts that are being written."""
        done = self.released()
        for number in range(done + 1, self.n_parts + 1):
            own = (number - 1) % size == rank and number not in besides
            if own and not self.part_path(number).exists():
                return number
        return None

    def is_due(self, number: int) -> bool:
        """Whether part `number`, which was not there, is to be made: it fits into the budget, and
        is not just being noted as deleted."""
        later = any(self.part_path(n).exists() for n in range(number + 1, self.n_parts + 1))
        since = self._missed.setdefault(number, time.monotonic())
        if later and time.monotonic() - since < SECOND_LOOK:
            return False
        return self._has_room(number)

    def _has_room(self, number):
        return sum(self.sizes[self.released() : number]) <= self.about["budget"]

    # Stage 2

    def is_full(self) -> bool:
        """Whether stage 1 has no room for the next part."""
        number = self.next_part()
        return number is not None and not self._has_room(number)

    def release(self, upto: int, digests: Mapping[int, str]) -> None:
        """Delete the parts up to `upto`, then note them; `digests`: their sha256 where known. Only
        for what is saved."""
        for number in range(self.released() + 1, upto + 1):
            storage.remove(self.part_path(number))
            storage.append_line(self.notes, {"part": number, "sha256": digests.get(number)})
        for path in self.folder.glob("part-*.npz"):  # made once more after a kill in between
            digits = path.stem.removeprefix("part-")
            if digits.isdigit() and int(digits) <= upto:
                storage.remove(path)

    def forget_after(self, number: int) -> None:
        """Let parts after `number` count as not trained on yet: stage 1 makes them again."""
        kept = [line for line in storage.read_lines(self.notes) if line.get("part", 0) <= number]
        if len(kept) < len(storage.read_lines(self.notes)):
            text = "".join(storage.to_json(line) + "\n" for line in kept)
            storage.write_text(self.notes, text)

    def take(self, plans: Mapping[str, str], command: str) -> None:
        """Become the trainer of the parts; plans: {checkpoint: fingerprint}.

        InputError while another training has trained on a part of them and not on all. After one
        that has ended all parts are needed again.
        """
        found = _read_json(self.folder / "trainer.json")
        if found.get("plans") == dict(plans) and not found.get("ended"):
            return
        if found and not found.get("ended") and 0 < self.released():
            raise InputError(
                f"{self.folder}: is being trained on with other settings "
                f"({self.released()} of {self.n_parts} parts are done and deleted). finish that "
                f"with: {found.get('command')}; or delete the folder, and all parts are made again."
            )
        self.forget_after(0)
        self._write_trainer(plans, command, ended=False)

    def join(self, plans: Mapping[str, str], command: str, *, todo: bool, run: str | None) -> None:
        """Say at the start of stage 2 which autoencoders {checkpoint: fingerprint} are wanted, and
        whether any is still to be trained; stage 1 of the same pipeline `run` waits for that."""
        if todo:
            self.take(plans, command)
        elif _read_json(self.folder / "trainer.json").get("plans") == dict(plans):
            self.end(plans, command)  # it may have been killed before it said so
        self.answer(run, todo)

    def end(self, plans: Mapping[str, str], command: str) -> None:
        """Nobody needs the parts any more: delete them, and say so."""
        self.release(self.n_parts, {})
        self._write_trainer(plans, command, ended=True)

    def answer(self, run: str | None, needs: bool) -> None:
        """Tell stage 1 of the same pipeline `run` whether parts are needed."""
        if run is not None:
            storage.write_json(self.folder / "answer.json", {"run": run, "needs": needs})

    def answered(self, run: str | None) -> bool | None:
        """What stage 2 of the same pipeline answered; None before it has."""
        found = _read_json(self.folder / "answer.json")
        return found.get("needs") if found.get("run") == run else None

    def _write_trainer(self, plans, command, *, ended):
        storage.write_json(
            self.folder / "trainer.json", {"plans": dict(plans), "command": command, "ended": ended}
        )


def _read_json(path):
    try:
        found = storage.from_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def opened(
    activations_path: Path, stream_bytes: int | None, run: str | None = None
) -> tuple[dict[str, Any], Stream | None]:
    """(metadata of the activations, their stream if they are the sample of one) for stage 2.

    stream_bytes: with it, waits as long as stage 1 is making the sample. run: the pipeline that
    has started both, which waits itself. InputError where the two do not fit.
    """
    stream = Stream(folder_of(activations_path))
    while True:
        # the sample that is there may be another run's, which stage 1 is about to replace
        is_made = run is None and stream_bytes is not None and storage.is_claimed(activations_path)
        if find_shards(activations_path) or not is_made:
            source = read_metadata(activations_path)
            if "stream" in source:
                if stream.read() and stream.about["fingerprint"] == source["fingerprint"]:
                    return source, stream
                if not storage.is_claimed(activations_path):
                    raise EnvironmentFailure(
                        f"{stream.folder}: has no parts of the stream that {activations_path.name} "
                        f"is the sample of. run {MAKER} beside this, with the same settings."
                    )
            elif stream_bytes is None:
                return source, None
            elif not is_made:
                raise InputError(
                    f"STREAM_BYTES: {activations_path} was made without it. run {MAKER} with "
                    "--stream-bytes too, or leave it out here."
                )
        time.sleep(POLL)
