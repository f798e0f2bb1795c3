"""The run folder: what it holds, how it is written and read back."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adapters_kit import devices, tasks
from adapters_kit.artifacts.adapter import CONFIG, named_base
from adapters_kit.artifacts.json_file import read_json, read_json_lines
from adapters_kit.errors import TrainingError
from adapters_kit.names import check_name
from adapters_kit.pages.run_page import PAGE, scores_table
from adapters_kit.pages.verdict import verdict
from adapters_kit.recipe import Recipe

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
        check_name(path, TrainingError)
        path = Path(path)
        if not (path / "metrics.json").is_file():
            started = (path / "recipe.yaml").is_file()
            raise TrainingError(
                f"{path} is {'a run that has not finished: go on with resume=True' if started else 'no run folder'}."
            )
        return cls(path, read_json(path / "metrics.json"), Recipe.read(path / "recipe.yaml"))

    def _repr_html_(self) -> str:
        """The scores, for a notebook; `report.html` in the folder tells the rest."""
        sentence, _ = verdict(self.metrics, metric_of(self))
        return f"<p><b>{escape(sentence)}</b> Page: {escape(str(self.path / PAGE))}</p>{scores_table(self.metrics)}"

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_json_lines(self.path / "metrics.jsonl")


def metric_of(run: Run) -> str:
    """The score by which a run's evaluations were compared."""
    chosen = tasks.of(run.recipe).metric
    if chosen in run.metrics:
        return chosen
    return next((name for name in ("f1", "pearson") if name in run.metrics), "loss")


def recipe_of(adapter: Path) -> Recipe | None:
    """The recipe that an adapter folder was trained with: its run folder's, or the one that travels with it.

    The one that travels has names in place of paths: the base is then where the adapter's config says.
    """
    beside, inside = adapter.parent / "recipe.yaml", adapter / "recipe.yaml"
    in_its_run = adapter.name == "adapter" and (adapter.parent / "metrics.json").is_file()
    for place in (beside, inside) if in_its_run else (inside, beside):
        if place.is_file():
            recipe = Recipe.read(place)
            base = named_base(adapter, read_json(adapter / CONFIG).get("base_model_name_or_path"))
            is_name = "/" not in recipe.model and not Path(recipe.model).exists()
            return recipe.changed(model=base) if is_name and base and Path(base).exists() else recipe
    return None


def environment() -> dict[str, Any]:
    """Versions and hardware that the numbers were made with."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("adapters-kit", *_PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # with its build: +cpu, +cu130
    found["cpus"] = os.cpu_count()
    found["threads"] = torch.get_num_threads()
    found["gpus"] = devices.names()
    found["processes"] = int(os.environ.get("WORLD_SIZE", "1"))
    return found
