"""Adapters of one rank on equally many tokens each: their narrow products as batches of matrices, one call for all.

With few tokens an adapter, calling costs more than multiplying: eight adapters make six narrow products each in every
layer. What `grouped.py` does adapter by adapter is done here at once, in float32 (or the dtype of a wider x), with the
same numbers; it is taken where all of x fits a CPU's cache in that dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapters_kit.kernels.dropout import draw_pattern, is_mask
from adapters_kit.kernels.low_rank import factor_of
from adapters_kit.kernels.products import cast, converts, fine_dtype

_MOST = 2**22  # elements of x or y: 16 MB in float32


def is_even(shares: Sequence[Any], x: Tensor, out: int) -> bool:
    """Whether `shares` (of `grouped.py`) on `x (rows, tokens, in)` are of one shape, without biases and gains."""
    first = shares[0]
    if len(shares) < 2 or first.down is None or not converts(x) or x.numel() // x.shape[-1] * out > _MOST:
        return False
    rows = first.stop - first.start
    return x.numel() <= _MOST and all(
        share.down is not None
        and share.down.shape == first.down.shape
        and share.down.dtype == first.down.dtype
        and (share.start, share.stop, share.tokens) == (rows * at, rows * (at + 1), x.shape[1])
        and share.up_bias is None
        and share.gain is None
        for at, share in enumerate(shares)
    )


def add_all(y: Tensor, x: Tensor, shares: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
    """`y (rows, tokens, out)` with every adapter's part added, and of each S `(tokens, r)` without 1 / (1 - p)."""
    fine, count = fine_dtype(x), len(shares)
    low = torch.bmm(_dropped(x, shares, fine), _downs(shares, fine).transpose(1, 2))  # (adapters, tokens, r)
    wide = cast(y, fine).view(count, -1, y.shape[-1])
    wide.baddbmm_(low * _factors(shares, fine), _ups(shares, fine).transpose(1, 2))  # (adapters, tokens, out)
    return cast(wide, x.dtype).view(y.shape), list(low)


def gradients(
    dx: Tensor | None, grad: Tensor, x: Tensor, shares: Sequence[Any], lows: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx with every adapter's part added, in the dtype of `x`; of each the gradients of A, B, c and g."""
    fine, count = fine_dtype(x), len(shares)
    dy = cast(grad, fine).view(count, -1, grad.shape[-1])  # (adapters, tokens, out)
    factors = _factors(shares, fine)
    d_low = torch.bmm(dy, _ups(shares, fine)) * factors  # (adapters, tokens, r)
    d_ups = torch.bmm(dy.transpose(1, 2), torch.stack(list(lows)) * factors)  # (adapters, out, r)
    d_downs = torch.bmm(d_low.transpose(1, 2), _dropped(x, shares, fine))  # (adapters, r, in)
    if dx is not None:
        wide = cast(dx, fine).view(count, -1, x.shape[-1])
        if all(share.seed is None for share in shares):
            wide.baddbmm_(d_low, _downs(shares, fine))
        else:
            wide.add_(_drop_(torch.bmm(d_low, _downs(shares, fine)), shares, x.shape))
        dx = cast(wide, x.dtype).view(x.shape)
    found: list[Tensor | None] = []
    for share, d_down, d_up in zip(shares, d_downs, d_ups, strict=True):
        found += [d_down.to(share.down.dtype), d_up.to(share.up.dtype), None, None]
    return dx, found


def _downs(shares: Sequence[Any], dtype: torch.dtype) -> Tensor:
    return torch.stack([cast(share.down, dtype) for share in shares])  # (adapters, r, in)


def _ups(shares: Sequence[Any], dtype: torch.dtype) -> Tensor:
    return torch.stack([cast(share.up, dtype) for share in shares])  # (adapters, out, r)


def _factors(shares: Sequence[Any], dtype: torch.dtype) -> Tensor:
    return torch.tensor([factor_of(share.scale, share.p) for share in shares], dtype=dtype).view(-1, 1, 1)


def _dropped(x: Tensor, shares: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """x in `dtype`, `(adapters, tokens, in)`, with zeros where each adapter's dropout has them."""
    wide = cast(x, dtype).reshape(len(shares), -1, x.shape[-1])
    if all(share.seed is None for share in shares):
        return wide
    return _drop_(wide.clone() if wide.data_ptr() == x.data_ptr() else wide, shares, x.shape)


def _drop_(wide: Tensor, shares: Sequence[Any], shape: torch.Size) -> Tensor:
    """Zeros in `wide (adapters, tokens, in)`, in place; each adapter draws as for its own rows of `shape`."""
    for own, share in zip(wide, shares, strict=True):
        if share.seed is None:
            continue
        pattern = draw_pattern(own.view(-1, *shape[1:]), int(share.seed), share.p)
        if is_mask(pattern):
            own.mul_(pattern.view(own.shape))
        else:
            own.view(-1).scatter_(0, pattern, 0.0)
    return wide
