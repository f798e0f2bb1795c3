"""Whether an adapter of AdapterHub's library sits in this model where the library has put it.

Its files name modules, not equations. What it computes at a module is known for one shape of block: attention is added
to the stream, then the feed-forward reads that sum and is added to it. So the model is run once, and what each branch
gives, what it is added to and what comes out are compared. A block of another shape is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters_kit import anatomy
from adapters_kit.anatomy import probe_inputs
from adapters_kit.anatomy.parts import Block, Branch, Tap
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.errors import ModelError

_INTERFACE = "adapter_interface.json"


def check_class(source: Path, model: nn.Module) -> None:
    """Refuse a model that the library computes otherwise than transformers, without any adapter.

    Every class of the library 1.3.0 was run before and after it took the model over. Where the outputs differ it is for
    one of two reasons, and one run of the model shows both: its blocks have one place behind attention and one behind
    the feed-forward, and leave out what a block adds besides (X-MOD's adapters of languages); and it makes a fused
    projection anew with a bias, which starts at random and is not saved (DeBERTa, ModernBERT).

    Args:
        source: the folder, for messages.
        model: the base model, not wrapped; it is run once on a tiny input.

    Raises:
        ModelError: an adapter that was trained there sits on another function.
    """
    for block in anatomy.map_model(model).blocks:
        kinds = [branch.kind for branch in block.branches]
        twice = next((branch for branch in block.branches if kinds.count(branch.kind) > 1), None)
        bare = next(
            (one.path for one in block.linears if one.role == "qkv" and _no_bias(model.get_submodule(one.path))), None
        )
        if twice is not None:
            what = f"computes {block.path} with one {twice.kind} branch, where this {type(model).__name__} adds two"
        elif bare is not None:
            what = f"gave {bare} a bias that this {type(model).__name__} does not have, at random, and did not save it"
        else:
            continue
        raise ModelError(
            f"{source}: AdapterHub's library {what}: its outputs are others than transformers' even without an "
            "adapter, and what was trained there is not for this model. It was not converted. Train it anew with the "
            "method of the same name here."
        )


def _interface(source: Path) -> dict[str, Any]:
    """What the library was told of a class that it does not know: which modules are which."""
    told = read_json(source / _INTERFACE).get("interface") if (source / _INTERFACE).is_file() else None
    return told if isinstance(told, dict) else {}


def _no_bias(module: nn.Module) -> bool:
    return hasattr(module, "weight") and getattr(module, "bias", None) is None


def check_placement(source: Path, model: nn.Module, sites: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a model whose blocks are not of the one shape for which the library's placement is known.

    Args:
        source: the folder, for messages.
        model: the base model, not wrapped; it is run once on a tiny input.
        sites: the adapters' places, as `find_sites` gives them.

    Raises:
        ModelError: says which branch, and what it does otherwise.
    """
    found, interface = anatomy.map_model(model), _interface(source)
    used = {(site["layer"], site["role"]): site for site in sites.values()}
    wanted = [
        (block, branch, used[number, branch.kind])
        for number, block in enumerate(found.blocks)
        for branch in block.branches
        if (number, branch.kind) in used
    ]
    for block, branch, site in wanted:
        told = interface.get("layer_pre_self_attn" if branch.kind == "attention" else "layer_pre_ffn")
        if interface and site["reads"] != "branch" and (not told or branch.norm is not None):
            raise _unproved(source, model, branch, "the library was not told where the stream is")
        if site["reads"] != "branch" and _parallel(block, branch):
            raise _unproved(source, model, branch, "attention and feed-forward are added to the stream side by side")
        if branch.branch_norm is not None and site["reads"] != "branch":
            raise _unproved(source, model, branch, "a branch is normalized before it is added")
    seen = _Seen(model, [branch for block in found.blocks for branch in block.branches], found.blocks)
    for block, branch, _ in wanted:
        together = [other for other in block.branches if other is branch or other.residual == branch.residual]
        if not seen.adds_up(block, branch, together):
            raise _unproved(source, model, branch, "what a branch gives is changed (scaled) before it is added")


def _parallel(block: Block, branch: Branch) -> bool:
    return any(other.residual == branch.residual for other in block.branches if other is not branch)


def _unproved(source: Path, model: nn.Module, branch: Branch, what: str) -> ModelError:
    return ModelError(
        f"{source}: in {type(model).__name__} {what} ({branch.module or branch.kind}), and where AdapterHub's library "
        "puts such an adapter there is not known, so the outputs might differ. It was not converted. Train it "
        "anew with the method of the same name here."
    )


class _Seen:
    """What one forward shows of every branch: its output h, the stream x that it is added to, and their sum."""

    def __init__(self, model: nn.Module, branches: list[Branch], blocks: tuple[Block, ...]) -> None:
        self.values: dict[tuple[str, str, Any], torch.Tensor] = {}
        handles = []
        places: set[tuple[str, str, Any]] = {(block.path, "output", None) for block in blocks}
        for branch in branches:
            places |= {(tap.path, tap.side, tap.key) for tap in (branch.residual, branch.sum) if tap is not None}
            if branch.module is not None:
                places.add((branch.module, "output", branch.index))
        was_training = model.training
        model.eval()
        try:
            for path, side, key in places:
                handles.append(self._watch(model.get_submodule(path), (path, side, key)))
            with torch.no_grad():
                model(**probe_inputs(model))
        finally:
            model.train(was_training)
            for handle in handles:
                handle.remove()

    def _watch(self, module: nn.Module, place: tuple[str, str, Any]) -> Any:
        _, side, key = place

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.values.setdefault(place, (args[key] if isinstance(key, int) else kwargs[key]).clone())

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            value = output[key or 0] if isinstance(output, tuple | list) else output
            if isinstance(value, torch.Tensor):
                self.values.setdefault(place, value.clone())

        if side == "input":
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    def _at(self, tap: Tap | None) -> torch.Tensor | None:
        return None if tap is None else self.values.get((tap.path, tap.side, tap.key))

    def adds_up(self, block: Block, branch: Branch, together: list[Branch]) -> bool:
        """Whether x and the outputs of the branches that are added to it make what the block goes on with."""
        x = self._at(branch.residual)
        total = self._at(branch.sum)
        if total is None and branch.norm is None:
            total = self.values.get((block.path, "output", None))
        if x is None or total is None:
            return False
        for other in together:
            h = self.values.get((other.module, "output", other.index)) if other.module else None
            if h is None:
                return False
            x = x + h
        size = max(float(total.abs().max()), 1e-6)
        exact = total.dtype in (torch.float32, torch.float64)
        return x.shape == total.shape and float((x - total).abs().max()) <= (1e-5 if exact else 3e-2) * size
