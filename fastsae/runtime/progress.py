"""What a stage prints while it works and at its end: progress bars on a terminal, else a line every
30 seconds; one line of JSON for programs."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from fastsae.runtime import ranks, stage, stops
from fastsae.runtime.console import Console, OwnLine

HIDDEN = "FASTSAE_HIDE_PROGRESS"  # in the environment: another process shows how far all is
INTERVAL = 30.0  # seconds between lines where stderr is no terminal; shorter runs print none
# in the environment: the handle on which who started this stage takes its progress, a JSON object a
# line: name, n, total, unit, note
CHANNEL = "FASTSAE_PROGRESS"
CHANNEL_INTERVAL = 0.25  # seconds between these


def start(*, quiet: bool) -> float:
    """The time, for `summary`. With `quiet` stdout carries only warnings and summaries from here on
    (`run_stage` undoes it).

    Of torchrun's processes rank 0 speaks for all; variables that describe no such process are
    an InputError, and so are several processes of the whole pipeline.
    """
    if stage.in_pipeline():
        ranks.require_one_process("run_pipeline.py", "give torchrun the stages one by one.")
    _tasks[:] = [Task("starting", None, "")]
    if _silent():
        sys.stdout = open(os.devnull, "w")
    elif quiet and isinstance(sys.stdout, Console):
        sys.stdout.quiet = True
    elif quiet:  # not called by `run_stage`
        sys.stdout = Console(sys.stdout, quiet=True)
    elif stops.is_running() and not sys.stderr.isatty():
        over = threading.Event()
        channel = os.environ.pop(CHANNEL, None)
        work: tuple[Any, tuple] = (_print_lines, (over, INTERVAL))
        if channel is not None:
            work = (_send_states, (over, CHANNEL_INTERVAL, int(channel)))
        threading.Thread(target=work[0], args=work[1], daemon=True).start()
        stops.at_end(over.set)
    return time.monotonic()


def _silent():
    return ranks.current().rank > 0


def _is_quiet():
    return _silent() or getattr(sys.stdout, "quiet", False)


class Task:
    """How far a piece of work is: `n` of `total` units (None: nobody knows), begun at `initial`. A
    context: one within another takes its place in the lines until it ends. `bar`: its tqdm bar, or
    None. `at_most`: it may end before `total`. `hidden`: it has no lines, as another process shows
    how far both are."""

    def __init__(
        self,
        name: str,
        total: float | None,
        unit: str,
        *,
        initial: float = 0,
        at_most: bool = False,
        bar: Any = None,
        hidden: bool = False,
    ) -> None:
        self.hidden = hidden
        self.name, self.total, self.unit, self.at_most = name, total, unit, at_most
        self.n, self.initial, self.fraction, self.note, self.bar = initial, initial, 0.0, "", bar
        self.began = time.monotonic()

    def __enter__(self) -> "Task":
        _tasks.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self in _tasks:
            _tasks.remove(self)
        if self.bar is not None:
            self.bar.close()

    def update(self, n: float = 1) -> None:
        """`n` more units are done."""
        self.n, self.fraction = self.n + n, 0.0
        if self.bar is not None:
            self.bar.update(n)

    def part(self, fraction: float) -> None:
        """That much of the next unit is done, 0 to 1."""
        self.fraction = fraction

    def already(self, n: float) -> None:
        """`n` units were done by an earlier run; they count for how far it is, not for how fast."""
        self.initial += n
        self.update(n)

    def set_postfix(self, figures: dict) -> None:
        """Show `figures` {name: value} behind the bar, and in the lines."""
        self.note = ", ".join(f"{name} {value}" for name, value in figures.items())
        if self.bar is not None:
            self.bar.set_postfix(figures)

    def set_postfix_str(self, note: str, **options: Any) -> None:
        """Show a text behind the bar, and in the lines."""
        self.note = note
        if self.bar is not None:
            self.bar.set_postfix_str(note, **options)

    def refresh(self) -> None:
        """Draw the bar now."""
        if self.bar is not None:
            self.bar.refresh()

    def state(self) -> dict[str, Any]:
        """What the work is and how far, for CHANNEL."""
        state = {"name": self.name, "n": self.n + self.fraction, "total": self.total}
        return {**state, "unit": self.unit, "note": self.note}

    def line(self, now: float) -> str:
        """What the work is, how far, how fast and how long still, at the time `now` (of
        time.monotonic)."""
        seconds, n = max(now - self.began, 1e-9), self.n + self.fraction
        if not self.unit:
            return f"progress: {self.name}, for {duration(seconds)}"
        speed = (n - self.initial) / seconds
        parts = [f"progress: {self.name}: {_number(n)}"]
        if self.total:
            parts[0] += f" of {_number(self.total)} {self.unit}s ({100 * n / self.total:.0f} %)"
        else:
            parts[0] += f" {self.unit}s"
        if speed:
            parts.append(_speed(speed, self.unit))
        if speed and self.total:
            parts.append(f"{'at most ' * self.at_most}{duration((self.total - n) / speed)} left")
        return ", ".join([*parts, *filter(None, [self.note])])


_tasks: list[Task] = []  # the innermost one last


def _number(n):
    return f"{n:,.0f}" if n == int(n) or n >= 1000 else f"{n:,.1f}"


def _speed(per_second, unit):
    for factor, each in ((1, "s"), (60, "min")):
        if per_second * factor >= 1:
            value = per_second * factor
            return f"{value:,.{0 if value >= 10 else 1}f} {unit}s/{each}"
    return f"{per_second * 3600:.2g} {unit}s/h"


def duration(seconds: float) -> str:
    """As people say it: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _print_lines(over, interval):
    while not over.wait(interval):
        if _tasks and not _tasks[-1].hidden and HIDDEN not in os.environ:
            print(_tasks[-1].line(time.monotonic()), file=sys.stderr, flush=True)


