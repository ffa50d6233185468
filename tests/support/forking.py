"""Stages in forked copies of a process that has imported everything (about a tenth of a second
each), to be killed and starved.

`Stages` starts this file as a process of its own, with one thread: OpenMP's threads do not survive
a fork. Before every operation of fastsae.runtime.storage the fork looks whether it is to die or to
fail there; any other way of writing into the folder is reported.
"""

import functools
import gc
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from source_tree import module_name, python_files

PROJECT = Path(__file__).resolve().parents[2]
WRITING = {
    "os.rename": 2,
    "os.remove": 1,
    "os.mkdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.rmdir": 1,
    "shutil.rmtree": 1,
}  # audit events, and how many of their arguments are paths
LATE = (
    "transformers.integrations.sdpa_attention",
    "transformers.models.llama.modeling_llama",
    # imported when they are used
    "transformers.models.llama.tokenization_llama",
    "hypothesaes.interpret_neurons",
    "hypothesaes.sae",
)
NEEDS_SPACE = ("mkdir", "create", "write", "fsync", "link", "replace")


class Stages:
    """The client: `run(script, *flags, kill_at=5)` gives {"code", "out", "err", "operations",
    "foreign", "seconds"}."""

    def __init__(self, **environment):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **environment,
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def run(self, script, *flags, output, **how):
        """how: `kill_at=k` or `full_from=k` or `stop_at=k` (operation, from 1),
        `kill_after=seconds` or `stop_when=path` (once it is there), `environment={}`; `racers=n`,
        `processes=n` for so many that work together, `bare=True` for a module that takes no
        --output-dir."""
        job = {"script": script, "flags": [*map(str, flags)], "output": str(output), **how}
        self.process.stdin.write(json.dumps(job, default=str) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def at_once(self, *jobs, output):
        """Run different stages at once, each given as (script, flags, how); their outcomes in that
        order."""
        several = [
            {"script": script, "flags": [*map(str, flags)], "output": str(output), **how}
            for script, flags, how in jobs
        ]
        self.process.stdin.write(json.dumps({"at_once": several}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve():
    sys.path.insert(0, str(PROJECT))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preload()
    for line in sys.stdin:
        job = json.loads(line)
        trial = race if job.get("racers") else together if job.get("processes") else once
        trial = at_once if "at_once" in job else trial
        replies.write(json.dumps(trial(job)) + "\n")
        replies.flush()


def preload():
    """All that stages import, and tokenizers that are read once for all forks."""
    import torch

    # as where it is not installed: its figure takes longer than the rest of a tiny run
    sys.modules["matplotlib"] = None
    modules = [module_name(path) for path in python_files("fastsae")]
    if importlib.util.find_spec("triton") is None:
        modules.remove("fastsae.sae.kernels")  # which nothing imports then
    for name in (*LATE, *modules, "extract_activations", "train_sae", "interpret_sae"):
        importlib.import_module(name)
    from fastsae.interpretation import run_table
    from fastsae.interpretation.llm import client
    from fastsae.lm import loading

    torch.set_num_threads(1)
    client.FIRST_WAIT = 0.01  # hardly any waiting between tries
    run_table.N_SPLITS = 2  # half splits enough for tables
    plain, loaded = loading.load_tokenizer, {}

    def load_tokenizer(name, **source):
        return loaded.get(os.path.realpath(name)) or plain(name, **source)

    loading.load_tokenizer = load_tokenizer
    for name in filter(None, os.environ.get("TEST_TOKENIZERS", "").split(os.pathsep)):
        loaded[os.path.realpath(name)] = plain(name)
    gc.freeze()  # or the collector touches, and so copies, every page in every fork


def once(job):
    started = time.monotonic()
    child, report = start(job)
    if job.get("stop_when"):
        stop_when(child, Path(job["stop_when"]))
    status = wait(child, job.get("kill_after"))
    return {**outcome(job, report, status), "seconds": time.monotonic() - started}


def race(job):
    """All racers start at once; the first to write waits there until the others have ended."""
    go = Path(job["output"]).with_suffix(".go")
    go.unlink(missing_ok=True)
    children = [start({**job, "wait_for": str(go), "racer": i}) for i in range(job["racers"])]
    waiting, ended, deadline = dict(children), [], time.monotonic() + 120
    while len(waiting) > 1 and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ended.append((waiting.pop(pid), status))
        else:
            time.sleep(0.01)
    n_waiting = len(waiting)
    go.touch()
    ended += [(report, os.waitpid(pid, 0)[1]) for pid, report in waiting.items()]
    racers = [outcome(job, report, status) for report, status in ended]
    return {
        "n_waiting": n_waiting,
        "racers": racers,
        "foreign": [each for racer in racers for each in racer["foreign"]],
    }


def together(job):
    """Processes of one run, as torchrun starts them: each is told its rank, and where one fails the
    others get SIGTERM. The code is that of the first to fail, `err` of all."""
    n, running, ended = job["processes"], {}, []
    for rank in range(n):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
        environment = job.get("environment", {}) | {name: str(i) for name, i in names.items()}
        pid, report = start({**job, "racer": rank, "environment": environment})
        running[pid] = report
    while running:
        pid, status = os.waitpid(-1, 0)
        ended.append(outcome(job, running.pop(pid), status))
        if ended[-1]["code"]:
            for other in running:
                os.kill(other, signal.SIGTERM)
    code = next((each["code"] for each in ended if each["code"]), 0)
    return {"code": code, "err": "".join(each["err"] for each in ended)}


def at_once(job):
    """The outcomes of several stages that run at once; each may be killed after a while, and is
    when another one has refused what it was given, for it would wait in vain."""
    jobs = [{**each, "racer": i} for i, each in enumerate(job["at_once"])]
    running = {i: start(each) for i, each in enumerate(jobs)}
    began, outcomes = time.monotonic(), {}
    while running:
        for i, (pid, report) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                outcomes[i] = outcome(jobs[i], report, status)
                del running[i]
            elif any(done["code"] == 2 for done in outcomes.values()):
                os.kill(pid, signal.SIGKILL)
            elif time.monotonic() - began > jobs[i].get("kill_after", 120):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [outcomes[i] for i in range(len(jobs))]


def start(job):
    """(pid, the fork's report file)."""
    report = Path(job["output"]).parent / f".report-{job.get('racer', 0)}"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        in_fork(job, report)
    return child, report


def stop_when(child, path):
    """SIGTERM as soon as there is something at `path`."""
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)


def wait(child, kill_after):
    if kill_after is None:
        return os.waitpid(child, 0)[1]
    deadline = time.monotonic() + kill_after
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def outcome(job, report, status):
    found = json.loads(report.read_text()) if report.exists() else {}
    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": read(report, ".out"),
        "err": read(report, ".err"),
        "operations": found.get("operations", []),
        "foreign": found.get("foreign", []),
    }


def read(report, suffix):
    return report.with_name(report.name + suffix).read_text(errors="replace")


def in_fork(job, report):
    from experiments.shared.constants import set_constant
    from fastsae.runtime import storage
    from fastsae.runtime.stage import run_stage
    from fastsae.settings.values import SHOWN

    for number, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(
            report.with_name(report.name + suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        )
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    if not job.get("bare"):
        os.environ[SHOWN] = "1"
    os.environ.update(job.get("environment", {}))
    constants = [flag for flag in job["flags"] if flag.startswith("fastsae.")]
    for constant in constants:
        set_constant(constant)
    shared = [] if job.get("bare") else ["--output-dir", job["output"]]
    given = (flag for flag in job["flags"] if flag not in constants)
    sys.argv = [job["script"] + ".py", *shared, *given]
    operations, foreign = [], []
    sys.addaudithook(functools.partial(look_for_foreign, foreign, job["output"]))
    storage.watch = functools.partial(at_operation, job, operations)
    code = 1
    try:
        code = run_stage(importlib.import_module(job["script"]).main)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else print(stop.code, file=sys.stderr) or 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        whole = report.with_name(report.name + ".whole")  # a kill may come while it is written
        whole.write_text(json.dumps({"operations": operations, "foreign": foreign}))
        os.replace(whole, report)
        os._exit(code)


def at_operation(job, operations, operation, path):
    operations.append(operation)
    n = len(operations)
    if job.get("wait_for") and operation == "create" and not str(path).endswith(".lock"):
        while not os.path.exists(job["wait_for"]):
            time.sleep(0.01)
    if n == job.get("kill_at"):
        os.kill(os.getpid(), signal.SIGKILL)
    if n == job.get("stop_at"):
        os.kill(os.getpid(), signal.SIGTERM)
    if n >= job.get("full_from", 1 << 60) and operation in NEEDS_SPACE:
        raise OSError(28, "No space left on device", str(path))


def look_for_foreign(foreign, folder, event, arguments):
    """An audit hook: what changes `folder` must be called by fastsae/runtime/storage.py."""
    if event == "open":
        path, mode, flags = arguments
        paths = (
            [path]
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            else []
        )
    else:
        paths = arguments[: WRITING.get(event, 0)]
    if any(isinstance(path, (str, os.PathLike)) and str(path).startswith(folder) for path in paths):
        frame = sys._getframe(1)
        while frame and not frame.f_code.co_filename.endswith("fastsae/runtime/storage.py"):
            frame = frame.f_back
        if not frame:
            foreign.append(f"{event} {paths}")


if __name__ == "__main__":
    serve()
