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

from fastsae import machine_errors

EXIT_BUG, EXIT_INPUT, EXIT_ENVIRONMENT, EXIT_INCOMPLETE = 1, 2, 3, 4


class StageError(Exception):
    """What went wrong and what to do about it: `where: what. remedy.`, one line each when there are several."""

    exit_code = 1


class InputError(StageError):
    """A bad setting, dataset or model choice: the user can mend it."""

    exit_code = EXIT_INPUT


class EnvironmentFailure(StageError):
    """Disk, network, access rights or a damaged artifact."""

    exit_code = EXIT_ENVIRONMENT


class Terminated(BaseException):
    """SIGTERM arrived. A BaseException, like KeyboardInterrupt, so that no handler swallows it."""


_waiting: dict[str, Any] = {"deferred": False, "asked": None, "at": -math.inf}
SAME_STOP = 1.0  # seconds in which a second signal is the first one once more: a service manager sends it to all, and the pipeline on


def _on_signal(signum, frame):
    if time.monotonic() - _waiting["at"] < SAME_STOP:
        return
    _waiting["at"] = time.monotonic()
    if _waiting["deferred"] and _waiting["asked"] is None:
        _waiting["asked"] = signum
    else:  # asked twice: stop at once
        _waiting["asked"] = None
        raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


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
    raise Terminated if _waiting["asked"] == signal.SIGTERM else KeyboardInterrupt


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


class _Output:
    """stdout that bears it when its reader leaves, as `| head` does: the stage's work is not in what it says."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        return self._heard(self._stream.write, text)

    def flush(self):
        return self._heard(self._stream.flush)

    def _heard(self, action, *text):
        try:
            return action(*text)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return action(*text)


def run_stage(main):
    """Call `main()` and return the exit code: 0 done, 1 bug, 2 input, 3 environment, 4 incomplete, 130/143."""
    _waiting["at"] = -math.inf
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    end_with_parent()
    try:
        with contextlib.redirect_stdout(_Output(sys.stdout)):  # a stage may put something in its place
            code = main() or 0
            sys.stdout.flush()
        return code
    except StageError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, Terminated) as stop:
        for number in (signal.SIGTERM, signal.SIGINT):  # it is ending
            signal.signal(number, signal.SIG_IGN)
        print("stopped: what was finished is kept; the same command continues.", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    except Exception as error:
        return _environment(error) or _bug(error)
    finally:
        while _stage["at_end"]:
            _stage["at_end"].pop()()
        _stage["log_folder"] = None


def end(code):
    """End the process with the exit code; if it failed, at once: threads may still wait for an answer that nobody needs."""
    with contextlib.suppress(OSError):  # nobody reads
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
    print(text, file=sys.stderr, end="")
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
