"""A small part of `make kills`: two trials of each kind that is quick."""

import os
import subprocess
import sys

import pytest

from adapters_kit import system


@pytest.mark.slow
@pytest.mark.skipif(not system.FORKS, reason="needs a system that forks")
def test_what_was_killed_goes_on_to_the_same_bytes():
    command = [sys.executable, "-W", "ignore", "-m", "tests.kills", "--most", "2", "--only", "merge,export,train lora"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("nothing was lost")
