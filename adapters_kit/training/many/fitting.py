"""Which recipes can be trained in one pass; the others are refused before anything is loaded, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from accelerate import PartialState

from adapters_kit import registry
from adapters_kit.artifacts.adapter import CONFIG, read_json
from adapters_kit.errors import RecipeError, TrainingError
from adapters_kit.methods import find_method
from adapters_kit.names import is_adapter_folder
from adapters_kit.recipe import Recipe

# What one base in memory, and one pass through it, have once.
_ONE = (
    "model",
    "task",
    "quantize",
    "training.precision",
    "training.gradient_checkpointing",
    "training.recompute",
)
_LORA, _CONFIGS = "LoraConfig", ("LoraConfig", "IA3Config", "BottleneckConfig")
_TYPES = ("LORA", "IA3", "BOTTLENECK")


def check(recipes: Mapping[str, Recipe]) -> None:
    """Refuses what cannot go together.

    Args:
        recipes: name of a run -> its resolved recipe.

    Raises:
        RecipeError: every key that differs though it must not, every method and option that has no place in a pass.
        TrainingError: several processes.
    """
    if PartialState().num_processes > 1:
        raise TrainingError(
            "Many adapters are trained in one process, which this is not (accelerate launch, torchrun). Start "
            "train-many without a launcher, or each recipe by itself with `train`."
        )
    first, *others = recipes
    problems = []
    for name in others:
        for key in _ONE:
            ours, theirs = _value(recipes[first], key), _value(recipes[name], key)
            if ours != theirs:
                problems.append(
                    f"{key} is {theirs!r} in {name} and {ours!r} in {first}, but a pass has one {key.split('.')[-1]}: "
                    f"give both the same, or train {name} in a call of its own"
                )
    for name, recipe in recipes.items():
        problems += [f"{problem} ({name})" for problem in _alone(recipe)]
    if problems:
        raise RecipeError(problems, "recipes that are to be trained together")


def kind(recipe: Recipe) -> str:
    """What a pass has once, as a text: recipes of one kind can go together."""
    return repr([_value(recipe, key) for key in _ONE])


def _alone(recipe: Recipe) -> list[str]:
    """Why this recipe cannot be one of many."""
    told = []
    if recipe.objective is not None:
        told.append(f"objective: {recipe.objective.name} is trained by itself (train); a pass of many has one loss")
    if recipe.training.auto_batch:
        told.append("training.auto_batch: a pass of many has no batch that could be halved; choose training.batch_size")
    if recipe.eval.keep is not None:
        told.append("eval.keep: a pass of many scores held-out rows alone; train this one by itself, or leave it out")
    if recipe.data.augment is not None:
        told.append("data.augment: a pass of many takes rows as they are; train this one by itself, or leave it out")
    if recipe.eval.judge is not None:
        told.append("eval.judge: a pass of many writes no answers; train this one by itself, or leave it out")
    if recipe.training.init is not None:
        told.append("training.init: it is found for one adapter on its rows; train this one by itself, or leave it out")
    options = recipe.method.options
    names = [recipe.method.name] if isinstance(recipe.method.name, str) else recipe.method.name
    for name in names:
        if reason := _why_not(name, options.get("parts", {}).get(name, options)):
            told.append(f"method {name}: {reason}. What can: {', '.join(joining())}; train this one by itself")
    return told


def joining() -> list[str]:
    """Names of the methods whose adapters can be trained in one pass."""
    return [name for name in registry.BUILTIN if _why_not(name, {}) is None]


def _why_not(name: str, options: Mapping[str, Any]) -> str | None:
    if is_adapter_folder(name):
        kind = read_json(Path(name) / CONFIG).get("peft_type")
        return None if kind in _TYPES else f"a {kind} adapter cannot be trained in one pass with others"
    method = find_method(name)
    config = method.config.partition(":")[2]
    if config not in _CONFIGS:
        return "it cannot be trained in one pass with others"
    if config != _LORA:
        return None
    chosen = {**method.defaults, **options}
    if not isinstance(chosen.get("init_lora_weights", True), bool) and chosen["init_lora_weights"] != "gaussian":
        return f"init_lora_weights={chosen['init_lora_weights']!r} changes the base, which the others share"
    if chosen.get("bias", "none") != "none":
        return f"bias={chosen['bias']!r} trains biases of the base, which the others share"
    if chosen.get("layer_replication"):
        return "layer_replication makes another model of the base, which the others share"
    return None


def _value(recipe: Recipe, key: str) -> Any:
    return reduce(getattr, key.split("."), recipe)
