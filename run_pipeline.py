"""The three stages one after the other, and nothing else.

    python run_pipeline.py                               # the demo
    python run_pipeline.py --dataset-path my.jsonl --k 16

Checks the settings of all stages first, hands each flag to the stages that know it, and returns the
exit code of the stage that failed. A stage whose output is up to date says so and returns at once.
"""

from fastsae.runtime import early_stop
from fastsae.settings import startup

if __name__ == "__main__":
    early_stop.listen()  # before anything else is loaded
    startup.explain_slips()  # of config.py, which is imported below

import os
import signal
import subprocess
import sys

import config
from fastsae.runtime import signals
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.runtime.stage import end, run_stage


def main():
    scripts = [config.PROJECT / name for name in config.STAGES]
    settings = config.resolve(*scripts)
    if problems := check_chain(settings):
        raise InputError(*problems)
    if blocked := folders_that_take_no_files(settings):
        raise EnvironmentFailure(*blocked)
    settings.show()
    for number, script in enumerate(scripts, 1):
        if not settings.QUIET:
            print(f"[{number}/{len(scripts)}] {script.name}", flush=True)
        code = run(script, [*settings.flags_for(script.name), "--no-print-settings"])
        if code:
            return code
    return 0


def check_chain(settings):
    """What each stage could do by itself, but the next one could not go on from."""
    problems = []
    if settings.LAYERS and settings.LAYER_IDX not in settings.LAYERS:
        problems.append(
            f"LAYERS: {settings.LAYERS} are without LAYER_IDX={settings.LAYER_IDX}, on which the "
            "later stages work. give "
            f"--layer-idx {settings.LAYERS[0]}, or add {settings.LAYER_IDX} to --layers."
        )
    if settings.PROCESSING == "block":
        problems.append(
            "PROCESSING: stage 3 needs examples and refuses blocks. run extract_activations.py and "
            "train_sae.py by themselves."
        )
    return problems


def folders_that_take_no_files(settings):
    """What stages 2 and 3 would say of the folders of their first results, after stage 1's work."""
    problems = []
    for first in (settings.run_dir / "metrics.json", settings.output_dir / "interpretations.jsonl"):
        if os.path.exists(first):  # it may be up to date
            continue
        nearest = str(first.parent)
        while not os.path.lexists(nearest) and os.path.dirname(nearest) != nearest:
            nearest = os.path.dirname(nearest)
        if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
            problems.append(
                f"{nearest}: takes no files. check its rights, or choose another --output-dir or "
                "--run-name."
            )
    return list(dict.fromkeys(problems))


def run(script, flags):
    """The stage's exit code. A stage gets the signals that end this process, each once, so that
    none is left running.

    (In a session of its own: Ctrl-C at a terminal would otherwise reach it twice, and twice means
    at once, without saving.) Its stdin is a pipe that closes when this process ends, also by a
    kill: it then stops as well.
    """
    asked = []

    def stop(signum, frame):
        asked.append(signum)
        if stage.poll() is None:
            stage.send_signal(signum)

    with signals.blocked():  # until both are there: the stage, and who passes signals on to it
        stage = subprocess.Popen(
            [sys.executable, str(script), *flags],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "FASTSAE_STDIN_ENDS_WITH_PARENT": "1"},
        )
        previous = {number: signal.signal(number, stop) for number in signals.STOPS}
    try:
        code = stage.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    code = 128 - code if code < 0 else code
    return code or (128 + asked[0] if asked else 0)


if __name__ == "__main__":
    end(run_stage(main, ends_in_time=False))
