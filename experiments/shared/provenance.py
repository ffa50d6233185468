"""What every experiment needs: stages as subprocesses, and results with their provenance."""

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from fastsae.settings.values import SHOWN

PROJECT = Path(__file__).resolve().parents[2]
RESULTS = Path(os.environ.get("FASTSAE_RESULTS") or PROJECT / "experiments" / "results").absolute()


def run_stage(script: str, *flags: Any) -> None:
    """Run one of the project's scripts as a user would; `fastsae.MODULE.NAME=value` among the flags
    is another value of a constant, for which `experiments.shared.constants` runs it."""
    given = list(map(str, flags))
    constants = [flag for flag in given if flag.startswith("fastsae.")]
    rest = [flag for flag in given if flag not in constants]
    if constants:
        command = module_command("experiments.shared.constants", *constants, script, *rest)
    else:
        command = [sys.executable, str(PROJECT / script), *rest]
    run_to_its_end(command, env=environment())


def module_command(name: str, *flags: Any) -> list[str]:
    """The command that runs one of the project's modules, for `subprocess` with `environment()`."""
    return [sys.executable, "-m", name, *map(str, flags)]


def environment() -> dict[str, str]:
    """This process's environment, with the project where `python -m` finds it from any folder, and
    without the line of settings that a stage prints."""
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), SHOWN: "1"}


def run_to_its_end(
    command: list[str], text: str | None = None, env: dict[str, str] | None = None
) -> None:
    """Run a command, `text` on its stdin; if it fails, which it has explained, this process ends
    with its exit code.

    When this process is stopped the other one may save first (`subprocess.run` would kill it after
    a quarter of a second).
    """
    with subprocess.Popen(
        command, stdin=None if text is None else subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            process.communicate(text)
        except KeyboardInterrupt:  # Ctrl-C reached both; twice would mean: without saving
            process.wait()
            raise
        except BaseException:
            process.terminate()
            raise
    if code := process.returncode:
        sys.exit(code if code > 0 else 128 - code)


def machine() -> dict[str, Any]:
    """The CPU's name, the number of cores and the versions that decide speed."""
    import torch
    import transformers

    name = platform.processor()
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    ):
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else name
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def commit() -> str:
    """The commit the result was made from, with '+' when the work tree differed from it."""
    try:
        sha = subprocess.check_output(
            ["git", "-C", PROJECT, "rev-parse", "--short", "HEAD"], text=True
        ).strip()
        changed = subprocess.check_output(
            ["git", "-C", PROJECT, "status", "--porcelain", "--untracked-files=no"], text=True
        ).strip()
        return sha + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_result(name: str, settings: dict[str, Any], result: dict[str, Any]) -> None:
    """Write experiments/results/<name>.json and say so. Of folders of this machine only the last
    name stays."""
    from fastsae.runtime import artifacts

    path = RESULTS / f"{name}.json"
    content = {
        "settings": without_folders(settings),
        "commit": commit(),
        "machine": machine(),
        **result,
    }
    artifacts.write_text(path, json.dumps(content, indent=2) + "\n")
    print(f"wrote {path}")


def without_folders(value: Any) -> Any:
    """`value`, JSON-able, with the file's name in the place of every absolute path in it."""
    if isinstance(value, dict):
        return {name: without_folders(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(each) for each in value]
    if isinstance(value, (str, Path)) and os.path.isabs(os.path.expanduser(value)):
        return Path(value).name
    return value


def write_figure(path: Path, figure: "Figure") -> None:
    """A matplotlib figure as a PNG, and say so."""
    from fastsae.training.monitoring import save_figure

    save_figure(path, figure)
    print(f"wrote {path}")


@functools.cache
def code_version(leaving_out: tuple[str, ...] = ()) -> str:
    """sha256 (hex) of the project's Python files: what other code computed is not remembered.
    leaving_out: files and folders that change nothing of it."""
    digest = hashlib.sha256()
    for path in sorted(
        [
            *PROJECT.glob("*.py"),
            *PROJECT.glob("fastsae/**/*.py"),
            *PROJECT.glob("experiments/**/*.py"),
        ]
    ):
        name = path.relative_to(PROJECT).as_posix()
        if not any(name == each or name.startswith(f"{each}/") for each in leaving_out):
            digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()


def remembered(path: str | Path, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """What `compute()` returned, JSON-able, when this code was asked for `key` before, from the
    journal at `path`; else that, appended."""
    from fastsae.runtime import artifacts

    name = artifacts.fingerprint("study", key, {"code": code_version()})
    for line in artifacts.read_lines(path):
        if line.get("key") == name:
            return line["value"]
    value = compute()
    artifacts.append_line(Path(path), {"key": name, "value": value})
    return value


class Journal:
    """What a study computed piece by piece; a piece is remembered as `remembered` has it. Several
    processes may add to one. leaving_out: code that has no part in the pieces."""

    def __init__(self, path: str | Path, leaving_out: tuple[str, ...] = ()) -> None:
        self.path, self.leaving_out = Path(path), leaving_out
        self.known: dict[str, Any] = {}
        self._size = 0

    def remembered(self, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """What `compute()` returned, JSON-able, when this code was asked for `key` before; else
        that, written down."""
        from fastsae.runtime import artifacts

        name = artifacts.fingerprint("study", key, {"code": code_version(self.leaving_out)})
        if name not in self.known:
            self._read()
        if name not in self.known:
            self.known[name] = compute()
            artifacts.append_line(self.path, {"key": name, "value": self.known[name]})
        return self.known[name]

    def _read(self):
        """Take over what is in the file, if there is more of it than before."""
        from fastsae.runtime import artifacts

        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._size:
            lines = artifacts.read_lines(self.path)
            self.known |= {li["key"]: li["value"] for li in lines if {"key", "value"} <= set(li)}
            self._size = size
