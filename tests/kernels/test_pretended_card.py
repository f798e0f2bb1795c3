"""The way of a step over a GPU, on a pretended one: no mix of devices, no hidden wait, no launch more than there was.

In a process of its own, since the card has to be there before torch is imported; skipped without a C++ compiler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.pretended import backend

pytestmark = pytest.mark.skipif(backend.why_not() is not None, reason=backend.why_not() or "")
ROOT = Path(__file__).parents[2]
LINEARS = 14  # of the tiny Llama
# Launches that one adapted linear adds to the frozen model's, forward and backward, in bf16 under autocast.
LAUNCHES = {"lora": 8.8, "lora dropout": 15.0, "lora nf4": 12.0, "dora": 33.4, "houlsby": 5.2, "prefix": 0.0}
# transformers looks whether a mask hides anything, and the caches of an encoder-decoder begin with an empty list.
THEIRS = ("transformers/masking_utils.py", "transformers/cache_utils.py")
# peft's prompt is made of lists at every step.
PEFTS = {"llama prompt": ("peft/peft_model.py",)}


def printed(module: str, *arguments: str) -> dict[str, Any]:
    """What a module of tests/support/pretended saw."""
    command = [sys.executable, "-W", "ignore", "-m", f"tests.support.pretended.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ, timeout=570)
    found = [line for line in done.stdout.splitlines() if line.startswith("SEEN")]
    assert found, done.stderr[-3000:]
    return json.loads(found[0].removeprefix("SEEN"))


@pytest.fixture(scope="module")
def steps():
    return printed("steps", "llama", "bert", "t5")


@pytest.mark.slow
def test_no_operation_mixes_devices_and_nothing_is_left_behind(steps):
    assert len(steps) > 40
    assert not {name: one["error"] for name, one in steps.items() if "error" in one}
    assert not {name: one["away"] or one["lost"] for name, one in steps.items() if one["away"] or one["lost"]}


@pytest.mark.slow
def test_the_numbers_are_those_of_a_cpu(steps):
    """Dropout is drawn in another way there, and bitsandbytes' 4-bit products on a CPU are off by themselves."""
    same = {name: one["off"] for name, one in steps.items() if "dropout" not in name and "nf4" not in name}
    assert not {name: off for name, off in same.items() if off > 1e-5}


@pytest.mark.slow
def test_the_host_waits_for_nothing_of_ours(steps):
    waits = {
        name: [what for what in one["waits"] if what.rpartition(" ")[2].partition(":")[0] not in known]
        for name, one in steps.items()
        for known in [(*THEIRS, *PEFTS.get(name, ()))]
    }
    assert not {name: found for name, found in waits.items() if found}


@pytest.mark.slow
@pytest.mark.parametrize("method", LAUNCHES)
def test_launches_do_not_creep_up(steps, method):
    each = {
        name: (steps[f"llama {name}"]["launches"] - steps["llama nothing"]["launches"]) / LINEARS
        for name in (method, "lora", "peft lora")
    }
    assert each[method] <= LAUNCHES[method]
    assert each["lora"] < 0.6 * each["peft lora"]


@pytest.mark.slow
def test_whole_runs_on_the_card(tmp_path):
    """Trained, scored, asked, merged, compared; float32 gives the CPU's losses, and a step waits once for our sake."""
    seen = printed("runs", str(tmp_path))
    assert seen.pop("merged")["verified"] and "merge" in seen.pop("compared")["keys"]
    for name, run in seen.items():
        on_cpu, same, sixteen, scored = run["loss"]
        assert run["precision"] == "bf16" and run["said"] == 2
        assert run["learned"] > 3e-4, "otherwise equal losses show nothing"
        assert same == pytest.approx(on_cpu, rel=1e-4), name
        assert scored == pytest.approx(sixteen, rel=1e-3), name
        ours = {what: count for what, count in run["waits"].items() if not any(known in what for known in THEIRS)}
        assert sum(ours.values()) <= 1 and all("training/loop.py" in what for what in ours), (name, ours)
