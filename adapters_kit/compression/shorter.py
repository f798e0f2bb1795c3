"""The config and the tensors' names of a model without some of its layers.

Which key counts the layers is found by trying: the number that is theirs, lowered, has to make a model with fewer.
Lists and patterns with an entry for each layer are cut along. Every layer of the new model has to be of the kind that
the one in its place was: windows, experts and widths that hang on a layer's number are refused, not moved.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from adapters_kit.anatomy.depth import kind_of
from adapters_kit.anatomy.structure import blocks
from adapters_kit.artifacts.checkpoint import Checkpoint
from adapters_kit.errors import AdapterError, ShippingError
from adapters_kit.merging.weightless import base_config, empty_model, trace

_A_LAYER_EACH = ("layer", "block", "pattern")  # words in the names of lists that say something of each layer


def shorter_config(raw: dict[str, Any], model: nn.Module, holder: str, kept: list[int]) -> dict[str, Any]:
    """The config with the number of layers, and what is listed for each, cut to those that are kept.

    Raises:
        ShippingError: no such number; layers that share what others computed.
    """
    whole = len(blocks(model))
    for path, value in _entries(raw):
        if "shared" in path[-1] and "kv" in path[-1] and isinstance(value, int) and value:
            raise ShippingError(
                f"The last {value} layers of this model take keys and values from layers before them ({path[-1]}): "
                "layers cannot be left out of it."
            )
        if value is True and "layer_idx" in path[-1]:
            raise ShippingError(f"The layers of this model compute by their number ({path[-1]}): none can be left out.")
    cut = copy.deepcopy(raw)
    for path, value in list(_entries(raw)):
        listed = (
            isinstance(value, list | str) and len(value) == whole and any(word in path[-1] for word in _A_LAYER_EACH)
        )
        if listed:
            chosen = [value[number] for number in kept]
            _put(cut, path, "".join(chosen) if isinstance(value, str) else chosen)
    counts = [path for path, value in _entries(raw) if type(value) is int and value == whole and path[-1] != "version"]
    for path in sorted(counts, key=lambda path: "layer" not in path[-1]):
        made = copy.deepcopy(cut)
        _put(made, path, len(kept))
        if _layers(made, type(model), holder) == len(kept):
            return made
    raise ShippingError(f"No key of the config says how many layers there are ({whole}): none can be left out.")


def _entries(raw: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from _entries(value, (*before, key))
        else:
            yield (*before, key), value


def _put(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        raw = raw[key]
    raw[path[-1]] = value


def _empty(raw: dict[str, Any], kind: type) -> nn.Module:
    with TemporaryDirectory(prefix="adapters_kit-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        return empty_model(kind, base_config(Path(folder)))


def _layers(raw: dict[str, Any], kind: type, holder: str) -> int | None:
    try:
        return len(_empty(raw, kind).get_submodule(holder))
    except (AdapterError, AttributeError):
        return None


def fits(model: nn.Module, made: dict[str, Any], holder: str, kept: list[int], name: str) -> None:
    """Refuses a config by which a layer would become another kind of layer.

    Raises:
        ShippingError: naming the layer and the module in it.
    """
    old: Any = model.get_submodule(holder)
    new: Any = _empty(made, type(model)).get_submodule(holder)
    for place, number in enumerate(kept):
        one, other = kind_of(old[number]), kind_of(new[place])
        if one != other:
            where = next((a[0] for a, b in zip(one, other, strict=False) if a != b), "")
            raise ShippingError(
                f"Layer {number} of {name} would be number {place}, where the config makes another kind of layer"
                f"{f' (its {where})' if where else ''}: choose other layers to leave out, layers=[…]."
            )


def renamed(model: Any, checkpoint: Checkpoint, holder: str, kept: list[int]) -> tuple[dict[str, str], set[str]]:
    """Names of the checkpoint's tensors -> new names, and the tensors that go.

    Raises:
        ShippingError: tensors that are not stored layer by layer.
    """
    origins, _ = trace(model, checkpoint.tensors)
    whole = len(model.get_submodule(holder))
    keys: list[set[str]] = [set() for _ in range(whole)]
    for name, origin in origins.items():
        if name.startswith(f"{holder}."):
            keys[int(name[len(holder) + 1 :].partition(".")[0])].update(origin.keys)
    split = {key: key.split(".") for key in checkpoint.tensors}
    longest = min((len(split[key]) for own in keys for key in own), default=0)
    for at in range(longest):
        if all(split[key][at] == str(number) for number, own in enumerate(keys) for key in own):
            before = {tuple(split[key][:at]) for own in keys for key in own}
            break
    else:
        raise ShippingError(
            f"The weights in {checkpoint.folder} are not stored layer by layer, as {holder}.0 and so on: load the "
            "model and save it with save_pretrained, then leave layers out of that."
        )
    new = {str(number): str(place) for place, number in enumerate(kept)}
    # Whatever else stands under a layer's name goes with it, such as buffers that the model has no use for.
    inside = {key: parts for key, parts in split.items() if tuple(parts[:at]) in before and parts[at].isdecimal()}
    gone = {key for key, parts in inside.items() if parts[at] not in new}
    names = {
        key: ".".join([*parts[:at], new[parts[at]], *parts[at + 1 :]])
        for key, parts in inside.items()
        if parts[at] in new
    }
    return names, gone
