"""The folder of a saved adapter, read for one base model: config and tensors, from whichever library wrote it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    get_peft_model_state_dict,
)
from peft.utils import set_peft_model_state_dict
from torch import nn

from adapters_kit.artifacts import mlx
from adapters_kit.artifacts.adapter import check_fields, check_options, check_sizes, read_raw, read_weights
from adapters_kit.artifacts.patterns import check_patterns
from adapters_kit.errors import ModelError, did_you_mean, gist
from adapters_kit.methods.adapterhub import folder as adapterhub
from adapters_kit.methods.configs import config_to_options, infer_task_type, task_heads
from adapters_kit.methods.moved import names_now, targets_now
from adapters_kit.names import ADAPTER_CONFIG
from adapters_kit.peft_plugin import peft_methods


@dataclass
class Saved:
    """An adapter that lies in a folder, for one base model.

    Attributes:
        folder: where it lies.
        config: its peft config, to be trained further.
        state: its tensors under the names that peft saves them by.
        lends_head: the file holds no task head: the adapter was trained for another task or without one, and goes on
            with the model's own.
    """

    folder: Path
    config: PeftConfig
    state: dict[str, torch.Tensor]
    lends_head: bool


def read_saved(folder: Path, base: nn.Module) -> Saved:
    """The adapter in `folder`, for `base`, which is read and not changed.

    Raises:
        ModelError: it asks for a method that does not exist, or has weights that the model has no place for.
        ShippingError: files that cannot be read.
    """
    task = infer_task_type(base)
    if adapterhub.is_adapterhub(folder):
        config, state = adapterhub.convert(folder, base)
        config.task_type = task
        config.modules_to_save = task_heads(base) or None
        return Saved(folder, config, state, lends_head=True)
    raw = read_raw(folder)
    mlx.check_base(folder, getattr(base, "config", None))
    check_fields(folder, raw)
    check_patterns(raw, [path for path, _ in base.named_modules()])
    state = read_weights(folder)
    check_sizes(folder, raw, state)
    try:
        config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**raw))
    except KeyError as error:
        kind = error.args[0]
        raise ModelError(
            f"{folder / ADAPTER_CONFIG} asks for the method {kind!r}, which neither peft nor a plug-in provides. "
            f"{did_you_mean(str(kind).lower(), peft_methods())}"
        ) from None
    except Exception as error:  # peft raises whatever the fields provoke
        raise ModelError(f"{folder / ADAPTER_CONFIG} is not a usable peft config: {gist(error)}") from error
    check_options(folder, raw)
    config = targets_now(as_trained(config), state, base)
    # Trained for another task, such as a language adapter under a classifier: the head is the model's own.
    lends_head = config.task_type not in (None, task) and not isinstance(config, PromptLearningConfig)
    if lends_head:
        config.task_type = task
        if hasattr(config, "modules_to_save"):
            config.modules_to_save = task_heads(base) or None
    return Saved(folder, config, state, lends_head)


def as_trained(config: PeftConfig) -> PeftConfig:
    """The config under which the saved tensors are what is trained: p-tuning and a projected prefix save what their
    encoder has written, not the encoder. With the config of training, peft would run that through a new encoder."""
    config.inference_mode = False
    if isinstance(config, PromptEncoderConfig):
        shared = {field.name for field in dataclasses.fields(PromptTuningConfig)} - {"peft_type"}
        return PromptTuningConfig(**{k: v for k, v in config_to_options(config).items() if k in shared})
    if isinstance(config, PrefixTuningConfig):
        config.prefix_projection = False
    return config


def fill(model: PeftModel, adapter_name: str, saved: Saved) -> None:
    """Put the tensors of `saved` into the adapter that its config has made in `model`.

    Raises:
        ModelError: tensors that are missing, have no place or another shape.
    """
    own = get_peft_model_state_dict(model, adapter_name=adapter_name)
    state = names_now(saved.state, model, adapter_name, own, model.get_base_model())
    heads = getattr(model.peft_config[adapter_name], "modules_to_save", None) or () if saved.lends_head else ()
    missing = [key for key in own.keys() - state.keys() if not any(f".{head}." in key for head in heads)]
    problems = [f"{key} is missing from the file" for key in missing]
    problems += [f"{key} fits no place in the model" for key in state.keys() - own.keys()]
    if problems:
        raise misfit(saved.folder, model, "; ".join(sorted(problems)[:3]))
    problems = [
        f"{key} has shape {tuple(state[key].shape)}, and the model needs {tuple(own[key].shape)}"
        for key in sorted(state)
        if state[key].shape != own[key].shape
    ]
    if problems:
        raise misfit(saved.folder, model, f"{problems[0]} ({len(problems)} such tensors)")
    set_peft_model_state_dict(model, merged(own, state), adapter_name=adapter_name)


def merged(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The file's tensors over the model's own, which a lent head keeps."""
    return {**own, **state}


def misfit(folder: Path, model: nn.Module, details: str) -> ModelError:
    """The error for an adapter of another base."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return ModelError(
        f"The adapter in {folder} does not fit this {type(base).__name__}: {details}\n"
        "Load the base model that it was trained on; adapter_config.json names it as base_model_name_or_path."
    )
