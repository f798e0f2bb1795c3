"""One frozen base in memory for all trainings: each has its own modules, heads and config around the same tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from adapters_kit.loading import load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Task
from adapters_kit.training.assembly import load_model


class SharedBase:
    """Loads the base model of several recipes; after the first, only what a seed has drawn anew (a head)."""

    def __init__(self) -> None:
        self.bare: Any = None
        self._draws = False

    def load(self, recipe: Recipe, task: Task) -> tuple[nn.Module, Any]:
        """As `assembly.load_base`, with the frozen tensors of the first model that was loaded."""
        if self.bare is None or self._draws:
            torch.manual_seed(recipe.training.seed)
            before = torch.get_rng_state()
            model = load_model(recipe, task)
            self._draws = not torch.equal(before, torch.get_rng_state())
        else:
            model = same_tensors(self.bare)
        if self.bare is None:
            _settle_8bit(model)
            self.bare = same_tensors(model)
        else:
            _share(model, self.bare)
        processor = load_processor(recipe.model, trust_remote_code=recipe.trust_remote_code)
        task.bind(processor, model)
        return model, processor


def same_tensors(model: nn.Module) -> Any:
    """A copy of the modules around the same parameters; whatever else they hold is copied."""
    kept: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        state = _state_8bit(module)
        kept |= {id(tensor): tensor for tensor in (state.CB, state.SCB) if tensor is not None} if state else {}
    return copy.deepcopy(model, dict(kept))


@torch.no_grad()
def _share(model: nn.Module, base: nn.Module) -> None:
    """Puts the base's tensors wherever the model has equal ones."""
    theirs = dict(base.named_modules())
    for path, module in model.named_modules():
        other = theirs.get(path)
        if other is None:
            continue
        state, source = _state_8bit(module), _state_8bit(other)
        for name, parameter in list(module._parameters.items()):
            wanted = other._parameters.get(name)
            if parameter is None or wanted is None or parameter is wanted or not _equal(parameter, wanted):
                continue
            module._parameters[name] = wanted
            if state is not None and source is not None:
                _settle_8bit(module)
                state.CB, state.SCB = source.CB, source.SCB


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    same_kind = type(one) is type(other) and one.shape == other.shape and one.dtype == other.dtype
    return same_kind and one.device == other.device and torch.equal(one.data, other.data)


def _state_8bit(module: nn.Module) -> Any:
    return module.state if type(module).__name__ == "Linear8bitLt" else None


def _settle_8bit(model: nn.Module) -> None:
    """bitsandbytes moves 8-bit weights from the parameter to the layer in its first forward: now, for all."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and getattr(module.weight, "CB", None) is not None:
            module.init_8bit_state()
