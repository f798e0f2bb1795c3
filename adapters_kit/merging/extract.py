"""extract(), convert(), compress(): a plain LoRA for what is none: a fine-tuned checkpoint, another method, too high a
rank.

Each weight's update is made alone, in float32, and brought to two factors by the singular value decomposition (Eckart
and Young 1936); what that loses is measured, by module and as a whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters_kit.artifacts.adapter import CONFIG, WEIGHTS, adapter_folder, open_adapter, read_adapter
from adapters_kit.artifacts.checkpoint import open_checkpoint
from adapters_kit.artifacts.factors import canonicalise, pairs, strip
from adapters_kit.artifacts.files import write_json, write_tensors
from adapters_kit.artifacts.identity import base_hashes
from adapters_kit.artifacts.manifest import describe, write_manifest
from adapters_kit.artifacts.record_reader import FORMAT, RECORD
from adapters_kit.artifacts.side_files import copy_card, copy_processor
from adapters_kit.artifacts.source import base_of, locate, portable_base
from adapters_kit.artifacts.staging import staged
from adapters_kit.errors import ShippingError, UnknownNameError
from adapters_kit.merging.base_folder import as_checkpoint
from adapters_kit.merging.deltas import merge_unit
from adapters_kit.merging.made_lora import Made, factors
from adapters_kit.merging.made_lora import config as lora_config
from adapters_kit.merging.roundtrip import Rounding
from adapters_kit.merging.update import match
from adapters_kit.merging.weightless import base_config, empty_model, model_class, trace
from adapters_kit.merging.weights import BaseWeights

Paths = str | os.PathLike[str]


@dataclass(frozen=True)
class ExtractReport:
    """What was written; `print` it.

    Attributes:
        path: the adapter's folder.
        ranks: module -> its rank.
        errors: module -> the share of its update's Frobenius norm that the factors miss.
        error: the same over all of them together.
        left: tensors that changed and that a LoRA cannot hold (norms, embeddings, biases) -> the norm of their change,
            as a share of that of all changes.
    """

    path: Path
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float
    left: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        rank = f"rank {high}" if low == high else f"ranks {low} to {high}"
        worst = max(self.errors, key=self.errors.__getitem__)
        text = (
            f"LoRA of {len(self.ranks)} modules at {rank} in {self.path}: it misses {self.error:.2%} of the update's "
            "norm, "
            f"most in {worst} ({self.errors[worst]:.2%})."
        )
        if self.left:
            first = max(self.left, key=self.left.__getitem__)
            text += (
                f"\nWarning: {len(self.left)} tensors changed that a LoRA cannot hold, such as {first} "
                f"({self.left[first]:.2%} of all change): they stay the base's."
            )
        return text


def extract(
    base: Paths,
    tuned: Paths,
    out: Paths | None = None,
    *,
    r: int = 16,
    energy: float | None = None,
    overwrite: bool = False,
) -> ExtractReport:
    """A LoRA from the difference of two checkpoints: the base and a full fine-tuning of it.

    Both are read one tensor at a time.

    Args:
        base: folder, .gguf file or hub id of the base.
        tuned: folder or hub id of the fine-tuned model, of the same class and with the same tensors.
        out: the adapter's folder; None takes the name of `tuned` with `-lora` behind it.
        r: rank of every module; with `energy` the highest that one may get.
        energy: choose each module's rank as the lowest that keeps this share of its update's squared norm, such as
            0.99.
        overwrite: replace what `out` holds, if it was written here.

    Returns:
        A report with the errors.

    Raises:
        ShippingError: the checkpoints do not fit together or are equal, or there is no LoRA for what changed.

    Example:
        >>> ak.extract("meta-llama/Llama-3.2-1B", "runs/full", r=32)
    """
    _check(r, energy)
    first, second = locate(base), locate(tuned)
    target = Path(out) if out is not None else name_beside(second)
    with ExitStack() as stack:
        work = Path(stack.enter_context(TemporaryDirectory(prefix="adapters_kit-")))
        places = [stack.enter_context(as_checkpoint(one, work / str(i))) for i, one in enumerate((first, second))]
        old, new = (stack.enter_context(open_checkpoint(place)) for place in places)
        config = base_config(places[1])
        bare = empty_model(model_class(None, config), config)
        (before, _), (after, _) = trace(bare, old.tensors), trace(bare, new.tensors)
        weights = [BaseWeights(bare, one, origins) for one, origins in ((old, before), (new, after))]
        names = [name for name in after if name in before]
        if not names:
            raise ShippingError(
                f"{first} and {second} have no tensor in common: they are not one model and its tuning."
            )
        left: dict[str, float] = {}

        def updates() -> Iterator[tuple[str, torch.Tensor]]:
            for name in names:
                one, other = (read(name).float() for read in weights)
                if one.shape != other.shape:
                    left[name] = math.inf
                elif not torch.equal(one, other):
                    path, _, leaf = name.rpartition(".")
                    module = bare.get_submodule(path)
                    update = other - one
                    if leaf == "weight" and type(module) in (nn.Linear, Conv1D):
                        yield path, update.T if isinstance(module, Conv1D) else update
                    else:
                        left[name] = update.norm().item()

        made = factors(updates(), r, energy)
        left |= dict.fromkeys(after.keys() - before.keys(), math.inf)
        if not made.ranks:
            reason = f"only {', '.join(sorted(left)[:3])} differ" if left else "every tensor is the same"
            raise ShippingError(f"{second} is {first} as far as a LoRA goes: {reason}.")
        record = {"format": FORMAT, "base": describe(base), "tensors": base_hashes(first), "quantize": None}
        name = str(base) if not Path(base).exists() else os.path.abspath(base)
        peft_config = lora_config(made, portable_base(name, target), _task(bare))
        with staged(target, overwrite=overwrite, keep=[first, second]) as stage:
            _write(stage, peft_config, made, record)
            copy_processor(places[1], stage)
            write_manifest(stage, {"base": describe(base), "tuned": describe(tuned), "error": made.error})
    whole = math.hypot(made.size, *(value for value in left.values() if math.isfinite(value))) or 1.0
    shares = {key: value / whole if math.isfinite(value) else 1.0 for key, value in left.items()}
    return ExtractReport(target, made.ranks, made.errors, made.error, shares)


def convert(
    folder: Paths,
    to: str = "lora",
    out: Paths | None = None,
    *,
    r: int | None = None,
    energy: float | None = None,
    base: Paths | None = None,
    overwrite: bool = False,
) -> ExtractReport:
    """An adapter of another kind (DoRA, LoHa, LoKr, VeRA, PiSSA, OFT …) as a plain LoRA, which every server takes.

    Args:
        folder: the adapter's folder.
        to: "lora".
        out: the new folder; None takes the name of `folder` with `-lora` behind it.
        r: rank of every module; None takes the adapter's own rank, twice for one that moved the base (PiSSA).
        energy: choose each module's rank as the lowest that keeps this share of its update's squared norm; `r` is then
            the highest that one may get.
        base: the base model; None takes the one that the adapter names.
        overwrite: replace what `out` holds, if it was written here.

    Returns:
        A report with the errors.

    Raises:
        UnknownNameError: another `to`.
        ShippingError: the adapter is more than updates of linear weights (a prefix, virtual tokens, trained
            embeddings).
    """
    if to != "lora":
        raise UnknownNameError(f"to={to!r}: adapters are converted to 'lora'.")
    adapter = open_adapter(adapter_folder(folder))
    source = base_of(adapter, base)
    own = next((value for key in ("r", "init_r") if type(value := adapter.raw.get(key)) is int and value > 0), 16)
    moved = str(adapter.raw.get("init_lora_weights")).startswith(("pissa", "olora"))
    rank = r if r is not None else own * (2 if moved or adapter.raw.get("use_dora") else 1)
    _check(rank, energy)
    target = Path(out) if out is not None else name_beside(adapter.folder)
    rounding = Rounding.of(adapter.record)
    with ExitStack() as stack:
        work = Path(stack.enter_context(TemporaryDirectory(prefix="adapters_kit-")))
        place = stack.enter_context(as_checkpoint(source, work / "base"))
        checkpoint = stack.enter_context(open_checkpoint(place))
        update = match(adapter, checkpoint, None, rounding, False)
        attached = update.attached
        heads = [unit for unit in attached.units if unit.copy is not None]
        odd = sorted(update.attached.replaced.keys() | update.weights.resized.keys())
        if odd:
            raise ShippingError(f"{adapter.folder} also trains {odd[0]}, which a LoRA cannot hold. Merge it instead.")

        def updates() -> Iterator[tuple[str, torch.Tensor]]:
            for unit in attached.units:
                if unit.copy is not None:
                    continue
                merged = merge_unit(unit, adapter, update.weights)
                for name, value in merged.items():
                    change = value - update.weights(name).float()
                    module = attached.bare.get_submodule(unit.path)
                    if name == f"{unit.path}.weight" and type(module) in (nn.Linear, Conv1D):
                        yield unit.path, change.T if isinstance(module, Conv1D) else change
                    elif change.any():
                        raise ShippingError(
                            f"{adapter.folder} changes {name}, which a LoRA of linears cannot hold. Merge it instead."
                        )

        made = factors(updates(), rank, energy)
        if not made.ranks:
            raise ShippingError(f"{adapter.folder} changes no linear's weight.")
        paths = tuple(f"{unit.path}." for unit in heads)
        extra = {name: tensor for name, tensor in adapter.weights.items() if paths and strip(name).startswith(paths)}
        config = lora_config(made, portable_base(adapter.base, target), adapter.raw.get("task_type"))
        config["modules_to_save"] = adapter.raw.get("modules_to_save") if heads else None
        config["auto_mapping"] = adapter.raw.get("auto_mapping")
        with staged(target, overwrite=overwrite, keep=[adapter.folder, source]) as stage:
            _write(stage, config, made, adapter.record, extra)
            copy_processor(adapter.folder, stage)
            copy_card(adapter.folder, stage, changed=True)
            write_manifest(stage, {"adapter": describe(adapter.folder), "error": made.error})
    return ExtractReport(target, made.ranks, made.errors, made.error)


def compress(
    folder: Paths,
    out: Paths | None = None,
    *,
    energy: float | None = 0.99,
    r: int | None = None,
    base: Paths | None = None,
    overwrite: bool = False,
) -> ExtractReport:
    """A LoRA at the lowest rank that keeps what it learned; each module gets its own.

    Args:
        folder: the adapter's folder. What is no LoRA is converted on the way, which reads the base.
        out: the new folder; None takes the name of `folder` with `-small` behind it.
        energy: share of each update's squared norm to keep; None to go by `r` alone.
        r: the highest rank that a module may get; None takes the adapter's own.
        base: the base model, for what has to be converted; None takes the one that the adapter names.
        overwrite: replace what `out` holds, if it was written here.

    Returns:
        A report with ranks and errors.
    """
    adapter = read_adapter(folder)
    target = Path(out) if out is not None else name_beside(adapter.folder, "-small")
    config = adapter.config
    plain = adapter.method == "lora" and not config.use_dora and not getattr(config, "target_parameters", None)
    if not plain or str(config.init_lora_weights).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        return convert(adapter.folder, out=target, r=r, energy=energy, base=base, overwrite=overwrite)
    raw, tensors, _ = canonicalise(adapter)
    found, rest = pairs(tensors)
    odd = [pair.name_a for pair in found.values() if pair.embedding]
    if odd:
        raise ShippingError(f"{adapter.folder} adapts an embedding ({odd[0]}), which is not compressed.")
    highest = r if r is not None else raw["r"]
    _check(highest, energy)
    made = Made()
    for path, pair in found.items():
        qb, rb = torch.linalg.qr(pair.b.double())  # (out, r), (r, r)
        qa, ra = torch.linalg.qr(pair.a.double().T)  # (in, r), (r, r)
        u, s, vh = torch.linalg.svd(rb @ ra.T)
        made.add(path, qb @ u, s, vh @ qa.T, s.norm().item(), highest, energy)
    with staged(target, overwrite=overwrite, keep=[adapter.folder]) as stage:
        small = lora_config(made, portable_base(adapter.base, target), raw.get("task_type"))
        _write(stage, {**raw, **small}, made, adapter.record, rest)
        copy_processor(adapter.folder, stage)
        copy_card(adapter.folder, stage, changed=True)
        write_manifest(stage, {"adapter": describe(adapter.folder), "error": made.error})
    return ExtractReport(target, made.ranks, made.errors, made.error)


def _write(
    stage: Path,
    config: dict[str, Any],
    made: Made,
    record: dict[str, Any],
    extra: dict[str, torch.Tensor] | None = None,
) -> None:
    write_json(stage / CONFIG, config, sort_keys=True)
    write_tensors(stage / WEIGHTS, made.tensors | (extra or {}))
    if record:
        write_json(stage / RECORD, record, indent=1)


def _task(bare: Any) -> str | None:
    from adapters_kit.methods.configs import infer_task_type

    task = infer_task_type(bare)
    return None if task is None else str(getattr(task, "value", task))


def name_beside(place: Path, end: str = "-lora") -> Path:
    """The default name of what is written."""
    place = Path(os.path.abspath(place))
    if "snapshots" in place.parts:  # the hub cache is not a place to write to
        return Path(place.parent.parent.name.rpartition("--")[2] + end)
    return place.with_name(place.name.removesuffix(".gguf") + end)


def _check(r: int, energy: float | None) -> None:
    if type(r) is not int or r < 1:
        raise ShippingError(f"r={r!r}: a whole number from 1 on.")
    if energy is not None and not 0 < energy <= 1:
        raise ShippingError(f"energy={energy!r}: a share above 0 and up to 1, such as 0.99.")
