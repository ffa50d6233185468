"""A busy machine is shared: threads of a matrix product do not wait for each other on cores that
others could use.

A thread of GNU's OpenMP, which PyTorch ships for Linux, looks at a lock for milliseconds before it
sleeps. On an idle machine nothing is faster. Beside another busy job it holds the core that the
thread it waits for needs, and most of the speed is lost. OpenMP itself looks a hundred times only
where it has more threads than cores (GOMP_SPINCOUNT in libgomp's manual). So while this process's
threads have to wait for a core, a second team, which does nothing, makes them more. Results stay
the same to the bit, as they would not with fewer threads.
"""

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

DECIDE = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # what a user sets for the same
LOOK = 0.3  # seconds between looks
BUSY = 0.1  # seconds in a second that threads wait for a core, all together, on a busy machine
CALM = 3  # looks in a row without such waits after which the machine is no longer busy
TASKS = Path("/proc/self/task")  # Linux: a folder for each thread of this process


def share_cores() -> None:
    """Watch, in a thread, whether the machine is busy, and let OpenMP's threads sleep early while
    it is. Nothing happens where a user has set how long they wait, or outside Linux."""
    if TASKS.exists() and not any(name in os.environ for name in DECIDE):
        with contextlib.suppress(RuntimeError):  # no thread may be started
            threading.Thread(target=watch, daemon=True).start()


def watch() -> None:
    """Look at the waits of this process's threads for as long as it lives, or until something
    prevents it (too many open files, no further thread): the stage goes on without."""
    with contextlib.suppress(Exception):
        _watch()


def _watch():
    sharing = Sharing()
    waits, since = seconds_waited(), time.monotonic()
    while True:
        time.sleep(LOOK)
        before, waits = waits, seconds_waited()
        began, since = since, time.monotonic()
        sharing.look(is_busy(before, waits, since - began))


class Sharing:
    """Has a crowd from the first look at a busy machine until `CALM` looks at one that is not."""

    def __init__(self) -> None:
        self.crowd: Crowd | None = None
        self.calm = 0

    def look(self, busy: bool) -> None:
        """What the next look has found."""
        self.calm = 0 if busy else self.calm + 1
        if busy and self.crowd is None and "torch" in sys.modules:
            self.crowd = Crowd()
        elif self.calm >= CALM and self.crowd is not None:
            self.crowd.over.set()
            self.crowd = None


def is_busy(before: dict[str, float], after: dict[str, float], seconds: float) -> bool:
    """Whether the threads that were there all the time waited for cores in these seconds."""
    waited = sum(after[name] - before[name] for name in before.keys() & after.keys())
    return waited > BUSY * seconds


def seconds_waited() -> dict[str, float]:
    """{thread: seconds that it was ready to run and had no core}; {} where Linux does not say."""
    found = {}
    for task in TASKS.iterdir():
        try:
            found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError):  # it has ended, or such figures are not kept
            continue
    return found


class Crowd(threading.Thread):
    """A second team of OpenMP's threads, asleep until `over` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        """Make a team by an operation that is large enough for one, and keep it."""
        with contextlib.suppress(Exception):  # PyTorch is broken, or memory is short
            import torch  # loaded, or being loaded: this then waits for it

            torch.zeros(1 << 18).add_(1)
        self.over.wait()
