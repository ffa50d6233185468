"""Errors a user can cause or meet, as one line and an exit code; everything else is a bug and keeps its traceback."""
import contextlib
import errno
import os
import signal
import sys

EXIT_INPUT, EXIT_ENVIRONMENT, EXIT_INCOMPLETE = 2, 3, 4


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


_waiting = {"deferred": False, "asked": None}


def _on_signal(signum, frame):
    if _waiting["deferred"] and _waiting["asked"] is None:  # asked twice: stop at once
        _waiting["asked"] = signum
    else:
        raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def deferred_stop():
    """Within, SIGTERM and Ctrl-C only ask: the loop looks at `stop_asked()` where its state is whole, saves, and calls `stop()`."""
    _waiting.update(deferred=True, asked=None)
    try:
        yield
    finally:
        _waiting["deferred"] = False


def stop_asked():
    return _waiting["asked"] is not None


def stop():
    """End the run as the signal that asked for it would have."""
    raise Terminated if _waiting["asked"] == signal.SIGTERM else KeyboardInterrupt


def run_stage(main):
    """Call `main()` and return the exit code of DESIGN.md: 0 done, 1 bug, 2 input, 3 environment, 4 incomplete, 130/143."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    try:
        with contextlib.redirect_stdout(sys.stdout):  # a stage may put something in its place
            code = main() or 0
            sys.stdout.flush()
        return code
    except StageError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, Terminated) as stop:
        print("stopped: what was finished is kept; the same command continues.", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    except MemoryError as error:
        return _out_of_memory(error)
    except RuntimeError as error:  # torch's own errors, of a GPU or of the CPU's allocator
        if type(error).__name__ != "OutOfMemoryError" and "not enough memory" not in str(error):
            raise
        return _out_of_memory(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output left, as in `| head`
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        remedy = ("free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder's rights")
        print(f"error: {error.filename or 'output'}: {error.strerror}. {remedy}, or choose another --output-dir; "
              "nothing that was complete is lost.", file=sys.stderr)
        return EXIT_ENVIRONMENT


def _out_of_memory(error):
    brief = (str(error) or "out of memory").splitlines()[0][:150]
    print(f"error: memory: {brief}. lower --batch-tokens (stage 1) or --batch-size and --max-examples (stage 2), then run again: "
          "what was finished is kept.", file=sys.stderr)
    return EXIT_ENVIRONMENT
