"""Training in several processes that torchrun started: what they must know of each other. Alone, every function here is the identity.

Each process takes its slice of every batch. Sums over the batch (gradients, variance, loss) are added up, BatchTopK's choice and
threshold and the counters of dead features look at all slices, so N processes do what one does with the same batch.
"""
import os
from datetime import timedelta

import torch
import torch.distributed as dist


def world():
    """(rank, number of processes)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(device):
    """Join the others, and return this process's device."""
    size = world()[1]
    if device == "cuda" and size > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():  # counts and flags are kept on the CPU, which NCCL does not serve
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(minutes=30))
    return device


def wait_for_all():
    """Go on when all processes have come here."""
    if together():
        dist.all_reduce(torch.zeros(1))


def together():
    return dist.is_available() and dist.is_initialized()


def share(n):
    """The slice of n rows that is this process's."""
    rank, size = world()
    return slice(rank * n // size, (rank + 1) * n // size)


def total(tensor):
    """The sum over all processes, in place; any strides."""
    if together():
        flat = tensor.contiguous()
        dist.all_reduce(flat)
        tensor.copy_(flat)
    return tensor


def least(tensor):
    if together():
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def anywhere(flags):
    """Element by element whether it is true in any process: bool in, bool out."""
    if not together():
        return flags
    counts = torch.as_tensor(flags).int().reshape(-1)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return counts.bool() if isinstance(flags, torch.Tensor) else bool(counts)


def joined(values):
    """The values (n,) of all processes in one tensor."""
    if not together():
        return values
    sizes = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(values)], device=values.device))
    longest = max(int(size) for size in sizes)
    padded = [values.new_empty(longest) for _ in sizes]
    dist.all_gather(padded, torch.cat([values, values.new_zeros(longest - len(values))]))
    return torch.cat([part[:int(size)] for part, size in zip(padded, sizes)])


def from_rank_0(make):
    """What `make()` returns on rank 0, on every rank."""
    if not together():
        return make()
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]
