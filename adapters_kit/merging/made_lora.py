"""A LoRA made of whole updates: factors by the singular value decomposition, what they lose, and their peft config."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from adapters_kit.artifacts.factors import PREFIX, missed
from adapters_kit.errors import ShippingError


@dataclass
class Made:
    """Factors as they are made, and what they lose."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Stored name -> factor."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Module path -> rank."""
    errors: dict[str, float] = field(default_factory=dict)
    """Module path -> what is lost, as a share of the update's norm."""
    lost: float = 0.0
    """Sum of the squares of what is lost."""
    whole: float = 0.0
    """Sum of the squares of all updates."""

    @property
    def size(self) -> float:
        """The norm of all updates together."""
        return math.sqrt(self.whole)

    @property
    def error(self) -> float:
        """The share of it that the factors miss."""
        return math.sqrt(self.lost / self.whole) if self.whole else 0.0

    def add(
        self, path: str, u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, size: float, r: int, energy: float | None
    ) -> None:
        """One module's update from its decomposition, which may end before the update's rank.

        Args:
            u, s, vh: (out, k), (k,), (k, in).
            size: the update's Frobenius norm.
        """
        rank = min(r, len(s))
        if energy is not None:
            kept = s.double().square().cumsum(0) / max(size**2, torch.finfo(torch.float64).tiny)
            rank = min(rank, int((kept < energy).sum()) + 1)
        root = s[:rank].sqrt()
        self.tensors[f"{PREFIX}{path}.lora_A.weight"] = (root[:, None] * vh[:rank]).float()  # (r, in)
        self.tensors[f"{PREFIX}{path}.lora_B.weight"] = (u[:, :rank] * root).float()  # (out, r)
        lost = max(size**2 - s[:rank].double().square().sum().item(), 0.0)
        if len(s) == min(u.shape[0], vh.shape[1]):
            lost = (missed(s, rank) * size) ** 2
        self.ranks[path], self.errors[path] = rank, math.sqrt(lost) / size if size else 0.0
        self.lost, self.whole = self.lost + lost, self.whole + size**2


_EXACT = 1536  # the shorter side up to which the whole decomposition is made; it takes a second at most


def factors(updates: Iterable[tuple[str, torch.Tensor]], r: int, energy: float | None) -> Made:
    """Factors of rank `r` at most for each (path, update `(out, in)`); fewer where `energy` of the update is reached.

    Raises:
        ShippingError: an update that is not finite.
    """
    made = Made()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for path, update in updates:
            if not torch.isfinite(update).all():
                raise ShippingError(f"The update of {path} is not finite: a checkpoint is broken.")
            size = update.double().norm().item()
            if not size:
                continue
            if min(update.shape) <= _EXACT or r * 4 > min(update.shape):
                u, s, vh = torch.linalg.svd(update, full_matrices=False)
            else:  # Halko, Martinsson and Tropp 2011, arXiv:0909.4061: the first r, to rounding
                u, s, v = torch.svd_lowrank(update, q=r + 16, niter=6)
                vh = v.T
            made.add(path, u, s, vh, size, r, energy)
    return made


def config(made: Made, base: str | None, task: str | None) -> dict[str, Any]:
    """peft's config of the LoRA: alpha = r everywhere, so that the scale is 1."""
    highest = max(made.ranks.values(), default=1)
    other = {path: rank for path, rank in made.ranks.items() if rank != highest}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": highest,
        "lora_alpha": highest,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "target_modules": sorted(made.ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
