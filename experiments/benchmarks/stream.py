"""Training while activations are extracted, on millions of tokens with a budget of a few percent of
them, against extraction and training one after the other.

    python -m experiments.benchmarks.stream --work-dir /tmp/w                # all of it
    python -m experiments.benchmarks.stream --work-dir /tmp/w --step both    # or step by step

The data are dialogues made of two of the demo's passages each, read at a low layer of the embedded
model. Steps: data, extract (all parts stay), shuffled (the same rows in one full shuffle, in
memory), train (on the stream that is there), both (at once, with the budget), half (the same on
half the dialogues with the same budget: memory and disk at two sizes), write. A step ends after
--minutes with exit code 75, and the same command goes on; steps that are done are not done again.
Wall time says little on a machine that does other work, so CPU seconds stand beside it. Writes
experiments/results/stream.json.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.shared.provenance import PROJECT, environment, module_command, write_result
from fastsae.runtime import storage

STEPS = ("data", "extract", "shuffled", "train", "both", "half", "write")
GO_ON = 75  # exit code of a step that ended in time and is not done
STOPPED = 128 + signal.SIGTERM
SEED = 0
UNLIMITED = 10**13
TRAINING = ("--m", 256, "--k", 8, "--matryoshka-prefixes", "64,256", "--learning-rate", 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--step", choices=STEPS, help="one step; without it all of them")
    parser.add_argument("--tokens", type=int, default=5_500_000, help="of the dialogues, about")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--small-model", action="store_true", help="128 wide, random weights")
    parser.add_argument("--name", default="stream", help="of the result")
    parser.add_argument("--buffer-tokens", type=int, default=190_000)
    parser.add_argument("--budget", type=float, default=0.05, help="part of all rows' bytes")
    parser.add_argument("--sample", type=float, default=0.04, help="part that is not streamed")
    parser.add_argument("--minutes", type=float, default=9.0, help="of a step, then it stops")
    parser.add_argument("train", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:  # in a process of its own
        sys.exit(train_shuffled(args.train))
    for step in (args.step,) if args.step else STEPS:
        if args.step or step == "write" or not (args.work_dir / f"{step}.json").exists():
            globals()[f"step_{step}"](args)


def step_data(args: argparse.Namespace) -> None:
    """Dialogues of two passages each, and the small model."""
    if (args.work_dir / "dialogues.jsonl").exists():
        return
    if args.small_model:
        make_small_model(args.work_dir / "model")
    passages = [
        json.loads(line)["text"]
        for line in (PROJECT / "data" / "cognitive_actions.jsonl").read_text().splitlines()
    ]
    chance, n_characters = random.Random(SEED), 0
    args.work_dir.mkdir(parents=True, exist_ok=True)
    with open(args.work_dir / "dialogues.jsonl", "w") as file:
        while n_characters < 4.6 * args.tokens:  # characters a token, the template's left out
            first, second = chance.sample(passages, 2)
            roles = zip(("user", "assistant"), (first, second))
            row = {"messages": [{"role": role, "content": text} for role, text in roles]}
            file.write(json.dumps(row) + "\n")
            n_characters += len(first) + len(second)


def make_small_model(folder: Path) -> None:
    """A random Llama, 128 wide, with the embedded model's tokenizer."""
    import transformers

    from fastsae.lm.loading import load_tokenizer

    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer("SmolLM2-135M-Instruct").save_pretrained(folder)


def step_extract(args: argparse.Namespace) -> None:
    """Stage 1 alone; all parts stay."""
    found = measured(args, "extract", "alone", [extract(args, "alone", UNLIMITED)])
    keep(args, "extract", found)


def step_shuffled(args: argparse.Namespace) -> None:
    """Stage 2 on the same rows in one full shuffle."""
    copied = args.work_dir / "shuffled"
    if not copied.exists():
        shutil.copytree(args.work_dir / "alone", copied, copy_function=os.link)
    command = module_command("experiments.benchmarks.stream", "--work-dir", args.work_dir, "--")
    found = measured(
        args, "shuffled", "shuffled", [[*command, *train(args, "shuffled", UNLIMITED)[2:]]]
    )
    keep(args, "shuffled", {**found, "metrics": metrics_of(args, "shuffled")})


