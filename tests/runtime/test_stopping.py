"""Stops wherever they come: while libraries load, in calls that Python does not interrupt, in
destructors; and what is left as it was."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import PROJECT

from fastsae.runtime import early_stop, signals, stage
from fastsae.runtime.errors import InputError
from fastsae.runtime.stage import run_stage

STOPPED = "stopped: what was finished is kept; the same command continues.\n"
NUMBERS = pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)


def start(code, **options):
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def stopped(process, number, wait_for="ready\n"):
    """(exit code, stderr) of a process that got the signal once it had printed `wait_for`."""
    assert process.stdout.readline() == wait_for, process.stderr.read()
    process.send_signal(number)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err


@pytest.mark.parametrize(
    "script", ["extract_activations", "train_sae", "interpret_sae", "run_pipeline"]
)
@NUMBERS
def test_a_stop_while_libraries_load(script, number, code):
    """The first import that takes time is replaced by one that waits: no exception could come out
    of it."""
    body = (
        "import runpy, sys, time\n"
        "class Wait:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {'config' if script == 'run_pipeline' else 'numpy'!r}:\n"
        "            print('ready')\n"
        "            while True:\n"
        "                try:\n"
        "                    time.sleep(60)\n"
        "                except BaseException:\n"
        "                    pass\n"
        "sys.meta_path.insert(0, Wait())\n"
        f"sys.argv = ['{script}.py']\n"
        f"runpy.run_path('{script}.py', run_name='__main__')"
    )
    assert stopped(start(body), number) == (code, STOPPED)


def test_importing_a_stage_changes_no_handler(monkeypatch):
    """Only who runs a script wants its handlers, not a notebook that imports it."""
    monkeypatch.setattr(early_stop, "listen", lambda: pytest.fail("listens"))
    for script in ("extract_activations", "train_sae", "interpret_sae", "run_pipeline"):
        source = compile((PROJECT / f"{script}.py").read_text(), script, "exec")
        exec(source, {"__name__": script, "__file__": str(PROJECT / f"{script}.py")})


@NUMBERS
@pytest.mark.parametrize(
    "busy",
    [
        "lock.acquire()",
        "next(x for x in iter(int, 1) if x)",
        "swallow()",
        "lost()",
        "time.sleep(60)",
        "translated()",
    ],
)
def test_a_stop_is_answered_wherever_it_comes(busy, number, code):
    """Also where the exception is caught, lost in a destructor, or turned into another one."""
    body = (
        "import threading, time\n"
        "from fastsae.runtime import signals, stage\n"
        "signals.ANSWER_WITHIN = 0.3\n"
        "lock = threading.Lock(); lock.acquire()\n"
        "def swallow():\n"
        "    while True:\n"
        "        try: time.sleep(60)\n"
        "        except BaseException: pass\n"
        "class Lost:\n"
        "    def __del__(self): time.sleep(60)\n"
        "def lost():\n"
        "    Lost()\n"
        "    time.sleep(60)\n"
        "def translated():\n"
        "    try: time.sleep(60)\n"
        "    except BaseException: raise ImportError('initialisation failed') from None\n"
        f"stage.end(stage.run_stage(lambda: [print('ready'), {busy}] and 0))"
    )
    assert stopped(start(body), number) == (code, STOPPED)


@NUMBERS
def test_a_call_that_no_handler_interrupts_is_ended(number, code):
    """A thread sees the signal while the main thread is in foreign code that does not return."""
    body = (
        "import ctypes\n"
        "from fastsae.runtime import signals, stage\n"
        "signals.ANSWER_WITHIN = 0.3\n"
        "def pause():\n"
        "    print('ready')\n"
        "    lock, libc = (ctypes.c_char * 64)(), ctypes.CDLL(None)\n"
        "    libc.pthread_mutex_init(lock, None)\n"
        "    libc.pthread_mutex_lock(lock), libc.pthread_mutex_lock(lock)\n"
        "stage.end(stage.run_stage(pause))"
    )
    assert stopped(start(body), number) == (code, STOPPED)


def test_a_stage_that_saves_has_longer(monkeypatch):
    """The end is forced after ANSWER_WITHIN unless the state is being written; then after
    SAVE_WITHIN more."""
    ended = []
    monkeypatch.setattr(signals, "end_now", ended.append)
    monkeypatch.setattr(signals, "ANSWER_WITHIN", 0.01)
    monkeypatch.setattr(signals, "SAVE_WITHIN", 0.2)
    for saving, expected in ((True, []), (False, [signal.SIGTERM])):
        reader, writer = os.pipe()
        over = threading.Event()
        threading.Timer(0.05, over.set).start()
        os.write(writer, bytes([signal.SIGCHLD, signal.SIGTERM]))
        signals._watch(reader, over, lambda saving=saving: saving)
        assert ended == expected
        os.close(reader)
        os.close(writer)


def handlers():
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    return (
        [signal.getsignal(number) for number in signals.STOPS],
        wakeup,
        sys.unraisablehook,
        sys.stdout,
        sys.stderr,
        [thread for thread in threading.enumerate() if "_watch" in thread.name],
    )


@pytest.mark.parametrize(
    "body",
    [
        lambda: 0,
        lambda: signal.raise_signal(signal.SIGTERM),
        lambda: signal.raise_signal(signal.SIGINT),
        lambda: sys.exit(2),
        lambda: 1 / 0,
        lambda: 4,
    ],
)
def test_afterwards_all_is_as_it_was(body, capsys, tmp_path, monkeypatch):
    """In a notebook the next Ctrl-C interrupts a cell again."""
    monkeypatch.setattr(stage.tempfile, "tempdir", str(tmp_path))
    heard = []
    previous = {
        number: signal.signal(number, lambda number, frame: heard.append(number))
        for number in signals.STOPS
    }
    try:
        for _ in range(2):
            before = handlers()
            try:
                run_stage(body)
            except SystemExit:
                pass
            assert handlers() == before
            for number in signals.STOPS:
                signal.raise_signal(number)
            assert heard == list(signals.STOPS)
            heard.clear()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def test_a_stage_in_another_thread_leaves_signals_alone(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_stage(lambda: 4)))
    thread.start()
    thread.join(30)
    assert codes == [4]


def test_a_stop_before_and_after_the_work(outcome, monkeypatch):
    """A signal that comes before `main` has begun, and one while the stage's error is being
    printed, make no traceback."""
    begin = stage.end_with_parent
    monkeypatch.setattr(
        stage, "end_with_parent", lambda: signal.raise_signal(signal.SIGTERM) or begin()
    )
    assert outcome(lambda: pytest.fail("ran")) == (143, [STOPPED.rstrip()])
    monkeypatch.setattr(stage, "end_with_parent", begin)

    class Late:
        def __str__(self):
            signal.raise_signal(signal.SIGTERM)
            return "M: a. b."

    def fail():
        raise InputError(Late())

    assert outcome(fail) == (2, ["error: M: a. b."])


@NUMBERS
def test_a_pipeline_stopped_at_its_very_beginning(tmp_path, number, code):
    """At random moments of its first second, when the first stage may or may not have begun to
    listen."""
    random.seed(number)
    for _ in range(2):
        process = subprocess.Popen(
            [
                sys.executable,
                "-u",
                PROJECT / "run_pipeline.py",
                "--output-dir",
                tmp_path,
                "--device",
                "cpu",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (line := process.stdout.readline()).startswith("[1/3]"):
            assert line, process.stderr.read()
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (code, STOPPED)
