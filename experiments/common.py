"""What every experiment needs: the project on the import path, stages as subprocesses, and results with their provenance."""
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "experiments" / "results"
sys.path.insert(0, str(PROJECT))


def run_stage(script, *flags):
    """Run one of the project's scripts as a user would; raises if it fails."""
    subprocess.run([sys.executable, str(PROJECT / script), "--no-print-settings", *map(str, flags)], check=True)


def machine():
    """The CPU's name, the number of cores and the versions that decide speed."""
    import torch
    import transformers

    name = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else name
    return {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__}


def commit():
    """The commit the result was made from, with '+' when the work tree differed from it."""
    try:
        sha = subprocess.check_output(["git", "-C", PROJECT, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output(["git", "-C", PROJECT, "status", "--porcelain", "--untracked-files=no"], text=True).strip()
        return sha + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_result(name, settings, result):
    """Write experiments/results/<name>.json and say so."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"settings": settings, "commit": commit(), "machine": machine(), **result}
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {path}")
