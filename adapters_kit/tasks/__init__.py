"""One file a task: the columns it needs, encoding, collating, predicting, scoring."""

from adapters_kit.errors import UnknownNameError, did_you_mean
from adapters_kit.recipe import Recipe
from adapters_kit.registry import load_attribute
from adapters_kit.task_table import TASKS, home_of
from adapters_kit.tasks.base import Task


def get(name: str) -> type[Task]:
    """The class of the task called `name`."""
    if name not in TASKS:
        raise UnknownNameError(f"Unknown task {name!r}. {did_you_mean(name, TASKS)}")
    return load_attribute(TASKS[name].home)


def of(recipe: Recipe) -> type[Task]:
    """The class of a recipe's task, as its objective teaches it."""
    return load_attribute(home_of(recipe.task, recipe.objective.name if recipe.objective else None))
