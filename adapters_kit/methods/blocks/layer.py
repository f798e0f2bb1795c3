"""The layer: a frozen linear in blocks, and the trained changes of what its blocks store."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from adapters_kit.errors import AdapterError
from adapters_kit.kernels.block_tensor import BlockTensor
from adapters_kit.kernels.block_update import ScalesOutput, minima_codes, minima_output, pooled, updated
from adapters_kit.kernels.ggml import FORMATS
from adapters_kit.methods.blocks.config import BlocksConfig

FIX = (
    'Load a .gguf file with quantize="keep"; a model folder becomes one by adapters-kit export FOLDER model.gguf '
    "--format gguf --dtype q4_1."
)


class Change(nn.Module):
    """A matrix `(out, blocks)` that starts at zero: B A of rank r, or every value by itself.

    Args:
        rows, columns: out and the number of blocks in a row.
        r: the rank; None, or one that saves nothing, for a full matrix.
    """

    def __init__(self, rows: int, columns: int, r: int | None) -> None:
        super().__init__()
        self.low_rank = r is not None and r * (rows + columns) < rows * columns
        if self.low_rank and r is not None:
            self.A = nn.Parameter(torch.randn(r, columns) / math.sqrt(columns))  # (r, blocks)
            self.B = nn.Parameter(torch.zeros(rows, r))  # (out, r)
        else:
            self.full = nn.Parameter(torch.zeros(rows, columns))  # (out, blocks)

    def forward(self) -> Tensor:
        """`(out, blocks)`."""
        return self.B @ self.A if self.low_rank else self.full


class BlocksLayer(nn.Module, BaseTunerLayer):
    """A linear whose weight is a `BlockTensor`, with changes of its minima, its scales, or both.

    y = W x + Σ_block Δm · (Σ v x) + Σ_block Δd · (Σ u x)
    """

    adapter_layer_names = ("blocks_minima", "blocks_scales")
    other_param_names = ("scale_factor",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.blocks_minima = nn.ModuleDict()
        self.blocks_scales = nn.ModuleDict()
        self.scale_factor: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._as_loaded: Tensor | None = None
        weight = blocks_of(base_layer)
        v = minima_codes(weight.raw, weight.kind) if FORMATS[weight.kind].minimum is not None else None
        self.register_buffer("minima_codes", v, persistent=False)
        self.minima_codes: Tensor | None
        self.minima_unit = self.unit_of(weight.raw, weight.kind)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    @staticmethod
    def unit_of(raw: Tensor, kind: int) -> float:
        """What Δm is measured in: codes of up to 63 make the same Δm move a weight as much further, and one learning
        rate is to suit all formats. 1 where there are no values to look at (the meta device)."""
        if raw.is_meta:
            return 1.0
        v = minima_codes(raw, kind) if FORMATS[kind].minimum is not None else None
        return 1.0 if v is None else 1 / max(1.0, v.float().square().mean().sqrt().item())

    def add(self, adapter_name: str, config: BlocksConfig, trained: bool) -> None:
        """One adapter more, at zero."""
        weight = blocks_of(self.get_base_layer())
        given = FORMATS[weight.kind]
        rows, columns = weight.raw.shape[0], weight.raw.shape[1] // given.nbytes
        for name in config.fields(weight.kind):
            getattr(self, f"blocks_{name}")[adapter_name] = Change(rows, columns, config.r).to(weight.device)
        self.scale_factor[adapter_name] = config.scale_factor
        self.set_adapter(self.active_adapters, inference_mode=not trained)

    def changes(self, adapter_name: str) -> tuple[Tensor | None, Tensor | None]:
        """Δm and s of an adapter, `(out, blocks)` each; None where it trains no such field."""
        minima = scales = None
        if adapter_name in self.blocks_minima:
            minima = self.blocks_minima[adapter_name]() * self.minima_unit
        if adapter_name in self.blocks_scales:
            scales = self.blocks_scales[adapter_name]() * self.scale_factor[adapter_name]
        return minima, scales

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`(..., in)` -> `(..., out)`, in the base layer's dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        weight = blocks_of(self.get_base_layer())
        for name in self.active_adapters:
            if name in self.blocks_minima:
                y = y + self._minima_output(x, name, weight.kind).to(y.dtype)
            if name in self.blocks_scales:
                _, share = self.changes(name)
                y = y + ScalesOutput.apply(x.to(y.dtype), share, weight.raw, weight.kind).to(y.dtype)
        return y

    def _minima_output(self, x: Tensor, name: str, kind: int) -> Tensor:
        change = self.blocks_minima[name]
        if self.minima_codes is None and change.low_rank:  # never as a whole matrix
            sums = pooled(x, FORMATS[kind].run)  # (..., blocks)
            return sums @ change.A.t().to(sums.dtype) @ change.B.t().to(sums.dtype)
        return minima_output(x, change() * self.minima_unit, self.minima_codes, kind)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the sum of the adapters' changes into the blocks, rounded to fp16 as a file stores them."""
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        weight = blocks_of(self.get_base_layer())
        with torch.no_grad():
            found = [self.changes(name) for name in names]
            minima, scales = (_sum([pair[i] for pair in found]) for i in (0, 1))
            raw = updated(weight.raw, weight.kind, minima, scales)
        made = BlockTensor(raw, weight.kind, weight.dtype)
        if safe_merge and not made.unpack(torch.float32).isfinite().all():
            raise AdapterError(f"Merging {names} would leave values in fp16 that are not finite.")
        if self._as_loaded is None:
            self._as_loaded = weight.raw
        self.get_base_layer().weight = nn.Parameter(made, requires_grad=False)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """The blocks as they were loaded."""
        if self._as_loaded is not None:
            weight = blocks_of(self.get_base_layer())
            made = BlockTensor(self._as_loaded, weight.kind, weight.dtype)
            self.get_base_layer().weight = nn.Parameter(made, requires_grad=False)
        self._as_loaded, self.merged_adapters = None, []


def _sum(changes: Sequence[Tensor | None]) -> Tensor | None:
    there = [change for change in changes if change is not None]
    return sum(there[1:], there[0]) if there else None


def blocks_of(layer: nn.Module) -> BlockTensor:
    """The packed weight of a linear.

    Raises:
        AdapterError: its weight lies in no blocks.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, BlockTensor):
        raise AdapterError(
            f"The method 'blocks' trains what a GGUF file's blocks store, and this layer's weight lies in none. {FIX}"
        )
    return weight
