"""The three stages called from Python: `extract`, `train` and `interpret`, with the settings of
their scripts as keyword arguments.

Each call runs the script beside this package as a process of its own, shows what it prints and how
far it is, and gives back what it wrote. So nothing in the caller's process changes, its memory is
free again when a call ends, an interrupt saves what is done, and the same call goes on from there
(docs/design.md).
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.runtime import early_stop, signals
from fastsae.runtime.errors import (
    EXIT_ENVIRONMENT,
    EXIT_INCOMPLETE,
    EXIT_INPUT,
    EnvironmentFailure,
    InputError,
)
from fastsae.runtime.progress import CHANNEL
from fastsae.settings import kinds
from fastsae.settings.declarations import RENAMED, home_of, instead_of, settings_in
from fastsae.settings.flags import as_flags
from fastsae.settings.resolving import wrong_type
from fastsae.settings.suggestions import listed, nearest

if TYPE_CHECKING:
    import pandas

    from fastsae.trained_sae import TrainedSae

PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "extract": "extract_activations.py",
    "train": "train_sae.py",
    "interpret": "interpret_sae.py",
}
SUMMARY = "summary: "
SAVE_WITHIN = 30.0  # seconds that a stage has to save when it was interrupted, before it is killed


@dataclass(frozen=True)
class Extracted:
    """What `extract` wrote: the file of each layer; of several layers `path` is the first one's."""

    path: Path
    paths: dict[int, Path] = field(repr=False)
    n_examples: int
    n_tokens: int
    summary: dict[str, Any] = field(repr=False)

    def open(self, layer: int | None = None) -> Mapping[str, Any]:
        """The arrays of a layer's file by name (docs/files.md), mapped from the disk."""
        from fastsae.activations.files import open_activations

        return open_activations(self.path if layer is None else self.paths[layer])


@dataclass(frozen=True)
class Trained:
    """What `train` wrote: the checkpoints; of several autoencoders `path` is the first one's, which
    `interpret` reads. `metrics` are its figures, those of metrics.json."""

    path: Path
    paths: list[Path] = field(repr=False)
    metrics: dict[str, Any] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)

    def load(self, path: Path | None = None, **options: Any) -> "TrainedSae":
        """The autoencoder, as `load_sae` gives it, which takes `options` too."""
        from fastsae.trained_sae import load_sae

        return load_sae(path or self.path, **options)


@dataclass(frozen=True)
class Interpreted:
    """What `interpret` wrote: the report, which an array of another program has not (None),
    and the table in two formats."""

    html: Path | None
    csv: Path
    jsonl: Path
    summary: dict[str, Any] = field(repr=False)

    @property
    def table(self) -> "pandas.DataFrame":
        """One row per feature, as `read_table` gives it."""
        from fastsae.interpretation.frames import read_table

        return read_table(self.csv)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per feature, unrounded, with all that interpretations.jsonl has."""
        with open(self.jsonl, encoding="utf-8") as file:
            return [json.loads(line) for line in file][1:]


def extract(**settings: Any) -> Extracted:
    """Stage 1, `extract_activations.py`: `extract(dataset_path="my.jsonl", layer_idx=12)`.

    `settings` are those of config.py and of the script, in small letters; what is not given is as
    in these files. Raises InputError or EnvironmentFailure, whose text says what to do.
    """
    summary = _run("extract", settings)
    path = Path(summary["path"])
    first, *_ = layers = summary["layers"]
    paths = {n: path.with_name(path.name.replace(f"layer{first}", f"layer{n}")) for n in layers}
    return Extracted(path, paths, summary["n_examples"], summary["n_tokens"], summary)


def train(**settings: Any) -> Trained:
    """Stage 2, `train_sae.py`: `train(dataset_path="my.jsonl", m=1024, k=16)`. As `extract`."""
    summary = _run("train", settings)
    path = Path(summary["path"])
    names = summary.get("names", [path.name])
    metrics = json.loads((path.parent / "metrics.json").read_text(encoding="utf-8"))
    return Trained(path, [path.with_name(name) for name in names], metrics, summary)


def interpret(**settings: Any) -> Interpreted | None:
    """Stage 3, `interpret_sae.py`: `interpret(dataset_path="my.jsonl", label_field="topic")`. As
    `extract`. None where the settings (`text`, `dry_run`) ask for nothing but printing."""
    summary = _run("interpret", settings)
    if not summary:
        return None
    path = Path(summary["path"])
    html = path if path.suffix == ".html" else None
    return Interpreted(html, path.with_suffix(".csv"), path.with_suffix(".jsonl"), summary)


def _run(stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the last line of a stage says, {} where it has none."""
    script = PROJECT / SCRIPTS[stage]
    if not script.is_file():
        raise EnvironmentFailure(
            f"{script}: not found. keep fastsae in the project's folder, beside its scripts."
        )
    child = _Child(script, flags_of(stage, script, settings))
    code = child.wait()
    if code in (0, EXIT_INCOMPLETE):
        return child.summary
    what = child.errors or [f"{script.name} ended with exit code {code}, without saying why"]
    if code == EXIT_INPUT:
        raise InputError(*what)
    if code == EXIT_ENVIRONMENT:
        raise EnvironmentFailure(*what)
    if code in early_stop.EXIT_CODES.values():  # somebody else stopped it
        raise EnvironmentFailure(f"{script.name} was stopped. the same call goes on.")
    if code < 0:
        raise EnvironmentFailure(
            f"{script.name} was killed by signal {-code}, as by a machine that runs out of memory. "
            "the same call goes on."
        )
    raise RuntimeError("\n".join(what))


