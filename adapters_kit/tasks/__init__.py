"""One file a task: the columns it needs, encoding, collating, predicting, scoring."""

from adapters_kit.errors import UnknownNameError, did_you_mean
from adapters_kit.registry import load_attribute
from adapters_kit.task_table import TASKS
from adapters_kit.tasks.base import Task


def get(name: str) -> type[Task]:
    """The class of the task called `name`."""
    if name not in TASKS:
        raise UnknownNameError(f"Unknown task {name!r}. {did_you_mean(name, TASKS)}")
    return load_attribute(TASKS[name].home)
