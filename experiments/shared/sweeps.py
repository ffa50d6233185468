"""One script run many times in one process: loading the libraries takes longer than a small
training does.

    # a JSON list of flags on each line
    python -m experiments.shared.sweeps train_sae.py < jobs.jsonl

Each run is the script's own `main()` with those flags, as from the command line;
`fastsae.MODULE.NAME=value` among them is another value of a constant, for this run. What it prints
is shown when it fails, else only its warnings, alike ones once, in the end. Ends with the exit code
of the first run that failed. `run_many` does this from an experiment.
"""

import collections
import contextlib
import importlib
import io
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.shared import constants, provenance
from fastsae.settings.flags import as_flags

if TYPE_CHECKING:
    from fastsae.settings.values import Settings


# settings that a study and its stages know: of the model, and of all that is read
MODEL_SETTINGS = ("PRESET", "MODEL_NAME", "CACHE_DIR", "DEVICE", "MAX_LENGTH", "TEXT_FIELD")
DATA_SETTINGS = (*MODEL_SETTINGS, "LAYER_IDX", "DATASET_PATH", "MAX_EXAMPLES", "SEED")


def run_many(script: str, jobs: Iterable[Iterable[Any]]) -> None:
    """Run one of the project's scripts once for each list of flags in `jobs`, all in one other
    process; if one fails, this one ends too."""
    lines = "".join(json.dumps([str(flag) for flag in job]) + "\n" for job in jobs)
    command = provenance.module_command("experiments.shared.sweeps", script)
    provenance.run_to_its_end(command, lines, provenance.environment())


def quick_settings(settings: "Settings", quick: dict[str, Any]) -> "Settings":
    """`settings`, if QUICK is on with the values of `quick` wherever no flag was given."""
    import config

    small = {
        name: value
        for name, value in quick.items()
        if settings.QUICK and settings.source[name] != "flag"
    }
    return config.Settings(
        {**settings.values, **small},
        {**settings.source, **dict.fromkeys(small, "QUICK")},
        settings.owner,
        typed={**settings.typed, **small},
    )


def passed_on(settings: "Settings", names: Iterable[str]) -> list[str]:
    """The flags given to an experiment that its stages know too, of the settings named."""
    given = {name: settings.typed[name] for name in names if settings.source[name] == "flag"}
    return [as_flags(name, value) for name, value in given.items()]


def listed(values: Iterable[Any]) -> str:
    """A flag's value for a setting that takes several; of one value too, since the comma stays."""
    return "".join(f"{value}," for value in values)


def epochs_and_steps(settings: "Settings") -> list[Any]:
    """Flags of train_sae.py: all N_EPOCHS, without an early stop, in steps of BATCH_SIZE tokens
    with a learning rate that falls to 0."""
    return [
        "--n-epochs",
        settings.N_EPOCHS,
        "--patience",
        settings.N_EPOCHS,
        "--batch-size",
        settings.BATCH_SIZE,
        "--learning-rate",
        settings.LEARNING_RATE,
        "--lr-schedule",
        "linear",
    ]


def recorded(settings: "Settings") -> dict[str, Any]:
    """The settings of an experiment for its result: of a path only the file's name, which says
    nothing of the machine."""
    paths = ("DATASET_PATH", "LABELLED_PATH", "PLAIN_TEXT", "MODEL_NAME")
    return {
        name: Path(value).name if name in paths and value else value
        for name, value in settings.select(settings.values).items()
        if name not in ("OUTPUT_DIR", "CACHE_DIR")
    }


def rounded(value: Any, digits: int = 6) -> Any:
    """`value` with every float in its lists and dicts rounded to so many significant digits."""
    if isinstance(value, dict):
        return {name: rounded(each, digits) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each, digits) for each in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def main() -> int:
    """The command line: the script's name, its jobs on stdin."""
    from fastsae.runtime.stage import run_stage

    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    script = importlib.import_module(sys.argv[1].removesuffix(".py"))
    jobs = [json.loads(line) for line in sys.stdin]
    warnings = collections.Counter()
    for number, flags in enumerate(jobs, 1):
        assigned = [flag for flag in flags if flag.startswith("fastsae.")]
        sys.argv = [str(script.__file__), *(flag for flag in flags if flag not in assigned)]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), constants.other_values(assigned):
            code = run_stage(script.main)
        if code:
            print(f"{printed.getvalue()}{' '.join(flags)}: exit code {code}", file=sys.stderr)
            return code
        warnings.update(
            re.sub(r"\d+\.\d+", "...", line)
            for line in printed.getvalue().splitlines()
            if line.startswith("warning:")
        )
        if number == len(jobs) or number % 10 == 0:
            print(f"{script.__name__}: {number} of {len(jobs)} runs", flush=True)
    for line, times in warnings.items():
        print(f"{line} ({times} of {len(jobs)} runs)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
