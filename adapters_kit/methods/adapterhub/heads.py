"""The trained head that AdapterHub's library saves beside an adapter, and its folders of several adapters."""

from pathlib import Path

import torch
from torch import nn

from adapters_kit.artifacts.json_file import read_json
from adapters_kit.errors import ShippingError
from adapters_kit.names import ADAPTER_CONFIG

HEADS = ("pytorch_model_head.bin", "model_head.safetensors")
_SETUP, _FUSION = "adapter_setup.json", "adapter_fusion_config.json"


def head_file(source: Path) -> Path | None:
    """The file with the head's weights, if the folder has one."""
    return next((source / name for name in HEADS if (source / name).is_file()), None)


def head_state(
    file: Path, weights: dict[str, torch.Tensor], model: nn.Module, heads: list[str]
) -> dict[str, torch.Tensor]:
    """The head's weights as peft saves them; empty where they are those that the model has already.

    Args:
        file: where they come from, for messages.
        weights: under AdapterHub's names.
        model: the base model, not wrapped.
        heads: the modules that the user's labels define (`task_heads`).

    Raises:
        ShippingError: a head that this model has no equal for. Leaving it out would change what the adapter says.
    """
    own = model.state_dict()
    if all(key in own and own[key].shape == value.shape for key, value in weights.items()):
        if all(torch.equal(own[key].cpu().float(), value.float()) for key, value in weights.items()):
            return {}
        if all(any(key.startswith(f"{head}.") for head in heads) for key in weights):
            return {f"base_model.model.{key}": value for key, value in weights.items()}
    shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(weights.items())[:4])
    kind = "a flexible head of its own model class" if any(key.startswith("heads.") for key in weights) else "a head"
    raise ShippingError(
        f"{file} holds {kind} that was trained with the adapter ({shapes}), and this {type(model).__name__} has no "
        "equal for it. Load the model with the same head and number of labels; or, to have the adapter without its "
        f"head, copy the folder without {file.name} and load the copy."
    )


def told(folder: Path) -> str | None:
    """What a folder without an adapter of its own is, if AdapterHub's library wrote it, and what to load instead."""
    if (folder / _FUSION).is_file():
        return (
            f"{folder} holds an AdapterFusion layer of AdapterHub's library, which mixes several adapters by attention "
            "and has no equal here. The adapters that it mixes lie in folders of their own, and each can be loaded."
        )
    inner = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}")) if folder.is_dir() else []
    if not inner:
        return None
    first = f"Load one: wrap(model, {str(folder / inner[0])!r})."
    if not (folder / _SETUP).is_file():
        return f"{folder} is a folder of {len(inner)} adapters: {', '.join(map(repr, inner))}. {first}"
    try:
        setup = read_json(folder / _SETUP).get("adapter_setup") or {}
        how = str(setup.get("type", "composition")) if isinstance(setup, dict) else "composition"
    except ShippingError:
        how = "composition"
    several = (
        f"To stack them, load each under its name (adapter_name=...), then ak.activate(model, {inner})."
        if how == "Stack"
        else f"A {how} of them has no equal here."
    )
    return f"{folder} is AdapterHub's {how} of the adapters {', '.join(map(repr, inner))}. {first} {several}"
