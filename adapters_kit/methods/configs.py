"""From a method and the options given to a peft config that fits a model: defaults, targets, task, head, checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from peft import PeftConfig, PromptLearningConfig, TaskType
from torch import nn

from adapters_kit.anatomy import base_model, head, pooler
from adapters_kit.artifacts.option_types import types_of, unfit
from adapters_kit.artifacts.patterns import unusable
from adapters_kit.errors import AdapterError, ModelError, UnknownNameError, did_you_mean
from adapters_kit.methods.beside import OwnConfig
from adapters_kit.methods.catalogue import find_method
from adapters_kit.methods.targets import check_targets, in_layers
from adapters_kit.task_table import OTHER_HEADS, TASKS


def label(method: str | PeftConfig) -> str:
    """What a method is called in a combination: its short name, or peft's name of the config's type."""
    return str(method.peft_type.value).lower() if isinstance(method, PeftConfig) else find_method(method).name


def fields(method: str | PeftConfig) -> set[str]:
    """The names of the options that a method has, without what its config says about itself."""
    owner = type(method) if isinstance(method, PeftConfig) else find_method(method).config_class
    return {field.name for field in dataclasses.fields(owner)} - {"peft_type", "auto_mapping", "peft_version"}


def check_options(method: str | PeftConfig, options: Mapping[str, Any]) -> None:
    """Refuse options that the method does not have, and values that mean nothing.

    Raises:
        UnknownNameError: an option that does not exist.
        AdapterError: a value of another type than the method's config has there, or that nothing computes with.
    """
    known = fields(method)
    unknown = [name for name in options if name not in known]
    if unknown:
        hints = " ".join(f"{name!r}: {did_you_mean(name, known)}" for name in unknown)
        raise UnknownNameError(f"{label(method)} has no option {', '.join(map(repr, unknown))}. {hints}")
    owner = type(method) if isinstance(method, PeftConfig) else find_method(method).config_class
    found = unfit(types_of(owner), options)
    if found is None and options.get("lora_alpha", 1) == 0:
        found = "lora_alpha", "another number: what is multiplied with 0 learns nothing"
    if found is not None:
        key, wanted = found
        raise AdapterError(f"{label(method)}: {key} is {repr(options[key])[:80]}; it has to be {wanted}.")


def build(model: nn.Module, method: str | PeftConfig, options: dict[str, Any], for_task: bool = False) -> PeftConfig:
    """The peft config of one method for `model`.

    Args:
        model: the base model, not wrapped. It is read, never changed.
        method: a short name, or a config whose options count as the user's.
        options: the user's; they go before the method's defaults.
        for_task: fill in peft's type of task and the task's head, which an adapter that stands alone is saved with.
            Parts of a combination leave both to it.

    Raises:
        UnknownNameError: an option or a target that does not exist.
        ModelError: a method that the model does not suit.
    """
    given = {**config_to_options(method), **options} if isinstance(method, PeftConfig) else options
    check_options(method, given)
    if isinstance(method, PeftConfig):
        config_class = type(method)
        options = given
        _check(model, options)
    else:
        declared = find_method(method)
        config_class = declared.config_class
        options = {**declared.defaults, **options}
        _check(model, options)
        chosen = any(options.get(name) is not None for name in ("target_modules", "target_parameters"))
        if declared.prepare is not None:
            options = declared.prepare(model, options)
        if not issubclass(config_class, OwnConfig):  # those number layers themselves
            options = in_layers(model, options, chosen)
    if for_task:
        options = _for_task(model, config_class, options)
    try:
        config: PeftConfig = config_class(**options)
    except (TypeError, ValueError) as error:  # what peft's configs raise for values that do not go together
        raise AdapterError(f"{label(method)} cannot be set up so for {type(model).__name__}: {error}") from error
    return config


def _check(model: nn.Module, options: dict[str, Any]) -> None:
    slow = unusable(options, [path for path, _ in model.named_modules()])
    if slow is not None:  # before anything is matched, which nothing could stop
        raise UnknownNameError(f"The expression {slow}. For module names, pass a list.")
    check_targets(model, options)


def _for_task(model: nn.Module, config_class: type, options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    if options.get("task_type") is None:
        options["task_type"] = infer_task_type(model)
    if issubclass(config_class, PromptLearningConfig) and options["task_type"] is None:
        raise ModelError(
            f"peft's {config_class.__name__} needs to know the task, and has none for {type(model).__name__}. "
            "Use 'lora' or another method that works inside the layers."
        )
    heads = task_heads(model)
    if heads and "modules_to_save" in {field.name for field in dataclasses.fields(config_class)}:
        options["modules_to_save"] = list(dict.fromkeys([*(options.get("modules_to_save") or []), *heads]))
    return options


def config_to_options(config: PeftConfig) -> dict[str, Any]:
    """The fields of a peft config that its constructor takes, without those that peft fills in itself."""
    derived = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.init and field.name not in derived
    }


def infer_task_type(model: nn.Module) -> TaskType | None:
    """peft's task type, from transformers' tables of model classes; None for tasks that peft has no type for."""
    name = type(model).__name__
    typed = (row for row in TASKS.values() if row.task_type)
    return next((TaskType(row.task_type) for row in typed if name in _class_names(row.auto_class)), None)


def task_heads(model: nn.Module) -> list[str]:
    """The modules that turn hidden states into the user's labels; empty for language models.

    The backbone's pooler is one of them: pretraining leaves it near its random start, and frozen there it costs every
    method a point and more (docs/defaults.md). So is any other fresh module inside the body, which `load` notes in
    `model.fresh_modules`.
    """
    headed = [*OTHER_HEADS, *(row.auto_class for row in TASKS.values() if row.own_head)]
    if not any(type(model).__name__ in _class_names(auto_class) for auto_class in headed):
        return []
    base = base_model(model)
    _refuse_shared(base, head(model))
    # A quantized pooler, as plain transformers makes them, cannot be trained.
    heads = head(model) + [path for path in pooler(model) if base.get_submodule(path).weight.is_floating_point()]
    fresh = getattr(model, "fresh_modules", ())
    return heads + [name for name in fresh if not any(f"{name}.".startswith(f"{found}.") for found in heads)]


def _refuse_shared(base: nn.Module, heads: Sequence[str]) -> None:
    """Refuses heads of which several are one: peft would train a copy of each, and none could be put back."""
    owners: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if name.startswith(tuple(f"{path}." for path in heads)):
            owners.setdefault(id(parameter), []).append(name)
    shared = next((names for names in owners.values() if len(names) > 1), None)
    if shared is not None:
        raise ModelError(
            f"{type(base).__name__} has one head in several places ({', '.join(shared[:3])} are the same numbers), and "
            "an adapter can neither train nor ship such a head. Take a model with one head, such as DETR, Conditional "
            "DETR, RT-DETR or YOLOS."
        )


def _class_names(auto_class: str) -> set[str]:
    """The model classes that an Auto class of transformers chooses from, by transformers' own table."""
    entries = getattr(transformers, auto_class)._model_mapping._model_mapping.values()
    return {name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)}
