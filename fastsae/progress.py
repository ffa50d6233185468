"""What a stage tells while it works and at its end: bars to people at a terminal, one line of JSON to programs."""
import io
import json
import os
import sys
import time

from fastsae import errors, ranks


class OnlyImportant(io.TextIOBase):
    """Stands for stdout when QUIET: lets through warnings and summary lines."""

    def __init__(self, out):
        self.out, self.unfinished = out, ""

    def write(self, text):
        *lines, self.unfinished = (self.unfinished + text).split("\n")
        self.out.write("".join(f"{line}\n" for line in lines if line.startswith(("summary: ", "warning: "))))
        return len(text)

    def flush(self):
        self.out.flush()


def start(*, quiet: bool) -> float:
    """The time, for `summary`. With `quiet` stdout carries only warnings and summaries from here on (`run_stage` undoes it).

    Of torchrun's processes rank 0 speaks for all; variables that describe no such process are
    an InputError, and so are several processes of the whole pipeline.
    """
    if errors.in_pipeline():
        ranks.require_one_process("run_pipeline.py", "give torchrun the stages one by one.")
    if _silent():
        sys.stdout = open(os.devnull, "w")
    elif quiet:
        sys.stdout = OnlyImportant(sys.stdout)
    return time.monotonic()


def _silent():
    return ranks.current().rank > 0


def bar(total: int, desc: str, unit: str, **options):
    """A tqdm bar with rate and time left on stderr; invisible where that is no terminal, or where only what is important is printed."""
    from tqdm import tqdm

    options.setdefault("disable", True if _silent() or isinstance(sys.stdout, OnlyImportant) else None)
    return tqdm(total=total, desc=desc, unit=unit, mininterval=1, file=sys.stderr, **options)


def summary(stage: str, path, started: float, **figures):
    """Print `summary: {"stage", "path", "seconds", ...}`, the last line of a stage on stdout. `started` is of `start`."""
    line = {"stage": stage, "path": str(path), "seconds": round(time.monotonic() - started, 2), **figures}
    print(f"summary: {json.dumps(line)}", flush=True)
