"""Several methods at once, and one on top of another.

model = ak.wrap(model, ["lora", "prefix"], r=8, num_virtual_tokens=10)    # one adapter, trained and saved together
model = ak.wrap(model, "mam")                                             # a published combination
model = ak.fold(model)                    # LoRA goes into the weights, the prefix stays an adapter
model = ak.stack(model, "pfeiffer", adapter_name="task")     # freezes what is there and trains on top of it
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from adapters_kit.errors import AdapterError, UnknownNameError, did_you_mean
from adapters_kit.methods import find_method
from adapters_kit.methods.targets import check_targets
from adapters_kit.methods.together.config import CombinedConfig
from adapters_kit.methods.together.model import CombinedModel, unmergeable, wrappers
from adapters_kit.registry import Method


def combine(model: nn.Module, methods: Sequence[str | PeftConfig], **options: Any) -> CombinedConfig:
    """The config of several methods as one adapter, each prepared for `model`. `wrap(model, [...])` uses it.

    Args:
        model: the base model; read, not changed.
        methods: short names or peft configs, each of another kind.
        **options: an option goes to the part that knows it. If several do, say which:
            `parts={"lora": {"target_modules": [...]}}`. `gate` and `modules_to_save` are the combination's own.

    Raises:
        UnknownNameError: a method or option that does not exist.
        AdapterError: an option that several parts know, or parts that cannot go together.
    """
    own = {name: options.pop(name) for name in ("gate", "modules_to_save", "task_type") if name in options}
    given = dict(options.pop("parts", None) or {})
    named = {_label(method): method for method in methods}
    if len(named) < len(methods):
        raise AdapterError(f"{list(map(_label, methods))}: the same method twice. One adapter holds one of a kind.")
    stray = [label for label in given if label not in named]
    if stray:
        raise UnknownNameError(f"parts has {stray[0]!r}, which is not combined here. {did_you_mean(stray[0], named)}")
    known = {label: _fields(method) for label, method in named.items()}
    sorted_out: dict[str, dict[str, Any]] = {label: dict(given.get(label, {})) for label in named}
    for option, value in options.items():
        takers = [label for label in named if option in known[label]]
        if not takers:
            every = set().union(*known.values())
            raise UnknownNameError(
                f"None of {', '.join(named)} has the option {option!r}. {did_you_mean(option, every)}"
            )
        if len(takers) > 1:
            raise AdapterError(
                f"{option!r} is an option of {' and '.join(takers)}. Say which: "
                f"parts={{{takers[0]!r}: {{{option!r}: {value!r}}}}}."
            )
        sorted_out[takers[0]][option] = value
    parts = {label: _build(model, method, sorted_out[label]) for label, method in named.items()}
    return CombinedConfig(parts=parts, **own)


def _label(method: str | PeftConfig) -> str:
    return method.peft_type.value.lower() if isinstance(method, PeftConfig) else find_method(method).name


def _fields(method: str | PeftConfig) -> set[str]:
    owner = type(method) if isinstance(method, PeftConfig) else find_method(method).config_class
    return {f.name for f in dataclasses.fields(owner)}


def _build(model: nn.Module, method: str | PeftConfig, options: dict[str, Any]) -> PeftConfig:
    unknown = [name for name in options if name not in _fields(method)]
    if unknown:
        hint = did_you_mean(unknown[0], _fields(method))
        raise UnknownNameError(f"{_label(method)} has no option {unknown[0]!r}. {hint}")
    if isinstance(method, PeftConfig):
        check_targets(model, options)
        return dataclasses.replace(method, **options) if options else method
    declared = find_method(method)
    options = {**declared.defaults, **options}
    check_targets(model, options)
    if declared.prepare is not None:
        options = declared.prepare(model, options)
    return declared.config_class(**options)


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
    base, below = model.get_base_model(), list(model.active_adapters)
    methods = [method] if isinstance(method, str | PeftConfig) else list(method)
    config = combine(base, methods, **options)
    to_combined(model)
    model.add_adapter(adapter_name, config)
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


def to_combined(model: PeftModel) -> None:
    """Let the tuner of one method serve as a part of a combination, so that other methods can join it."""
    old = model.base_model
    if isinstance(old, CombinedModel):
        return
    configs = {}
    for name, config in old.peft_config.items():
        heads, config.modules_to_save = getattr(config, "modules_to_save", None), None
        label = config.peft_type.value.lower()
        configs[name] = CombinedConfig(
            parts={label: config},
            modules_to_save=heads,
            task_type=config.task_type,
            inference_mode=config.inference_mode,
        )
    tuner = CombinedModel.__new__(CombinedModel)
    nn.Module.__init__(tuner)
    tuner.model = old.model
    tuner.targeted_module_names, tuner.targeted_parameter_names = [*old.targeted_module_names], []
    tuner.peft_config = tuner.model.peft_config = configs
    tuner.active_adapter = old.active_adapter
    tuner.tuners[model.peft_type.value] = old
    tuner.training = old.training
    old.peft_config = dict(old.peft_config)
    model.base_model = tuner
    model.peft_type = next(iter(configs.values())).peft_type


def _preset(
    name: str, trains: str, paper: str, parts: dict[str, dict[str, Any]], learning_rate: float, **own: Any
) -> Method:
    def prepare(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
        given = options.pop("parts", None) or {}
        stray = [label for label in given if label not in parts]
        if stray:
            raise UnknownNameError(f"{name} has no part {stray[0]!r}. {did_you_mean(stray[0], parts)}")
        merged = {label: {**defaults, **given.get(label, {})} for label, defaults in parts.items()}
        built = combine(model, list(parts), parts=merged, gate=options.get("gate", False))
        return {**options, "parts": built.parts}

    return Method(
        name=name,
        config="adapters_kit.methods.together.config:CombinedConfig",
        trains=trains,
        paper=paper,
        mergeable=False,
        defaults=own,
        learning_rate=learning_rate,
        prepare=prepare,
    )


MAM = _preset(
    "mam",
    "a prefix in attention and an MLP beside FFN",
    "He et al. 2021, arXiv:2110.04366",
    {
        "prefix": {"num_virtual_tokens": 30},
        # Not scaled by the paper's 4, for the reason that `parallel` is not.
        "parallel": {"reduction_factor": 16, "bottleneck_dim": 512, "init_weights": "mam_adapter"},
    },
    learning_rate=1e-3,
)
UNIPELT = _preset(
    "unipelt",
    "a prefix, an MLP after FFN and LoRA, each behind a gate",
    "Mao et al. 2022, arXiv:2110.07577",
    {"prefix": {"num_virtual_tokens": 10}, "pfeiffer": {"reduction_factor": 16}, "lora": {"r": 8, "lora_alpha": 16}},
    learning_rate=1e-3,
    gate=True,
)
