"""wrap(): freeze a model and put a trainable module on it, as a `peft.PeftModel`."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig, PeftModel
from torch import nn

from adapters_kit import registry
from adapters_kit.anatomy.rescaling import keep_weights
from adapters_kit.artifacts import foreign
from adapters_kit.artifacts.adapter import adapter_folder
from adapters_kit.artifacts.identity import check_loaded
from adapters_kit.artifacts.record_reader import OURS
from adapters_kit.artifacts.unread import other_adapters
from adapters_kit.errors import ModelError, UnknownNameError
from adapters_kit.kernels.fuse import fuse as fuse_layers
from adapters_kit.kernels.recompute import recompute_cheap
from adapters_kit.methods.configs import build
from adapters_kit.methods.saved_adapter import fill, read_saved
from adapters_kit.methods.together.build import combine
from adapters_kit.methods.together.live import attach
from adapters_kit.methods.virtual_tokens import keep_places
from adapters_kit.names import ADAPTER_CONFIG, is_adapter_folder, looks_like_folder
from adapters_kit.quantization import keep_layout


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
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise UnknownNameError(
            f"The model already has an adapter named {adapter_name!r}. Choose another name: "
            f"wrap(model, ..., adapter_name='{adapter_name}2')."
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    folder = _adapter_folder(method)
    if folder is not None and overrides:
        raise UnknownNameError(
            f"{folder} is a saved adapter, whose options are fixed; {sorted(overrides)} cannot be changed. "
            "Leave them out."
        )
    if folder is not None and not force:
        check_loaded(folder, getattr(base, "config", None))
    keep_weights(base)
    keep_layout(model)  # plain transformers leaves 4-bit weights on a CPU to be spoilt by the next evaluation
    with _untouched_on_failure(model):
        if folder is None:
            wrapped = attach(model, build_config(base, method, **overrides), adapter_name)
        else:
            saved = read_saved(folder, base)
            # peft warns of a base that the folder calls by another name; which it is, `check_loaded` has looked at.
            saved.config.base_model_name_or_path = getattr(base, "name_or_path", None)
            wrapped = attach(model, saved.config, adapter_name)
            fill(wrapped, adapter_name, saved)
    keep_places(wrapped)
    if fuse:
        fuse_layers(wrapped)
    if recompute:
        recompute_cheap(wrapped)
    setattr(base, OURS, True)
    return wrapped


def build_config(
    model: nn.Module, method: str | PeftConfig | Sequence[str | PeftConfig], **overrides: Any
) -> PeftConfig:
    """The peft config that `wrap` uses: defaults, the user's overrides, targets found by structure, all checked.

    Args:
        model: the base model, not wrapped. It is read, never changed.
        method, overrides: as for `wrap`.
    """
    if isinstance(method, list | tuple):
        return build(model, combine(model, method, **overrides), {}, for_task=True)
    return build(model, method, overrides, for_task=True)


def _adapter_folder(method: Any) -> Path | None:
    """`method` as the folder of a saved adapter, if that is what it is."""
    if isinstance(method, PeftConfig | list | tuple):
        return None
    if not isinstance(method, str | os.PathLike):
        raise UnknownNameError(
            f"method={method!r} is no method: give a name such as 'lora', a peft config, the folder of a saved adapter "
            "or of its run, or a list of names and configs."
        )
    folder = adapter_folder(method)
    if is_adapter_folder(folder):
        for note in other_adapters(folder):
            warnings.warn(note, UserWarning, stacklevel=3)
        return folder
    if not looks_like_folder(method) or registry.canonical(str(method)) in registry.known_names():
        return None  # "compacter++" is a name
    if not folder.exists():
        raise UnknownNameError(f"{str(method)!r} is neither a method nor an existing adapter folder.")
    raise UnknownNameError(
        foreign.told(folder, {}) or f"{folder} holds no {ADAPTER_CONFIG}, so it is not a saved adapter."
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
