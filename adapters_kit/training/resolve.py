"""What a recipe leaves open is decided here, once; every later room reads the fields.

1. `resolve(recipe)`: from the recipe and the machine alone: precision, rates, dropout, batch of the evaluations.
2. `prepare(recipe)`: the task and its rows, checked; reads no model.
3. `filled_in(recipe, task)`: what rows and model have told: classes, columns, length. That is the recipe of the run
   folder: training it again gives the same run.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset

from adapters_kit import devices, tasks
from adapters_kit.errors import MissingPackageError, RecipeError
from adapters_kit.methods import find_method
from adapters_kit.methods.configs import check_options
from adapters_kit.methods.starts import TAKEN_OUT
from adapters_kit.names import is_adapter_folder
from adapters_kit.quantization_table import KINDS
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_sections import DataSpec
from adapters_kit.task_table import OBJECTIVES
from adapters_kit.tasks.base import Task
from adapters_kit.tasks.notes import Notes
from adapters_kit.training import data
from adapters_kit.training.augment import check_augment
from adapters_kit.training.inputs import rows_from
from adapters_kit.training.optimizers import HEAD_RATE


def resolve(recipe: Recipe, *, trains: bool = True) -> Recipe:
    """The recipe with everything filled in that it leaves to the method and the machine. Resolved once more, it stays.

    Args:
        trains: whether the recipe is to be trained on this machine; to predict, any precision does.

    Raises:
        RecipeError: a precision in which this machine cannot train.
    """
    if trains:
        _check_objective(recipe)
        _check_method(recipe)
        _check_start(recipe)
        check_augment(recipe, tasks.of(recipe))
        _check_precision(recipe)
        _check_devices()
    training = recipe.training
    rate = training.learning_rate if training.learning_rate is not None else learning_rate(recipe)
    return recipe.changed(
        **{
            "training.precision": _precision(recipe),
            "training.base_dropout": _base_dropout(recipe),
            "training.learning_rate": rate,
            # Full copies (a task head, embeddings) do not stand the rates that suit a prefix.
            "training.head_learning_rate": training.head_learning_rate or min(rate, HEAD_RATE),
            "training.eval_batch_size": training.eval_batch_size or 2 * training.batch_size,
        }
    )


def filled_in(recipe: Recipe, task: Task) -> Recipe:
    """The recipe with what the rows and the model have told."""
    return recipe.changed(**task.found())


def prepare(recipe: Recipe) -> tuple[Task, data.Splits]:
    """The recipe's task, knowing its columns and classes, and both parts of its data. Reads no model.

    Raises:
        DataError: anything about the data that training would trip over.
    """
    kind = tasks.of(recipe)
    notes = Notes()
    found = data.read(recipe.data, notes)
    kind.refuse(found.train, recipe.data.columns)
    columns = data.recognise(found.train, recipe.data.columns, kind.needs, kind.optional)
    task = kind(recipe, columns, notes=notes)
    train, test = data.usable_parts(found, task)
    seed = recipe.training.seed
    if test is None:
        task.notes = Notes()  # the parts are looked at again when they are made, and then told of
        task.fit(train, None)
        task.notes = notes
        train, test = data.split(train, recipe.data.test_size, seed, task.strata(train), notes, task.groups(train))
        if test is not train:
            notes.say(
                f"No held-out part stands beside the training rows: {len(test):,} of {len(train) + len(test):,} rows "
                "are set aside (data.test_size)."
            )
    apart = test is not train
    if recipe.data.mix:
        train = data.mixed(train, test, task, seed)
    else:
        task.fit(train, test)
        train = data.take(train, recipe.data.limit, seed)
    parts = data.Splits(train, data.take(test, recipe.data.test_limit, seed))
    if apart and (both := data.in_both(parts)):
        notes.say(
            f"{both:,} of {len(parts.test):,} held-out rows stand among the training rows too: they score what was "
            "learned by heart.",
            rows_in_both=both,
        )
    return task, parts


def _precision(recipe: Recipe) -> str:
    """fp32, bf16 or fp16: the recipe's choice, or what this machine and the quantization ask for."""
    if recipe.training.precision != "auto":
        return recipe.training.precision
    if devices.accelerator() is not None:
        return "bf16" if devices.has_bf16() else "fp16"  # cards older than Ampere imitate bf16 at a crawl
    return "bf16" if recipe.quantize else "fp32"


def _check_method(recipe: Recipe) -> None:
    """Refuses methods that ask for what a recipe cannot hold, and options that do not fit. Nothing is loaded."""
    named = [recipe.method.name] if isinstance(recipe.method.name, str) else recipe.method.name
    for method in (find_method(name) for name in named if not is_adapter_folder(name)):
        if not method.in_recipes:
            raise RecipeError(
                [f"method: {method.name} needs {method.needs}. wrap(model, {method.name!r}, ...) takes it there."]
            )
    if isinstance(recipe.method.name, str) and not is_adapter_folder(recipe.method.name):
        check_options(recipe.method.name, recipe.method.options)
    if (start := recipe.method.options.get("init_lora_weights")) in ("eva", "corda", "lora_ga"):
        spelled = str(start).replace("_", "-")
        told = f"method.init_lora_weights: {start} starts from rows. Leave it out, and set training.init: {spelled}."
        raise RecipeError([told])


