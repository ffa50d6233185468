"""How a stage ends: errors a user can cause or meet are one line and an exit code; all others are bugs, and their traceback is kept."""
import contextlib
import math
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from fastsae import console, early_stop, machine_errors, signals

EXIT_BUG, EXIT_INPUT, EXIT_ENVIRONMENT, EXIT_INCOMPLETE = 1, 2, 3, 4


class StageError(Exception):
    """What went wrong and what to do about it: `where: what. remedy.`, an argument each when there are several."""

    exit_code = 1

    def __str__(self):
        return "\n".join(map(str, self.args))


class InputError(StageError):
    """A bad setting, dataset or model choice: the user can mend it."""

    exit_code = EXIT_INPUT


class EnvironmentFailure(StageError):
    """Disk, network, access rights or a damaged artifact."""

    exit_code = EXIT_ENVIRONMENT


class Terminated(BaseException):
    """SIGTERM arrived. A BaseException, like KeyboardInterrupt, so that no handler swallows it."""


_waiting: dict[str, Any] = {"running": False, "deferred": False, "asked": None, "raised": None, "saving": False, "at": -math.inf}
SAME_STOP = 1.0  # seconds in which a second signal is the first one once more: a service manager sends it to all, and the pipeline on
ONCE_MORE = 0.05  # seconds after which a stop that was lost is asked for again


def _on_signal(signum, frame):
    if time.monotonic() - _waiting["at"] < SAME_STOP:
        return
    _waiting["at"] = time.monotonic()
    if _waiting["deferred"] and _waiting["asked"] is None:
        _waiting["asked"] = signum
    else:  # asked twice: stop at once
        _waiting.update(asked=None, raised=signum)
        if _waiting["running"]:
            _raise_stop()


def _raise_stop():
    raise Terminated if _waiting["raised"] == signal.SIGTERM else KeyboardInterrupt


def _again(lost):
    """Whether the exception, which Python could only print, was a stop; then it is asked for once more."""
    if not isinstance(lost, (KeyboardInterrupt, Terminated)) or _waiting["raised"] is None:
        return False
    _waiting["at"] = -math.inf
    timer = threading.Timer(ONCE_MORE, os.kill, (os.getpid(), _waiting["raised"]))
    timer.daemon = True
    timer.start()
    return True


@contextlib.contextmanager
def deferred_stop():
    """Within, SIGTERM and Ctrl-C only ask: the loop looks at `stop_asked()` where its state is whole, saves, and calls `stop()`."""
    _waiting.update(deferred=True, asked=None)
    try:
        yield
    finally:
        _waiting.update(deferred=False, asked=None)


def stop_asked():
    return _waiting["asked"] is not None


def stop_if_asked():
    """For work that can be cut short anywhere. Not where other processes would wait for this one."""
    if stop_asked() and not _stage["joined"]:
        stop()


def stop():
    """End the run as the signal that asked for it would have."""
    _waiting.update(raised=_waiting["asked"], saving=True)
    _raise_stop()


_stage: dict[str, Any] = {"at_end": [], "log_folder": None, "in_pipeline": False, "joined": False}


def at_end(action):
    """Have `action()` called when the stage ends, however it does."""
    _stage["at_end"].append(action)


def in_pipeline() -> bool:
    """Whether run_pipeline.py started this stage."""
    return _stage["in_pipeline"]


def joined_others() -> None:
    """From here on this process takes steps together with others, which wait for it."""
    _stage["joined"] = True


def keep_log_in(folder):
    _stage["log_folder"] = folder


def is_running() -> bool:
    """Whether a stage is at work in this process."""
    return _waiting["running"]


