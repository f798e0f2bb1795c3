"""What a run that is out of memory does next: go on with a smaller batch, or say what to lower."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from adapters_kit import devices
from adapters_kit.errors import TrainingError
from adapters_kit.kernels.fuse import forget
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Features, Task


def let_go(model: nn.Module) -> None:
    """All that a step which did not end has left on the device is given back.

    Called outside the `except` block: as long as the error lives, its frames hold every tensor of the step.
    """
    forget(model)
    gc.collect()
    devices.empty_cache()


def restart(model: nn.Module, start: dict[str, torch.Tensor]) -> None:
    """The trained parameters as they were before the first step, and the memory of the last one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if name in start:
                parameter.copy_(start[name])
    let_go(model)


def evaluated(
    task: Task, model: nn.Module, features: Features, recipe: Recipe, tell: Callable[[str], None]
) -> tuple[list[Any], Recipe]:
    """The task's results; with `auto_batch`, on half the rows at a time as long as memory runs out.

    Returns:
        The results, and the recipe with the rows that fit.

    Raises:
        TrainingError: out of memory, with what to lower.
    """
    rows = recipe.training.eval_batch_size or 2 * recipe.training.batch_size
    # Several processes share the batches out by number: one alone must not cut them differently.
    halves = recipe.training.auto_batch and PartialState().num_processes == 1
    while True:
        try:
            return task.run(model, features, rows), recipe
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if not halves or rows == 1:
                raise TrainingError(lower_what_of_evaluation(recipe, rows)) from error
        rows = (rows + 1) // 2
        tell(f"out of memory: evaluating {rows} rows at a time")
        recipe = recipe.changed(**{"training.eval_batch_size": rows})
        let_go(model)


def lower_what(recipe: Recipe) -> str:
    """The sentence for a user who has not asked for smaller batches."""
    training = recipe.training
    steps = [f"training.batch_size (now {training.batch_size}), raising gradient_accumulation to match"]
    steps.append(f"training.max_length (now {training.max_length})")
    advice = "Lower " + " or ".join(steps)
    if not training.auto_batch:
        advice += "; or set training.auto_batch: true"
    if not training.gradient_checkpointing:
        advice += ", training.gradient_checkpointing: true"
    if not recipe.quantize:
        advice += ", quantize: nf4"
    return f"Out of memory. {advice}."


def lower_what_of_evaluation(recipe: Recipe, rows: int) -> str:
    """The same for an evaluation, which keeps nothing for a backward pass."""
    if rows == 1:
        more = "" if recipe.quantize else ", or set quantize: nf4"
        length = recipe.training.max_length
        return f"Out of memory while evaluating one row. Lower training.max_length (now {length}){more}."
    return (
        f"Out of memory while evaluating {rows} rows at a time. Lower training.eval_batch_size, or set "
        "training.auto_batch: true."
    )
