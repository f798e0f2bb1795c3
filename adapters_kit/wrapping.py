"""wrap(): freeze a model and put a trainable module on it, as a `peft.PeftModel`."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import transformers
from peft import PeftConfig, PeftModel, PromptLearningConfig, TaskType, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn

from adapters_kit.anatomy import base_model, head, pooler
from adapters_kit.artifacts.identity import check_loaded
from adapters_kit.errors import AdapterError, ModelError, UnknownNameError, did_you_mean
from adapters_kit.kernels.fuse import fuse as fuse_layers
from adapters_kit.kernels.recompute import recompute_cheap
from adapters_kit.methods import find_method
from adapters_kit.methods.adapterhub import folder as adapterhub
from adapters_kit.methods.targets import check_targets
from adapters_kit.methods.together.build import combine, to_combined
from adapters_kit.methods.together.config import CombinedConfig
from adapters_kit.names import ADAPTER_CONFIG, is_adapter_folder, looks_like_folder
from adapters_kit.peft_plugin import peft_methods
from adapters_kit.quantization import keep_layout
from adapters_kit.task_table import OTHER_HEADS, TASKS


def wrap(
    model: nn.Module,
    method: str | Path | PeftConfig | Sequence[str | PeftConfig] = "lora",
    *,
    adapter_name: str = "default",
    fuse: bool = True,
    recompute: Literal["cheap"] | None = None,
    force: bool = False,
    **overrides: Any,
) -> PeftModel:
    """Freeze `model` and add a trainable adapter to it.

    Args:
        model: any `transformers` model, or a `PeftModel`, which then gets one adapter more and activates it. The 4-bit
            layers of a model that `load` did not load are kept as they train correctly (`quantization.keep_layout`).
        method: a short name (see `methods()`), any peft config object, or the folder of a saved adapter. A list of
            names or configs trains several methods as one adapter.
        adapter_name: the adapter's name in the model.
        fuse: let LoRA layers compute as fused nodes where they can (see `fuse`): the same numbers with less memory.
        recompute: "cheap": compute activation × gate and fp32 norms again in the backward pass instead of keeping them.
        force: put a saved adapter on another base than the one that was recorded when it was trained.
        **overrides: options of the method's peft config, e.g. `r=16`, `target_modules=["q_proj"]`.

    Returns:
        A `peft.PeftModel`. Its parameters outside the adapter (and a task head, which is trained with it) are frozen.

    Raises:
        UnknownNameError: a method, option or target that does not exist. The model is left as it was.
        ModelError: the adapter does not fit the model. The model is left as it was.
        ShippingError: the model's files are not those that the saved adapter was trained on. (peft's own
            `from_pretrained` does not compare them.)
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"wrap() takes a model; this is {model!r} ({type(model).__name__}). Load it first: "
            f"ak.wrap(ak.load({str(model) if isinstance(model, Path) else model!r}, task=...), {method!r})"
        )
    if recompute not in (None, "cheap"):
        raise UnknownNameError(f"recompute={recompute!r} is unknown; it is None or 'cheap'.")
    wrapped = isinstance(model, PeftModel)
    if wrapped and adapter_name in model.peft_config:
        raise UnknownNameError(
            f"The model already has an adapter named {adapter_name!r}. Choose another name: "
            f"wrap(model, ..., adapter_name='{adapter_name}2')."
        )
    folder = _adapter_folder(method)
    if folder is not None and not force:
        check_loaded(folder, getattr(model.get_base_model() if wrapped else model, "config", None))
    keep_layout(model)  # plain transformers leaves 4-bit weights on a CPU to be spoilt by the next evaluation
    with _untouched_on_failure(model):
        if folder is not None:
            if overrides:
                raise UnknownNameError(
                    f"{folder} is a saved adapter, whose options are fixed; {sorted(overrides)} cannot be changed. "
                    "Leave them out."
                )
            model = _load_adapter(model, folder, adapter_name)
        else:
            base = model.get_base_model() if wrapped else model
            config = build_config(base, method, **overrides)
            if not wrapped:
                model = _inject(get_peft_model, model, config, adapter_name=adapter_name)
            else:
                if config.peft_type != model.peft_type:
                    # peft holds adapters of one kind in a model; combinations hold any, also of a single part.
                    if not isinstance(config, CombinedConfig):
                        config = build_config(base, [method], **overrides)
                    to_combined(model)
                _inject(model.add_adapter, adapter_name, config)
                model.set_adapter(adapter_name)
    if fuse:
        fuse_layers(model)
    if recompute:
        recompute_cheap(model)
    return model


def build_config(
    model: nn.Module, method: str | PeftConfig | Sequence[str | PeftConfig], **overrides: Any
) -> PeftConfig:
    """The peft config that `wrap` uses: defaults, the user's overrides, targets found by structure, all checked.

    Args:
        model: the base model, not wrapped. It is read, never changed.
        method, overrides: as for `wrap`.
    """
    if isinstance(method, list | tuple):
        method, overrides = combine(model, method, **overrides), {}
    if isinstance(method, PeftConfig):
        config_class = type(method)
        chosen, defaults, prepare = config_to_options(method), {}, None
    else:
        declared = find_method(method)
        config_class, chosen, defaults, prepare = declared.config_class, {}, declared.defaults, declared.prepare
    known = {field.name for field in dataclasses.fields(config_class)}
    unknown = [name for name in overrides if name not in known]
    if unknown:
        hints = " ".join(f"{name!r}: {did_you_mean(name, known)}" for name in unknown)
        raise UnknownNameError(f"{config_class.__name__} has no option {', '.join(map(repr, unknown))}. {hints}")
    options = {**defaults, **chosen, **overrides}
    check_targets(model, options)
    if prepare is not None:
        options = prepare(model, options)
    if options.get("task_type") is None:
        options["task_type"] = infer_task_type(model)
    if issubclass(config_class, PromptLearningConfig) and options["task_type"] is None:
        raise ModelError(
            f"peft's {config_class.__name__} needs to know the task, and has none for {type(model).__name__}. "
            "Use 'lora' or another method that works inside the layers."
        )
    heads = task_heads(model)
    if heads and "modules_to_save" in known:
        options["modules_to_save"] = list(dict.fromkeys([*(options.get("modules_to_save") or []), *heads]))
    return config_class(**options)


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
    # A quantized pooler, as plain transformers makes them, cannot be trained.
    heads = head(model) + [path for path in pooler(model) if base.get_submodule(path).weight.is_floating_point()]
    fresh = getattr(model, "fresh_modules", ())
    return heads + [name for name in fresh if not any(f"{name}.".startswith(f"{found}.") for found in heads)]


