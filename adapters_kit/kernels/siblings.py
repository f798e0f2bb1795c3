"""Projections that read one tensor (q, k and v; gate and up) are computed together when the first of them is called.

Which ones they are is read off a dry run, on fake tensors where that works: no memory, no arithmetic. The
groups are fixed from then on, so that activation checkpointing recomputes exactly what it did. At call time they are
only trusted as far as the very same tensor object arrives again, unchanged; otherwise a layer computes on its own.
"""

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters_kit.anatomy import base_model, fake, probe_inputs, shape_dtype, shapes_alone
from adapters_kit.anatomy.structure import is_linear
from adapters_kit.devices import with_generator


@dataclass
class _Waiting:
    """Outputs that were computed ahead for one input.

    The input is held weakly: its lifetime is not ours to stretch.
    """

    x: "weakref.ref[Tensor]"
    version: int
    mode: tuple
    outputs: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)


class Siblings:
    """A group of layers, in calling order, and the outputs that still wait for their layer's call."""

    def __init__(self, members: list[nn.Module]) -> None:
        self.members = members
        self.waiting: _Waiting | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a model start with nothing computed.
        return {"members": self.members, "waiting": None}

    def leads(self, layer: nn.Module) -> bool:
        """Whether `layer` is the one that is called first. Replicas of a layer lead nobody."""
        return self.members[0] is layer

    def put(self, x: Tensor, layers: list[nn.Module], calls: list[Any], outputs: tuple[Tensor, ...]) -> None:
        """Keep the outputs of `layers` on `x` until each is called."""
        ahead = {id(layer): (call, y) for layer, call, y in zip(layers, calls, outputs, strict=True)}
        self.waiting = _Waiting(weakref.ref(x), x._version, _mode(x), ahead)

    def take(self, x: Tensor, layer: nn.Module, call: Any) -> Tensor | None:
        """The output of `layer` on `x` if it waits here and was computed as `call` says."""
        waiting = self.waiting
        if waiting is None or waiting.x() is not x or waiting.version != x._version or waiting.mode != _mode(x):
            return None
        planned, y = waiting.outputs.pop(id(layer), (None, None))
        if not waiting.outputs:
            self.waiting = None
        return y if planned is not None and planned.same(call) else None


def _mode(x: Tensor) -> tuple:
    """What, beside the input and the parameters, decides how an output is made."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), autocast, x.requires_grad


def find_groups(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> tuple[list[list[str]], str | None]:
    """Paths of linears that have one parent and read one tensor, in calling order.

    A twin of the model runs on fake tensors. Where its code asks for a value, which they do not have, the model itself
    runs once on a few tokens, if all of it is in plain tensors on one device.

    Args:
        model: a transformers model, wrapped by peft or not. It is left as it was.
        inputs: a batch to run the model itself on, for models that do not come from transformers.

    Returns:
        The groups of two and more, as paths in the base model, and the reason if no run reached the end.
    """
    base = base_model(model)
    if inputs is not None:
        return _dry_run(base, inputs)
    if not isinstance(base, PreTrainedModel):
        return [], f"{type(base).__name__} is not a transformers model; fuse(model, inputs=batch) finds its siblings"
    try:
        twin = base if shapes_alone(base) else _meta_twin(base)
        with fake(twin, shape_dtype(twin)):
            groups, failure = _dry_run(twin, probe_inputs(twin))
    except Exception as error:
        return [], f"no dry run: {_first_line(error)}"
    if failure is not None and _can_run(base):
        groups, failure = _dry_run(base, probe_inputs(base))
    return groups, failure


def _dry_run(model: nn.Module, batch: Mapping[str, Any]) -> tuple[list[list[str]], str | None]:
    seen: dict[tuple[str, int], list[str]] = {}
    alive = []  # an id is only unique while its tensor lives

    def record(path: str, x: Any) -> None:
        if isinstance(x, Tensor):
            alive.append(x)
            group = seen.setdefault((path.rpartition(".")[0], id(x)), [])
            if path not in group:
                group.append(path)

    handles = []
    for name, module in model.named_modules():
        if is_linear(module):
            # Hooks go on the layer that the model calls: what peft put around a linear sees the same input.
            path = name.replace(".base_layer", "")
            handles.append(module.register_forward_pre_hook(lambda _, args, path=path: record(path, args[0])))
    training = {module: module.training for module in model.modules()}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    failure = None
    try:
        with torch.no_grad(), torch.random.fork_rng(**with_generator(device)):
            for module in training:
                # bitsandbytes repacks 4-bit weights for good when they are evaluated on a CPU.
                module.training = is_linear(module)
            model(**batch)
    except Exception as error:
        failure = f"the dry run stopped early: {_first_line(error)}"
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was
    # A layer that also reads something which its siblings do not (DeBERTa's relative positions) is left alone: its
    # call does not tell whether they will follow.
    readings = list(seen.values())
    groups = [
        group
        for group in readings
        if len(group) > 1 and all(other == group or not set(other) & set(group) for other in readings)
    ]
    return [group for position, group in enumerate(groups) if group not in groups[:position]], failure


def _meta_twin(base: PreTrainedModel) -> nn.Module:
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return type(base)._from_config(config, dtype=torch.float32)


def _can_run(base: nn.Module) -> bool:
    parameters = list(base.parameters())
    return (
        all(type(parameter) is nn.Parameter and not parameter.is_meta for parameter in parameters)
        and len({parameter.device for parameter in parameters}) == 1
        and not any(hasattr(module, "_hf_hook") for module in base.modules())
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
