"""The attention function that joins a prefix to keys and values, whichever implementation the model uses.

transformers lets every attention module look its function up by name: `config._attn_implementation`. An attention that
holds a prefix gets a *view* of its config, which shares all of the config's values and answers that one question with
our name while a prefix is active, and with the truth otherwise. `model.config` itself is not touched, and
`model.set_attn_implementation(...)` keeps working: the function below asks the model's own config which one to run.

It runs after the cache has been updated, so the prefix is never cached and takes no positions. What is left to do
is the mask, and each implementation states visibility in its own way:

    eager           adds a float mask (batch, 1, queries, keys)                   pad with 0 on the left
    sdpa            a bool or float mask of that shape                            pad with True or 0
                    or none, meaning causal by `is_causal`                        needs a mask: see `_causal_mask`
    flex_attention  a BlockMask, a function of (query, key) indices               shift the key index
    flash_attention a padding mask (batch, keys), causal towards the last key     pad with 1
"""

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.modeling_utils import AttentionInterface

from adapters_kit.errors import ModelError

NAME = "adapters_kit_prefix"
CHILD = "kv_prefix"  # the name of the prefix layer inside its attention module; must not contain "prefix_"
_TABLE = "ALL_ATTENTION_FUNCTIONS"
_IMPLEMENTATION = "_attn_implementation"


class Prefix(NamedTuple):
    """What is joined at one call.

    Attributes:
        key: (batch or 1, key/value heads, prefix, key width).
        value: (batch or 1, key/value heads, prefix, value width).
        visible: bool (batch, prefix): which rows see which prefix tokens; None if all see all.
        bias: float (batch, 1, queries, prefix), added to the scores of the prefix; None for no gate.
    """

    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor | None
    bias: torch.Tensor | None


class Route(NamedTuple):
    """Where an attention class looks its functions up."""

    table: AttentionInterface
    """Name of an implementation -> its function."""
    eager: Any
    """The module's own function, for "eager"."""


_ROUTES: dict[type, Route | None] = {}


def route(attention: type) -> Route | None:
    """How `attention` finds its attention function; None for a class that does not go through the interface."""
    if attention not in _ROUTES:
        _ROUTES[attention] = next(filter(None, map(_route_in, _functions(attention))), None)
    return _ROUTES[attention]


def _functions(owner: type) -> list[Any]:
    members = [member for parent in owner.__mro__ for member in vars(parent).values()]
    return [inspect.unwrap(member) for member in members if inspect.isroutine(member)]


def _route_in(function: Any) -> Route | None:
    code = getattr(function, "__code__", None)
    if code is None or _TABLE not in code.co_names:
        return None
    # A model file may have its own table and its own eager function: take those that this very function sees.
    scope = function.__globals__
    eager = [scope[name] for name in code.co_names if "eager" in name and callable(scope.get(name))]
    return Route(scope[_TABLE], eager[0] if eager else None)


@cache
def _view_class(config_class: Any) -> Any:
    """A subclass of a config class that answers `_attn_implementation` with `_view_name`, if that is set."""
    truth: Any = getattr(config_class, _IMPLEMENTATION)

    def implementation(self: Any) -> str | None:
        layer = self._view_layer
        return self._view_name if layer is None or not layer.idle else truth.fget(self)

    def rebuild(self: Any, protocol: Any = None) -> tuple:
        return view_config, (self._view_original, self._view_layer, self._view_name)

    body = {
        "__slots__": ("_view_layer", "_view_name", "_view_original"),
        _IMPLEMENTATION: property(implementation, truth.fset),
        # Copies and pickles are made from the original, so that they go on sharing its values.
        "__reduce_ex__": rebuild,
        "__module__": config_class.__module__,
        "__qualname__": config_class.__qualname__,
        "__doc__": config_class.__doc__,
    }
    return type(config_class.__name__, (config_class,), body)


