"""Runs beside each other: comparing run folders, and sweeping learning rate and rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from adapters_kit import tasks
from adapters_kit.artifacts.files import write_json
from adapters_kit.errors import TrainingError
from adapters_kit.recipe import Recipe
from adapters_kit.training.given import Given, recipe_from
from adapters_kit.training.run import Run
from adapters_kit.training.train import flat, train

_COSTS = ("trainable_params", "train_seconds", "tokens_per_second", "peak_memory_bytes")


def compare_runs(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """One row a run: its name, the recipe fields in which the runs differ, its scores, parameters, time and memory.

    Rows are sorted by the task's metric, best first.

    Raises:
        TrainingError: a folder without a finished run, fewer than two runs, or runs of different tasks.
    """
    runs = [Run.open(path) for path in paths]
    if len(runs) < 2:
        raise TrainingError(f"Comparing needs two runs or more, here is {len(runs)}.")
    kinds = sorted({run.recipe.task for run in runs})
    if len(kinds) > 1:
        raise TrainingError(f"These runs have different tasks, whose scores do not compare: {', '.join(kinds)}.")
    recipes = [flat(run.recipe.model_dump()) for run in runs]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    differing = [key for key in keys if len({repr(recipe.get(key)) for recipe in recipes}) > 1]
    rows = []
    for run, recipe in zip(runs, recipes, strict=True):
        metric = metric_of(run)
        _check_numbers(run, (metric, f"base_{metric}"))
        scores = {name[5:]: run.metrics.get(name[5:]) for name in run.metrics if name.startswith("base_")}
        rows.append(
            {
                "run": str(run.path),
                **{key: recipe.get(key) for key in differing},
                **scores,
                f"base_{metric}": run.metrics[f"base_{metric}"],
                **{name: run.metrics.get(name) for name in _COSTS},
            }
        )
    kind = tasks.get(kinds[0])
    metric = metric_of(runs[0])
    higher = kind.higher_is_better or metric != "loss"
    return sorted(rows, key=lambda row: row[metric], reverse=higher)


def _check_numbers(run: Run, names: Iterable[str]) -> None:
    """Refuses a run whose metrics.json does not hold them, as one that was edited by hand may not."""
    for name in names:
        if not isinstance(run.metrics.get(name), int | float):
            raise TrainingError(
                f"{run.path / 'metrics.json'}: {name} is {run.metrics.get(name)!r}, where a number belongs."
            )


def metric_of(run: Run) -> str:
    """The score by which a run's evaluations were compared."""
    chosen = tasks.get(run.recipe.task).metric
    if chosen in run.metrics:
        return chosen
    return next((name for name in ("f1", "pearson") if name in run.metrics), "loss")


def sweep(
    recipe: Given,
    out: str | Path,
    *,
    learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3),
    ranks: Sequence[int] = (),
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Trains every learning rate with every rank; returns the table of `compare_runs`, also in `out`/sweep.json.

    A run that has finished already is not trained again, so that an interrupted sweep goes on where it stopped.

    Args:
        out: folder of the run folders, `lr0.001-r8` and so on.
        ranks: values of the method's option `r`; none leaves the recipe's own.

    Raises:
        RecipeError: a rate that no recipe can have; before anything is trained.
        TrainingError: a run that is there was made with another recipe.
    """
    out = Path(out)
    recipe = recipe_from(recipe, out / "data")
    recipes = {}
    for rate, rank in product(learning_rates, ranks or [None]):
        name = f"lr{rate:g}" + ("" if rank is None else f"-r{rank}")
        changes = {"training.learning_rate": rate} | ({} if rank is None else {"method.r": rank})
        recipes[out / name] = recipe.changed(**changes)
    for path, given in recipes.items():
        if (path / "metrics.json").is_file():
            _check_same(Run.open(path), given)
        else:
            train(given, path, resume=(path / "recipe.yaml").is_file(), quiet=quiet)
    runs = list(recipes)
    table = compare_runs(runs) if len(runs) > 1 else [{"run": str(runs[0]), **Run.open(runs[0]).metrics}]
    write_json(out / "sweep.json", table)
    return table


# What `train` fills in when the recipe leaves it open, and what `auto_batch` may change.
_FOUND_OUT = ("labels", "problem", "data.columns", "training.precision", "training.max_length")
_BY_MEMORY = ("training.batch_size", "training.gradient_accumulation")


def _check_same(run: Run, recipe: Recipe) -> None:
    free = _FOUND_OUT + (_BY_MEMORY if recipe.training.auto_batch else ())
    before, now = flat(run.recipe.model_dump()), flat(recipe.model_dump())
    told = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in {**before, **now}
        if not key.startswith(free) and before.get(key) != now.get(key)
    ]
    if told:
        raise TrainingError(f"{run.path} was trained with another recipe; sweep into a new folder. {'; '.join(told)}.")


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of text."""

    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *[[shown(row.get(key, "")) for key in columns] for row in rows]]
    return aligned(cells)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
