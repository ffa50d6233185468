"""Rows on their way to the device that trains on them: kept there in the type of their file where
they fit, or else sent batch by batch from pinned memory. The rows are the same either way."""

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

# of a device's free memory that rows may take; the rest is for gradients, moments and a batch
DEVICE_SHARE = 0.5
# rows that are read from the disk together, and at most so many bytes where they are pinned
READ_ROWS, PINNED_BYTES = 16384, 64 << 20
# pinned blocks between the disk and a device: one is read, one is ready, one is sent
N_BLOCKS = 3
# seconds between looks at another thread
LOOK = 0.005

# gives the rows of a slice of those that are asked for
Reader = Callable[[slice], np.ndarray]


class HostRows:
    """Room for `n` rows of `d` numbers in memory, in the type of their file."""

    def __init__(self, n: int, d: int, dtype: np.dtype, device: str = "cpu") -> None:
        self.rows = np.empty((n, d), dtype)
        self.device = device

    def take(self, slots: np.ndarray) -> torch.Tensor:
        """(len(slots), d) rows on the device, in the type of their file."""
        batch = host_batch(len(slots), self.rows.shape[1], self.rows.dtype, self.device)
        np.take(self.rows, slots, axis=0, out=batch.numpy(), mode="clip")  # other modes buffer
        return batch.to(self.device, non_blocking=True)

    def fill_ahead(self, read: Reader, slots: np.ndarray) -> "Reading":
        """Put what `read` gives into `slots` in a thread, while other slots are taken."""

        def read_all(stopped):
            for part in parts_of(len(slots), READ_ROWS):
                if stopped.is_set():
                    return
                self.rows[slots[part]] = read(part)

        return Reading(read_all)


class Block(NamedTuple):
    """Pinned memory: for the thread that talks to the device, and for the one that reads."""

    tensor: torch.Tensor
    array: np.ndarray


class DeviceRows:
    """Room for `n` rows of `d` numbers on a CUDA device, in the type of their file.

    Rows come over a stream of their own, from a ring of pinned blocks that a thread reads into.
    Only the thread that trains talks to the device: it sends what is ready whenever it takes a
    batch, and never waits for the device but at the end of a reading.
    """

    def __init__(self, n: int, d: int, dtype: np.dtype, device: str) -> None:
        self.device, self.kind = device, torch_type(dtype)
        self.rows = torch.empty((n, d), dtype=self.kind, device=device)
        self.stream = torch.cuda.Stream(device)
        row_bytes = d * np.dtype(dtype).itemsize
        self.block = max(1, min(READ_ROWS, n, PINNED_BYTES // row_bytes))
        self.free: queue.Queue[Block] = queue.Queue()
        self.ready: queue.Queue[tuple[Block, np.ndarray]] = queue.Queue()
        self.on_the_way: list[tuple[torch.cuda.Event, Block]] = []
        for _ in range(N_BLOCKS):
            pinned = torch.empty((self.block, d), dtype=self.kind, pin_memory=True)
            self.free.put(Block(pinned, pinned.numpy()))

    def take(self, slots: np.ndarray) -> torch.Tensor:
        """(len(slots), d) rows on the device, in the type of their file."""
        self._send()
        return self.rows.index_select(0, self._numbers(slots))

    def fill_ahead(self, read: Reader, slots: np.ndarray) -> "Reading":
        """Put what `read` gives into `slots`, read by a thread, while other slots are taken."""
        # what was taken from these slots leaves them before they are written
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

        def read_all(stopped):
            for part in parts_of(len(slots), self.block):
                block = self._free_block(stopped)
                if block is None:
                    return
                block.array[: len(slots[part])] = read(part)
                self.ready.put((block, slots[part]))

        return Reading(read_all, meanwhile=self._send, at_end=self._arrive)

    def _free_block(self, stopped):
        while not stopped.is_set():
            try:
                return self.free.get(timeout=LOOK)
            except queue.Empty:
                continue
        return None

    def _send(self):
        """Start the copies of blocks that are ready; free the blocks whose copies have arrived."""
        while not self.ready.empty():
            block, slots = self.ready.get()
            with torch.cuda.stream(self.stream):
                rows = block.tensor[: len(slots)].to(self.device, non_blocking=True)
                self.rows.index_copy_(0, self._numbers(slots), rows)
                event = torch.cuda.Event()
                event.record(self.stream)
            self.on_the_way.append((event, block))
        while self.on_the_way and self.on_the_way[0][0].query():
            self.free.put(self.on_the_way.pop(0)[1])

    def _arrive(self):
        """Let what follows on the device wait for all that was sent."""
        self._send()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _numbers(self, slots):
        return torch.from_numpy(slots).long().pin_memory().to(self.device, non_blocking=True)


class Reading:
    """A thread that runs `read(stopped)`, which is to end early when the event `stopped` is set.

    `meanwhile()` is called again and again while `finish` waits for it, `at_end()` afterwards.
    """

    def __init__(
        self,
        read: Callable[[threading.Event], None],
        *,
        meanwhile: Callable[[], object] = lambda: None,
        at_end: Callable[[], object] = lambda: None,
    ) -> None:
        self.meanwhile, self.at_end = meanwhile, at_end
        self.failed: list[BaseException] = []
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(read,), daemon=True)
        self.thread.start()

    def _run(self, read):
        try:
            read(self.stopped)
        except BaseException as error:  # it would otherwise end nothing but the thread
            self.failed.append(error)

    def finish(self) -> None:
        """Wait until all is read, and raise what reading raised. What follows on the device then
        sees the rows."""
        while self.thread.is_alive():
            self.meanwhile()
            self.thread.join(LOOK)
        if self.failed:
            raise self.failed[0]
        self.at_end()

    def stop(self) -> None:
        """Read no more."""
        self.stopped.set()
        while self.thread.is_alive():
            self.thread.join(LOOK)
        self.at_end()


def room_for(n: int, d: int, dtype: np.dtype, device: str) -> HostRows | DeviceRows:
    """Room for `n` rows of `d` numbers: on a CUDA device if they take no more than DEVICE_SHARE of
    its free memory, else on the host."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        if n * d * np.dtype(dtype).itemsize <= DEVICE_SHARE * free:
            return DeviceRows(n, d, dtype, device)
    return HostRows(n, d, dtype, device)


def host_batch(n: int, d: int, dtype: np.dtype, device: str) -> torch.Tensor:
    """Room on the host for a batch (n, d) that goes to a device, pinned for CUDA. PyTorch uses
    pinned memory again only when a copy `to` the device has arrived."""
    return torch.empty((n, d), dtype=torch_type(dtype), pin_memory=device.startswith("cuda"))


def parts_of(n: int, size: int) -> list[slice]:
    """Slices of `size` that cover n."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def torch_type(dtype: np.dtype) -> torch.dtype:
    """PyTorch's name of one of numpy's types."""
    return torch.from_numpy(np.empty(0, dtype)).dtype
