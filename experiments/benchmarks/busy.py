"""Stages 1 and 2 beside another busy job: how much of their quiet speed is left, by how long
OpenMP's threads wait for each other.

    python -m experiments.benchmarks.busy --activations activations/activations_layer12.npz

A process for each setting runs what stage 1 does with a batch of examples, or steps of stage 2, for
a few seconds, in turn with the others: alone, then beside a loop in Python that is bound to no
core. `as shipped` is what the stages set for themselves (fastsae/runtime/threads.py), `OpenMP's
own` what they would have without it. Figures are medians over the rounds. Writes
experiments/results/busy.json.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

from fastsae.runtime import threads

SHIPPED, OWN = "as shipped", "OpenMP's own"
SETTINGS: dict[str, dict[str, str]] = {  # variables of each process
    OWN: {},
    SHIPPED: {},
    "GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
WORK = ("stage 1", "stage 2")
M, K, PREFIXES, BATCH = 256, 8, [64, 256], 512  # of stage 2, as in the demo
MODEL, LAYER = "SmolLM2-135M-Instruct", 12
BUSY = "while True: pass"
SETTLE = 1.0  # seconds of work before each timing, in which a process can see what it is beside


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--activations", default="activations/activations_layer12.npz")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each timing")
    parser.add_argument("--worker", choices=SETTINGS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    found: dict = {name: {each: {"quiet": [], "busy": []} for each in WORK} for name in SETTINGS}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(worker(args, name)) for name in SETTINGS}
        for process in workers.values():
            if process.stdout.readline().strip() != "ready":  # it has said why
                return process.wait() or 1
        for number in range(args.rounds + 1):
            for each, (name, process) in itertools.product(WORK, workers.items()):
                for beside in ("quiet", "busy"):
                    with busy_job() if beside == "busy" else contextlib.nullcontext():
                        speed = ask(process, each)
                    if number:  # the first round warms up
                        found[name][each][beside].append(round(speed))
            if number:
                write(args, found)  # what is there stays if this is stopped
    return 0


def write(args, found):
    """Write the results of the rounds so far, and print them."""
    from experiments.shared.provenance import write_result

    result = {name: summary(found[name], found[OWN]) for name in SETTINGS}
    for name, rows in result.items():
        print(name, {each: (row["kept"], row["quiet_over_own"]) for each, row in rows.items()})
    write_result(
        "busy",
        {"activations": args.activations, "model": MODEL, "layer": LAYER, "seconds": args.seconds},
        {"rounds": len(found[OWN][WORK[0]]["busy"]), "speed": result},
    )


def summary(found, own):
    """Tokens a second of each kind of work; the part of the quiet speed kept beside the busy job,
    and the quiet speed beside that of OpenMP's own setting in the same round."""
    return {
        each: {
            "quiet": median(row["quiet"]),
            "busy": median(row["busy"]),
            "kept": round(median(map(ratio, row["busy"], row["quiet"])), 3),
            "quiet_over_own": round(median(map(ratio, row["quiet"], own[each]["quiet"])), 3),
            "all": row,
        }
        for each, row in found.items()
    }


def ratio(speed, other):
    return speed / other


@contextlib.contextmanager
def worker(args, name):
    """A process with the variables of the setting `name`, which says when it is ready; it
    ends with the block."""
    kept = {key: value for key, value in os.environ.items() if key not in threads.DECIDE}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "experiments.benchmarks.busy", "--worker", name),
            *("--activations", args.activations, "--seconds", str(args.seconds)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**kept, **SETTINGS[name]},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def busy_job():
    """A loop in Python, while the block lasts."""
    with subprocess.Popen([sys.executable, "-c", BUSY]) as process:
        try:
            yield
        finally:
            process.kill()


def ask(process, what):
    """Tokens a second of the worker's next timing of `what`."""
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def work(args):
    """A worker: what stands on a line of stdin for args.seconds, and its tokens a second on
    stdout."""
    if args.worker == SHIPPED:
        threads.share_cores()
    # from here on OpenMP is loaded
    steps = {"stage 1": extraction_step(), "stage 2": training_step(args.activations)}
    print("ready", flush=True)
    for line in sys.stdin:
        step: Callable[[], int] = steps[line.strip()]
        for seconds in (SETTLE, args.seconds):
            n, started = 0, time.perf_counter()
            while time.perf_counter() - started < seconds:
                n += step()
            taken = time.perf_counter() - started
        print(json.dumps(n / taken), flush=True)


def extraction_step() -> Callable[[], int]:
    """Stage 1's work on eight examples of the demo; a call returns their tokens."""
    import torch

    from experiments.benchmarks.extract import our_path, sample
    from experiments.shared.provenance import PROJECT
    from fastsae.activations.extraction import BATCH_TOKENS
    from fastsae.data.datasets import stream_examples
    from fastsae.data.tokenization import ChatTokenizer, mark_shared_prefix, tokenise
    from fastsae.lm import loading, residual

    tokenizer = ChatTokenizer(loading.load_tokenizer(MODEL), max_length=512)
    dataset = str(PROJECT / "data" / "cognitive_actions.jsonl")
    table = sample(tokenise(stream_examples(dataset), tokenizer), 8)
    model = residual.ResidualModel(MODEL, LAYER, device="cpu", dtype=torch.float32)
    options = argparse.Namespace(device="cpu")
    run = our_path(options, model, table, mark_shared_prefix(table), BATCH_TOKENS["cpu"])

    def step():
        run()
        return len(table.ids)

    return step


def training_step(activations) -> Callable[[], int]:
    """A step of stage 2; a call returns the tokens of its batch."""
    import torch

    from experiments.benchmarks.train import START, batches, load, our_run

    rows = load(activations)[0][:16384].clone()
    _, step = our_run(rows, M, K, BATCH, PREFIXES, torch.float32, START)
    source = batches(rows, BATCH)

    def one():
        step(next(source))
        return BATCH

    return one


if __name__ == "__main__":
    sys.exit(main())
