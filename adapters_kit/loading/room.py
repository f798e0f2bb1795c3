"""A config may describe far more than its files hold: seen on the meta device, before memory is taken for it."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from adapters_kit.artifacts.source import Source
from adapters_kit.errors import AdapterError

# Weights a byte: formats of two bits have some four. More than that, and than a small model's fresh head, is no model.
_DENSEST, _FRESH = 4, 1 << 24
_COMPUTED = 1 << 27  # numbers that need no file: masks and angles of long contexts


def stored_bytes(source: Source) -> int | None:
    """The size of a local model's weights on disk; None where they are not on this machine."""
    folder = Path(source.location)
    if not source.local:
        return None
    if source.gguf_file:
        return (folder / source.gguf_file).stat().st_size
    return sum(path.stat().st_size for end in ("safetensors", "bin") for path in folder.glob(f"*.{end}"))


def check_room(model: nn.Module, stored: int | None, name: str, error: type[AdapterError]) -> None:
    """Refuse a model whose config describes far more weights, or longer masks, than its files can hold.

    Args:
        model: on the meta device.
        stored: bytes of its weights on disk; None: not known, nothing is compared.
        name: of the model, for the message.

    Raises:
        AdapterError: of the type given, naming the largest.
    """
    if stored is None:
        return
    _compare(model.named_parameters(), _DENSEST * stored + _FRESH, "weights", name, error)
    _compare(model.named_buffers(), _DENSEST * stored + _COMPUTED, "computed numbers", name, error)


def check_computed(model: nn.Module, name: str, error: type[AdapterError]) -> None:
    """Refuse masks and angles that take gigabytes, whatever the files hold.

    Args:
        model: on the meta device.
    """
    _compare(model.named_buffers(), 8 * _COMPUTED, "computed numbers", name, error)


def _compare(
    tensors: Iterable[tuple[str, torch.Tensor]], most: int, what: str, name: str, error: type[AdapterError]
) -> None:
    shapes = {path: value.shape for path, value in tensors}
    count = sum(map(math.prod, shapes.values()))
    if count > most:
        path = max(shapes, key=lambda one: math.prod(shapes[one]))
        raise error(
            f"The config.json of {name} describes {count:,} {what} ({path} alone is {tuple(shapes[path])}), far more "
            "than its files can hold: they do not belong together."
        )
