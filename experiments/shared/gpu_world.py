"""What the benchmark on a GPU needs on a machine without a network: a model with random weights,
its tokenizer, datasets of given lengths; the ceilings of the device, and a clock for it."""

import contextlib
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

N_WORDS = 400  # of the texts, a token each
TEMPLATE = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"


def random_model(folder: Path, sizes: Mapping[str, Any], device: str) -> Path:
    """A Llama of the given sizes with random bfloat16 weights, made on `device`, and a tokenizer of
    N_WORDS words, saved in `folder`: right for speed, wrong for what a model says."""
    import tokenizers
    import transformers

    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2),
            dtype=torch.bfloat16,
        )
    model = model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
    model.save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *map(word, range(N_WORDS))]
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **named)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def word(i: int) -> str:
    """The word of a number: letters only, so that a token is a word."""
    return "w" + "".join(chr(ord("a") + int(digit)) for digit in str(i))


def texts(path: Path, lengths: Sequence[int], topics: int = 4) -> Path:
    """A dataset of random texts with so many words each, and the field `topic`, whose words are
    more frequent in them."""
    random = np.random.default_rng(0)
    lines = []
    for i, length in enumerate(lengths):
        topic = i % topics
        numbers = random.integers(0, N_WORDS, length)
        own = random.random(length) < 0.3
        numbers[own] = topic * (N_WORDS // topics) + numbers[own] % 10
        lines.append(
            json.dumps({"text": " ".join(map(word, numbers.tolist())), "topic": f"t{topic}"})
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def lognormal_lengths(n: int, median: float, longest: int) -> list[int]:
    """Lengths of dialogues as they are: a median, a long tail, at most `longest`."""
    drawn = np.random.default_rng(1).lognormal(np.log(median), 0.8, n)
    return np.clip(drawn, 3, longest).astype(int).tolist()


def wait_for(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def times(call: Callable[[], Any], device: str, n: int, warm: int) -> list[float]:
    """Milliseconds of each of `n` calls after `warm` others; on CUDA by its own events, so that the
    host may run ahead."""
    for _ in range(warm):
        call()
    wait_for(device)
    if not device.startswith("cuda"):
        found = []
        for _ in range(n):
            started = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - started))
        return found
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    wait_for(device)
    return [before.elapsed_time(after) for before, after in zip(events, events[1:])]


def ceilings(device: str, side: int) -> dict[str, float]:
    """What the device reaches here: FLOP/s of square products of `side`, bytes/s of a copy."""
    found = {}
    for kind in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, side, side, device=device, dtype=kind)
        taken = statistics.median(times(functools.partial(torch.matmul, a, b), device, 5, 2))
        found[f"{str(kind).removeprefix('torch.')}_flops"] = 2 * side**3 / (taken / 1e3)
    source = torch.zeros(16 * side * side, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = statistics.median(times(lambda: target.copy_(source), device, 5, 2))
    found["copy_bytes"] = 2 * len(source) / (taken / 1e3)
    return found


def host_waits(call: Callable[[], Any], device: str) -> int | None:
    """How often PyTorch lets the host wait for the device in a call; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in seen)


def profile(call: Callable[[], Any], device: str, n: int, most: int = 15) -> list[dict]:
    """The kernels that take the most time in a call, means of `n` (on a CPU, the operators)."""
    from torch.profiler import ProfilerActivity, profile as profiler

    kinds = [ProfilerActivity.CUDA if device.startswith("cuda") else ProfilerActivity.CPU]
    with profiler(activities=kinds) as seen:
        for _ in range(n):
            call()
        wait_for(device)
    name = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, name))[:most]
    return [
        {
            "kernel": row.key[:80],
            "ms": round(getattr(row, name) / n / 1e3, 4),
            "calls": round(row.count / n, 1),
        }
        for row in rows
    ]


@contextlib.contextmanager
def peak_memory(device: str, into: dict[str, Any]) -> Iterator[None]:
    """Note the most GB that tensors on a CUDA device took meanwhile; None on a CPU."""
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if on_cuda else None
    into["peak_memory_gb"] = round(peak, 3) if peak is not None else None
