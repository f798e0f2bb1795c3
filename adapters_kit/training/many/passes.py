"""Which of several trainings go through the base together: as many as there is memory for."""

from __future__ import annotations

from collections.abc import Mapping

from adapters_kit import devices, system
from adapters_kit.errors import RecipeError, TrainingError
from adapters_kit.recipe import Recipe
from adapters_kit.training.many.fitting import kind
from adapters_kit.training.many.train_many import checked
from adapters_kit.training.plan import plan, size

_USED = 0.8  # of the free memory: what `plan` states is one step's, and the system needs some


def passes(asked: Mapping[str, Recipe]) -> tuple[list[list[str]], str]:
    """Names of the trainings of each pass, in order; and a line that says why they are so many."""
    told: list[str] = []
    kinds: dict[str, dict[str, Recipe]] = {}
    alone: list[list[str]] = []
    for name, recipe in asked.items() if len(asked) > 1 else ():
        try:
            resolved = checked({name: recipe})
        except (RecipeError, TrainingError) as error:
            alone.append([name])
            told.append(f"{name} goes by itself, since it cannot share a pass: {_reason(error)}")
        else:
            kinds.setdefault(kind(resolved[name]), {}).update(resolved)
    if len(asked) < 2 or len(told) == len(asked):
        return [[name] for name in asked], f"One by one: {told[0]}" if told else ""
    groups: list[list[str]] = []
    for members in kinds.values():
        made, why = _by_memory(members)
        groups += made
        told += [why] if why else []
    order = {name: number for number, name in enumerate(asked)}
    return sorted(groups + alone, key=lambda group: order[group[0]]), "\n".join(dict.fromkeys(told))


def _reason(error: Exception) -> str:
    return error.problems[0] if isinstance(error, RecipeError) else str(error)


def _by_memory(resolved: Mapping[str, Recipe]) -> tuple[list[list[str]], str]:
    names = list(resolved)
    if len(names) < 2:
        return [names], ""
    # Neither a rate nor a seed takes memory, and that is all in which most of them differ.
    free_of = {"training.learning_rate": 1.0, "training.head_learning_rate": 1.0, "training.seed": 0}
    alike = {recipe.changed(**free_of).to_yaml(): recipe for recipe in resolved.values()}
    needs = {number: plan(recipe).memory for number, recipe in enumerate(alike.values())}
    once = max(need.weights + need.working for need in needs.values())
    own = max(need.adapter + need.gradients + need.optimizer + need.activations for need in needs.values())
    free = devices.free_memory() or system.free_memory()
    count = int(max(1, min(len(names), (_USED * free - once) // own)))
    told = f"{size(once)} for the base and {size(own)} for each, of {size(free)} free"
    if count == 1:
        return [[name] for name in names], f"One by one: two in one pass would not fit ({told})."
    return [names[at : at + count] for at in range(0, len(names), count)], f"Up to {count} in one pass: {told}."
