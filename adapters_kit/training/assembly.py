"""The model of a run: the base with its task's head, as the recipe wants it held, and the adapter on it."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import torch
from torch import nn

from adapters_kit import devices
from adapters_kit.artifacts.dtypes import DTYPES
from adapters_kit.errors import TrainingError
from adapters_kit.kernels.cross_entropy import chunked_loss
from adapters_kit.kernels.fuse import fuse
from adapters_kit.loading import load, load_processor
from adapters_kit.methods import find_method
from adapters_kit.methods.starts import FROM_DATA, begin, doubled
from adapters_kit.names import is_adapter_folder
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Features, Task, autocast
from adapters_kit.wrapping import wrap

START_ROWS = 256
"""The most training rows that a start looks at."""


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


def add_adapter(
    model: nn.Module, recipe: Recipe, steps: int, task: Task | None = None, features: Features | None = None
) -> nn.Module:
    """The model with the recipe's adapter on it. What is trained is held in fp32, whatever the base model's dtype.

    Args:
        steps: optimizer steps of the run, for methods that plan ahead (AdaLoRA).
        task, features: what is trained on which rows, for a start that looks at them (`training.init`); without them
            the adapter has the shapes of that start only.

    Raises:
        AdapterError: a model that the method or the start does not suit.
    """
    torch.manual_seed(recipe.training.seed)
    options = method_options(recipe, steps)
    training = recipe.training
    set_dropout(model, training.base_dropout)
    fused = training.fuse and training.init is None
    wrapped = wrap(model, recipe.method.name, fuse=fused, recompute=training.recompute, **options)
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    if training.init is not None:
        if task is not None and features is not None:
            task.notes.say(_started(wrapped, recipe, training.init, task, features))
        if training.fuse:
            fuse(wrapped)
    if recipe.task == "causal-lm" and training.chunked_loss:
        chunked_loss(wrapped)
    return wrapped


def method_options(recipe: Recipe, steps: int) -> dict[str, Any]:
    """The options of the recipe's method; where it plans ahead, the length of the run in optimizer steps among them."""
    options = recipe.method.options
    if isinstance(recipe.method.name, str) and not is_adapter_folder(recipe.method.name):
        if recipe.training.init is not None:
            options = doubled(recipe.training.init, {**find_method(recipe.method.name).defaults, **options})
        config = find_method(recipe.method.name).config_class
        if "total_step" in {field.name for field in dataclasses.fields(config)}:
            options.setdefault("total_step", steps)
    return options


def _started(model: nn.Module, recipe: Recipe, kind: str, task: Task, features: Features) -> str:
    """Puts the recipe's start into the fresh adapter; returns what was done."""
    if any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED")):
        raise TrainingError(
            f"training.init: {kind} needs whole weights, which FSDP and DeepSpeed cut up: leave it out."
        )
    device, size = next(model.parameters()).device, recipe.training.batch_size
    batches = []
    if kind in FROM_DATA:
        order = np.random.default_rng(recipe.training.seed).permutation(len(features))[:START_ROWS]
        for first in range(0, len(order), size):
            batch = task.collate_training([features[int(number)] for number in order[first : first + size]])
            batches.append({name: tensor.to(device) for name, tensor in batch.items() if name != "row"})
    plain = None
    if kind == "loftq":
        trusted = recipe.trust_remote_code
        dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
        plain = load(recipe.model, recipe.head, labels=task.labels, dtype=dtype, trust_remote_code=trusted)
    torch.manual_seed(recipe.training.seed)
    with autocast(model, device):
        return begin(model, kind, batches, task.loss, plain)


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