def _class_names(auto_class: str) -> set[str]:
    """The model classes that an Auto class of transformers chooses from, by transformers' own table."""
    entries = getattr(transformers, auto_class)._model_mapping._model_mapping.values()
    return {name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)}


def _adapter_folder(method: Any) -> Path | None:
    """`method` as the folder of a saved adapter, if that is what it is."""
    if isinstance(method, PeftConfig | list | tuple):
        return None
    folder = Path(method)
    if is_adapter_folder(folder):
        return folder
    if not looks_like_folder(method):
        return None
    if not folder.exists():
        raise UnknownNameError(f"{str(method)!r} is neither a method nor an existing adapter folder.")
    raise UnknownNameError(f"{folder} holds no {ADAPTER_CONFIG}, so it is not a saved adapter.")


def _inject(put: Callable, *args: Any, **kwargs: Any) -> Any:
    try:
        return put(*args, **kwargs)
    except AdapterError:
        raise
    except Exception as error:  # peft raises whatever its parts raise: KeyError, TypeError, AssertionError ...
        reason = f"{type(error).__name__}: {error}"
        raise AdapterError(f"peft cannot put this adapter on this model, which is left as it was. {reason}") from error


def _load_adapterhub(model: nn.Module, folder: Path, adapter_name: str) -> PeftModel:
    wrapped = isinstance(model, PeftModel)
    base = model.get_base_model() if wrapped else model
    config, state = adapterhub.convert(folder, base)
    config.task_type = infer_task_type(base)
    config.modules_to_save = task_heads(base) or None
    if not wrapped:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    elif config.peft_type != model.peft_type:
        raise AdapterError(
            f"The model holds {model.peft_type.value} adapters; peft cannot add {config.peft_type.value} beside them."
        )
    else:
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
    # A task head is trained with the adapter from here on; it starts from the base model's.
    head_and_adapter = get_peft_model_state_dict(model, adapter_name=adapter_name) | state
    set_peft_model_state_dict(model, head_and_adapter, adapter_name=adapter_name)
    return model


def _load_adapter(model: nn.Module, folder: Path, adapter_name: str) -> PeftModel:
    if adapterhub.is_adapterhub(folder):
        return _load_adapterhub(model, folder, adapter_name)
    try:
        config = PeftConfig.from_pretrained(folder)
    except KeyError as error:
        kind = error.args[0]
        raise ModelError(
            f"{folder / ADAPTER_CONFIG} asks for the method {kind!r}, which neither peft nor a plug-in provides. "
            f"{did_you_mean(str(kind).lower(), peft_methods())}"
        ) from None
    saved = load_peft_weights(str(folder), device="cpu")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    task, lent = infer_task_type(base), []
    if config.task_type not in (None, task) and not isinstance(config, PromptLearningConfig):
        # Trained for another task, such as a language adapter under a classifier: the head is the model's own.
        config.task_type, lent = task, [f".{name}." for name in task_heads(base)]
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name, is_trainable=True)
            model.set_adapter(adapter_name)
        elif lent:
            config.inference_mode = False
            model = get_peft_model(model, config, adapter_name=adapter_name)
            own = get_peft_model_state_dict(model, adapter_name=adapter_name)
            set_peft_model_state_dict(model, own | saved, adapter_name=adapter_name)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name, is_trainable=True, config=config)
    except (RuntimeError, ValueError) as error:
        raise _misfit(folder, model, str(error)) from error
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name)
    missing = [key for key in expected.keys() - saved.keys() if not any(name in key for name in lent)]
    problems = [f"{key} is missing from the file" for key in missing]
    problems += [f"{key} fits no place in the model" for key in saved.keys() - expected.keys()]
    if problems:
        raise _misfit(folder, model, "; ".join(sorted(problems)[:3]))
    return model


def _misfit(folder: Path, model: nn.Module, details: str) -> ModelError:
    mismatches = [line.strip() for line in details.splitlines() if "size mismatch" in line]
    if mismatches:
        details = f"{mismatches[0]} ({len(mismatches)} such tensors)"
    return ModelError(
        f"The adapter in {folder} does not fit this {type(model).__name__}: {details}\n"
        "Load the base model that it was trained on; adapter_config.json names it as base_model_name_or_path."
    )


@contextmanager
def _untouched_on_failure(model: nn.Module) -> Iterator[None]:
    """Put the model's modules and `requires_grad` flags back if the block fails halfway through an injection."""
    structure = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs = dict(model.peft_config) if isinstance(model, PeftModel) else None
    active = model.active_adapter if isinstance(model, PeftModel) else None
    try:
        yield
    except BaseException:
        for module, children, parameters in structure:
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        if configs is None:
            model.__dict__.pop("peft_config", None)
        else:
            model.peft_config.clear()
            model.peft_config.update(configs)
            model.set_adapter(active)
        raise
