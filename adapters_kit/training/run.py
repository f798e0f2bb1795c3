"""The run folder: what it holds, how it is written and read back."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adapters_kit.artifacts.adapter import read_json
from adapters_kit.errors import TrainingError
from adapters_kit.recipe import Recipe
from adapters_kit.task_table import TASKS

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder: recipe.yaml, adapter/, metrics.json, metrics.jsonl, README.md, environment.json, curves.png …
        metrics: what metrics.json holds; the base model's scores start with `base_`.
        recipe: the recipe with everything filled in that was left to be found out.
    """

    path: Path
    metrics: dict[str, Any]
    recipe: Recipe

    def __fspath__(self) -> str:
        """A run is taken wherever the path of its folder is: `ak.merge(run, "merged")`."""
        return str(self.path)

    @property
    def adapter(self) -> Path:
        """The trained adapter, in peft's format, with the tokenizer and the recipe beside it."""
        return self.path / "adapter"

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The finished run in a folder.

        Raises:
            TrainingError: there is none, or it has not finished.
            ShippingError, RecipeError: its files are damaged.
        """
        path = Path(path)
        if not (path / "metrics.json").is_file():
            started = (path / "recipe.yaml").is_file()
            raise TrainingError(
                f"{path} is {'a run that has not finished: go on with resume=True' if started else 'no run folder'}."
            )
        return cls(path, read_json(path / "metrics.json"), Recipe.read(path / "recipe.yaml"))

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def environment() -> dict[str, Any]:
    """Versions and hardware that the numbers were made with."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("adapters-kit", *_PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["cpus"] = os.cpu_count()
    found["threads"] = torch.get_num_threads()
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["processes"] = int(os.environ.get("WORLD_SIZE", "1"))
    return found


def card(
    recipe: Recipe, metrics: Mapping[str, Any], metric: str, samples: Sequence[Mapping[str, Any]], layers: str = ""
) -> str:
    """The model card: data, recipe, scores and how to load, with the front matter that the hub reads.

    Args:
        layers: which layers computed how, as `FuseReport` says it.
    """
    scores = [name[5:] for name in metrics if name.startswith("base_") and name[5:] in metrics]
    rows = "\n".join(f"| {name} | {_number(metrics[f'base_{name}'])} | {_number(metrics[name])} |" for name in scores)
    task = TASKS[recipe.task]
    auto = task.auto_class
    options = f", num_labels={len(recipe.labels)}" if recipe.labels else ""
    options += ", ignore_mismatched_sizes=True" if recipe.labels else ""
    hub_name = Path(recipe.model).name if Path(recipe.model).exists() else recipe.model
    examples = "\n".join(f"- `{json.dumps(sample, ensure_ascii=False)}`" for sample in samples[:3])
    return f"""---
base_model: {hub_name}
library_name: peft
pipeline_tag: {task.pipeline}
tags: [adapters-kit, {recipe.method.label if "/" not in recipe.method.label else "adapter"}]
---

# {recipe.method.label} adapter of {hub_name} for {recipe.task}

Trained with adapters_kit: {metrics["trainable_params"]:,} of
{metrics["total_params"]:,} parameters, {metrics["train_examples"]:,} examples, {metrics["steps"]:,} steps.

## Scores on {metrics["test_examples"]:,} held-out examples

| metric | base model | with this adapter |
|---|---|---|
{rows}

The adapter kept is {_kept(recipe, metric)}.
{_computed(layers)}{_notes(metrics)}
## Load

```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{hub_name}"{options})
model = PeftModel.from_pretrained(base, "adapter")
```

## Data

`{recipe.data.train}`{f", held out: `{recipe.data.test}`" if recipe.data.test else ""}

{"## Samples" if examples else ""}

{examples}

## Recipe

```yaml
{recipe.to_yaml().rstrip()}
```
"""


def _kept(recipe: Recipe, metric: str) -> str:
    training = recipe.training
    best = training.keep_best and training.evals_per_epoch
    return f"that of the best `{metric}` among the evaluations" if best else "that of the last step"


def _notes(metrics: Mapping[str, Any]) -> str:
    """What was done to the rows, as a list; nothing where nothing was."""
    lines = "\n".join(f"- {note}" for note in metrics.get("notes", ()))
    return f"\n## What was done to the data\n\n{lines}\n" if lines else ""


def _computed(layers: str) -> str:
    return f"\nHow its layers computed while it was trained:\n\n```\n{layers}\n```\n" if layers else ""


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