def run_stage(main, *, ends_in_time: bool = True) -> int:
    """Call `main()` and return the exit code: 0 done, 1 bug, 2 input, 3 environment, 4 incomplete, 130/143 interrupted.

    Within, stdout and stderr are `console.Console`s, and SIGTERM and Ctrl-C end the stage; all is as it was before afterwards.
    ends_in_time: end the process a few seconds after a stop, whatever it is in. Off for who waits for others.
    """
    console.open_closed_handles()
    _waiting.update(running=False, deferred=False, asked=None, raised=None, saving=False, at=-math.inf)
    with contextlib.ExitStack() as around:
        around.enter_context(console.installed())
        if threading.current_thread() is threading.main_thread():  # others get no signals
            if ends_in_time:
                around.enter_context(signals.watched(lambda: _waiting["saving"]))
            around.enter_context(signals.handled_by(_on_signal, _again))
        end_with_parent()
        try:
            return _code_of(main)
        finally:
            while _stage["at_end"]:
                _stage["at_end"].pop()()
            _stage["log_folder"] = None


def _code_of(main):
    """What `main()` returns, or the exit code of what it raises, with its line."""
    try:
        code = _call(main)
        sys.stdout.flush()
        if isinstance(failure := _failure_of(sys.stdout), OSError) and not sys.stdout.was_closed:
            print(f"warning: stdout: {failure.strerror}. what was to be printed is lost; the work itself is done.", file=sys.stderr)
        return code
    except StageError as error:
        if _waiting["raised"] is None:
            for line in error.args:
                print(f"error: {line}", file=sys.stderr)
            return error.exit_code
    except (KeyboardInterrupt, Terminated) as stop:
        _waiting["raised"] = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM
    except Exception as error:
        if _waiting["raised"] is None:  # else a library made this of the stop
            return _environment(error) or _bug(error)
    print(early_stop.MESSAGE, file=sys.stderr)
    return early_stop.EXIT_CODES[_waiting["raised"]]


def _call(main):
    _waiting["running"] = True
    try:
        if _waiting["raised"] is not None:
            _raise_stop()
        return main() or 0
    except SystemExit as leaving:  # --help, or settings that are refused
        if not leaving.code:
            require_printed()
        raise
    finally:
        _waiting["running"] = False


def _failure_of(stream):
    return getattr(stream, "failure", None)


def require_printed():
    """EnvironmentFailure if what was printed went nowhere, for a command whose printing is its work. A reader that left is no failure."""
    sys.stdout.flush()
    if (failure := _failure_of(sys.stdout)) is not None:
        what = getattr(failure, "strerror", None) or failure
        raise EnvironmentFailure(f"stdout: {what}. print to a terminal, or to a file on a disk with free space.")


def end(code):
    """End the process with the exit code; if it failed, at once: threads may still wait for an answer that nobody needs."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads, or it is closed
        sys.stdout.flush()
        sys.stderr.flush()
    if code or _stage["joined"]:  # gloo's threads abort a process now and then while Python shuts down (torch 2.13)
        os._exit(code)
    sys.exit(code)


def end_with_parent():
    """Under run_pipeline.py, whose end closes our stdin: stop then as at SIGTERM, even if it was killed."""
    _stage["in_pipeline"] = bool(os.environ.pop("FASTSAE_STDIN_ENDS_WITH_PARENT", None))
    if _stage["in_pipeline"]:
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent():
    while os.read(0, 1024):
        pass
    if not stop_asked():  # twice would mean: without saving
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
    from fastsae import masking, storage

    text = masking.of_environment()("".join(traceback.format_exception(error)))
    for line in text.rstrip("\n").split("\n"):
        indent = "  " * line.startswith(("error: ", "warning: "))  # a message's line looks like none of ours
        print(indent + line, file=sys.stderr)
    for folder in filter(None, (_stage["log_folder"], Path(tempfile.gettempdir()))):  # none if the stage did not come so far
        with contextlib.suppress(OSError):  # a folder that takes no file
            path = folder / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
            storage.write_text(path, f"{' '.join(sys.argv)}\n{text}")
            print(f"error: this is a bug. report it with {path}; the same command goes on from what is finished.", file=sys.stderr)
            break
    return EXIT_BUG


def _out_of_memory(error):
    brief = (str(error) or "out of memory").splitlines()[0][:150]
    print(f"error: memory: {brief}. lower --batch-tokens (stage 1) or --buffer-tokens and --batch-size (stage 2), then run again: "
          "what was finished is kept.", file=sys.stderr)
    return EXIT_ENVIRONMENT