def _send_states(over, interval, handle):
    last = None
    while not over.wait(interval):
        state = _tasks[-1].state() if _tasks else None
        if state is not None and state != last:
            last = state
            try:
                os.write(handle, (json.dumps(state) + "\n").encode())
            except OSError:  # nobody takes it any more
                return


def step(name: str) -> None:
    """Say what the stage is doing where no bar does, such as "loading the model", for the lines off
    a terminal."""
    _tasks[:1] = [Task(name, None, "")]


def bar(
    total: int,
    desc: str,
    unit: str,
    *,
    at_most: bool = False,
    initial: int = 0,
    hidden: bool = False,
    **options: Any,
) -> Task:
    """A piece of work with a tqdm bar on stderr at a terminal; elsewhere it has lines. Neither
    where only what matters is printed, nor where it is `hidden`."""
    hidden = hidden or HIDDEN in os.environ
    if hidden or _is_quiet() or not sys.stderr.isatty():
        return Task(desc, total, unit, initial=initial, at_most=at_most, hidden=hidden)
    from tqdm import tqdm

    if _has_no_size(sys.stderr):  # tqdm would draw nothing
        options = {"ncols": 80, "nrows": 24, **options}
    return Task(
        desc,
        total,
        unit,
        initial=initial,
        at_most=at_most,
        bar=tqdm(
            total=total,
            desc=desc,
            unit=unit,
            mininterval=1,
            file=sys.stderr,
            initial=initial,
            **options,
        ),
    )


def _has_no_size(terminal):
    """Whether it says that it has no columns, as those of `script` and of containers may."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns == 0
    except (OSError, ValueError, AttributeError):
        return False


def counted(items: Iterable, name: str, unit: str, total: int | None = None) -> Iterator:
    """Pass the items on, and count them for the lines off a terminal."""
    with Task(name, total, unit) as task:
        for item in items:
            yield item
            task.update()


def summary(stage: str, path: object, started: float, **figures: Any) -> None:
    """Print `summary: {"stage", "path", "seconds", ...}`, the last line of a stage on stdout.
    `started` is of `start`."""
    line = {
        "stage": stage,
        "path": str(path),
        "seconds": round(time.monotonic() - started, 2),
        **figures,
    }
    sys.stdout.write(OwnLine(f"summary: {json.dumps(line)}\n"))
    sys.stdout.flush()
