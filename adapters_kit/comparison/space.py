"""What a search chooses from: methods x learning rates x ranks x dropouts, as recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

from adapters_kit.comparison.cell import FULL
from adapters_kit.errors import AdapterError, RecipeError, did_you_mean
from adapters_kit.loading import skeleton
from adapters_kit.methods import find_method
from adapters_kit.names import is_adapter_folder
from adapters_kit.recipe import Recipe
from adapters_kit.registry import canonical, known_names
from adapters_kit.training.assembly import method_options
from adapters_kit.training.resolve import resolve
from adapters_kit.wrapping import build_config

FACTORS = (1 / 3, 1.0, 3.0)
"""Of each method's own learning rate."""
RANKS, DROPOUTS = (8, 32), (0.0, 0.1)
# The options of a peft config that a rank and a dropout are; the first that it has.
_RANK, _DROPOUT = ("r", "bottleneck_dim"), ("lora_dropout", "dropout")
_SOME_STEPS = 10**9


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One point of the grid.

    Attributes:
        recipe: of its training.
        told: what sets it apart, as the table shows it.
    """

    recipe: Recipe
    told: Mapping[str, Any]


def grid(
    recipe: Recipe,
    methods: Sequence[str] | None,
    learning_rates: Sequence[float] | None,
    ranks: Sequence[int] | None,
    dropouts: Sequence[float] | None,
) -> dict[str, Candidate]:
    """Name -> candidate, in the order of the grid. None takes what is usual; the arguments are those of `search`.

    Raises:
        RecipeError, UnknownNameError: a method, rate, rank or dropout that nothing can have.
        AdapterError: a method does not suit the model.
    """
    given = {"methods": methods, "learning_rates": learning_rates, "ranks": ranks, "dropouts": dropouts}
    for name, values in given.items():
        if values is not None and (isinstance(values, str) or not values or len(set(values)) < len(values)):
            raise RecipeError([f"{name}={values!r}: give a list of at least one, each once."], "the search")
    if wrong := [p for p in dropouts or () if not 0 <= p < 1]:
        raise RecipeError([f"dropouts: {wrong[0]!r} is no probability from 0 to below 1."], "the search")
    changes = as_changes(recipe, methods) if methods is not None else {recipe.method.label: {"method": recipe.method}}
    if FULL in changes:
        other = "compare(recipe, ['full', …]) sets adapters beside it."
        raise RecipeError([f"methods: full fine-tuning is no adapter; {other}"], "the search")
    of_method = {label: recipe.changed(method=change["method"]) for label, change in changes.items()}
    options = {label: (_option(made, _RANK), _option(made, _DROPOUT)) for label, made in of_method.items()}
    for number, (name, values) in enumerate((("ranks", ranks), ("dropouts", dropouts))):
        if values is not None and not any(found[number] for found in options.values()):
            raise RecipeError([f"{name}: {', '.join(options)} has no such option; leave {name} out."], "the search")
    found: dict[str, Candidate] = {}
    shapes = cache(skeleton)
    for label, made in of_method.items():
        own = resolve(made).training.learning_rate
        assert own is not None  # that is what resolving is for
        rates = learning_rates if learning_rates is not None else [float(f"{own * factor:.2g}") for factor in FACTORS]
        rank, dropout = options[label]
        for rate, size, p in product(
            rates, (ranks or RANKS) if rank else (None,), (dropouts or DROPOUTS) if dropout else (None,)
        ):
            told: dict[str, Any] = {"method": label, "learning rate": rate}
            name = f"{label.replace('/', '-')}-lr{rate:g}"
            if rank:
                told["rank"], name = size, f"{name}-r{size}"
            if dropout:
                told["dropout"], name = p, f"{name}-d{p:g}"
            changed = {"training.learning_rate": rate, f"method.{rank}": size, f"method.{dropout}": p}
            cell = made.changed(**{key: value for key, value in changed.items() if key != "method.None"})
            if rate == rates[0]:
                _check(cell, name, shapes)
            found[name] = Candidate(cell, told)
    return found


def as_changes(recipe: Recipe, methods: Any) -> dict[str, dict[str, Any]]:
    """Label to changes of the recipe; names become the change of the method."""
    if isinstance(methods, str):
        raise RecipeError([f"methods={methods!r}: give a list, such as {methods.split(',')}."])
    if isinstance(methods, Mapping):
        return {label: dict(changes) for label, changes in methods.items()}
    found = {}
    for name in methods:
        parts = [canonical(part) for part in name.split("+")]
        unknown = [part for part in parts if part not in (FULL, *known_names())]
        # "compacter++" has pluses of its own.
        if canonical(name) in (FULL, *known_names()):
            parts, unknown = [canonical(name)], []
        if unknown:
            raise RecipeError([f"methods: there is no method {unknown[0]!r}. "
                               f"{did_you_mean(unknown[0], [FULL, *known_names()])}"])  # fmt: skip
        own = recipe.method.label == "+".join(parts)
        given = recipe.method.model_dump() if own else {"name": parts[0] if len(parts) == 1 else parts}
        found["+".join(parts)] = {"method": FULL if parts == [FULL] else given}
    return found


def _option(recipe: Recipe, wanted: Sequence[str]) -> str | None:
    """What the recipe's method calls it; None where it has no such option, or begins from a saved adapter."""
    name = recipe.method.name
    if not isinstance(name, str) or is_adapter_folder(name):
        return None
    known = {field.name for field in dataclasses.fields(find_method(name).config_class)}
    return next((option for option in wanted if option in known), None)


def _check(recipe: Recipe, name: str, shapes: Any) -> None:
    """Refuses, on the model's shapes, what would fail after an hour."""
    method = recipe.method.name
    if isinstance(method, str) and is_adapter_folder(method):
        return
    model = shapes(recipe.model, recipe.head)
    try:
        build_config(model, method, **method_options(recipe, _SOME_STEPS))
    except AdapterError as error:
        raise RecipeError([f"{name}: {error}"], "the search") from error
