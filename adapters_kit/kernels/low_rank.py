"""Products with A that a dropped input asks for, as the node of one adapter and that of many make them."""

import torch
from torch import Tensor

from adapters_kit.kernels.dropout import dropped, is_mask
from adapters_kit.kernels.products import cast, widen_


def add_down_part(
    dx: Tensor,
    d_low: Tensor,
    matrix: Tensor,
    factor: float,
    seeds: Tensor | None,
    which: int,
    p: float,
    pattern: Tensor | None,
) -> None:
    """Add `factor · d_low · matrix` to `dx`, where the input was not dropped."""
    if seeds is None:
        widen_(dx, d_low, matrix, factor)
    elif pattern is None:
        dx.add_(dropped(torch.mm(d_low, cast(matrix, dx.dtype)), seeds, which, p), alpha=factor)
    elif is_mask(pattern):
        wide = torch.mm(cast(d_low, dx.dtype), cast(matrix, dx.dtype))
        dx.addcmul_(wide, cast(pattern, dx.dtype), value=factor)
    else:
        flat = dx.view(-1)
        before = flat.index_select(0, pattern)
        widen_(dx, d_low, matrix, factor)
        flat.put_(pattern, before)


def dropped_source(
    x: Tensor, seeds: Tensor | None, patterns: list[Tensor] | None, which: int, p: float
) -> tuple[Tensor, Tensor | None]:
    """What a down-projection reads, without the factor 1 / (1 - p), and positions in it that count as zero."""
    if seeds is None:
        return x, None
    if patterns is None:
        return dropped(x, seeds, which, p), None
    pattern = patterns[which]
    return (x * cast(pattern, x.dtype), None) if is_mask(pattern) else (x, pattern)


def factor_of(scale: float, p: float) -> float:
    """What multiplies B·A·x for what dropout lets through of x."""
    return scale / (1 - p) if p < 1 else 0.0
