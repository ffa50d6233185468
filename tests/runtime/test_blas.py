"""Products of NumPy take one thread in stage 3, unless a user says otherwise."""

import os
import subprocess
import sys

import pytest
from conftest import PROJECT

STAGE = """
import runpy, sys
sys.argv = ["interpret_sae.py", "--help"]
try:
    runpy.run_path("interpret_sae.py", run_name="__main__")
except SystemExit:
    pass
import numpy, scipy.linalg
from threadpoolctl import threadpool_info
print(*(each["num_threads"] for each in threadpool_info() if each["internal_api"] == "openblas"))
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one core")
@pytest.mark.parametrize("given, expected", [(None, {"1"}), ("2", {"2"})])
def test_stage_3_multiplies_in_one_thread(given, expected):
    """The stage says so before NumPy is loaded: later it would come too late."""
    env = {name: value for name, value in os.environ.items() if "_NUM_THREADS" not in name}
    env |= {} if given is None else {"OPENBLAS_NUM_THREADS": given}
    done = subprocess.run(
        [sys.executable, "-c", STAGE], cwd=PROJECT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()[-1].split()
    if not found:
        pytest.skip("NumPy is built with another library")
    assert set(found) == expected
