"""How a stage ends: errors a user can cause or meet are one line and an exit code; all others are
bugs, whose traceback is kept."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from fastsae.runtime import console, early_stop, machine_errors, masking, signals, stops, storage
from fastsae.runtime.errors import (
    EXIT_BUG,
    EXIT_ENVIRONMENT,
    EnvironmentFailure,
    StageError,
    Terminated,
)

_parent: dict[str, str | None] = {"pipeline": None}


def in_pipeline() -> bool:
    """Whether run_pipeline.py started this stage."""
    return _parent["pipeline"] is not None


def pipeline() -> str | None:
    """A name of the run of run_pipeline.py that started this stage, the same for its stages; None
    where a person started it."""
    return _parent["pipeline"]


def run_stage(main: Callable[[], int | None], *, ends_in_time: bool = True) -> int:
    """Call `main()` and return the exit code: 0 done, 1 bug, 2 input, 3 environment, 4 incomplete,
    130/143 interrupted.

    Within, stdout and stderr are `console.Console`s, and SIGTERM and Ctrl-C end the stage; all is
    as it was before afterwards. ends_in_time: end the process a few seconds after a stop, whatever
    it is in. Off for who waits for others.
    """
    console.open_closed_handles()
    stops.begin()
    with contextlib.ExitStack() as around:
        around.enter_context(console.installed())
        if threading.current_thread() is threading.main_thread():  # others get no signals
            if ends_in_time:
                around.enter_context(signals.watched(stops.is_saving))
            around.enter_context(signals.handled_by(stops.on_signal, stops.again))
        end_with_parent()
        try:
            return _code_of(main)
        finally:
            stops.end_all()
            storage.keep_log_in(None)


def _code_of(main):
    """What `main()` returns, or the exit code of what it raises, with its line."""
    signum: int | None
    try:
        code = _call(main)
        sys.stdout.flush()
        was_closed = getattr(sys.stdout, "was_closed", False)
        if isinstance(failure := _failure_of(sys.stdout), OSError) and not was_closed:
            print(
                f"warning: stdout: {failure.strerror}. what was to be printed is lost; "
                "the work itself is done.",
                file=sys.stderr,
            )
        return code
    except StageError as error:
        signum = stops.raised()
        if signum is None:
            for line in error.args:
                print(f"error: {line}", file=sys.stderr)
            return error.exit_code
    except (KeyboardInterrupt, Terminated) as stop:
        signum = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM
    except Exception as error:
        signum = stops.raised()
        if signum is None:  # else a library made this error of the stop
            return _environment(error) or _bug(error)
    print(early_stop.MESSAGE, file=sys.stderr)
    return early_stop.EXIT_CODES[signum]


def _call(main):
    stops.running(True)
    try:
        if stops.raised() is not None:
            stops.raise_stop()
        return main() or 0
    except SystemExit as leaving:  # --help, or settings that are refused
        if not leaving.code:
            require_printed()
        raise
    finally:
        stops.running(False)


def _failure_of(stream):
    return getattr(stream, "failure", None)


def require_printed() -> None:
    """EnvironmentFailure if what was printed went nowhere, for a command whose printing is its
    work. A reader that left is no failure."""
    sys.stdout.flush()
    if (failure := _failure_of(sys.stdout)) is not None:
        what = getattr(failure, "strerror", None) or failure
        raise EnvironmentFailure(
            f"stdout: {what}. print to a terminal, or to a file on a disk with free space."
        )


def end(code: int) -> NoReturn:
    """End the process with the exit code; if it failed, at once: threads may still wait for an
    answer that nobody needs."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads, or it is closed
        sys.stdout.flush()
        sys.stderr.flush()
    # gloo's threads abort a process now and then while Python shuts down (torch 2.13)
    if code or stops.has_joined_others():
        os._exit(code)
    sys.exit(code)


def end_with_parent() -> None:
    """Under run_pipeline.py, whose end closes our stdin: stop then as at SIGTERM, even if it was
    killed."""
    _parent["pipeline"] = os.environ.pop("FASTSAE_STDIN_ENDS_WITH_PARENT", None)
    if _parent["pipeline"]:
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent():
    while os.read(0, 1024):
        pass
    if not stops.stop_asked():  # twice would mean: without saving
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
    os._exit(143)  # it is in something that no signal interrupts


def _environment(error):
    """EXIT_ENVIRONMENT, and its line, for errors of memory, disk and rights; None for others."""
    if machine_errors.is_out_of_memory(error):
        return _out_of_memory(error)
    remedy = machine_errors.remedy(error) if isinstance(error, OSError) else None
    if not remedy:
        return None
    print(f"error: {error.filename or 'output'}: {error.strerror}. {remedy}", file=sys.stderr)
    return EXIT_ENVIRONMENT


def _bug(error):
    """EXIT_BUG, the traceback on stderr and in a file, and a last line that says where."""
    text = masking.of_environment()("".join(traceback.format_exception(error)))
    for line in text.rstrip("\n").split("\n"):
        # a message's line looks like none of ours
        indent = "  " * line.startswith(("error: ", "warning: "))
        print(indent + line, file=sys.stderr)
    # none if the stage did not come so far
    for folder in filter(None, (storage.log_folder(), Path(tempfile.gettempdir()))):
        with contextlib.suppress(OSError):  # a folder that takes no file
            path = folder / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
            storage.write_text(path, f"{' '.join(sys.argv)}\n{text}")
            print(
                f"error: this is a bug. report it with {path}; "
                "the same command goes on from what is finished.",
                file=sys.stderr,
            )
            break
    return EXIT_BUG


def _out_of_memory(error):
    brief = (str(error) or "out of memory").splitlines()[0][:150]
    print(
        f"error: memory: {brief}. lower --batch-tokens (stage 1) or --buffer-tokens and "
        "--batch-size (stage 2), then run again: what was finished is kept.",
        file=sys.stderr,
    )
    return EXIT_ENVIRONMENT
