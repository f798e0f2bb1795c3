"""Adapters of several methods on a live model: one more on it, one on top of another, one folded into the weights.

model = ak.fold(model)                    # LoRA goes into the weights, the prefix stays an adapter
model = ak.stack(model, "pfeiffer", adapter_name="task")     # freezes what is there and trains on top of it
"""

import traceback
from collections.abc import Sequence
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from adapters_kit.errors import AdapterError, UnknownNameError, did_you_mean
from adapters_kit.methods.together.build import combine
from adapters_kit.methods.together.config import CombinedConfig
from adapters_kit.methods.together.model import CombinedModel, unmergeable, wrappers


def attach(model: nn.Module, config: PeftConfig, adapter_name: str) -> PeftModel:
    """Put one more adapter on `model` and activate it, whatever methods the others are of.

    peft holds adapters of one kind in a model; a combination holds any, also of a single part. So where kinds differ,
    what is there and what comes are both made combinations.

    Args:
        model: a base model, or one that has adapters.
        config: of the new adapter, complete.

    Raises:
        AdapterError: peft cannot put it there, or the two kinds cannot share a model. The model may be half changed.
    """
    try:
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=adapter_name)
        if config.peft_type != model.peft_type:
            config = as_combination(config)
            to_combined(model)
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
        return model
    except AdapterError:
        raise
    except Exception as error:  # peft raises whatever its parts raise: KeyError, TypeError, AssertionError ...
        reason = f"{type(error).__name__}: {str(error) or traceback.extract_tb(error.__traceback__)[-1].line}"
        raise AdapterError(f"peft cannot put this adapter on this model, which is left as it was. {reason}") from error


def as_combination(config: PeftConfig) -> CombinedConfig:
    """The same adapter as a combination of one part, which other methods can join. Its tensors keep their names.

    Raises:
        AdapterError: a method that cannot be a part of a combination.
    """
    if isinstance(config, CombinedConfig):
        return config
    heads, config.modules_to_save = getattr(config, "modules_to_save", None), None
    return CombinedConfig(
        parts={str(config.peft_type.value).lower(): config},
        modules_to_save=heads,
        task_type=config.task_type,
        inference_mode=config.inference_mode,
    )


def to_combined(model: PeftModel) -> None:
    """Let the tuner of one method serve as a part of a combination, so that other methods can join it.

    Raises:
        AdapterError: a method that cannot be a part of a combination.
    """
    old = model.base_model
    if isinstance(old, CombinedModel):
        return
    configs = {name: as_combination(config) for name, config in model.peft_config.items()}
    if not isinstance(old, BaseTuner):
        raise AdapterError(
            f"The model's {model.peft_type.value} adapter works on its input, not inside its layers, so no adapter of "
            "another kind can join it. Load the base model anew and wrap that."
        )
    model.base_model = CombinedModel.around(old, configs)
    model.peft_type = next(iter(configs.values())).peft_type


def fold(model: PeftModel) -> PeftModel | nn.Module:
    """Merge the parts of a combination that can be merged into the base weights, and keep an adapter of the rest.

    Args:
        model: a model with one combined adapter, ungated.

    Returns:
        The same `PeftModel` with the smaller adapter, or the plain base model if every part was merged. Outputs stay
        equal up to rounding. Save the base model too: the rest belongs to the changed weights.

    Raises:
        AdapterError: no combination, more than one adapter, or no part that can be merged.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, CombinedModel):
        raise AdapterError(
            "fold() is for combinations such as wrap(model, ['lora', 'prefix']); merge_and_unload() merges others."
        )
    if len(model.peft_config) > 1:
        raise AdapterError(
            f"The model has the adapters {sorted(model.peft_config)}, and the weights can take in one. "
            "Delete the others first: model.delete_adapter(name)."
        )
    ((name, config),) = model.peft_config.items()
    kept = unmergeable(config)
    gone = [label for label in config.parts if label not in kept]
    if not gone:
        raise AdapterError(f"No part of {name!r} can be merged into weights: {', '.join(kept)}.")
    if not kept:
        return model.merge_and_unload()
    tuner.merge_adapter([name], safe_merge=True)
    _take_off_wrappers(tuner.model)
    for label in gone:
        tuner.tuners.pop(config.parts.pop(label).peft_type.value)
    return model


def _take_off_wrappers(model: nn.Module) -> None:
    around = {id(layer) for layer in wrappers(model)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in around and id(parent) not in around:
                setattr(parent, name, child.get_base_layer())


def stack(
    model: PeftModel, method: str | PeftConfig | Sequence[str], adapter_name: str = "task", **options: Any
) -> PeftModel:
    """Freeze the active adapters and train a new one on top of them (a task adapter over a language adapter).

    Args:
        model: a model with a trained adapter of an injected method.
        method: as for `wrap`; may be of another kind than the adapter below.
        adapter_name: name of the new adapter.
        **options: options of the new method.

    Returns:
        The model, with the old adapters active and frozen and the new one active and trained. Each saves into a
        folder of its own. After loading both, `activate(model, ["default", "task"])` puts them together again.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError("stack() puts an adapter on top of another; this model has none. Use wrap(model, ...).")
    if adapter_name in model.peft_config:
        raise UnknownNameError(f"The model already has an adapter {adapter_name!r}; choose another adapter_name.")
    below = list(model.active_adapters)
    methods = [method] if isinstance(method, str | PeftConfig) else list(method)
    attach(model, combine(model.get_base_model(), methods, **options), adapter_name)
    activate(model, [*below, adapter_name])
    model.set_requires_grad(below, False)
    model.set_requires_grad(adapter_name, True)
    return model


def activate(model: PeftModel, names: Sequence[str]) -> None:
    """Let several adapters of a model act together, the first one lowest. A task head is the last one's that has any.

    All of them are then trained, as after `set_adapter`; `model.set_requires_grad(names, False)` freezes some.
    """
    unknown = [name for name in names if name not in model.peft_config]
    if unknown or not names:
        raise UnknownNameError(
            f"There is no adapter {unknown or names!r}. {did_you_mean(str(unknown), model.peft_config)}"
        )
    names = list(names)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            owners = [name for name in names if name in module._adapters]
            module.set_adapter(owners[-1:])
    tuner = model.base_model
    tuner.active_adapter = names
    for part in getattr(tuner, "tuners", {}).values():
        part.active_adapter = names
    model.active_adapter = names[-1]
