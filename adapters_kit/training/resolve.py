"""From a recipe to a task with checked rows, and to a base model: what training, evaluation and plan share."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from adapters_kit import tasks
from adapters_kit.artifacts.dtypes import DTYPES
from adapters_kit.kernels.cross_entropy import chunked_loss
from adapters_kit.loading import load, load_processor
from adapters_kit.methods import find_method
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Task
from adapters_kit.training import data
from adapters_kit.training.given import rows_from
from adapters_kit.wrapping import wrap


def prepare(recipe: Recipe) -> tuple[Task, data.Splits]:
    """The recipe's task, knowing its columns and classes, and both parts of its data. Reads no model.

    Raises:
        DataError: anything about the data that training would trip over.
    """
    kind = tasks.get(recipe.task)
    found = data.read(recipe.data)
    kind.refuse(found.train, recipe.data.columns)
    columns = data.recognise(found.train, recipe.data.columns, kind.needs, kind.optional)
    if found.test is not None:
        data.recognise(found.test, columns, kind.needs, kind.optional)
    seed = recipe.training.seed
    task = kind(recipe, columns)
    if found.test is None:
        task.fit(found.train, None)
        found = data.split(found.train, recipe.data.test_size, seed, task.strata(found.train))
    task.fit(found.train, found.test)
    return task, data.Splits(
        data.take(found.train, recipe.data.limit, seed), data.take(found.test, recipe.data.test_limit, seed)
    )


def precision(recipe: Recipe) -> str:
    """fp32, bf16 or fp16: the recipe's choice, or what this machine and the quantization ask for."""
    chosen = recipe.training.precision
    if chosen != "auto":
        return chosen
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bf16" if on_gpu or recipe.quantize else "fp32"


def processes() -> dict[str, Any]:
    """How accelerate is to join the processes of a launcher, as arguments of PartialState.

    Left to find out by itself that there is no GPU, it would leave them apart. Asked for a CPU, it would not use
    DeepSpeed, which is told what carries its messages instead.
    """
    if torch.cuda.is_available():
        return {"cpu": False}
    on_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    return {"cpu": False, "backend": "gloo"} if on_deepspeed else {"cpu": True}


def load_base(recipe: Recipe, task: Task) -> tuple[nn.Module, Any]:
    """The base model with the task's head, in the recipe's precision, and its processor; the task is bound to both."""
    torch.manual_seed(recipe.training.seed)  # a new head starts from the seed
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(
        recipe.model,
        recipe.task,
        labels=task.labels,
        quantize=recipe.quantize,
        dtype=DTYPES[precision(recipe)],
        device_map={"": torch.cuda.current_device()} if recipe.quantize and device.type == "cuda" else None,
    )
    processor = load_processor(recipe.model)
    task.bind(processor, model)
    if not recipe.quantize:
        model.to(device)
    return model, processor


def add_adapter(model: nn.Module, recipe: Recipe, steps: int) -> nn.Module:
    """The model with the recipe's adapter on it. What is trained is held in fp32, whatever the base model's dtype.

    Args:
        steps: optimizer steps of the run, for methods that plan ahead (AdaLoRA).
    """
    torch.manual_seed(recipe.training.seed)
    options = recipe.method.options
    if isinstance(recipe.method.name, str) and not Path(recipe.method.name).is_dir():
        config = find_method(recipe.method.name).config_class
        if "total_step" in {field.name for field in dataclasses.fields(config)}:
            options.setdefault("total_step", steps)
    training = recipe.training
    set_dropout(model, base_dropout(recipe))
    wrapped = wrap(model, recipe.method.name, fuse=training.fuse, recompute=training.recompute, **options)
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    if recipe.task == "causal-lm" and training.chunked_loss:
        chunked_loss(wrapped)
    return wrapped


def set_dropout(model: nn.Module, probability: float | None) -> None:
    """Give every dropout of `model` this probability: `nn.Dropout` modules, and the numbers that attention modules keep
    for the functional form; what is read from the config at each step stays (Falcon). None leaves all as they are."""
    if probability is None:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = probability
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, probability)


def base_dropout(recipe: Recipe) -> float | None:
    """The recipe's, or the one that suits the method; None for the model's own."""
    name = recipe.method.name
    if recipe.training.base_dropout is not None or not isinstance(name, str) or Path(name).is_dir():
        return recipe.training.base_dropout
    return find_method(name).base_dropout


def learning_rate(recipe: Recipe) -> float:
    """The recipe's, or the one that suits the method."""
    if recipe.training.learning_rate is not None:
        return recipe.training.learning_rate
    names = [recipe.method.name] if isinstance(recipe.method.name, str) else recipe.method.name
    generates = tasks.get(recipe.task).generates

    def own(name: str) -> float:
        if Path(name).is_dir():
            return 2e-4  # a saved adapter goes on as LoRA would
        method = find_method(name)
        return method.learning_rate if generates else method.classifier_learning_rate or method.learning_rate

    # Methods that train together share one rate: the lowest of theirs.
    return min(map(own, names))


def filled_in(recipe: Recipe, task: Task) -> Recipe:
    """The recipe with the choices that were left to us written out; training it again gives the same run."""
    return recipe.changed(
        **{
            "labels": task.labels,
            **({"problem": getattr(task, "problem", None)} if recipe.task == "text-classification" else {}),
            "data.columns": task.columns,
            "training.learning_rate": learning_rate(recipe),
            "training.precision": precision(recipe),
            "training.base_dropout": base_dropout(recipe),
            "training.max_length": task.max_length,
        }
    )


def rows_of(source: Any) -> Dataset:
    """Rows for evaluation or prediction: a path, a hub id, or rows in memory (see `rows_from`)."""
    rows = rows_from(source)
    return data.read_rows(source) if rows is None else rows