def _check_start(recipe: Recipe) -> None:
    """Refuses a start that the recipe's method, base or optimizer does not go with."""
    kind, name = recipe.training.init, recipe.method.name
    if kind is None:
        return
    method = find_method(name) if isinstance(name, str) and not is_adapter_folder(name) else None
    if method is None or method.config != "peft:LoraConfig" or "init_lora_weights" in method.defaults:
        saved = "a saved adapter, which has started" if isinstance(name, str) and is_adapter_folder(name) else None
        told = f"training.init: {kind} is a start of a new LoRA, and the method is {saved or recipe.method.label}"
        raise RecipeError([f"{told}. Set method to lora, rslora or dora, or leave init out."])
    if kind == "loftq" and recipe.quantize not in KINDS:
        raise RecipeError(["training.init: loftq starts with what quantizing loses: set quantize: nf4, or take pissa."])
    if recipe.training.weight_decay and kind in TAKEN_OUT:
        raise RecipeError(
            [f"training.weight_decay: it would pull at the half of the adapter that {kind} holds still: set it to 0."]
        )


def _check_objective(recipe: Recipe) -> None:
    """Refuses an objective whose package is not installed."""
    if recipe.objective is None:
        return
    name = recipe.objective.name
    package = OBJECTIVES[name].package
    if package and find_spec(package) is None:
        raise MissingPackageError(f"objective: {name} needs {package}: pip install 'adapters-kit[{package}]'")


def _check_precision(recipe: Recipe) -> None:
    """Refuses what the training loop would refuse after the base model has been loaded and scored."""
    chosen = recipe.training.precision
    here = devices.accelerator()
    if chosen == "fp16" and here is None:
        other = "bf16 (or auto)" if recipe.quantize else "bf16 or fp32 (or auto)"
        raise RecipeError([f"training.precision: fp16 needs a GPU, and there is none here. Set it to {other}."])
    if chosen == "bf16" and here is not None and not devices.has_bf16():
        card = devices.names()[here.index or 0]
        raise RecipeError([f"training.precision: {card} has no bf16. Set it to fp16 or fp32 (or auto)."])


def _check_devices() -> None:
    """Refuses several accelerators without a launcher: Trainer would split each batch over all of them in one process,
    which is slower than one of them alone, and which outputs that are no plain tensors do not survive."""
    seen = devices.count()
    if seen > 1 and "WORLD_SIZE" not in os.environ:
        command = "-m adapters_kit train RECIPE.yaml"
        raise RecipeError(
            [
                f"{seen} GPUs are visible, and one process trains on one. To use all: accelerate launch "
                f"--num_processes {seen} {command}. To use the first: {devices.ONE_ALONE} python {command}"
            ],
            source="this machine",
        )


def _base_dropout(recipe: Recipe) -> float | None:
    """The recipe's, or the one that suits the method; None for the model's own."""
    name = recipe.method.name
    if recipe.training.base_dropout is not None or not isinstance(name, str) or Path(name).is_dir():
        return recipe.training.base_dropout
    return find_method(name).base_dropout


def learning_rate(recipe: Recipe) -> float:
    """The peak learning rate that suits the recipe's method and task."""
    names = [recipe.method.name] if isinstance(recipe.method.name, str) else recipe.method.name
    generates = tasks.get(recipe.head).generates

    def own(name: str) -> float:
        if Path(name).is_dir():
            return 2e-4  # a saved adapter goes on as LoRA would
        method = find_method(name)
        return method.learning_rate if generates else method.classifier_learning_rate or method.learning_rate

    # Methods that train together share one rate: the lowest of theirs.
    return min(map(own, names))


def processes() -> dict[str, Any]:
    """How accelerate is to join the processes of a launcher, as arguments of PartialState.

    Left to find out by itself that there is no GPU, it would leave them apart. Asked for a CPU, it would not use
    DeepSpeed, which is told what carries its messages instead.
    """
    if devices.accelerator() is not None:
        return {"cpu": False}
    on_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    return {"cpu": False, "backend": "gloo"} if on_deepspeed else {"cpu": True}


def rows_of(source: Any, spec: DataSpec | None = None) -> Dataset:
    """Rows for evaluation or prediction: a path, a hub id, or rows in memory (see `rows_from`).

    Args:
        spec: a recipe's, whose encoding and delimiter hold for a file too.
    """
    rows = rows_from(source, spec.columns if spec else {})
    return data.read_rows(source, spec) if rows is None else rows
