"""fuse(): peft's LoRA layers compute as one autograd node; unfuse() undoes it.

Only `layer.__class__` changes, to a subclass of peft's own. Parameters, names, checkpoints, merging and switching of
adapters are peft's. At every call a layer looks at itself, and where the node does not cover what it finds, it runs
peft's forward.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora import layer as peft_lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from adapters_kit.kernels import base_layers
from adapters_kit.kernels.dora import with_gain
from adapters_kit.kernels.lora import lora_linear
from adapters_kit.kernels.projection import Projection
from adapters_kit.kernels.siblings import Siblings, find_groups

_GROUP = "_fused_siblings"
_SHARED_MASK = "_fused_shared_mask"
_TRAINED = "its base weight is trained"


@dataclass
class FuseReport:
    """What `fuse` did.

    Attributes:
        fused: paths of the layers that compute as one node.
        plain: path -> why that layer runs peft's forward, as things stand now.
        groups: paths of siblings that share their input and, without dropout, one down-projection; not under
            `torch.compile`.
        unshared: why siblings could not be looked for, or not everywhere.
    """

    fused: list[str] = field(default_factory=list)
    plain: dict[str, str] = field(default_factory=dict)
    groups: list[tuple[str, ...]] = field(default_factory=list)
    unshared: str | None = None

    def __str__(self) -> str:
        total = len(self.fused) + len(self.plain)
        lines = [f"{len(self.fused)} of {total} LoRA layers fused, {len(self.groups)} groups of siblings"]
        for reason, count in Counter(self.plain.values()).most_common():
            where = dict.fromkeys(_shape_of(path) for path, why in self.plain.items() if why == reason)
            shown = ", ".join(list(where)[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
            lines.append(f"  plain, {count}×: {reason}: {shown}")
        lines += [f"  siblings: {self.unshared}"] if self.unshared else []
        return "\n".join(lines)


class Call(NamedTuple):
    """What one layer is about to compute.

    Attributes:
        magnitude: DoRA's m `(out,)`, or None for LoRA.
        dtype: to compute in.
        result: dtype of the output.
    """

    projection: Projection
    """The base layer's product."""
    magnitude: Tensor | None
    scale: float
    """LoRA's factor on B·A."""
    p: float
    """Probability that dropout drops an input."""
    dtype: torch.dtype
    result: torch.dtype

    def joins(self, other: "Call") -> bool:
        """Whether both can be computed in one node."""
        return self[2:] == other[2:]

    def same(self, other: "Call") -> bool:
        """Whether both compute the same."""
        mine, theirs = self.projection, other.projection
        return (
            mine.down is theirs.down
            and mine.up is theirs.up
            and mine.up_bias is theirs.up_bias
            and mine.bias is theirs.bias
            and self.magnitude is other.magnitude
            and self.joins(other)
        )


