"""The three stages one after the other, and nothing else. With STREAM_BYTES the first two run at
once: stage 2 trains on what stage 1 makes, and deletes it. Of several layers each is trained on by
a stage 2 of its own.

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

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import config
from fastsae.runtime import signals
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.runtime.progress import HIDDEN
from fastsae.runtime.stage import end, run_stage
from fastsae.settings.values import SHOWN

POLL = 0.1  # seconds between looks at two stages that run at once
LAST_WORDS = 10  # seconds for stage 1 to end by itself when stage 2 has


def main():
    scripts = [config.PROJECT / name for name in config.STAGES]
    settings = config.resolve(*scripts)
    if problems := check_chain(settings):
        raise InputError(*problems)
    if blocked := folders_that_take_no_files(settings):
        raise EnvironmentFailure(*blocked)
    settings.show()
    stages = [
        Stage(
            script,
            settings.flags_for(script.name),
            "" if settings.QUIET else f"[{number}/{len(scripts)}] {script.name}",
        )
        for number, script in enumerate(scripts, 1)
    ]
    groups = [[stage] for stage in stages]
    if settings.STREAM_BYTES:
        groups = [[stages[0], stages[1], *of_other_layers(stages[1], settings)], [stages[2]]]
    for group in groups:
        code = run(group, settings)
        if code:
            return code
    return 0


def of_other_layers(stage, settings):
    """Stage 2 for each layer of a stream but the first, which `stage` trains on; the runs are named
    after their layers."""
    return [
        Stage(
            stage.script,
            [
                *stage.flags,
                f"--layer-idx={layer}",
                f"--run-name={settings.run_dir.name}_layer{layer}",
            ],
            stage.title and f"{stage.title} for layer {layer}",
            has_bar=False,
        )
        for layer in (settings.LAYERS or ())[1:]
    ]


def check_chain(settings):
    """What each stage could do by itself, but the next one could not go on from."""
    problems = []
    if settings.PROCESSING == "block":
        problems.append(
            "BLOCK_LENGTH: stage 3 needs examples and refuses blocks. run extract_activations.py "
            "and train_sae.py by themselves."
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


class Stage:
    """A stage as a process of its own, which ends with this one.

    (In a session of its own: Ctrl-C at a terminal would otherwise reach it twice, and twice means
    at once, without saving.) Its stdin is a pipe that closes when this process ends, also by a
    kill: it then stops as well. has_bar: whether it may show how far it is.
    """

    def __init__(self, script, flags, title, *, has_bar=True):
        self.script, self.flags, self.title, self.has_bar = script, flags, title, has_bar
        self.process = None

    def start(self, name):
        """Start it; stages of the run `name` know by it that they belong together."""
        if self.title:
            print(self.title, flush=True)
        own = {"FASTSAE_STDIN_ENDS_WITH_PARENT": name, SHOWN: "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(self.script), *self.flags],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **own, **({} if self.has_bar else {HIDDEN: "1"})},
        )

    def is_running(self):
        return self.process is not None and self.process.poll() is None

    def code(self):
        """Its exit code; None before it has one."""
        code = None if self.process is None else self.process.poll()
        return 128 - code if code is not None and code < 0 else code


def run(stages, settings):
    """The exit code of the stages; all but the first start when that has begun its stream.

    A stage gets the signals that end this process, each once, so that none is left running. The
    first that fails ends the others, and its code is returned. Where the others are done the first
    is not needed any more.
    """
    asked = []

    def stop(signum, frame):
        asked.append(signum)
        for stage in stages:
            if stage.is_running():
                stage.process.send_signal(signum)

    name = f"{os.getpid()}-{time.time_ns()}"
    with signals.blocked():  # until both are there: the stage, and who passes signals on to it
        stages[0].start(name)
        previous = {number: signal.signal(number, stop) for number in signals.STOPS}
    try:
        code = ended(stages, settings, name, asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code or (128 + asked[0] if asked else 0)


def ended(stages, settings, name, asked):
    """Wait for the stages, starting all but the first in time; returns the code of the first that
    fails, else 0."""
    first, *others = stages
    if not others:
        first.process.wait()
        return first.code()
    while True:
        waiting = [stage for stage in others if stage.process is None]
        if waiting and not asked and (first.code() == 0 or has_begun(settings, name)):
            with signals.blocked():
                waiting[0].start(name)
            continue
        codes = [stage.code() for stage in stages]
        if failed := [code for code in codes if code]:
            end_all(stages)
            return failed[0]
        if all(stage.code() == 0 for stage in others):
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may be at its last words
                first.process.wait(LAST_WORDS)
            end_all(stages)
            return 0
        if asked and waiting and all(stage.code() is not None for stage in started(stages)):
            return first.code()
        time.sleep(POLL)


def started(stages):
    """Those that were started."""
    return [stage for stage in stages if stage.process is not None]


def end_all(stages):
    """Ask those that still run to stop, and wait until they have."""
    for stage in stages:
        if stage.is_running():
            stage.process.send_signal(signal.SIGTERM)
    for stage in started(stages):
        stage.process.wait()


def has_begun(settings, name):
    """Whether stage 1 of the run `name` has made the samples and announced their parts."""
    for layer in settings.LAYERS or (settings.LAYER_IDX,):
        path = settings.replace(LAYER_IDX=layer).activations_path
        folder = path.with_name(path.stem.replace("activations", "stream", 1))
        try:
            about = json.loads((folder / "stream.json").read_bytes())
            if about["run"] != name:
                return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
    return True


if __name__ == "__main__":
    end(run_stage(main, ends_in_time=False))
