"""Several adapters merged at once: the weighted sum of what each adds to the weights, whatever their methods.

peft's `combination_type="linear"` adds factors, whose product has cross terms, and leaves DoRA's magnitudes out. Here
each adapter is merged alone, tensor by tensor in float32, and `base + Σ weight · (merged − base)` is rounded once. So
DoRA counts with its magnitudes: m · (W + BA) / ‖W + BA‖ − W.
"""

from collections.abc import Iterator, Sequence

import torch

from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.checkpoint import Checkpoint
from adapters_kit.errors import ShippingError
from adapters_kit.shipping.deltas import merge_unit
from adapters_kit.shipping.layout import Layout, lay_out
from adapters_kit.shipping.plan import Job, plan


def plan_sum(
    adapters: Sequence[Adapter], checkpoint: Checkpoint, dtype: torch.dtype | None
) -> tuple[list[Job], Layout]:
    """A job for each adapter, and the layout of their sum.

    Raises:
        ShippingError: an adapter brings along whole parameters or sits on a quantized base, for which there is no sum.
    """
    jobs = [plan(adapter, checkpoint, dtype) for adapter in adapters]
    for job in jobs:
        whole = job.added or job.attached.replaced or any(unit.copy is not None for unit in job.attached.units)
        if whole or job.rounding or any(job.origins[name].converter for name in job.written):
            raise ShippingError(
                f"{job.adapter.folder} does more than add to stored matrices (a trained head, resized embeddings, a "
                "quantized base, converted experts), so there is no sum with others. Merge it alone."
            )
    return jobs, lay_out(checkpoint, dtype=dtype, computed={key for job in jobs for key in job.computed})


def changed_sum(jobs: Sequence[Job], weights: Sequence[float]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the output, value in float32) of every tensor that some adapter changes; one module in memory."""
    tables = [{unit.path: unit for unit in job.attached.units} for job in jobs]
    for path in dict.fromkeys(path for table in tables for path in table):
        total: dict[str, torch.Tensor] = {}
        for job, weight, table in zip(jobs, weights, tables, strict=True):
            merged = merge_unit(table[path], job.adapter, job.read) if path in table else {}
            for name, value in merged.items():
                base = job.read(name).float()
                total[name] = total.get(name, base) + weight * (value - base)
        for name, value in total.items():
            origin = jobs[0].origins[name]
            if any(name in job.written for job in jobs):
                yield origin.keys[0], value
