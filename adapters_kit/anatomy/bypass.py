"""Linears that a model never calls: it reads their weight as a tensor, in a fused kernel or a product of its own.

Mamba's `dt_proj`, WavLM's attention. An adapter layer there would never run, yet merging it would change the model.
"""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import nn

from adapters_kit.anatomy.probe import probe_inputs
from adapters_kit.anatomy.structure import base_model, walk

# `self.x.weight`, but not where only its dtype, shape or class is asked for.
_WEIGHT_READ = re.compile(r"(?<!isinstance\()\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|numel|size)\b)")


def bypassed(model: nn.Module, linears: Sequence[str], inputs: Mapping[str, Any] | None = None) -> set[str]:
    """Those of the paths `linears` that a training step uses without calling them.

    Source code names the suspects (for most models none, at the cost of reading a file or two); only then one forward
    on `inputs` (by default `probe_inputs(model)`) tells which of them are called after all. Where that forward cannot
    be finished (on the meta device some cannot), a suspect about which nothing was seen counts as called.
    """
    modules = dict(walk(model))
    suspects: dict[str, tuple[nn.Module, str]] = {}
    for path in linears:
        parent, _, name = path.rpartition(".")
        owner = modules[parent]
        of: Any = type(owner)
        if name in _weights_read(of):
            suspects[path] = (owner, name)
    if not suspects:
        return set()
    never = _never_called(model, list(suspects.values()), inputs)
    return {path for path, (owner, name) in suspects.items() if (type(owner), name) in never}


def _never_called(
    model: nn.Module, suspects: list[tuple[nn.Module, str]], inputs: Mapping[str, Any] | None
) -> set[tuple[type, str]]:
    """`(class, child)` of suspects whose owner ran to its end, in some block, and called the child in none.

    An owner that is used by other methods than its forward (Gemma 3n's AltUp) ran where something else in it ran.
    """
    called: set[tuple[type, str]] = set()
    finished: set[tuple[type, str]] = set()
    begun: set[tuple[type, str]] = set()
    modules = dict(walk(model))
    paths = {module: path for path, module in modules.items()}
    hooks = []
    for owner, name in suspects:
        key = (type(owner), name)
        child = modules[f"{paths[owner]}.{name}"]
        hooks.append(child.register_forward_pre_hook(lambda *_, key=key: called.add(key)))
        hooks.append(owner.register_forward_hook(lambda *_, key=key: finished.add(key)))
        hooks += [
            other.register_forward_pre_hook(lambda *_, key=key: begun.add(key))
            for other in owner.modules()
            if other not in (owner, child)
        ]
    # Fused kernels may be for training only, and the flag that they ask is that of the module that owns the weight.
    modes = {owner: owner.training for owner, _ in suspects}
    base = base_model(model)
    inputs = probe_inputs(base) if inputs is None else dict(inputs)
    if "use_cache" in inspect.signature(base.forward).parameters:
        inputs = {"use_cache": False, **inputs}  # a hybrid whose layers are all state-space cannot make an empty cache
    try:
        for owner in modes:
            owner.training = True
        with suppress(RuntimeError, NotImplementedError), torch.no_grad(), torch.random.fork_rng(devices=[]):
            base(**inputs)
            finished |= begun
    finally:
        for owner, mode in modes.items():
            owner.training = mode
        for hook in hooks:
            hook.remove()
    return finished - called


@cache
def _weights_read(owner: Any) -> frozenset[str]:
    """Every `x` for which code beside the class `owner` reads `self.x.weight`."""
    return frozenset().union(*(_read_in(parent.__module__) for parent in owner.__mro__ if parent is not nn.Module))


@cache
def _read_in(module_name: str) -> frozenset[str]:
    try:
        source = inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):  # made at run time, or built in
        return frozenset()
    return frozenset(_WEIGHT_READ.findall(source))
