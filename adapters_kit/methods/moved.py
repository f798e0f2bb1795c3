"""Adapters that name modules as an older transformers did: a language model inside a larger one, experts one by one.

transformers has a table of what it renamed and how it packs experts now, for checkpoints; an adapter's tensors follow
the same table.
"""

import copy
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import transformers_weight_conversion as peft_conversion
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from adapters_kit.artifacts.factors import PREFIX, strip

Tensors = Mapping[str, torch.Tensor]


def paths_now(model: nn.Module) -> Callable[[str], str | None]:
    """A function from the name that a module had in transformers 4 to where it is in `model`; None if it is nowhere."""
    modules: Any = dict(model.named_modules())
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    prefix = str(getattr(model, "base_model_prefix", ""))
    weights = {f"{path}.weight": None for path in modules}

    def now(old: str) -> str | None:
        for candidate in (old, f"{prefix}.{old}", old.removeprefix(f"{prefix}.")):
            if candidate in modules:
                return candidate
            renamed = rename_source_key(f"{candidate}.weight", renamings, [], prefix, weights)[0]
            if renamed.removesuffix(".weight") in modules:
                return renamed.removesuffix(".weight")
        return None

    return now


def names_now(state: Tensors, model: PeftModel, adapter_name: str, own: Collection[str], bare: nn.Module) -> Tensors:
    """The tensors of an adapter under the names that `model` has for them; as they are, where they have none.

    Args:
        state: as saved.
        model: with the adapter's modules in place.
        own: the names under which peft would save them.
        bare: the base model before peft changed it.
    """
    if state.keys() <= set(own):
        return state
    config = model.peft_config[adapter_name]
    convert: Any = peft_conversion.convert_peft_adapter_state_dict_for_transformers
    try:
        packed: Tensors = convert(model, config, dict(state), adapter_name)
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError):  # factors that do not pack: told as a misfit
        packed = state
    if not _patterns_hold(config, bare):
        return state  # a scale of its own, for a module of another name
    if packed.keys() <= set(own):
        return packed
    now = paths_now(bare)
    moved = {_name_now(name, now, own): tensor for name, tensor in state.items()}
    return moved if len(moved) == len(state) and moved.keys() <= set(own) else state


def targets_now(config: PeftConfig, state: Tensors, bare: nn.Module) -> PeftConfig:
    """The config of a LoRA whose targets are in no place of that name any more: they are those that it has tensors for.

    Args:
        config: as saved; returned as it is where a target of it is found, or where tensors have no place.
        state: the adapter's tensors, as saved.
        bare: the base model, not wrapped.
    """
    targets = getattr(config, "target_modules", None)
    if not isinstance(config, LoraConfig) or not targets or targets == "all-linear" or config.target_parameters:
        return config
    paths = [path for path, _ in bare.named_modules()]
    if any(check_target_module_exists(config, path) for path in paths):
        return config
    now = paths_now(bare)
    found = {now(strip(name).partition(".lora_A")[0]) for name in state if ".lora_A" in name}
    if not found or None in found:
        return config
    moved = copy.deepcopy(config)
    moved.target_modules = {path for path in found if path}
    return moved


def _patterns_hold(config: PeftConfig, bare: nn.Module) -> bool:
    """Whether every rank and scale that the config has for a single module is for one that is there."""
    patterns = [*(getattr(config, "rank_pattern", None) or ()), *(getattr(config, "alpha_pattern", None) or ())]
    if not patterns:
        return True
    names = [*(path for path, _ in bare.named_modules()), *(name for name, _ in bare.named_parameters())]
    return all(any(re.search(rf"(^|\.)({pattern})$", name) for name in names) for pattern in patterns)


def _name_now(name: str, now: Callable[[str], str | None], own: Collection[str]) -> str:
    """A tensor's name with its module's present path: the longest part of it that is one."""
    path, rest = name.removeprefix(PREFIX), ""
    while name not in own and "." in path:
        path, _, leaf = path.rpartition(".")
        rest = f".{leaf}{rest}"
        found = now(path)
        if found is not None and f"{PREFIX}{found}{rest}" in own:
            return f"{PREFIX}{found}{rest}"
    return name
