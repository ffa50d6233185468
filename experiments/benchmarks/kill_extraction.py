"""Kill stage 1 with SIGKILL at random moments until it is done, and compare the bytes with an
uninterrupted run.

    python -m experiments.benchmarks.kill_extraction --kills 20 --chunk-tokens 2048

Processes are forked after the imports, so that most of their life is the work itself. Flags that
are not this script's go to extract_activations.py. Writes experiments/results/kill_extraction.json
if --write is given.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

# transformers imports these late; a fork should not have to
import transformers.integrations.sdpa_attention
import transformers.models.llama.modeling_llama
import transformers.models.llama.tokenization_llama  # noqa: F401

import extract_activations
from experiments.shared.provenance import write_result
from fastsae.activations import extraction
from fastsae.lm import cpu_kernels, residual  # noqa: F401
from fastsae.runtime.stage import run_stage


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--write", action="store_true", help="write experiments/results/kill_extraction.json"
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=2048, help="tokens of a part of an unfinished run"
    )
    args, flags = parser.parse_known_args()
    extraction.CHUNK_TOKENS = args.chunk_tokens
    chance, kept, n_runs = random.Random(args.seed), [], 0
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        run(Path(folder) / "whole", flags)
        seconds = time.monotonic() - started
        expected = content(Path(folder) / "whole")
        n_killed = 0
        while n_killed < args.kills:
            out = Path(folder) / f"killed-{n_runs}"
            n_runs += 1
            # the same command, until it is done
            while not run(out, flags, kill_after=chance.uniform(0, seconds)):
                n_killed += 1
                kept.append(len(list(out.glob("activations/.parts-*/part-*.npz"))))
            if content(out) != expected:
                sys.exit(f"different after {n_killed} kills")
    print(
        f"identical after {n_killed} kills in {n_runs} runs; an uninterrupted run takes "
        f"{seconds:.1f} s"
    )
    if args.write:
        found = {
            "n_kills": n_killed,
            "n_runs": n_runs,
            "seconds_uninterrupted": round(seconds, 2),
            "parts_there_at_each_kill": kept,
        }
        write_result(
            "kill_extraction",
            {"flags": flags, "chunk_tokens": args.chunk_tokens},
            {**found, "identical": True},
        )


def content(folder):
    """{file: bytes} of all .npz files under their final names."""
    return {path.name: path.read_bytes() for path in folder.glob("activations/*.npz")}


def run(out, flags, kill_after=None):
    """True if the run was done, False if it was killed."""
    child = os.fork()
    if child == 0:
        sys.argv = ["extract_activations.py", "--output-dir", str(out), *flags]
        sys.stdout = open(os.devnull, "w")
        os._exit(run_stage(extract_activations.main))
    if kill_after is not None:
        deadline = time.monotonic() + kill_after
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            time.sleep(0.005)
        else:
            os.kill(child, signal.SIGKILL)
            pid, status = os.waitpid(child, 0)
    else:
        pid, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status):
        sys.exit(f"exit code {os.WEXITSTATUS(status)}")
    return True


if __name__ == "__main__":
    main()
