"""The model of a checkpoint without its weights, and which checkpoint tensor each parameter is.

transformers 5 may store a model otherwise than it computes it (experts one by one on the disk, stacked in memory; other
names; a prefix more or less). Its own conversion rules are applied here tensor by tensor, in both directions.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.base_config import read_as_model, read_base_config
from adapters_kit.artifacts.checkpoint import Checkpoint
from adapters_kit.errors import ShippingError
from adapters_kit.loading.room import check_computed
from adapters_kit.task_table import TASKS

# peft's task type -> the class of transformers.
_AUTO = {row.task_type: row.auto_class for row in TASKS.values() if row.task_type} | {"FEATURE_EXTRACTION": "AutoModel"}


def model_class(adapter: Adapter | None, config: PretrainedConfig) -> type:
    """The transformers class that an adapter was trained on: recorded, else by its task, else by the base's config."""
    names: list[str | None] = []
    if adapter is not None:
        task = getattr(adapter.config.task_type, "value", adapter.config.task_type)
        names += [
            adapter.record.get("model_class"),
            (adapter.config.auto_mapping or {}).get("base_model_class"),
            _AUTO.get(task),
        ]
    named = config.architectures
    names += [name for name in named[:1] if isinstance(name, str)] if isinstance(named, list) else []
    for name in filter(None, names):
        found = getattr(transformers, name, None)
        model = isinstance(found, type) and (issubclass(found, PreTrainedModel) or name.startswith("AutoModel"))
        if found is not None and model:
            return found
    raise ShippingError(
        f"Cannot tell which transformers class to build: tried {', '.join(filter(None, names)) or 'nothing'}. "
        'Name it in the base\'s config.json under "architectures".'
    )