class _Fused(nn.Module):
    """Mixed in before one of peft's LoRA layers."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = plan_call(self, x) if not args and not any(value is not None for value in kwargs.values()) else None
        if not isinstance(call, Call):
            return super().forward(x, *args, **kwargs)
        return _compute(self, x, call)


class FusedLinear(_Fused, peft_lora.Linear):
    """`peft.tuners.lora.Linear` over nn.Linear or Conv1D, computed as one node."""


_CLASSES: dict[type, type] = {peft_lora.Linear: FusedLinear}
if is_bnb_available():
    from peft.tuners.lora import bnb as peft_bnb

    class FusedLinear8bitLt(_Fused, peft_bnb.Linear8bitLt):
        """`peft.tuners.lora.Linear8bitLt`, computed as one node."""

    _CLASSES[peft_bnb.Linear8bitLt] = FusedLinear8bitLt
    if is_bnb_4bit_available():

        class FusedLinear4bit(_Fused, peft_bnb.Linear4bit):
            """`peft.tuners.lora.Linear4bit`, computed as one node."""

        _CLASSES[peft_bnb.Linear4bit] = FusedLinear4bit
_PLAIN_CLASSES = {fused: plain for plain, fused in _CLASSES.items()}


def fuse(model: nn.Module, *, shared_dropout: bool = False, inputs: Mapping[str, Any] | None = None) -> FuseReport:
    """Make the LoRA layers of `model` compute as one autograd node each, or one for a group of siblings.

    Same numbers, fewer bytes kept for the backward pass, less time. Calling it again is harmless, and needed after
    adapters were added to layers that had none. Layers that cannot be fused are left as they are. Under
    `torch.compile` each layer is a node of its own: siblings share no down-projection there.

    Args:
        model: a `PeftModel`, or any module with peft LoRA layers inside. Changed in place.
        shared_dropout: siblings share one dropout mask, which saves time. Off, each draws its own, as in peft.
        inputs: a batch, as keyword arguments of the base model's forward. Only needed to find siblings in a model that
            does not come from transformers.

    Returns:
        What was fused, what was not, and why.
    """
    report = FuseReport()
    layers: dict[str, nn.Module] = {}
    for path, layer in _lora_layers(model):
        if type(layer) in _CLASSES:
            layer.__class__ = _CLASSES[type(layer)]
        if type(layer) not in _PLAIN_CLASSES:
            report.plain[path] = f"{type(layer).__name__} is not a kind of layer that is fused"
            continue
        layer.__dict__.pop(_GROUP, None)
        layer.__dict__[_SHARED_MASK] = shared_dropout
        base_layers.settle(layer.base_layer)
        layers[path] = layer
        reason = why_plain(layer)
        if reason is None:
            report.fused.append(path)
        else:
            report.plain[path] = reason
    if len(layers) > 1:
        found, report.unshared = find_groups(model, inputs)
        known = {path.removeprefix("base_model.model.").replace(".base_layer", ""): path for path in layers}
        for paths in found:
            members = [known[path] for path in paths if path in known]
            if len(members) > 1:
                group = Siblings([layers[path] for path in members])
                for path in members:
                    layers[path].__dict__[_GROUP] = group
                report.groups.append(tuple(members))
    return report


def fuse_report(model: nn.Module) -> FuseReport:
    """Which LoRA layers of `model` are fused as things stand now, and why the others are not. Changes nothing."""
    report = FuseReport()
    names = {id(layer): path for path, layer in _lora_layers(model)}
    for path, layer in _lora_layers(model):
        if type(layer) in _PLAIN_CLASSES:
            reason = why_plain(layer)
        elif type(layer) in _CLASSES:
            reason = "fuse(model) was not called"
        else:
            reason = f"{type(layer).__name__} is not a kind of layer that is fused"
        if reason is None:
            report.fused.append(path)
        else:
            report.plain[path] = reason
        group: Siblings | None = layer.__dict__.get(_GROUP)
        if group is not None and group.leads(layer):
            report.groups.append(tuple(names[id(member)] for member in group.members))
    return report


def unfuse(model: nn.Module) -> int:
    """Give every fused layer of `model` peft's own class back; returns how many there were."""
    count = 0
    for layer in model.modules():
        if type(layer) in _PLAIN_CLASSES:
            layer.__class__ = _PLAIN_CLASSES[type(layer)]
            layer.__dict__.pop(_GROUP, None)
            layer.__dict__.pop(_SHARED_MASK, None)
            base_layers.unsettle(layer.base_layer)
            count += 1
    return count


def forget(model: nn.Module) -> int:
    """Let go of what siblings computed ahead: after an exception inside `model`, their graph keeps every activation.

    Returns:
        How many groups held something.
    """
    groups = {id(group): group for module in model.modules() if (group := module.__dict__.get(_GROUP)) is not None}
    held = [group for group in groups.values() if group.waiting is not None]
    for group in held:
        group.waiting = None
    return len(held)


# Modules as their dictionaries hold them, whose declared types say less than is true.
_Parts = tuple[str, Any, Any, Any, Any, Any]


def _shape_of(path: str) -> str:
    """A path with `*` for the number of the block, as many layers share it."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path.removeprefix("base_model.model."))


def _lora_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, peft_lora.LoraLayer)]


def why_plain(layer: nn.Module) -> str | None:
    """Why `layer` would run peft's forward now, whatever its input; None if it is fused."""
    found = _inspect(layer)
    if isinstance(found, str):
        return found
    return _TRAINED if found[1]._parameters["weight"].requires_grad else None


