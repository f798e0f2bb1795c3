"""Reads prefixes saved by AdapterHub's `adapters`, flat or reparametrised, as flat prefixes, for `adapterhub.convert`.

One network writes the keys and values of all layers: (tokens, 2 · layers, heads, width), for each layer keys, then
values. Encoder, decoder and cross-attention have one each. Its prefix takes no positions either: nothing has to be
turned. T5 and its kin are left out: there AdapterHub counts the prefix when it looks up relative positions, so that
real tokens get the bias of a distance that is off by the length of the prefix.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from adapters_kit.errors import ModelError, ShippingError
from adapters_kit.methods.prefix import holders as prefix_probe
from adapters_kit.methods.prefix.attention import CHILD
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
    tokens = options["prefix_length"]
    seen = prefix_probe.run(model)
    decodes = any(note.kind != "encoder" for note in seen.values())
    groups: dict[str, list[str]] = {}
    for path, note in seen.items():
        group = "self" if note.kind == "decoder" or not decodes else note.kind
        groups.setdefault(group, []).append(path)
    shapes: dict[str, list[int]] = {}
    state: dict[str, torch.Tensor] = {}
    named = {key.partition(f".prefix_tunings.{name}.")[2].partition("_prefix.")[0] for key in weights} - {""}
    for group, paths in groups.items():
        # Where model and file have one kind of prefix each, it is the same, whatever the library calls it there.
        stored = next(iter(named)) if len(named) == len(groups) == 1 else group
        marker = f".prefix_tunings.{name}.{stored}_prefix."
        # Every layer's file entry repeats the same tensors.
        parts = {key.partition(marker)[2]: value.float() for key, value in weights.items() if marker in key}
        if not parts:
            continue
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
    if not shapes:
        raise ModelError(f"{source} holds no prefix called {name!r} for this {type(model).__name__}.")
    return PrefixConfig(num_virtual_tokens=tokens, shapes=shapes), state


def _written(parts: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    """The flat numbers; a network is run once for them."""
    if "control_trans" in parts:
        return parts["control_trans"]
    hidden = nn.functional.linear(parts["wte.weight"], parts["control_trans.0.weight"], parts["control_trans.0.bias"])
    hidden = ACT2FN[options["non_linearity"].lower()](hidden)
    return nn.functional.linear(hidden, parts["control_trans.2.weight"], parts["control_trans.2.bias"])
