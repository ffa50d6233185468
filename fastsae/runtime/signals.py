"""SIGTERM and Ctrl-C where no exception can answer them: while libraries load, and in calls that
Python does not interrupt."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from fastsae.runtime.early_stop import STOPS, end_now

# seconds from the signal to the end of the process, where nothing is being saved
ANSWER_WITHIN = 4.0
SAVE_WITHIN = 16.0  # seconds more for a stage that saves; service managers kill after 30


@contextlib.contextmanager
def watched(saving: Callable[[], bool]) -> Iterator[None]:
    """Within, a process that does not end by itself after a stop is ended: it is in a call that
    handlers wait for.

    `saving()` says whether the stage is writing down its state, for which it has longer. A thread
    waits for the signal, since handlers run in the main thread only, between two steps of Python.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader, over, saving), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(previous)
        os.close(writer)  # which the thread reads as the end
        thread.join()
        os.close(reader)


def _watch(reader, over, saving):
    while (got := os.read(reader, 1)) and got[0] not in STOPS:
        pass
    if got and not over.wait(ANSWER_WITHIN) and not (saving() and over.wait(SAVE_WITHIN)):
        end_now(got[0])


@contextlib.contextmanager
def handled_by(
    handler: Callable[[int, Any], object], again: Callable[[Any], bool]
) -> Iterator[None]:
    """Within, `handler` gets the stops. Exceptions of it that were lost in a destructor are asked
    for once more by `again(number)`."""
    previous = {number: signal.signal(number, handler) for number in STOPS}
    hook = sys.unraisablehook

    def unraisable(lost):
        if not again(lost.exc_value):
            hook(lost)

    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, before in previous.items():
            if before is not None:  # None: set by other than Python, and not to be had back
                signal.signal(number, before)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Within, stops wait. A process started here has them blocked until it calls `listen`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
