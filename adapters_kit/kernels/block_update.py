"""Changes of the numbers that blocks store: what they add to a layer's output, and the blocks that result.

    W' = (d + Δd) · u + (m + Δm) · v        Δd = d · s

Δm and s have one value for each block of each row, `(out, blocks)`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters_kit.kernels.ggml import FORMATS, codes, read_field, write_field


def minima_codes(raw: Tensor, kind: int) -> Tensor | None:
    """v, once for each run of weights that share it: `(out, in / run)` int8; None where it is 1 everywhere."""
    given = FORMATS[kind]
    if given.run == given.weights:
        return None
    return codes(raw, kind, minimum=True, dtype=torch.float32)[:, :: given.run].to(torch.int8)


def pooled(x: Tensor, run: int) -> Tensor:
    """The sum of `x (..., in)` over each run of inputs: `(..., in / run)`, float32 for narrower dtypes."""
    wide = torch.promote_types(torch.float32, x.dtype)
    return x.unflatten(-1, (-1, run)).sum(-1, dtype=wide)


def minima_output(x: Tensor, change: Tensor, v: Tensor | None, kind: int) -> Tensor:
    """What Δm adds to the output of a layer.

    Args:
        x: `(..., in)`.
        change: Δm `(out, blocks)`.
        v: from `minima_codes`.

    Returns:
        `(..., out)`, in float32 at least.
    """
    given = FORMATS[kind]
    if v is not None:  # (out, blocks) -> (out, runs)
        change = change.repeat_interleave(given.weights // given.run, dim=1) * v.to(change.dtype)
    sums = pooled(x, given.run)
    return F.linear(sums, change.to(sums.dtype))


class ScalesOutput(torch.autograd.Function):
    """What Δd adds to the output of a layer; the weight that it amounts to is made in both passes, and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Tensor, raw: Tensor, kind: int) -> Tensor:
        """Args:
        x: `(..., in)`.
        share: s `(out, blocks)`.
        raw: `(out, bytes)`.
        """
        ctx.save_for_backward(x, share, raw)
        ctx.kind = kind
        return F.linear(x, _scaled(raw, kind, share, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the share."""
        x, share, raw = ctx.saved_tensors
        (dy,) = grads
        dx = dy @ _scaled(raw, ctx.kind, share, dy.dtype) if ctx.needs_input_grad[0] else None
        ds = None
        if ctx.needs_input_grad[1]:
            rows, outs = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            d_weight = (outs.t() @ rows).to(share.dtype)  # (out, in)
            unit = _scaled(raw, ctx.kind, torch.ones_like(share), share.dtype)
            ds = (d_weight * unit).unflatten(1, (share.shape[1], -1)).sum(-1)
        return dx, ds, None, None


def _scaled(raw: Tensor, kind: int, share: Tensor, dtype: torch.dtype) -> Tensor:
    """`d · s · u`, `(out, in)`."""
    d = read_field(raw, kind, _scale_at(kind)).to(share.dtype) * share
    u = codes(raw, kind, minimum=False, dtype=share.dtype)
    return (u.unflatten(1, (share.shape[1], -1)) * d.unsqueeze(-1)).flatten(1).to(dtype)


def _scale_at(kind: int) -> int:
    offset = FORMATS[kind].scale
    assert offset is not None, FORMATS[kind].name
    return offset


def updated(raw: Tensor, kind: int, minima: Tensor | None, scales: Tensor | None) -> Tensor:
    """New blocks: `raw (out, bytes)` with fp16 m + Δm and d · (1 + s). Rounded once; nothing else changes.

    Args:
        minima: Δm `(out, blocks)`.
        scales: s `(out, blocks)`.
    """
    made = raw.clone(memory_format=torch.contiguous_format)
    given = FORMATS[kind]
    if minima is not None and given.minimum is not None:
        write_field(made, kind, given.minimum, read_field(raw, kind, given.minimum).double() + minima)
    if scales is not None:
        write_field(
            made, kind, _scale_at(kind), read_field(raw, kind, _scale_at(kind)).double() * (1 + scales.double())
        )
    return made