def view_config(config: Any, layer: Any, name: str = NAME) -> Any:
    """A config that shares every value with `config`, and sends attention to the function called `name`.

    Args:
        config: the config that an attention module holds.
        layer: the prefix layer; while it is idle the model's own function is named. None: never idle.
        name: a name registered with `AttentionInterface`.
    """
    kind: Any = type(config)
    view: Any = object.__new__(_view_class(kind))
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "_view_layer", layer)
    object.__setattr__(view, "_view_name", name)
    object.__setattr__(view, "_view_original", config)
    return view


def original_config(config: Any) -> Any:
    """The config that `config` is a view of; `config` itself if it is none."""
    return getattr(config, "_view_original", config)


def prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with the module's prefix joined to the left of the keys and values.

    Args:
        module: the attention module, with a prefix layer as child `kv_prefix`.
        query: (batch, heads, queries, key width).
        key, value: (batch, key/value heads, keys, width), cache included.
        attention_mask: in the form of the implementation that the model's config names.

    Returns:
        As the model's own function: output (batch, queries, heads, value width) and weights, without the prefix.

    Raises:
        ModelError: an implementation, or a use of it, that cannot be right with a prefix.
    """
    implementation = original_config(module.config)._attn_implementation or "eager"
    prefix: Prefix = module.get_submodule(CHILD)(query, key)
    size, queries = prefix.key.shape[2], query.shape[2]
    flash = "flash" in implementation
    _refuse(module, implementation, flash, attention_mask, size + key.shape[2], prefix, kwargs)
    if implementation == "sdpa" and attention_mask is None and queries > 1 and _is_causal(module, kwargs):
        # sdpa takes "no mask, causal" to mean that the n-th query is the n-th key. More keys than queries are then the
        # unwritten rest of a static cache.
        key, value = key[:, :, :queries], value[:, :, :queries]
        attention_mask = _causal_mask(queries, key.device)
    keys = key.shape[2]
    attention_mask = _extend(attention_mask, prefix, query, keys, flash, implementation)
    key = torch.cat([prefix.key.to(key.dtype).expand(key.shape[0], -1, -1, -1), key], dim=2)
    value = torch.cat([prefix.value.to(value.dtype).expand(value.shape[0], -1, -1, -1), value], dim=2)
    if kwargs.get("position_bias") is not None:  # T5: distances between real tokens stay what they were
        kwargs["position_bias"] = F.pad(kwargs["position_bias"][..., :keys], (size, 0))
    found = _ROUTES[type(module)] if type(module) in _ROUTES else route(type(module))
    assert found is not None  # the module came here by its route
    function = found.table.get_interface(implementation, found.eager)
    caller = _Plain(module) if flash else module
    output, weights = function(caller, query, key, value, attention_mask, **kwargs)
    if weights is not None and weights.dim() == 4 and weights.shape[-1] == size + keys:
        weights = weights[..., size:]  # whoever reads attention maps (Whisper's time stamps) counts real tokens
    return output, weights


AttentionInterface.register(NAME, prefix_attention)


class _Plain:
    """An attention module with its original config: flash attention reads the implementation's name from it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.config = original_config(module.config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    told = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if told is None else told


