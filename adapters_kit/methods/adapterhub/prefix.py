"""Reads prefixes saved by AdapterHub's `adapters`, flat or reparametrised, as flat prefixes, for `adapterhub.convert`.

One network writes the keys and values of all layers: (tokens, 2 · layers, heads, width), for each layer keys, then
values. Encoder, decoder and cross-attention have one each. Its prefix takes no positions either: nothing has to be
turned. T5 and its kin are left out: there AdapterHub counts the prefix when it looks up relative positions, so that
real tokens get the bias of a distance that is off by the length of the prefix.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from adapters_kit.errors import ModelError, ShippingError
from adapters_kit.methods.moved import paths_now
from adapters_kit.methods.prefix import holders as prefix_probe
from adapters_kit.methods.prefix.attention import CHILD, original_config
from adapters_kit.methods.prefix.config import PrefixConfig

_KNOWN = {
    *("architecture", "flat", "prefix_length", "bottleneck_size", "non_linearity", "dropout", "init_weights_seed"),
    *("encoder_prefix", "cross_prefix", "shared_gating"),
}


def convert_prefix(
    source: Path, options: dict[str, Any], name: str, weights: dict[str, torch.Tensor], model: nn.Module
) -> tuple[PrefixConfig, dict[str, torch.Tensor]]:
    """The config and the state dict, as peft saves it, of the prefix `name` for `model`.

    Args:
        source: the folder, for messages.
        options: AdapterHub's config of the adapter.
        weights: its tensors, under AdapterHub's names.
        model: the base model that it was trained on.

    Raises:
        ShippingError: an option without an equal.
        ModelError: sizes that do not fit the model, or relative positions, which make it inexact.
    """
    for option, value in options.items():
        if option not in _KNOWN and value not in (None, False, 0, [], {}):
            raise ShippingError(
                f"{source}: {option}={value!r} has no equal here, so the prefix would compute something else. "
                "It was not converted."
            )
    if any(getattr(module, "has_relative_attention_bias", False) for module in model.modules()):
        raise ModelError(
            f"{source}: on a {type(model).__name__}, AdapterHub's prefix also changes the relative positions of the "
            "text (a token is as far from itself as the prefix is long). Here they stay, so outputs would differ. It "
            "was not converted."
        )
    implementation = original_config(model.config)._attn_implementation
    if implementation not in (None, "eager"):
        raise ModelError(
            f"{source}: under {implementation!r}, its default, AdapterHub's library masks a prefix otherwise than "
            "under 'eager' on most classes, and the folder does not say which it was trained with. Where it was "
            "'eager', load the model so: attn_implementation='eager'. Else train it anew with the method 'prefix'. It "
            "was not converted."
        )
    tokens = options["prefix_length"]
    seen = prefix_probe.run(model)
    stored = _stored(weights, name)
    if not stored:
        raise ModelError(f"{source} holds no prefix called {name!r} for this {type(model).__name__}.")
    shapes: dict[str, list[int]] = {}
    state: dict[str, torch.Tensor] = {}
    now = paths_now(model)
    for group, paths in _groups(seen, stored).items():
        if options.get(f"{group}_prefix") is False:
            continue
        copies = _copies(stored, group, paths, now)
        if not copies or any(not _same(copies[0], other) for other in copies):
            raise ModelError(
                f"{source} holds {', '.join(map(repr, stored))} for the prefixes of this {type(model).__name__}, and "
                f"which of them is for {paths[0]} is not known. It was not converted."
            )
        parts = copies[0]
        flat = _written(parts, options)
        heads, width, _, _ = seen[paths[0]].shape
        needed = tokens * len(paths) * 2 * heads * width
        if flat.numel() != needed:
            raise ModelError(
                f"{source} holds {flat.numel()} numbers for its {group} prefix; {len(paths)} layers with {heads} heads "
                f"of {width} need {needed}. Load the base model that it was trained on."
            )
        both = flat.view(tokens, len(paths), 2, heads, width)
        for layer, path in enumerate(paths):
            shapes[path] = seen[path].shape
            for index, part in enumerate(("key", "value")):
                state[f"base_model.model.{path}.{CHILD}.prefix_{part}"] = both[:, layer, index].contiguous()
    return PrefixConfig(num_virtual_tokens=tokens, shapes=shapes), state


Parts = dict[str, torch.Tensor]


def _stored(weights: Mapping[str, torch.Tensor], name: str) -> dict[str, dict[str, Parts]]:
    """What the library calls a prefix -> the module that has it -> its tensors. Every layer repeats all of them."""
    pattern = re.compile(rf"(.*?)\.?prefix_tuning(?:\.pool)?\.prefix_tunings\.{re.escape(name)}\.([^.]+)\.(.+)")
    found: dict[str, dict[str, Parts]] = {}
    for key, value in weights.items():
        if match := pattern.fullmatch(key):
            found.setdefault(match[2].removesuffix("_prefix"), {}).setdefault(match[1], {})[match[3]] = value.float()
    return found


def _groups(seen: Mapping[str, prefix_probe.Seen], stored: Mapping[str, Any]) -> dict[str, list[str]]:
    """The attention modules that share one prefix, by its name: those of an encoder, of a decoder, across, or, where
    a model has towers, of a tower."""
    decodes = any(note.kind != "encoder" for note in seen.values())
    groups: dict[str, list[str]] = {}
    for path, note in seen.items():
        tower = next((one for one in stored if f"{path.partition('.')[0]}_self" in one), None)
        group = "self" if note.kind == "decoder" or not decodes else note.kind
        groups.setdefault(tower or group, []).append(path)
    return groups


def _copies(
    stored: Mapping[str, Mapping[str, Parts]], group: str, paths: list[str], now: Callable[[str], str | None]
) -> list[Parts]:
    """What the file has as the prefix of a group: as the group's own modules have it, or, where none of them is named
    there, any. Where the file knows one prefix only, that is it; an encoder's own may be called "self"."""
    name = group if group in stored or len(stored) > 1 else next(iter(stored))
    places = stored.get(name) or stored.get("self", {})
    own = [parts for place, parts in places.items() if now(place) in paths]
    return own or (list(places.values()) if name in stored else [])


def _same(one: Parts, other: Parts) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _written(parts: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    """The flat numbers; a network is run once for them."""
    if "control_trans" in parts:
        return parts["control_trans"]
    hidden = nn.functional.linear(parts["wte.weight"], parts["control_trans.0.weight"], parts["control_trans.0.bias"])
    hidden = ACT2FN[options["non_linearity"].lower()](hidden)
    return nn.functional.linear(hidden, parts["control_trans.2.weight"], parts["control_trans.2.bias"])
