"""A run that goes on: is it the same run, and from where.

What may be another when it does changes what is written down, not what is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from adapters_kit.errors import TrainingError
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_changes import differences, left_open
from adapters_kit.training import checkpoints
from adapters_kit.training.resolve import resolve
from adapters_kit.training.run import Run

_FREE = ("training.log_every", "training.log_to", "training.samples", "card.")
_BY_MEMORY = ("training.batch_size", "training.eval_batch_size", "training.gradient_accumulation")


def opened(out: Path, asked: Recipe, console: Console) -> Run:
    """The finished run, if it is of the recipe that was to be resumed."""
    run = Run.open(out)
    free = (*_FREE, *left_open(asked), *(_BY_MEMORY if asked.training.auto_batch else ()))
    if changed := differences(run.recipe, asked, free):
        raise TrainingError(f"{out} holds a finished run of another recipe. Changed: {'; '.join(changed)}.")
    console.print(f"{out}: this run has finished already.", highlight=False, soft_wrap=True, markup=False)
    return run


def begun(path: Path, recipe: Recipe) -> Recipe:
    """The recipe that the run was begun with; another one is refused: the result would be neither's."""
    if not (path / "recipe.yaml").is_file():
        return recipe
    first = resolve(Recipe.read(path / "recipe.yaml"), trains=False)
    changed = differences(first, recipe, (*_FREE, *(_BY_MEMORY if recipe.training.auto_batch else ())))
    if changed:
        told = "; ".join(changed)
        raise TrainingError(f"{path} was begun with another recipe, and resuming needs the same. Changed: {told}.")
    now = recipe.training
    return first.changed(
        **{
            "training.log_every": now.log_every,
            "training.log_to": now.log_to,
            "training.samples": now.samples,
            "card.samples": recipe.card.samples,
        }
    )


def last_checkpoint(path: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; says which, and what is wrong with newer ones."""
    found, told = checkpoints.newest(path)
    for line in told:
        tell(line)
    tell(f"going on from {found.name}" if found else "there is no checkpoint yet: from the start")
    return found
