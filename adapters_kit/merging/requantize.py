"""Merged weights quantized again, tensor by tensor, as a checkpoint that transformers loads; and what that costs.

An update that is small beside the step of the quantizer is mostly rounded away. How much is left is measured: the
change that arrives, `Q(base + update) − Q(base)`, projected on the update.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from adapters_kit.artifacts.checkpoint import INDEX, Checkpoint, build_header, open_checkpoint
from adapters_kit.artifacts.dtypes import CODES
from adapters_kit.artifacts.files import write_json
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.artifacts.staging import copy_range
from adapters_kit.errors import ShippingError
from adapters_kit.merging.update import Update
from adapters_kit.merging.weightless import stored_name
from adapters_kit.quantization import bnb_config, check_kind, modules_to_leave, quantizable
from adapters_kit.quantization_table import KINDS, Kind
from adapters_kit.system import WRITE_BINARY, write_at


@dataclass(frozen=True)
class Survival:
    """What requantizing left of an update.

    Attributes:
        kind: "nf4", "fp4" or "int8".
        overall: ⟨Q(W + Δ) − Q(W), Δ⟩ / ⟨Δ, Δ⟩ over all quantized weights: 1 if the update arrives, 0 if it is lost.
        tensors: stored name -> the same for that weight alone.
        noise: ‖Q(W + Δ) − (W + Δ)‖ / ‖Δ‖ over all of them: the rounding error beside the update.
    """

    kind: str
    overall: float
    noise: float
    tensors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.tensors:
            return f"Requantized to {self.kind}; the update is in none of the quantized weights."
        least = min(self.tensors, key=self.tensors.__getitem__)
        text = (
            f"Requantized to {self.kind}: {self.overall:.1%} of the update survived, least in {least} "
            f"({self.tensors[least]:.1%}); the rounding error is {self.noise:.1f} times the update."
        )
        if self.noise > 1:
            text += " Ship the adapter beside the quantized base instead, or merge without quantize."
        return text


def requantize(update: Update, stage: Path, kind: str) -> Survival:
    """Quantize the linears of the merged model in `stage`, and say in its config that they are.

    Args:
        update: the merge; tells the base's weights and which linears are the blocks'.
        kind: "nf4" and "fp4" (blocks of 64, double quantization, bfloat16 products) or "int8" (by row).

    Raises:
        MissingPackageError: no bitsandbytes.
        ShippingError: the model has no linears to quantize.
    """
    check_kind(kind)
    bare = update.attached.bare
    paths = quantizable(bare)
    if not paths:
        raise ShippingError(f"quantize={kind!r}: {type(bare).__name__} has no linears in its blocks to quantize.")
    wanted = {stored_name(bare, f"{path}.weight"): path for path in paths}
    config = bnb_config(kind, skip=modules_to_leave(bare, paths))
    measured = _Measure()
    with open_checkpoint(stage) as merged:
        unknown = wanted.keys() - merged.tensors.keys()
        if unknown:
            raise ShippingError(f"quantize={kind!r}: {min(unknown)} is not stored as a matrix of its own.")
        weight_map: dict[str, str] = {}
        total = 0
        for file in merged.files:
            names, size = _rewrite(update, merged, stage, file, wanted, KINDS[kind], measured)
            weight_map |= dict.fromkeys(names, file)
            total += size
    for file in merged.files:
        os.replace(stage / f"{file}.quantized", stage / file)
    if merged.index is not None:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(stage / INDEX, index)
    write_json(stage / "config.json", read_json(stage / "config.json") | {"quantization_config": config.to_dict()})
    return measured.result(kind)


class _Measure:
    """Sums over the quantized weights."""

    def __init__(self) -> None:
        self.arrived = self.update = self.error = 0.0
        self.tensors: dict[str, float] = {}

    def add(
        self, name: str, base: torch.Tensor, merged: torch.Tensor, before: torch.Tensor, after: torch.Tensor
    ) -> None:
        """One weight: of the base and merged, each as it is and as it comes back quantized `before` and `after`."""
        update = (merged - base).double()
        size = update.square().sum().item()
        if size:
            arrived = ((after - before).double() * update).sum().item()
            self.tensors[name] = arrived / size
            self.arrived, self.update = self.arrived + arrived, self.update + size
            self.error += (after - merged).double().square().sum().item()

    def result(self, kind: str) -> Survival:
        if not self.update:
            return Survival(kind, 0.0, 0.0)
        return Survival(kind, self.arrived / self.update, (self.error / self.update) ** 0.5, self.tensors)


def _rewrite(
    update: Update, merged: Checkpoint, stage: Path, file: str, wanted: dict[str, str], kind: Kind, measured: _Measure
) -> tuple[list[str], int]:
    """One shard, its linears quantized. The data goes to a file of its own first: only then is the header known."""
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    data_path, out_path = stage / f"{file}.data", stage / f"{file}.quantized"
    data = os.open(data_path, WRITE_BINARY, 0o600)
    out = os.open(out_path, WRITE_BINARY, 0o666)
    try:
        at = 0
        for name, stored in merged.tensors.items():
            if stored.file.name != file:
                continue
            parts = _quantized(update, merged, name, wanted[name], kind, measured) if name in wanted else None
            for key, tensor in parts or [(name, merged.read(name))]:
                tensor = tensor.contiguous()
                table[key] = CODES[tensor.dtype], tuple(tensor.shape)
                write_at(data, tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"", at)
                at += tensor.nbytes
        header = build_header(table, merged.metadata[file])
        write_at(out, header, 0)
        copy_range(data, 0, out, len(header), at)
    finally:
        os.close(data)
        os.close(out)
        os.unlink(data_path)
    return list(table), at


def _quantized(
    update: Update, merged: Checkpoint, name: str, path: str, kind: Kind, measured: _Measure
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that stand for one linear's weight in a checkpoint of bitsandbytes."""
    # bitsandbytes stores GPT-2's transposed linears the usual way round.
    turned = isinstance(update.attached.bare.get_submodule(path), Conv1D)
    value, base = merged.read(name), update.weights(f"{path}.weight")
    value, base = (tensor.T.contiguous() if turned else tensor for tensor in (value, base))
    coded = kind.code(value, name)
    before = kind.code(base.to(value.dtype)).weight
    measured.add(name, *(tensor.float() for tensor in (base, value, before, coded.weight)))
    yield from coded.parts.items()