def flags_of(stage: str, script: Path, settings: Mapping[str, Any]) -> list[str]:
    """The settings of a call as the flags of the stage's script.

    Raises InputError with a line for each that the script does not have, with what was probably
    meant, and for each that is of another type.
    """
    declared, problems = settings_in(script.with_name("config.py"))
    own, more = settings_in(script)
    declared, problems = {**declared, **own}, problems + more
    flags = []
    for word, value in settings.items():
        name = word.upper()
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        value = value.item() if hasattr(value, "item") and not hasattr(value, "__len__") else value
        if name not in declared:
            problems.append(_no_such(stage, word, declared))
        elif not kinds.has_type(value, declared[name]["type"]):
            problems.append(wrong_type(name, value, declared[name], "flag"))
        else:
            flags.append(as_flags(name, kinds.as_type(value, declared[name]["type"])))
    if settings.get("stream_bytes", settings.get("STREAM_BYTES")):
        problems.append(
            "STREAM_BYTES: stages 1 and 2 then run at once, and a call waits for one. "
            "start run_pipeline.py."
        )
    if problems:
        raise InputError(*problems)
    return flags


def _no_such(stage, word, declared):
    name = word.upper()
    if name in RENAMED:
        now, example = RENAMED[name]
        return f"{word}: not a setting any more. give {now.lower()}={example!r}."
    if remedy := instead_of(name):
        return f"{word}: not a setting any more. {remedy}."
    home = home_of(name)
    other = next((name for name, script in SCRIPTS.items() if script == home), None)
    if other:
        return f"{word}: no such setting of {stage}, but of {other}. leave it out here."
    near = nearest(word, [each.lower().replace("_", "-") for each in declared])
    if not near:
        return f"{word}: no such setting of {stage}. docs/settings.md has them all."
    names = listed([each.replace("-", "_") for each in near])
    return f"{word}: no such setting of {stage}. perhaps {names} is meant."


