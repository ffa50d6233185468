"""Training in several processes that torchrun started: what they must know of each other. Alone,
every function here is the identity.

Each process takes its slice of every batch. Sums over the batch (gradients, variance, loss) are
added up, BatchTopK's choice and threshold and the counters of dead features look at all slices, so
N processes do what one does with the same batch.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastsae.runtime import ranks, stops
from fastsae.runtime.errors import EnvironmentFailure, InputError

PATIENCE = timedelta(minutes=30)  # of a process that waits for another one
_apart = False  # see `apart`


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    return ranks.current()[:2]


def start(device: str) -> None:
    """Join the other processes that train on the same data, each on its `device`; alone, do
    nothing.

    Says for whom it waits. InputError where nothing says where they meet, or where processes of one
    machine would share a CUDA device; EnvironmentFailure where the others do not come.
    """
    rank, size, _, local_size = ranks.current()
    if size == 1 or dist.is_initialized():
        return
    store = _meet(rank, size)
    if device.startswith("cuda"):
        say_device(store, rank, device)
        require_own_device(store, rank, size, device)
    # Counts and flags are kept on the CPU, which NCCL does not serve.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )
    stops.joined_others()


def _meet(rank, size):
    """The store that all processes share, once all have come to it."""
    store = _store(rank, size)
    deadline = time.monotonic() + PATIENCE.total_seconds()
    waiting = ranks.Waiting()
    store.set(f"here/{rank}", "")
    missing = set(range(size))
    while missing := {other for other in missing if not store.check([f"here/{other}"])}:
        waiting.say(ranks.listed(missing), f"of {size} to start this stage")
        if time.monotonic() > deadline:
            raise EnvironmentFailure(
                f"WORLD_SIZE: {ranks.listed(missing)} of {size} did not come. "
                "start all processes, or look at what they said."
            )
        time.sleep(0.05)
    return store


def _store(rank, size):
    """A connection to the store at MASTER_ADDR and MASTER_PORT, which rank 0 opens unless torchrun
    did."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise InputError(
                f"{name}: is not set, so {size} processes cannot find each other. start the stage "
                "with torchrun, or set MASTER_ADDR and MASTER_PORT to where rank 0 runs."
            )
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InputError(
            f"MASTER_PORT: expected a port from 1 to 65535, got {ascii(port)}. choose a free one."
        )
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not opens:
        _await_answer(host, int(port))
    try:
        store = dist.TCPStore(
            host,
            int(port),
            size,
            opens,
            timeout=PATIENCE,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        brief = str(error).splitlines()[0][:200]
        raise EnvironmentFailure(
            f"MASTER_PORT: {host}:{port} cannot be used ({brief}). choose another one."
        ) from None
    return dist.PrefixStore(f"fastsae/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _await_answer(host, port):
    """Return when somebody listens there. (TCPStore's own tries print a page each, and no signal
    ends them.)"""
    deadline, waiting = time.monotonic() + PATIENCE.total_seconds(), ranks.Waiting()
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise EnvironmentFailure(
                    f"MASTER_ADDR: no answer from {host}:{port} ({error.strerror or error}). "
                    "start rank 0 there."
                ) from None
            waiting.say("rank 0", f"to answer at {host}:{port} ({error.strerror or error})")
            time.sleep(0.2)


def say_device(store: Any, rank: int, device: str) -> None:
    """Tell the others which GPU of which machine this process has; numbers do not say it, for each
    may see other ones."""
    properties = torch.cuda.get_device_properties(device)
    store.set(f"device/{rank}", f"{os.uname().nodename} {getattr(properties, 'uuid', device)}")


def require_own_device(store: Any, rank: int, size: int, device: str) -> None:
    """InputError if two processes have said that they have the same GPU: NCCL needs one for
    each."""
    taken = [store.get(f"device/{other}") for other in range(size)]
    # this process and who shares with it, or others who share
    for gpu in (taken[rank], *taken):
        sharing = [other for other in range(size) if taken[other] == gpu]
        if len(sharing) > 1:
            raise InputError(
                f"DEVICE: {ranks.listed(sharing)} would train on the same GPU, {device}. "
                "start one process for each GPU, with --device cuda, and let LOCAL_RANK tell "
                "those of a machine apart."
            )


def wait_for_all() -> None:
    """Go on when all processes have come here."""
    if together():
        dist.all_reduce(torch.zeros(1))


def together() -> bool:
    """Whether several processes train together."""
    return not _apart and dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Here this process works alone, whatever the others do: nothing is added up."""
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


def share(n: int) -> slice:
    """The slice of n rows that is this process's."""
    rank, size = world()
    return slice(rank * n // size, (rank + 1) * n // size)


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place; any strides."""
    if together():
        flat = tensor.contiguous()
        dist.all_reduce(flat)
        tensor.copy_(flat)
    return tensor


def least(tensor: torch.Tensor) -> torch.Tensor:
    """The least value over all processes, element by element, in place."""
    if together():
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def anywhere(flags: Any) -> Any:
    """Element by element whether it is true in any process: bool in, bool out."""
    if not together():
        return flags
    counts = torch.as_tensor(flags).int().reshape(-1)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return counts.bool() if isinstance(flags, torch.Tensor) else bool(counts)


def joined(values: torch.Tensor) -> torch.Tensor:
    """The values (n,) of all processes in one tensor."""
    if not together():
        return values
    sizes = [
        torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(sizes, torch.tensor([len(values)], device=values.device))
    longest = max(int(size) for size in sizes)
    padded = [values.new_empty(longest) for _ in sizes]
    dist.all_gather(padded, torch.cat([values, values.new_zeros(longest - len(values))]))
    return torch.cat([part[: int(size)] for part, size in zip(padded, sizes)])


def from_rank_0(make: Callable[[], Any]) -> Any:
    """What `make()` returns on rank 0, on every rank."""
    if not together():
        return make()
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]
