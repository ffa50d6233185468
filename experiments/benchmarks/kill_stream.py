"""Kill either side of a stream at every operation, fill the disk at every operation, and kill both
sides at random moments: how many such trials there are, and that all end in the same bytes.

    python -m experiments.benchmarks.kill_stream --work-dir /tmp/k

A trial takes seconds, so the exhaustive tests make a quarter of them, another one each day. This
runs the quarters one after the other; one that passed is not run again. Writes
experiments/results/kill_stream.json.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from experiments.shared.provenance import PROJECT, environment, write_result

QUARTERS = range(4)  # `thinned=4` in the tests
TESTS = ("tests/guarantees/test_guarantees_stream.py", "tests/guarantees/test_guarantees_int8.py")
COUNT = re.compile(r"([\d,]+)(?: of ([\d,]+))? ([a-zA-Z][^,]*)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="keeps each quarter's counts")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    found = [quarter_of(args.work_dir / f"quarter-{n}.json", n) for n in QUARTERS]
    trials = {
        kind: {
            "survived": sum(each["trials"][kind][0] for each in found),
            "of": found[0]["trials"][kind][1],
        }
        for kind in found[0]["trials"]
    }
    seconds = round(sum(each["seconds"] for each in found))
    write_result("kill_stream", {"tests": TESTS}, {"trials": trials, "seconds": seconds})


def quarter_of(path: Path, number: int) -> dict:
    """The counts of one quarter, from its file or from a run; a failure ends this process."""
    if not path.exists():
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n0", "--exhaustive", "-m", "sampled", *TESTS],
            cwd=PROJECT,
            env={**environment(), "TEST_DAY": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stdout)
        seconds = round(time.monotonic() - began, 1)
        path.write_text(json.dumps({"trials": counts(done.stdout), "seconds": seconds}))
        print(f"quarter {number + 1} of {len(QUARTERS)}: {seconds:.0f} s", flush=True)
    return json.loads(path.read_text())


def counts(printed: str) -> dict[str, list[int]]:
    """{kind: [trials, of all quarters]} as pytest's last lines say them."""
    (line,) = re.findall(r"^guarantees: (.*)$", printed, re.M)
    return {
        kind: [int(n.replace(",", "")), int((of or n).replace(",", ""))]
        for n, of, kind in COUNT.findall(line)
    }


if __name__ == "__main__":
    main()
