"""What a training that ran out of memory does next: begin again with a smaller batch, or say what to lower."""

from __future__ import annotations

import torch
from torch import nn

from adapters_kit.recipe import Recipe


def restart(model: nn.Module, start: dict[str, torch.Tensor]) -> None:
    """The trained parameters as they were before the first step."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if name in start:
                parameter.copy_(start[name])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def lower_what(recipe: Recipe) -> str:
    """The sentence for a user who has not asked for smaller batches."""
    training = recipe.training
    steps = [f"training.batch_size (now {training.batch_size}), raising gradient_accumulation to match"]
    steps.append(f"training.max_length (now {training.max_length})")
    advice = "Lower " + " or ".join(steps) + "; or set training.auto_batch: true"
    if not training.gradient_checkpointing:
        advice += ", training.gradient_checkpointing: true"
    if not recipe.quantize:
        advice += ", quantize: nf4"
    return f"Out of memory. {advice}."