def _causal_mask(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def _extend(
    mask: Any, prefix: Prefix, query: torch.Tensor, keys: int, flash: bool, implementation: str
) -> torch.Tensor | BlockMask | None:
    """The mask for `[prefix, keys]`, from the one for `keys`."""
    size, batch = prefix.key.shape[2], query.shape[0]
    if isinstance(mask, BlockMask) or (implementation == "flex_attention" and prefix.visible is not None):
        return _shift_blocks(mask, prefix, query, keys)
    if mask is None:
        if prefix.visible is None and prefix.bias is None:
            return None
        if flash:
            mask = torch.ones(batch, keys, dtype=torch.long, device=query.device)
        else:
            mask = torch.zeros(1, 1, 1, keys, dtype=query.dtype, device=query.device)
    mask = mask.to(query.device)[..., :keys]
    if flash:
        left = mask.new_ones(batch, size) if prefix.visible is None else prefix.visible.to(mask.dtype)
        return torch.cat([left, mask], dim=1)
    if mask.shape[-1] == 1 < keys:  # one value for all keys
        mask = mask.expand(*mask.shape[:-1], keys)
    if prefix.visible is None and prefix.bias is None:
        return F.pad(mask, (size, 0), value=0.0 if mask.is_floating_point() else 1)
    if prefix.bias is not None and not mask.is_floating_point():
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask.bool(), torch.finfo(query.dtype).min)
    left = torch.zeros(1, 1, 1, size, dtype=mask.dtype, device=mask.device)
    if prefix.bias is not None:
        left = prefix.bias.to(mask.dtype)
    if prefix.visible is not None:
        hidden = ~prefix.visible[:, None, None, :]
        left = left.masked_fill(hidden, torch.finfo(mask.dtype).min) if mask.is_floating_point() else ~hidden
    outer = torch.broadcast_shapes(left.shape[:-1], mask.shape[:-1])
    return torch.cat([left.expand(*outer, size), mask.expand(*outer, keys)], dim=-1)


def _shift_blocks(mask: Any, prefix: Prefix, query: torch.Tensor, keys: int) -> BlockMask:
    size, visible = prefix.key.shape[2], prefix.visible
    # All layers of one kind get the same mask object in a forward: the extended one is kept on it.
    made = getattr(mask, "_with_prefix", None) if visible is None else None
    if made is not None and made[0] == (size, keys):
        return made[1]
    inner = (lambda b, h, i, j: i >= 0) if mask is None else mask.mask_mod

    def shifted(b: Any, h: Any, i: Any, j: Any) -> Any:
        seen = j < size if visible is None else (j < size) & visible[b, torch.clamp(j, max=size - 1)]
        return seen | ((j >= size) & inner(b, h, i, torch.clamp(j - size, min=0)))

    rows = query.shape[0] if visible is not None else mask.shape[0]
    result = create_block_mask(shifted, rows, None, query.shape[2], size + keys, device=str(query.device))
    if visible is None:
        mask._with_prefix = ((size, keys), result)
    return result


def _refuse(
    module: nn.Module, implementation: str, flash: bool, mask: Any, keys: int, prefix: Prefix, kwargs: dict[str, Any]
) -> None:
    """Raise for what would silently be wrong."""
    reason = None
    if not flash and implementation not in ("eager", "sdpa", "flex_attention"):
        reason = "its rules for masks are not known here"
    elif kwargs.get("cache") is not None:
        reason = "a paged cache would store the prefix as if it were text"
    elif prefix.bias is not None and implementation not in ("eager", "sdpa"):
        reason = "it takes no score offsets, which a gated prefix needs"
    elif flash:
        window = kwargs.get("sliding_window")
        if window is not None and keys > window:
            reason = f"its sliding window of {window} would hide the prefix from later tokens"
        elif kwargs.get("cu_seq_lens_q") is not None or (mask is None and _is_packed(kwargs, prefix)):
            reason = "packed sequences of variable length leave no room for a prefix before each"
    if reason:
        raise ModelError(
            f"{type(module).__name__} with attn_implementation={implementation!r} cannot hold a prefix: {reason}. "
            "Call model.set_attn_implementation('sdpa') (or 'eager')."
        )


def _is_packed(kwargs: dict[str, Any], prefix: Prefix) -> bool:
    """Whether position ids start over inside a row, which flash attention takes as a sign of packing."""
    positions = kwargs.get("position_ids")
    if positions is None or positions.dim() != 2 or positions.shape[0] != 1 or positions.shape[1] < 2:
        return False
    return bool((positions.diff(dim=1) != 1).any())