def step_train(args: argparse.Namespace) -> None:
    """Stage 2 alone, on all parts."""
    found = measured(args, "train", "alone", [train(args, "alone", UNLIMITED)])
    keep(args, "train", {**found, "metrics": metrics_of(args, "alone")})


def step_both(args: argparse.Namespace) -> None:
    """Both stages at once, with the budget."""
    budget = budget_of(args)
    commands = [extract(args, "both", budget), train(args, "both", budget)]
    found = measured(args, "both", "both", commands)
    same = checkpoint_of(args, "alone").read_bytes() == checkpoint_of(args, "both").read_bytes()
    figures = {"budget_bytes": budget, "same_bytes": same, "metrics": metrics_of(args, "both")}
    keep(args, "both", {**found, **figures})


def step_half(args: argparse.Namespace) -> None:
    """Both stages at once on half the dialogues, with the budget of all."""
    lines = (args.work_dir / "dialogues.jsonl").read_text().splitlines(keepends=True)
    (args.work_dir / "half.jsonl").write_text("".join(lines[: len(lines) // 2]))
    budget = budget_of(args)
    commands = [extract(args, "half", budget), train(args, "half", budget)]
    keep(args, "half", measured(args, "half", "half", commands))


def step_write(args: argparse.Namespace) -> None:
    """The result of the steps that were run."""
    found = {step: kept(args, step) for step in STEPS if (args.work_dir / f"{step}.json").exists()}
    about = stream_of(args, "alone")
    trained = {step: found[step]["metrics"] for step in found if "metrics" in found[step]}
    errors = {step: metrics["normalized_mse"] for step, metrics in trained.items()}
    model = "128 wide, random" if args.small_model else "SmolLM2-135M-Instruct"
    result: dict[str, Any] = {
        "n_tokens": sum(about["n_tokens"]),
        "n_parts": len(about["n_tokens"]),
        "bytes_of_all_parts": sum(about["sizes"]),
        "stages": {step: each["stages"] for step, each in found.items()},
        "peak_bytes": {step: each["peak_bytes"] for step, each in found.items()},
        "load": {step: each["load"] for step, each in found.items()},
        "pieces": {step: each["pieces"] for step, each in found.items()},
        "normalized_mse": errors,
    }
    if "shuffled" in found:
        result["mixing_loss"] = errors["train"] / errors["shuffled"] - 1
    if "half" in found:
        n_half = sum(stream_of(args, "half")["n_tokens"])
        result["sizes"] = {
            step: {
                "n_tokens": n,
                "peak_memory_mb": [each["peak_memory_mb"] for each in found[step]["stages"]],
                "peak_bytes": found[step]["peak_bytes"],
            }
            for step, n in (("half", n_half), ("both", sum(about["n_tokens"])))
        }
    if "both" in found:
        in_turn = [found[step]["stages"][0] for step in ("extract", "train")]
        result |= {
            "budget_bytes": found["both"]["budget_bytes"],
            "same_bytes": found["both"]["same_bytes"],
            "seconds_in_turn": sum(each["seconds"] for each in in_turn),
            "seconds_at_once": found["both"]["seconds"],
            "cpu_seconds_in_turn": sum(each["cpu_seconds"] for each in in_turn),
            "cpu_seconds_at_once": sum(e["cpu_seconds"] for e in found["both"]["stages"]),
        }
    settings = {"model": model, "layer": args.layer, "buffer_tokens": args.buffer_tokens}
    write_result(args.name, {**settings, "training": TRAINING}, result)


# Stages as processes


def extract(args: argparse.Namespace, folder: str, budget: int) -> list[str]:
    """The command of stage 1."""
    own = ["--layer-idx", args.layer, "--label-field", "none", "--sample-fraction", args.sample]
    if args.small_model:
        own += ["--model-name", args.work_dir / "model"]
    return command_of(args, "extract_activations.py", folder, budget, *own)


def train(args: argparse.Namespace, folder: str, budget: int) -> list[str]:
    """The command of stage 2."""
    own = ["--layer-idx", args.layer, "--label-field", "none", "--run-name", "r", *TRAINING]
    return command_of(args, "train_sae.py", folder, budget, *own)


def command_of(args, script, folder, budget, *more):
    data = args.work_dir / ("half.jsonl" if folder == "half" else "dialogues.jsonl")
    shared = [
        "--output-dir", args.work_dir / folder, "--dataset-path", data,
        "--device", "cpu", "--stream-bytes", budget, "--buffer-tokens", args.buffer_tokens,
    ]  # fmt: skip
    return [sys.executable, str(PROJECT / script), *map(str, [*shared, *more])]


def measured(
    args: argparse.Namespace, step: str, folder: str, commands: list[list[str]]
) -> dict[str, Any]:
    """Run the commands, the second as soon as the first has a stream: wall and CPU seconds, peak
    memory of each, and the most bytes on the disk, of parts and of all files.

    After --minutes they are asked to stop, what was measured is kept, and this process ends with
    GO_ON; the next call adds to it.
    """
    out, partial = args.work_dir / folder, args.work_dir / f"{step}.partial.json"
    peak, over = {"parts": 0, "all": 0}, threading.Event()
    thread = threading.Thread(target=watch, args=(out, peak, over), daemon=True)
    began, stages, codes = time.monotonic(), [], []
    thread.start()
    running = [subprocess.Popen(commands[0], env=environment())]
    deadline = threading.Timer(60 * args.minutes, stop_all, [running])
    deadline.start()
    for command in commands[1:]:
        while (code := code_of(running[0])) is None and not may_begin(args, out):
            time.sleep(0.1)
        if code in (None, 0):
            running.append(subprocess.Popen(command, env=environment()))
    for process in running:
        code, usage = ended(process)
        codes.append(code)
        stages.append(
            {
                "seconds": round(time.monotonic() - began, 1),
                "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
                "peak_memory_mb": usage.ru_maxrss // 1024,
            }
        )
    deadline.cancel()
    over.set()
    thread.join()
    seconds = round(time.monotonic() - began, 1)
    found = {"seconds": seconds, "stages": stages, "peak_bytes": peak, "load": os.getloadavg()[1]}
    found["pieces"] = 1
    if failed := [code for code in codes if code not in (0, STOPPED)]:
        sys.exit(failed[0])
    if partial.exists():
        found = added(json.loads(partial.read_text()), found)
    if any(codes):
        partial.write_text(json.dumps(found))
        print(f"{step}: {found['seconds']:.0f} s so far; the same command goes on.", flush=True)
        sys.exit(GO_ON)
    return found


def may_begin(args: argparse.Namespace, out: Path) -> bool:
    """Whether stage 1 is at work and has announced its parts, so that stage 2 finds both."""
    activations = out / "activations"
    is_claimed = storage.is_claimed(activations / f"activations_layer{args.layer}.npz")
    return is_claimed and (activations / f"stream_layer{args.layer}" / "stream.json").exists()


def ended(process: subprocess.Popen) -> tuple[int, Any]:
    """(exit code, what it used) of a process, once it has ended."""
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    process.returncode = code if code >= 0 else 128 - code
    return process.returncode, usage


def code_of(process: subprocess.Popen) -> int | None:
    """The exit code of a process, None before it has one; `ended` can still say what it used."""
    looked = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if looked is None else looked.si_status


def stop_all(running: list[subprocess.Popen]) -> None:
    """Ask the stages to stop: they save, and the same commands go on."""
    for process in running:
        if process.returncode is None:  # `send_signal` would forget what it used
            os.kill(process.pid, signal.SIGTERM)


def added(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What was measured in pieces as one: seconds are summed, of peaks the largest counts. A stage
    that was stopped before it began counts for nothing."""
    pairs = itertools.zip_longest(before["stages"], now["stages"])
    stages = [
        {
            "seconds": round(sum(each["seconds"] for each in pair if each), 1),
            "cpu_seconds": round(sum(each["cpu_seconds"] for each in pair if each), 1),
            "peak_memory_mb": max(each["peak_memory_mb"] for each in pair if each),
        }
        for pair in pairs
    ]
    return {
        "seconds": round(before["seconds"] + now["seconds"], 1),
        "stages": stages,
        "peak_bytes": {
            name: max(n, now["peak_bytes"][name]) for name, n in before["peak_bytes"].items()
        },
        "load": max(before["load"], now["load"]),
        "pieces": before["pieces"] + now["pieces"],
    }


def watch(out: Path, peak: dict[str, int], over: threading.Event) -> None:
    """Note the most bytes that lie in `out`."""
    while not over.wait(0.1):
        found = {"parts": 0, "all": 0}
        for path in out.rglob("*"):
            try:
                n = path.stat().st_blocks * 512 if path.is_file() else 0
            except FileNotFoundError:
                continue
            found["all"] += n
            found["parts"] += n * ("part-" in path.name)
        for name, n in found.items():
            peak[name] = max(peak[name], n)


def stream_of(args, folder):
    path = args.work_dir / folder / "activations" / f"stream_layer{args.layer}" / "stream.json"
    return json.loads(path.read_text())


def budget_of(args):
    return int(args.budget * sum(stream_of(args, "alone")["sizes"]))


def checkpoint_of(args, folder):
    (path,) = (args.work_dir / folder / "checkpoints" / "r").glob("SAE_*.pt")
    return path


def metrics_of(args, folder):
    path = args.work_dir / folder / "checkpoints" / "r" / "metrics.json"
    return json.loads(path.read_text())


def keep(args, step, found):
    (args.work_dir / f"{step}.json").write_text(json.dumps(found))
    print(step, {name: found[name] for name in ("seconds", "stages", "peak_bytes")}, flush=True)


def kept(args, step):
    return json.loads((args.work_dir / f"{step}.json").read_text())


# One full shuffle of the same rows


def train_shuffled(flags: list[str]) -> int:
    """Stage 2 with all rows of the stream in one random order, and all else the same."""
    from fastsae.runtime.stage import run_stage
    from fastsae.training import stream_data, stream_loop

    class Shuffled(stream_data.StreamRows):
        """Rounds of the same sizes, of rows of all parts."""

        rows: np.ndarray

        def batches(self, number: int, first: int = 0) -> Iterator[torch.Tensor]:
            if not hasattr(self, "rows"):
                self.load()
            a, b = self.ends[number - 1], self.ends[number]
            order = self.order[a:b]
            bounds = stream_data.batch_bounds(len(order), self.batch_size)
            self.n_batches = len(bounds) - 1
            for start, end in list(zip(bounds, bounds[1:]))[first:]:
                yield torch.from_numpy(self.rows[order[start:end]]).float()

        def load(self) -> None:
            self.digests.clear()  # of an earlier piece
            counts, at = [], 0
            for number in range(1, self.stream.n_parts + 1):
                part = stream_data.read_part(self.stream, number, self.use)
                if number == 1:
                    n = sum(self.stream.about["n_tokens"])
                    self.rows = np.empty((n, part.rows.shape[1]), part.rows.dtype)
                self.rows[at : at + len(part.rows)] = part.rows
                at += len(part.rows)
                counts.append(len(part.rows))
                self.digests.append(part.sha256)
            served = [a // 2 + (b + 1) // 2 for a, b in zip([0, *counts], [*counts, 0])]
            self.ends = [0, *np.cumsum(served).tolist()]
            self.order = np.random.default_rng(SEED).permutation(at)

    stream_loop.StreamRows = Shuffled  # type: ignore[misc]
    sys.argv = ["train_sae.py", *flags]
    sys.path.insert(0, str(PROJECT))
    import train_sae

    return run_stage(train_sae.main)


if __name__ == "__main__":
    main()
