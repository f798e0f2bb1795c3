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

from adapters_kit.errors import ShippingError, UnknownNameError, did_you_mean
from adapters_kit.merging.deltas import merge_unit
from adapters_kit.merging.update import Update

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

    def __str__(self) -> str:
        return "The sum" if self.method == "sum" else f"{self.method.upper()} at density {self.density:g}"

    def generator(self) -> torch.Generator:
        """DARE's choices: one for all tensors, in their order."""
        return torch.Generator().manual_seed(self.seed)

    def __call__(
        self, updates: Sequence[torch.Tensor], weights: Sequence[float], generator: torch.Generator
    ) -> torch.Tensor:
        """One update for those of the adapters that change a tensor; all of one shape, float32."""
        updates, weights = list(updates), list(weights)
        if self.method == "sum":
            total = updates[0] * weights[0]
            for update, weight in zip(updates[1:], weights[1:], strict=True):
                total = total + update * weight
            return total
        if self.method == "ties":
            if len(updates) == 1:  # peft's vote needs two
                updates, weights = [updates[0], torch.zeros_like(updates[0])], [weights[0], 0.0]
            return ties(updates, torch.tensor(weights), self.density, "total")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            return dare_linear(updates, torch.tensor(weights), self.density)


def changed_sum(updates: Sequence[Update], factors: Sequence[float], mix: Mix) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the output, value in float32) of every tensor that some adapter changes; one module in memory."""
    tables = [{unit.path: unit for unit in one.attached.units} for one in updates]
    generator = mix.generator()
    for path in dict.fromkeys(path for table in tables for path in table):
        found: dict[str, list[tuple[torch.Tensor, float]]] = {}
        for one, factor, table in zip(updates, factors, tables, strict=True):
            merged = merge_unit(table[path], one.adapter, one.weights) if path in table else {}
            for name, value in merged.items():
                found.setdefault(name, []).append((value.sub_(one.weights(name)), factor))
        for name, parts in found.items():
            if any(name in one.written for one in updates):
                base, first = updates[0].weights(name).float(), updates[0].weights.origins[name]
                yield first.keys[0], base + mix([part for part, _ in parts], [weight for _, weight in parts], generator)
