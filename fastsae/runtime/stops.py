"""SIGTERM and Ctrl-C: when a stage hears of them, and how a loop asks for them where its state is
whole."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from fastsae.runtime.errors import Terminated

_waiting: dict[str, Any] = {
    "running": False,
    "deferred": False,
    "asked": None,
    "raised": None,
    "saving": False,
    "at": -math.inf,
    "joined": False,
    "at_end": [],
}
# seconds in which a second signal is the first one once more: a service manager sends it to all,
# and the pipeline on
SAME_STOP = 1.0
ONCE_MORE = 0.05  # seconds after which a stop that was lost is asked for again


def begin() -> None:
    """Forget earlier stops: a stage begins."""
    _waiting.update(
        running=False, deferred=False, asked=None, raised=None, saving=False, at=-math.inf
    )


def at_end(action: Callable[[], object]) -> None:
    """Have `action()` called when the stage ends, however it does."""
    _waiting["at_end"].append(action)


def end_all() -> None:
    """Call what is to be called at the end, the last one first."""
    while _waiting["at_end"]:
        _waiting["at_end"].pop()()


def running(now: bool) -> None:
    """Whether stops end the stage by an exception from here on."""
    _waiting["running"] = now


def is_saving() -> bool:
    """Whether the stage saves its state before it ends."""
    return _waiting["saving"]


def raised() -> int | None:
    """The signal that ends the stage, None if none does."""
    return _waiting["raised"]


def on_signal(signum: int, frame: object) -> None:
    """The handler of SIGTERM and Ctrl-C: note a stop that was deferred, else end the stage."""
    if time.monotonic() - _waiting["at"] < SAME_STOP:
        return
    _waiting["at"] = time.monotonic()
    if _waiting["deferred"] and _waiting["asked"] is None:
        _waiting["asked"] = signum
    else:  # asked twice: stop at once
        _waiting.update(asked=None, raised=signum)
        if _waiting["running"]:
            raise_stop()


def raise_stop() -> NoReturn:
    """Raise what ends the stage: Terminated for SIGTERM, KeyboardInterrupt for Ctrl-C."""
    raise Terminated if _waiting["raised"] == signal.SIGTERM else KeyboardInterrupt


def again(lost: BaseException | None) -> bool:
    """Whether the exception, which Python could only print, was a stop; then it is asked for once
    more."""
    if not isinstance(lost, (KeyboardInterrupt, Terminated)) or _waiting["raised"] is None:
        return False
    _waiting["at"] = -math.inf
    timer = threading.Timer(ONCE_MORE, os.kill, (os.getpid(), _waiting["raised"]))
    timer.daemon = True
    timer.start()
    return True


@contextlib.contextmanager
def deferred_stop() -> Iterator[None]:
    """Within, SIGTERM and Ctrl-C only ask: the loop looks at `stop_asked()` where its state is
    whole, saves, and calls `stop()`."""
    _waiting.update(deferred=True, asked=None)
    try:
        yield
    finally:
        _waiting.update(deferred=False, asked=None)


def stop_asked() -> bool:
    """Whether a stop came that the loop has still to answer."""
    return _waiting["asked"] is not None


def stop_if_asked() -> None:
    """For work that can be cut short anywhere, unless other processes would wait for this one."""
    if stop_asked() and not _waiting["joined"]:
        stop()


def stop() -> NoReturn:
    """End the run as the signal that asked for it would have."""
    _waiting.update(raised=_waiting["asked"], saving=True)
    raise_stop()


def joined_others() -> None:
    """From here on this process takes steps together with others, which wait for it."""
    _waiting["joined"] = True


def has_joined_others() -> bool:
    """Whether other processes wait for this one's steps."""
    return _waiting["joined"]


def is_running() -> bool:
    """Whether a stage is at work in this process."""
    return _waiting["running"]
