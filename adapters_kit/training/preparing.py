"""The earlier home of two functions that scripts use: `resolve` and `assembly` have them now."""

from typing import Any

from torch import nn

from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Task
from adapters_kit.training import assembly
from adapters_kit.training.resolve import prepare as prepare
from adapters_kit.training.resolve import resolve


def load_base(recipe: Recipe, task: Task) -> tuple[nn.Module, Any]:
    """The base model and its processor, for a recipe that need not be resolved."""
    return assembly.load_base(resolve(recipe, trains=False), task)
