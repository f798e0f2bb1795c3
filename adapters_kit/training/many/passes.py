"""Which of several trainings go through the base together: as many as there is memory for."""

from __future__ import annotations

from collections.abc import Mapping

from adapters_kit import devices, system
from adapters_kit.errors import RecipeError, TrainingError
from adapters_kit.recipe import Recipe
from adapters_kit.training.many.train_many import checked
from adapters_kit.training.plan import plan, size

_USED = 0.8  # of the free memory: what `plan` states is one step's, and the system needs some


def passes(asked: Mapping[str, Recipe]) -> tuple[list[list[str]], str]:
    """Names of the trainings of each pass, in order; and a line that says why they are so many.

    Args:
        asked: recipes that differ only in what a pass leaves free.
    """
    names = list(asked)
    apart = [[name] for name in names]
    if len(names) < 2:
        return apart, ""
    try:
        resolved = checked(asked)
    except (RecipeError, TrainingError) as error:
        return apart, f"One by one, since they cannot share a pass: {error}"
    needs = {name: plan(recipe).memory for name, recipe in resolved.items()}
    once = max(need.weights + need.working for need in needs.values())
    own = max(need.adapter + need.gradients + need.optimizer + need.activations for need in needs.values())
    free = devices.free_memory() or system.free_memory()
    count = int(max(1, min(len(names), (_USED * free - once) // own)))
    told = f"{size(once)} for the base and {size(own)} for each, of {size(free)} free"
    if count == 1:
        return apart, f"One by one: two in one pass would not fit ({told})."
    return [names[at : at + count] for at in range(0, len(names), count)], f"Up to {count} in one pass: {told}."