def _inspect(layer: Any) -> _Parts | str:
    """The one active adapter, the base layer, A, B, their dropout and DoRA's magnitude, if it is one.

    Or the reason why peft's forward has to run.
    """
    # Longer than a screen: a list of refusals, in the order in which attributes are safe to read.
    # At every call, so the look is quick: straight into the modules' dictionaries, past nn.Module's own __getattr__.
    if layer._disable_adapters:
        return "its adapters are switched off"
    if layer.merged_adapters:
        return "its adapter is merged"
    parts = layer._modules
    downs = parts["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in downs]
    if len(active) != 1:
        return "several adapters are active" if active else "none of its adapters is active"
    name = active[0]
    variant, magnitude = layer.lora_variant.get(name), None
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"its adapter is a variant of LoRA, {type(variant).__name__}"
    if not layer.cast_input_dtype_enabled:
        return "casting of its input is switched off"
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "a hook is set on every module"
    base, dropout = parts["base_layer"], parts["lora_dropout"]._modules[name]
    reason = base_layers.why_plain(base)
    if reason is not None:
        return reason
    down, up = downs[name], parts["lora_B"]._modules[name]
    if type(down) is not nn.Linear or type(up) is not nn.Linear or down._parameters["bias"] is not None:
        return "its A or B is not a plain linear layer"
    if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
        return f"its dropout is a {type(dropout).__name__}"
    if variant is not None:
        magnitude = parts["lora_magnitude_vector"]._modules[name]
        if type(magnitude) is not peft_dora.DoraLinearLayer:
            return f"its magnitude is a {type(magnitude).__name__}"
        if layer.training and type(dropout) is nn.Dropout:
            return "its adapter is DoRA with dropout, which multiplies the base weight by the dropped input as well"
        if peft_dora.ENABLE_DORA_CACHING and not layer.training:
            return "peft keeps the norms of its DoRA (DoraCaching)"
    for module in (base, down, up, dropout) if magnitude is None else (base, down, up, dropout, magnitude):
        own = module.__dict__
        # load() replaces the forward of 8-bit layers by one that only lets inputs of more dimensions in.
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or not getattr(own.get("forward"), "same_numbers", "forward" not in own)
        ):
            return "its base layer or adapter has hooks (offloading, sharding or the user's own)"
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    tensors = (weight, bias, down._parameters["weight"], up._parameters["weight"], up._parameters["bias"])
    for tensor in tensors if magnitude is None else (*tensors, magnitude._parameters["weight"]):
        if tensor is not None and not base_layers.is_plain(tensor):
            return f"it holds a {type(tensor).__name__}, which is not a plain tensor"
    return name, base, down, up, dropout, magnitude


def plan_call(layer: Any, x: Any) -> "Call | str":
    """What to compute on `x`, or why peft's forward has to run."""
    found = _inspect(layer)
    if isinstance(found, str):
        return found
    name, base, down, up, dropout, scaler = found
    # Evaluation needs no gradient. In training a pass without gradients may be one of checkpointing's two, which agree.
    if base._parameters["weight"].requires_grad and (layer.training or torch.is_grad_enabled()):
        return _TRAINED
    if not isinstance(x, Tensor) or not base_layers.is_plain(x) or x.dim() < 1 or not x.is_floating_point():
        return "its input is not a plain floating tensor"
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return "a function transform or forward-mode differentiation is running"
    settled = base_layers.compute_dtypes(base, x)
    if isinstance(settled, str):
        return settled
    a, b, device = down._parameters["weight"], up._parameters["weight"], x.device
    if not base._parameters["weight"].device == a.device == b.device == device:
        return "its weights and its input are on different devices"
    weight, bias = base_layers.weight_and_bias(base)
    magnitude, p = None, dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
    if scaler is not None:
        magnitude, p = scaler._parameters["weight"], 0.0
        if magnitude.device != device:
            return "its weights and its input are on different devices"
    projection = Projection(weight, bias, a, b, up._parameters["bias"], None, base_layers.quantized(base))
    return Call(projection, magnitude, layer.scaling[name], p, *settled)


def draws_alone(layer: nn.Module) -> bool:
    """Whether nothing but its call decides what `layer` computes: no hook, no mask that siblings share."""
    return not (layer._forward_hooks or layer._forward_pre_hooks or layer.__dict__.get(_SHARED_MASK, True))


def _compute(layer: nn.Module, x: Tensor, call: Call) -> Tensor:
    group: Siblings | None = layer.__dict__.get(_GROUP)
    # The compiler sees the whole graph, and a group's state would break it.
    if group is None or torch.compiler.is_compiling() or x.is_inference():
        return _run(layer, x, [call])[0]
    ready = group.take(x, layer, call)
    if ready is not None:
        return ready
    if not group.leads(layer):
        return _run(layer, x, [call])[0]
    layers, calls = [layer], [call]
    for member in group.members[1:]:
        other = plan_call(member, x)
        if isinstance(other, Call) and other.joins(call):
            layers.append(member)
            calls.append(other)
    outputs = _run(layer, x, calls)
    if len(layers) > 1:
        group.put(x, layers[1:], calls[1:], outputs[1:])
    return outputs[0]


def _run(layer: nn.Module, x: Tensor, calls: list[Call]) -> tuple[Tensor, ...]:
    first = calls[0]
    low = x if x.dtype == first.dtype else x.to(first.dtype)
    shared = layer.__dict__[_SHARED_MASK]
    made_of = None
    if low is x and not torch.compiler.is_compiling():
        made_of = getattr(x, "_made_of", None)  # set by recompute.py
    projections = [
        call.projection if call.magnitude is None else with_gain(call.projection, call.magnitude, call.scale)
        for call in calls
    ]
    outputs = lora_linear(low, projections, first.scale, first.p, shared, made_of)
    return outputs if first.result == first.dtype else tuple(y.to(first.result) for y in outputs)
