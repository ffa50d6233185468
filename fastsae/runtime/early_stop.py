"""Ctrl-C and SIGTERM in the first moments of a script, while it loads its libraries."""

import os
import signal

STOPS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODES: dict[int, int] = {signal.SIGTERM: 143, signal.SIGINT: 130}
MESSAGE = "stopped: what was finished is kept; the same command continues."


def listen() -> None:
    """From here on a stop ends the process with one line and its exit code, until `run_stage`
    answers it.

    For the first line of a script: this file imports nothing that takes time. An exception would
    not do: libraries catch it, or turn it into another one.
    """
    for number in STOPS:
        signal.signal(number, lambda number, frame: end_now(number))
    # run_pipeline.py starts stages with these blocked
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def end_now(number: int) -> None:
    """End the process as a stage ends that was stopped. What is written is whole or not there, as
    after a kill."""
    try:
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks for all
            os.write(2, f"{MESSAGE}\n".encode())
    except OSError:  # stderr is closed, or full
        pass
    os._exit(EXIT_CODES[signal.Signals(number)])
