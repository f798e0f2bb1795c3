"""Many adapters in one pass: a step of eight LoRA trainings of SmolLM2-135M together, beside their own runs.

    python benchmarks/many.py                        # fp32, bf16, int8, nf4; 1, 2 and 16 rows: an hour on two cores
    python benchmarks/many.py --kinds nf4 --rows 1
    python benchmarks/many.py --table                # prints results/many.json as Markdown

together   one `ak.train_many` of all: the time from one step to the next, in which every adapter makes a step
apart      `ak.train` of one, on all threads, times the number of adapters
beside     two processes of `ak.train` side by side, on half of the threads each, times half the number of adapters
memory     the most that each way took above the process after its imports (VmHWM); `beside` counts both processes

A process for each figure, the three ways in turn, medians of the steps and of the rounds' ratios. A step is all that
`train` does in one: batch, forward, loss, backward, clipping, AdamW, schedule. The first two, which `train_many` makes
twice to prove that the pass gives each adapter its own gradients, are left out.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from loading import prepare, resident

COUNT, LENGTH, FIRST = 8, 64, 2
KINDS = ("fp32", "bf16", "int8", "nf4")
WAYS = ("together", "apart", "beside")


def recipe(folder: Path, kind: str, rows: int, steps: int, number: int) -> dict[str, Any]:
    """One adapter's: its own rows, seed and rate."""
    import torch

    data = folder / f"rows{number}"
    if not data.exists():
        generator = torch.Generator().manual_seed(number)
        words = " ".join(json.loads((folder / "texts.json").read_text())).split()
        drawn = torch.randint(0, len(words), (16 * 64, 90), generator=generator).tolist()
        lines = [json.dumps({"text": " ".join(words[i] for i in one)}) for one in drawn]
        data.mkdir()
        (data / "train.jsonl").write_text("\n".join(lines))
        (data / "test.jsonl").write_text("\n".join(lines[:2]))
    training = {"max_steps": steps, "batch_size": rows, "seed": number, "learning_rate": 1e-4 * (1 + number)}
    training |= {
        "max_length": LENGTH,
        "samples": 0,
        "packing": False,
        "precision": "fp32" if kind == "fp32" else "bf16",
    }
    asked = {"model": str(folder), "task": "causal-lm", "data": str(data), "method": {"name": "lora", "r": 16}}
    return {**asked, "training": training} | ({"quantize": kind} if kind in ("int8", "nf4") else {})


def measure(folder: Path, way: str, kind: str, rows: int, steps: int) -> dict[str, float]:
    """Seconds from step to step and peak memory, in this process."""
    import adapters_kit as ak
    from adapters_kit.training.loop import AdapterTrainer
    from adapters_kit.training.many.trainer import JointTrainer

    began: list[float] = []
    trainer = JointTrainer if way == "together" else AdapterTrainer
    own = trainer.training_step

    def noted(self: Any, *given: Any, **named: Any) -> Any:
        if way != "together" or self.seat.name.startswith("1-"):
            began.append(time.perf_counter())
        return own(self, *given, **named)

    trainer.training_step = noted  # type: ignore[method-assign]
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as out:
        recipes = [recipe(folder, kind, rows, steps + FIRST + 1, number) for number in range(COUNT)]
        if way == "together":
            ak.train_many(recipes, Path(out) / "run", quiet=True)
        else:
            ak.train(recipes[0], Path(out) / "run", quiet=True)
    each = [after - one for one, after in itertools.pairwise(began)]
    return {"seconds": statistics.median(each[FIRST:]), "peak_mb": (resident("VmHWM") - before) / 1e6}


def run(folder: Path, way: str, kind: str, rows: int, steps: int) -> dict[str, float]:
    """The same in processes of their own; seconds for a step of all adapters."""
    command = [sys.executable, __file__, "--one", way, "--folder", str(folder), "--kinds", kind, "--rows", str(rows)]
    command += ["--steps", str(steps)]
    count = 2 if way == "beside" else 1
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // count))}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | threads) for _ in range(count)
    ]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    factor = 1 if way == "together" else COUNT / count
    seconds = factor * statistics.mean(one["seconds"] for one in found)
    return {"seconds": seconds, "peak_mb": sum(one["peak_mb"] for one in found)}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| base | rows | apart ÷ together | side by side ÷ together | MB: together, apart, side by side |"]
    lines.append("|---|---:|---:|---:|---:|")
    for cell in results["cells"]:
        memory = ", ".join(f"{cell['peak_mb'][way]:,.0f}" for way in WAYS)
        lines.append(f"| {cell['kind']} | {cell['rows']} | {cell['apart']:.2f} | {cell['beside']:.2f} | {memory} |")
    return "\n".join(lines)


def cell(folder: Path, kind: str, rows: int, steps: int, rounds: int) -> dict[str, Any]:
    """All ways of one kind of base and number of rows, in turn."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            found[way].append(run(folder, way, kind, rows, steps))
    ratios = {
        way: statistics.median(
            one["seconds"] / joint["seconds"] for one, joint in zip(found[way], found["together"], strict=True)
        )
        for way in ("apart", "beside")
    }
    middle = {
        key: {way: statistics.median(one[key] for one in found[way]) for way in WAYS} for key in ("seconds", "peak_mb")
    }
    return {"kind": kind, "rows": rows, **ratios, **middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 16])
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print the saved results and stop")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.table:
        print(table(common.read("many")))
        return
    if chosen.one:
        print(json.dumps(measure(chosen.folder, chosen.one, chosen.kinds[0], chosen.rows[0], chosen.steps)))
        return
    results: dict[str, Any] = {"environment": common.environment(), "adapters": COUNT, "tokens": LENGTH, "cells": []}
    results |= {"steps": chosen.steps, "rounds": chosen.rounds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for kind in chosen.kinds:
            for rows in chosen.rows:
                results["cells"].append(cell(folder, kind, rows, chosen.steps, chosen.rounds))
                print(json.dumps(results["cells"][-1]), flush=True)
                common.write("many", results)
    print(table(results))


if __name__ == "__main__":
    main()
