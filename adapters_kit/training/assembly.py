"""The model of a run: the base with its task's head, as the recipe wants it held, and the adapter on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from adapters_kit import devices
from adapters_kit.artifacts.dtypes import DTYPES
from adapters_kit.kernels.cross_entropy import chunked_loss
from adapters_kit.loading import load, load_processor
from adapters_kit.methods import find_method
from adapters_kit.names import is_adapter_folder
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Task
from adapters_kit.wrapping import wrap


def load_base(recipe: Recipe, task: Task) -> tuple[nn.Module, Any]:
    """The base model with the task's head, in the recipe's precision, and its processor; the task is bound to both."""
    model = load_model(recipe, task)
    processor = load_processor(recipe.model, trust_remote_code=recipe.trust_remote_code)
    task.bind(processor, model)
    return model, processor


def load_model(recipe: Recipe, task: Task) -> nn.Module:
    """The base model with the task's head, on the device that it is trained on."""
    torch.manual_seed(recipe.training.seed)  # a new head starts from the seed
    device = devices.best()
    model = load(
        recipe.model,
        recipe.head,
        labels=task.labels,
        quantize=recipe.quantize,
        dtype=DTYPES[recipe.training.precision],
        device_map={"": device} if recipe.quantize and device.type != "cpu" else None,
        trust_remote_code=recipe.trust_remote_code,
    )
    if not recipe.quantize:
        model.to(device)
    return model


def add_adapter(model: nn.Module, recipe: Recipe, steps: int) -> nn.Module:
    """The model with the recipe's adapter on it. What is trained is held in fp32, whatever the base model's dtype.

    Args:
        steps: optimizer steps of the run, for methods that plan ahead (AdaLoRA).
    """
    torch.manual_seed(recipe.training.seed)
    options = method_options(recipe, steps)
    training = recipe.training
    set_dropout(model, training.base_dropout)
    wrapped = wrap(model, recipe.method.name, fuse=training.fuse, recompute=training.recompute, **options)
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    if recipe.task == "causal-lm" and training.chunked_loss:
        chunked_loss(wrapped)
    return wrapped


def method_options(recipe: Recipe, steps: int) -> dict[str, Any]:
    """The options of the recipe's method; where it plans ahead, the length of the run in optimizer steps among them."""
    options = recipe.method.options
    if isinstance(recipe.method.name, str) and not is_adapter_folder(recipe.method.name):
        config = find_method(recipe.method.name).config_class
        if "total_step" in {field.name for field in dataclasses.fields(config)}:
            options.setdefault("total_step", steps)
    return options


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