def empty_model(kind: Any, config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model with every parameter on the meta device (no memory) and real buffers, in float32 and eval mode."""

    def made() -> PreTrainedModel:
        if kind.__name__.startswith("AutoModel"):
            return kind.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        return kind._from_config(config, dtype=torch.float32)

    name = config.name_or_path or kind.__name__
    with read_as_model(name, ShippingError):
        if not trust_remote_code:
            with torch.device("meta"):
                check_computed(made(), name, ShippingError)
        with init_empty_weights(include_buffers=False):
            model = made()
    model.tie_weights()
    _make_fixed(model)
    return model.eval().requires_grad_(False)


def _make_fixed(model: PreTrainedModel) -> None:
    """Give values to parameters that are computed, not trained, and so are in no checkpoint (sinusoidal positions)."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_save or []]
    for name, parameter in list(model.named_parameters()):
        if any(pattern.search(name) for pattern in patterns):
            owner = model.get_submodule(name.rpartition(".")[0])
            fill(model, {name: torch.empty_like(parameter, device="cpu")})
            model._init_weights(owner)


def base_config(folder: Path, adapter: Adapter | None = None) -> PretrainedConfig:
    """The base's config, with what the adapter's training changed in it (labels, vocabulary) applied."""
    try:
        read_base_config(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ShippingError:
        raise
    except Exception as error:
        raise ShippingError(f"{folder} has no config that transformers understands: {error}") from error
    for key, value in (adapter.record.get("config") or {}).items() if adapter is not None else ():
        if key == "id2label":
            value = {int(index): label for index, label in value.items()}
        setattr(config, key, value)
    return config


def hollow(shape: Sequence[int]) -> torch.Tensor:
    """A tensor of that shape that takes no memory: one NaN, seen from everywhere.

    Unlike a tensor on the meta device it does not make peft put the adapter there too, and whoever computes with it
    by mistake gets NaN.
    """
    return torch.full((), torch.nan).expand(tuple(shape))


def is_hollow(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is one of those made here: a shape that holds one NaN."""
    return (
        not tensor.is_meta
        and tensor.numel() > 0
        and not any(tensor.stride())
        and bool(tensor[(0,) * tensor.ndim].isnan())
    )


def make_hollow(model: nn.Module) -> None:
    """Replace every parameter on the meta device by a hollow one; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                fresh = nn.Parameter(hollow(parameter.shape), requires_grad=False)
                module._parameters[leaf] = made.setdefault(id(parameter), fresh)


@dataclass(frozen=True)
class Origin:
    """How one parameter of the model is stored.

    Attributes:
        keys: the checkpoint tensors that it is made of.
        parameters: the model parameters made of these tensors (several when a rule splits).
        converter: transformers' rule, None where the stored tensor is the parameter.
    """

    keys: tuple[str, ...]
    parameters: tuple[str, ...]
    converter: WeightConverter | None = None
    patterns: tuple[str, ...] = ()
    """The rule's patterns of stored names; empty without a rule."""


def trace(model: PreTrainedModel, names: Mapping[str, Any]) -> tuple[dict[str, Origin], list[str]]:
    """Match checkpoint names with model parameters as `from_pretrained` would.

    Args:
        model: the empty model.
        names: the checkpoint's tensor names.

    Returns:
        parameter (or buffer) name -> origin, and the checkpoint names that the model has no use for.
    """
    state = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    grouped: dict[str, list[tuple[str, str | None]]] = {}
    unused = []
    for key in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if target not in state and key in state:
            target, pattern = key, None
        if target in state:
            grouped.setdefault(target, []).append((key, pattern))
        else:
            unused.append(key)
    origins = {}
    for target, parts in grouped.items():
        keys, patterns = tuple(key for key, _ in parts), tuple(pattern or "" for _, pattern in parts)
        rule = by_pattern.get(patterns[0])
        parameters: tuple[str, ...] = (target,)
        if rule is not None:
            parameters = tuple(target.replace(rule.target_patterns[0], other, 1) for other in rule.target_patterns)
        origin = Origin(keys, parameters, rule, patterns)
        origins.update({name: origin for name in parameters if name in state})
    return origins, unused


Reader = Callable[[str], torch.Tensor]


def read_parameter(model: PreTrainedModel, origin: Origin, read: Reader) -> dict[str, torch.Tensor]:
    """The model parameters of one origin, in the stored dtype.

    Args:
        read: checkpoint name -> tensor.
    """
    if origin.converter is None:
        return {origin.parameters[0]: read(origin.keys[0])}
    rule = copy.deepcopy(origin.converter)
    for key, pattern in zip(origin.keys, origin.patterns, strict=True):
        rule.add_tensor(origin.parameters[0], key, pattern, read(key))
    made = rule.convert(origin.parameters[0], model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def stored_form(model: PreTrainedModel, origin: Origin, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reverse of `read_parameter`: checkpoint name -> tensor.

    Raises:
        ShippingError: transformers' rule does not lead back to the names that were read.
    """
    if origin.converter is None:
        return {origin.keys[0]: parameters[origin.parameters[0]]}
    made = revert_weight_conversion(model, parameters)
    if set(made) != set(origin.keys):
        raise ShippingError(
            f"{origin.parameters[0]} is stored as {', '.join(sorted(origin.keys)[:3])} …, and transformers "
            f"{transformers.__version__} does not convert it back to these. Save the base once with save_pretrained "
            "and merge into that folder."
        )
    return made


def stored_name(model: PreTrainedModel, name: str) -> str:
    """What a parameter that the checkpoint lacks is to be called there."""
    made = revert_weight_conversion(model, {name: torch.empty(0, device="meta")})
    return next(iter(made)) if len(made) == 1 else name


def fill(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Replace parameters (or buffers) of `module`, by dotted name; meta parameters cannot be assigned in place."""
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def reading(checkpoint: Checkpoint, dtype: torch.dtype | None = torch.float32) -> Reader:
    """A reader that casts floating tensors to `dtype` (None: as stored)."""

    def read(name: str) -> torch.Tensor:
        tensor = checkpoint.read(name)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    return read
