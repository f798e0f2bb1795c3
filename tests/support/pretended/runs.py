"""Whole runs on the pretended card: trained, evaluated, asked, merged, compared; and their steps looked at.

python -m tests.support.pretended.runs FOLDER     prints a line of JSON: "run" -> what was seen
"""

import tests.support.pretended.card as pretended  # isort: skip  first of all

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import adapters_kit as ak
from adapters_kit.comparison.cell import Cell, run_cell
from adapters_kit.recipe import Recipe
from adapters_kit.training.callbacks import Meter
from tests.support import small

RUNS: dict[str, dict[str, Any]] = {
    "bert": {"task": "text-classification", "method": {"name": "lora", "r": 4}},
    "llama": {"task": "causal-lm", "method": "prefix", "training": {"packing": True, "gradient_accumulation": 2}},
}


def recipe_of(name: str, data: Path) -> Recipe:
    """Of one of `RUNS`."""
    given = dict(RUNS[name])
    training = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "samples": 1, **given.pop("training", {})}
    columns = {"data": {"train": str(data / "train.jsonl"), "test": str(data / "test.jsonl")}}
    return Recipe(model=str(small.model(name.split()[0])), **columns, training=training, **given)


def watched() -> list[dict[str, int]]:
    """The waits of every step that is trained from now on."""
    steps: list[dict[str, int]] = []
    begin, end = Meter.on_step_begin, Meter.on_step_end

    def on_step_begin(self: Meter, *args: Any, **kwargs: Any) -> None:
        if pretended.Card.now is not None:
            pretended.Card.now.forget()
        begin(self, *args, **kwargs)

    def on_step_end(self: Meter, *args: Any, **kwargs: Any) -> None:
        if pretended.Card.now is not None:
            steps.append({f"{what} {where}": count for (what, where), count in pretended.Card.now.waits.items()})
        end(self, *args, **kwargs)

    Meter.on_step_begin, Meter.on_step_end = on_step_begin, on_step_end  # type: ignore[method-assign]
    return steps


def main(folder: Path) -> None:
    """Runs everything, on the CPU too where the numbers are to be the same."""
    rows = [{**row, "target": row["label"]} for row in small.sentiment(24)]
    small.write_jsonl(folder / "train.jsonl", rows)
    small.write_jsonl(folder / "test.jsonl", rows[:8])
    steps, seen = watched(), {}
    for name in RUNS:
        began = time.process_time()
        out = folder / name.replace(" ", "-")
        recipe = recipe_of(name, folder)
        single = recipe.changed(**{"training.precision": "fp32"})
        on_cpu = ak.train(single, folder / f"{out.name}-cpu", quiet=True)
        steps.clear()
        with pretended.present():
            run = ak.train(recipe, out, quiet=True)
            waits = steps[-1]
            same = ak.train(single, folder / f"{out.name}-fp32", quiet=True)
            scores = ak.evaluate(run)
            said = ak.predict(run, rows[:2])
        seen[name] = {
            "precision": run.recipe.training.precision,
            "waits": waits,
            "loss": [on_cpu.metrics["loss"], same.metrics["loss"], run.metrics["loss"], scores["loss"]],
            "said": len(said),
            "learned": abs(on_cpu.metrics["loss"] - on_cpu.metrics["base_loss"]),
            "seconds": time.process_time() - began,
        }
    with pretended.present():
        merged = ak.merge(folder / "bert" / "adapter", folder / "merged")
        fields = recipe_of("bert", folder).model_dump(mode="json")
        (folder / "cell").mkdir()
        compared = run_cell(Cell(fields, "adapter", 1e-3, 0, "test", 4, True, {}), folder / "cell")
    seen["merged"] = {"verified": merged.check is not None}
    seen["compared"] = {"keys": sorted(compared)}
    print("SEEN" + json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
