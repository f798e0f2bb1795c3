"""The trained head that AdapterHub's library saves beside an adapter."""

from pathlib import Path

import torch
from torch import nn

from adapters_kit.errors import ShippingError

HEADS = ("pytorch_model_head.bin", "model_head.safetensors")


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
    fits = all(key in own and own[key].shape == value.shape for key, value in weights.items())
    if fits:
        if all(torch.equal(own[key].cpu().float(), value.float()) for key, value in weights.items()):
            return {}
        if all(any(key.startswith(f"{head}.") for head in heads) for key in weights):
            return {f"base_model.model.{key}": value for key, value in weights.items()}
    shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(weights.items())[:4])
    kind = "a flexible head of its own model class" if any(key.startswith("heads.") for key in weights) else "a head"
    why, way = "has no equal for it", "Load the model with the same head and number of labels"
    if fits:
        why = "has others in its place, which are a part of the base here"
        way = f"Put it there first: model.load_state_dict(torch.load({str(file)!r}), strict=False)"
    raise ShippingError(
        f"{file} holds {kind} that was trained with the adapter ({shapes}), and this {type(model).__name__} {why}. "
        f"{way}; or, to have the adapter without its head, copy the folder without {file.name} and load the copy."
    )
