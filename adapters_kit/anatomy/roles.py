"""What a linear does in its branch, and how many key/value heads an attention has.

The flow of data decides where it can: the last linear of attention is "o", of a feed-forward "down"; the one whose
output enters the activation is "gate". Which of three parallel linears makes the queries only its name tells.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from adapters_kit.anatomy.parts import Branch, Linear
from adapters_kit.anatomy.structure import linear_shape
from adapters_kit.anatomy.trace import Trace

# Names are split at dots, underscores and capitals: `key_proj`, `Wqkv` and `EncDecAttention.k` give "k".
_ATTENTION = {
    "qkv": {"qkv", "wqkv", "in_proj", "c_attn", "query_key_value"},
    "kv": {"kv"},
    "q": {"q", "wq", "query"},
    "k": {"k", "wk", "key"},
    "v": {"v", "wv", "value"},
    "o": {"o", "wo", "out", "output", "post", "dense", "c_proj"},
}
_FEED_FORWARD = {
    "gate_up": {"gate_up", "gate_up_proj"},
    "gate": {"gate", "w1", "wi_0"},
    "up": {"up", "w3", "wi_1", "wi", "fc1", "c_fc", "lin1", "fc_in", "intermediate", "dense_h_to_4h"},
    "down": {"down", "w2", "wo", "fc2", "c_proj", "lin2", "fc_out", "output", "dense_4h_to_h"},
}


def named_role(path: str, kind: str) -> str:
    """The role that the last parts of the path stand for, or ""."""
    names = _ATTENTION if kind.endswith("attention") else _FEED_FORWARD if kind == "ffn" else {}
    for part in reversed(path.split(".")[-2:]):
        part = part.lower()
        if "pos" in part.split("_"):  # projections of relative positions
            return ""
        words = {part, *part.split("_"), re.sub(r"_?(proj|lin|head|linear)_?", "", part)}
        for role, known in names.items():
            if words & known:
                return role
    return ""


def flow_roles(branch: Branch, shapes: Mapping[str, tuple[int, int]], seen: Trace) -> dict[str, str]:
    """Roles of one branch's linears, from what feeds what."""
    found = {path: named_role(path, branch.kind) for path in branch.linears}
    first = [path for path in branch.linears if not seen.upstream[path] & found.keys()]
    later = [path for path in branch.linears if path not in first]
    if branch.kind.endswith("attention") and later:
        for path in branch.linears:
            if found[path] == "o" and path != later[-1]:
                found[path] = ""
        if found[later[-1]] == "":
            found[later[-1]] = "o"
    elif branch.kind == "ffn" and len(later) == 1 and len(first) in (1, 2):
        found[later[0]] = "down"
        activated = [path for path in first if path in seen.activated]
        if len(first) == 1:
            twice = shapes[first[0]][1] == 2 * shapes[later[0]][0]
            found[first[0]] = "gate_up" if twice else "up"
        elif len(activated) == 1:
            found |= {path: "gate" if path in activated else "up" for path in first}
    return found


def linears_of(
    paths: Sequence[str],
    modules: Mapping[str, nn.Module],
    branches: Sequence[Branch],
    seen: Trace,
    never_called: set[str],
) -> tuple[Linear, ...]:
    """The linears of a block, with their roles."""
    shapes = {path: linear_shape(modules[path]) for path in paths}
    roles: dict[str, str] = {}
    for branch in branches:
        roles |= flow_roles(branch, shapes, seen)
    return tuple(
        Linear(
            path,
            roles.get(path, ""),
            *shapes[path],
            type(modules[path]).__name__,
            path in never_called,
        )
        for path in paths
    )


def key_value_heads(linears: Sequence[Linear], branches: Sequence[Branch], config: Any) -> int | None:
    """Heads of keys and values in the block's self-attention: from the width of its projections, else the config."""
    attention = next((branch for branch in branches if branch.kind == "attention"), None)
    if attention is None or config is None:
        return None
    heads = _first(config, "num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads")
    size = _first(config, "head_dim", "d_kv", "d_head")
    widths = {linear.role: linear.out_features for linear in linears if linear.path in attention.linears}
    query = widths.get("q")
    if heads and not size:
        hidden = query or _first(config, "hidden_size", "d_model")
        size = hidden // heads if hidden else None
    if not heads or not size:
        return heads
    if "k" in widths and widths["k"] % size == 0:
        return widths["k"] // size
    if "qkv" in widths and widths["qkv"] % size == 0 and (widths["qkv"] // size - heads) % 2 == 0:
        return (widths["qkv"] // size - heads) // 2
    return _first(config, "num_key_value_heads") or heads


def _first(config: Any, *names: str) -> int | None:
    """The first of these entries that is a number.

    Read from the entries themselves: some configs have one per layer, and refuse to be asked for it by attribute.
    """
    entries = vars(config)
    return next((value for name in names if isinstance(value := entries.get(name), int) and value > 0), None)
