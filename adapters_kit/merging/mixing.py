"""Several adapters merged at once: what each adds to the weights, summed or trimmed, whatever their methods.

peft's `combination_type="linear"` adds factors, whose product has cross terms, and leaves DoRA's magnitudes out. Here
each adapter is merged alone, tensor by tensor in float32, and `base + Σ weight · (merged − base)` is rounded once. So
DoRA counts with its magnitudes: m · (W + BA) / ‖W + BA‖ − W. TIES and DARE are peft's arithmetic on these updates, with
no detour through low-rank factors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft.utils.merge_utils import dare_linear, ties

from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.checkpoint import Checkpoint
from adapters_kit.errors import ShippingError, UnknownNameError, did_you_mean
from adapters_kit.merging.deltas import merge_unit
from adapters_kit.merging.job import Job, plan
from adapters_kit.merging.output import Layout, lay_out

METHODS = ("sum", "ties", "dare")


@dataclass(frozen=True)
class Mix:
    """How updates become one.

    Attributes:
        method: "sum", "ties" or "dare".
        density: share of the values that "ties" and "dare" keep, above 0 and up to 1.
        seed: of DARE's choice.

    Raises:
        UnknownNameError: no such method.
        ShippingError: a density out of range.
    """

    method: str = "sum"
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UnknownNameError(f"Unknown method {self.method!r}. {did_you_mean(self.method, METHODS)}")
        if not 0 < self.density <= 1:
            raise ShippingError(f"density={self.density}: a share above 0 and up to 1.")

    def generator(self) -> torch.Generator:
        """DARE's choices: one for all tensors, in their order."""
        return torch.Generator().manual_seed(self.seed)

    def __call__(
        self, updates: Sequence[torch.Tensor], weights: Sequence[float], generator: torch.Generator
    ) -> torch.Tensor:
        """One update for those of the adapters that change a tensor; all of one shape, float32."""
        updates, weights = list(updates), list(weights)
        if self.method == "sum":
            return sum(update * weight for update, weight in zip(updates, weights, strict=True))
        if self.method == "ties":
            if len(updates) == 1:  # peft's vote needs two
                updates, weights = [updates[0], torch.zeros_like(updates[0])], [weights[0], 0.0]
            return ties(updates, torch.tensor(weights), self.density, "total")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            return dare_linear(updates, torch.tensor(weights), self.density)


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


def changed_sum(jobs: Sequence[Job], weights: Sequence[float], mix: Mix) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the output, value in float32) of every tensor that some adapter changes; one module in memory."""
    tables = [{unit.path: unit for unit in job.attached.units} for job in jobs]
    generator = mix.generator()
    for path in dict.fromkeys(path for table in tables for path in table):
        updates: dict[str, list[tuple[torch.Tensor, float]]] = {}
        for job, weight, table in zip(jobs, weights, tables, strict=True):
            merged = merge_unit(table[path], job.adapter, job.read) if path in table else {}
            for name, value in merged.items():
                updates.setdefault(name, []).append((value.sub_(job.read(name)), weight))
        for name, found in updates.items():
            if any(name in job.written for job in jobs):
                value = jobs[0].read(name).float() + mix(*zip(*found, strict=True), generator)
                yield jobs[0].origins[name].keys[0], value
