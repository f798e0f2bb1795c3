"""The plan of a merge: which stored tensors change, which are new, which are copied. Whatever can be refused without
reading the weights is refused here, before anything is written."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.checkpoint import Checkpoint
from adapters_kit.artifacts.heap import Trimmer
from adapters_kit.errors import ShippingError
from adapters_kit.merging import deltas
from adapters_kit.merging.output import Layout, lay_out
from adapters_kit.merging.roundtrip import roundtrip
from adapters_kit.merging.weightless import (
    Origin,
    base_config,
    model_class,
    read_parameter,
    stored_form,
    stored_name,
    trace,
)

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Job:
    """A merge, planned.

    Attributes:
        origins: parameter -> how the base stores it; every name of a tied parameter leads to the one that is stored.
        written: parameters whose stored tensors change.
        added: parameters that get a new tensor -> its name.
        renamed: base tensor -> its name in the output, where that differs.
        dropped: base tensors that the trained model has no use for.
        untied: whether embedding and head stop sharing their weight.
        rounding: how the base was quantized in training (see `record.quantization`), None if it was not.
        original: merge into the original weights although the training saw quantized ones.
    """

    adapter: Adapter
    attached: deltas.Attached
    checkpoint: Checkpoint
    origins: dict[str, Origin]
    written: set[str]
    added: dict[str, str]
    renamed: dict[str, str]
    dropped: set[str]
    untied: bool
    layout: Layout
    rounding: dict[str, Any] | None = None
    original: bool = False
    notes: list[str] = field(default_factory=list)

    def read(self, name: str) -> torch.Tensor:
        """A base parameter by its name in the model: as stored, or as the quantized base held it in training."""
        origin = self.origins[name]
        made = read_parameter(self.attached.bare, origin, self.checkpoint.read)
        value = made[name] if name in made else made[origin.parameters[0]]
        return value if self.original or name not in self.rounded else self._round(name, value)

    @cached_property
    def rounded(self) -> frozenset[str]:
        """Parameters that the quantized base held in 4 or 8 bit."""
        return frozenset(f"{path}.weight" for path in (self.rounding or {}).get("modules", ()))

    def _round(self, name: str, value: torch.Tensor) -> torch.Tensor:
        value = value.to(getattr(torch, self.adapter.record["dtype"]))
        if isinstance(self.attached.bare.get_submodule(name.rpartition(".")[0]), Conv1D):  # stored transposed
            return roundtrip(value.T, self.rounding).T
        return roundtrip(value, self.rounding)

    @property
    def computed(self) -> set[str]:
        """Base tensors whose values change."""
        return {key for name in self.written for key in self.origins[name].keys}


def plan(adapter: Adapter, checkpoint: Checkpoint, dtype: torch.dtype | None, original: bool = False) -> Job:
    """Match an adapter with the stored tensors of its base.

    Args:
        dtype: of the output's float tensors; None keeps each tensor's own, for a quantized base that of the training.
        original: merge into the original weights even if the training saw quantized ones.

    Raises:
        ShippingError: the adapter does not fit, or the base lacks parameters that the adapter does not bring along.
    """
    config = base_config(checkpoint.folder, adapter)
    if getattr(config, "quantization_config", None):
        raise ShippingError(
            f"{checkpoint.folder} holds quantized weights; an update cannot be added to them. Give the original "
            "16-bit or 32-bit model with base=."
        )
    attached = deltas.attach(adapter, model_class(adapter, config), config)
    bare = attached.bare
    stored, unused = trace(bare, checkpoint.tensors)
    origins = dict(stored)
    for name, names in attached.tied.items():
        keeper = next((other for other in names if other in stored), None)
        if keeper is not None:
            origins.setdefault(name, stored[keeper])
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in attached.replaced.items()}
    for unit in attached.units:
        shapes |= unit.shapes
    _check_complete(attached, origins, shapes, checkpoint.folder)

    job = Job(adapter, attached, checkpoint, origins, set(), {}, {}, set(), False, Layout({}))
    job.rounding, job.original = adapter.record.get("quantize"), original
    if job.rounding and dtype is None:
        dtype = getattr(torch, adapter.record["dtype"])
    split, shared = _split(job, stored, shapes)
    job.untied = bool(split)
    fresh = {name for name in shapes.keys() - shared if name not in origins}
    job.added = {name: stored_name(bare, name) for name in sorted(fresh | split)}
    job.written = {name for name in shapes.keys() - shared - split if name in origins}
    if not original:
        # The weights that the adapter leaves alone were rounded in training as well.
        job.written |= {name for name in job.rounded if name in origins}
    same_class = type(bare).__name__ in (config.architectures or [type(bare).__name__])
    if not same_class:
        # Another head than the base's: write what `save_pretrained` of the trained model would.
        job.dropped = set(unused)
        full = {origin.keys[0]: name for name, origin in stored.items() if origin.converter is None}
        job.renamed = {key: name for key, name in full.items() if name == f"{bare.base_model_prefix}.{key}"}
    job.layout = lay_out(
        checkpoint,
        dtype=dtype,
        computed=job.computed,
        reshaped=_reshaped(job, shapes),
        added={key: shapes.get(name) or tuple(bare.get_parameter(name).shape) for name, key in job.added.items()},
        renamed=job.renamed,
        dropped=job.dropped,
    )
    return job


def _reshaped(job: Job, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    plain = [name for name in job.written if job.origins[name].converter is None]
    return {job.origins[name].keys[0]: shapes[name] for name in plain if name in shapes}


def _check_complete(attached: deltas.Attached, origins: Mapping[str, Origin], shapes: Shapes, folder: Path) -> None:
    parameters = attached.bare.named_parameters(remove_duplicate=False)
    names = {name for name, parameter in parameters if parameter.is_meta}
    missing = names - origins.keys() - shapes.keys()
    missing |= {f"{unit.path}.{name}" for unit in attached.units for name in unit.wanted} - origins.keys()
    if missing:
        raise ShippingError(
            f"{len(missing)} parameters of {type(attached.bare).__name__} are neither in the base {folder} nor in the "
            f"adapter, such as {min(missing)!r}: they were random when the adapter was trained, and nobody saved them. "
            "Train again with them in modules_to_save, or give the right base with base=."
        )


def _split(job: Job, stored: Mapping[str, Origin], shapes: Shapes) -> tuple[set[str], set[str]]:
    """Tied parameters: names that need a tensor of their own now, and names that still share another's.

    A parameter with several names (embedding and head) stays tied if all of them end up equal. Else each name gets its
    own tensor: adding the embedding's update to the head as well would be another model.
    """
    attached = job.attached
    split: set[str] = set()
    shared: set[str] = set()
    for names in set(attached.tied.values()):
        changed = shapes.keys() & set(names)
        if not changed:
            continue
        keeper = next((name for name in names if name in stored), names[0])
        others = set(names) - {keeper}
        if changed == set(names) and _all_equal(job, names):
            shared |= others
        else:
            split |= others
    return split, shared


def _all_equal(job: Job, names: tuple[str, ...]) -> bool:
    attached = job.attached
    values = [attached.replaced[name] for name in names if name in attached.replaced]
    for unit in attached.units:
        if set(unit.shapes) & set(names):
            merged = deltas.merge_unit(unit, job.adapter, job.read)
            values += [value for name, value in merged.items() if name in names]
    return all(value.shape == values[0].shape and torch.equal(value, values[0]) for value in values)


def changed(job: Job) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the output, value) of every tensor that is not copied from the base; one unit after the other."""
    pending: dict[str, torch.Tensor] = {}

    def ready(names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            if name in job.added:
                yield job.added[name], pending[name]
            origin = job.origins.get(name)
            if name not in job.written or origin is None:
                continue
            needed = job.written & set(origin.parameters)
            if needed <= pending.keys():  # one stored tensor may hold several parameters (fused q, k and v)
                whole = {part: pending[part] if part in needed else job.read(part) for part in origin.parameters}
                for key, value in stored_form(job.attached.bare, origin, whole).items():
                    yield job.renamed.get(key, key), value
                for part in needed:
                    del pending[part]

    attached = job.attached
    pending.update(attached.replaced)
    yield from ready(sorted(attached.replaced))
    trimmer = Trimmer()  # of every unit several copies were made and dropped, which else stay in the heap
    for unit in attached.units:
        merged = deltas.merge_unit(unit, job.adapter, job.read)
        trimmer(4 * sum(value.numel() for value in merged.values()))
        pending.update(merged)
        yield from ready(list(merged))
        for name in merged.keys() - job.written:
            del pending[name]
    in_units = {name for unit in attached.units for name in unit.shapes}
    for name in sorted((job.written & job.rounded) - attached.replaced.keys() - in_units):
        pending[name] = job.read(name)
        yield from ready([name])
    for name in job.added.keys() - attached.replaced.keys() - in_units:
        yield job.added[name], job.read(name)  # was tied to a weight that changed; keeps the old values