class _Child:
    """A stage as a process, and what it says: `summary` its last line, `errors` its error lines.

    It has a session of its own, so that an interrupt of the notebook reaches it once, from here,
    and its stdin closes when this process ends, however it does: it then stops as well.
    """

    def __init__(self, script: Path, flags: list[str]) -> None:
        self.summary: dict[str, Any] = {}
        self.errors: list[str] = []
        self._bar = _Bar()
        reader, writer = os.pipe()
        environment = {
            **os.environ,
            "FASTSAE_STDIN_ENDS_WITH_PARENT": f"{os.getpid()}-{time.time_ns()}",
            CHANNEL: str(writer),
            "PYTHONIOENCODING": "utf-8",
            "PYTHONUNBUFFERED": "1",
        }
        try:
            with signals.blocked():  # until it is there, and can be told of an interrupt
                self.process = subprocess.Popen(
                    [sys.executable, str(script), *flags],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=environment,
                    start_new_session=True,
                    pass_fds=[writer],
                )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        assert self.process.stdout is not None and self.process.stderr is not None
        # {handle: [who takes its lines, what is there of the next one]}
        self._pipes: dict[int, list[Any]] = {
            self.process.stdout.fileno(): [self._printed, b""],
            self.process.stderr.fileno(): [self._said, b""],
            reader: [self._bar.show, b""],
        }
        self._progress = reader

    def wait(self) -> int:
        """Pass on what it says until it ends; its exit code, below 0 for a signal.

        An interrupt goes to it, and is raised here when it has saved its state.
        """
        try:
            self._pass_on()
            return self.process.wait()
        except BaseException:
            self._stop()
            raise
        finally:
            self._bar.close()
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
            os.close(self._progress)

    def _stop(self):
        """Interrupt it as Ctrl-C would, and kill it if it goes on, or at another interrupt."""
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGINT)
        try:
            self._pass_on(until=time.monotonic() + SAVE_WITHIN)
            self.process.wait(1)
        except BaseException:
            pass
        finally:
            self.process.kill()
            self.process.wait()

    def _pass_on(self, until=None):
        """Read its pipes until all are closed, or until that time (of time.monotonic)."""
        with selectors.DefaultSelector() as selector:
            for handle in self._pipes:
                selector.register(handle, selectors.EVENT_READ)
            while selector.get_map() and (until is None or time.monotonic() < until):
                for key, _ in selector.select(timeout=1):
                    if not self._read(key.fd):
                        selector.unregister(key.fd)

    def _read(self, handle):
        """Hand on the whole lines that came; False at the end."""
        got = os.read(handle, 65536)
        taker, rest = self._pipes[handle]
        *lines, rest = (rest + got).split(b"\n") if got else (rest, b"")
        self._pipes[handle][1] = rest
        for line in lines:
            if got or line:
                taker(line.decode("utf-8", "backslashreplace"))
        return bool(got)

    def _printed(self, line):
        if line.startswith(SUMMARY):
            self.summary = json.loads(line.removeprefix(SUMMARY))
        else:
            self._bar.print(line, sys.stdout)

    def _said(self, line):
        if line.startswith("error: "):
            self.errors.append(line.removeprefix("error: "))
        else:
            self._bar.print(line, sys.stderr)


class _Bar:
    """A bar of tqdm, in a notebook one of its widgets, that shows a stage's work bit by bit."""

    def __init__(self, make: Callable[..., Any] | None = None) -> None:
        self._make = make
        self._bar: Any = None
        self._piece: tuple | None = None

    def show(self, line: str) -> None:
        """Show the state in a line of `progress.CHANNEL`."""
        state = json.loads(line)
        if self._bar is None:
            if self._make is None:
                from tqdm.auto import tqdm as make
            else:
                make = self._make
            self._bar = make(leave=False)
        bar, piece = self._bar, (state["name"], state["total"], state["unit"])
        if piece != self._piece:
            self._piece = piece
            bar.reset(state["total"])
            # its speed is counted from here on
            bar.total, bar.initial, bar.unit = state["total"], state["n"], state["unit"]
            bar.bar_format = None if state["unit"] else "{desc} {elapsed}"
            bar.set_description_str(state["name"], refresh=False)
        bar.n = state["n"]
        bar.set_postfix_str(state["note"], refresh=False)
        bar.refresh()

    def print(self, line: str, stream: Any) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar is None:
            print(line, file=stream)
        else:
            self._bar.write(line, file=stream)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
