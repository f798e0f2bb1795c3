"""sweep(): one recipe with several learning rates and ranks, a run folder each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Literal

from adapters_kit import system
from adapters_kit.artifacts.files import write_json
from adapters_kit.errors import TrainingError, WriteError
from adapters_kit.names import check_name
from adapters_kit.pages.comparison_page import write_table_page
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_changes import differences, left_open
from adapters_kit.training.cells import train_cells
from adapters_kit.training.inputs import Given, recipe_from
from adapters_kit.training.run import Run
from adapters_kit.training.table import Table, compare_runs, metric_of, row_of


def sweep(
    recipe: Given,
    out: str | Path,
    *,
    learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3),
    ranks: Sequence[int] = (),
    together: Literal["auto", "off"] = "off",
    quiet: bool = False,
) -> Table:
    """Trains every learning rate with every rank; returns the table of `compare_runs`, also in `out`/sweep.json.

    A run that has finished already is not trained again, so that an interrupted sweep goes on where it stopped.

    Args:
        out: folder of the run folders, `lr0.001-r8` and so on.
        ranks: values of the method's option `r`; none leaves the recipe's own.
        together: "auto" trains as many in one pass through the base as there is memory for, each with the trajectory
            of its own run (`train_many`); "off" one after the other.

    Raises:
        RecipeError: a rate that no recipe can have; before anything is trained.
        TrainingError: a run that is there was made with another recipe.
        ManyError: some of those that went together failed, once the others have finished.
        WriteError: `out` cannot be written, or another process writes there.
    """
    check_name(out, WriteError)
    out = Path(out)
    recipe = recipe_from(recipe, out / "data")
    recipes = {}
    chosen: list[int | None] = [*ranks] or [None]
    for rate, rank in product(learning_rates, chosen):
        name = f"lr{rate:g}" + ("" if rank is None else f"-r{rank}")
        changes = {"training.learning_rate": rate} | ({} if rank is None else {"method.r": rank})
        recipes[out / name] = recipe.changed(**changes)
    with system.lock(out), system.writing(out, "The same call goes on with what is there."):
        for path, given in recipes.items():
            if (path / "metrics.json").is_file():
                _check_same(Run.open(path), given)
        train_cells(recipes, together=together == "auto", quiet=quiet)
        runs = list(recipes)
        table = compare_runs(runs) if len(runs) > 1 else Table([row_of(Run.open(runs[0]), {})])
        for row in table:
            row["run"] = Path(row["run"]).name  # the folder may be moved
        write_json(out / "sweep.json", table)
        metric = metric_of(Run.open(runs[0]))
        write_table_page(out, f"{out.name}: learning rates and ranks", table, metric, "run", table.notes)
    return table


def _check_same(run: Run, recipe: Recipe) -> None:
    by_memory = ("training.batch_size", "training.gradient_accumulation") if recipe.training.auto_batch else ()
    if told := differences(run.recipe, recipe, (*left_open(recipe), *by_memory)):
        raise TrainingError(f"{run.path} was trained with another recipe; sweep into a new folder. {'; '.join(told)}.")
