"""LoRA of several adapters around one frozen linear layer, each on its own rows of the batch, as one autograd node.

    rows of adapter 1   | x_1 |         | x_1 |        | s_1 · drop(x_1) A_1ᵀ B_1ᵀ |
    rows of adapter 2   | x_2 |    y =  | x_2 | Wᵀ  +  | s_2 · drop(x_2) A_2ᵀ B_2ᵀ |
    rows without one    | x_3 |         | x_3 |        |             0            |

1. The two wide products, x Wᵀ and dy W, are made once over the rows of all: a quantized weight is unpacked, and a
   16-bit one read, once for all adapters instead of once for each.
2. The narrow ones are those of `lora.py`, adapter by adapter, added in place to the rows that are the adapter's.
3. Kept for the backward pass is x, once, and a few columns and a seed for every adapter: the sum of what the adapters'
   own nodes keep.
4. Padding that an adapter's own run would not have is cut away before anything narrow is computed: dropout draws the
   numbers that it draws alone, and no gradient of A or B sees it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapters_kit.kernels import even
from adapters_kit.kernels.dropout import draw_pattern
from adapters_kit.kernels.lora import MadeOf
from adapters_kit.kernels.low_rank import add_down_part, dropped_source, factor_of
from adapters_kit.kernels.products import cast, narrow, narrow_sum, wide_dtype, widen_
from adapters_kit.kernels.projection import Quantized

_LEADING = 6  # arguments of the node before the tensors of the shares
_TENSORS = 4  # of every share: A, B, c, g


class Share(NamedTuple):
    """One adapter and the rows that are its own.

    Attributes:
        start, stop: its rows of the batch.
        tokens: how many of each row are its own; the others are padding.
        down, up: A `(r, in)` and B `(out, r)`; None where no adapter is.
        up_bias: c `(out,)` or None.
        gain: g `(out,)` or None, what DoRA rescales the columns by.
        scale: s.
        p: probability that dropout drops an input.
        seed: int64 `(1,)` where p is above 0.
    """

    start: int
    stop: int
    tokens: int
    down: Tensor | None = None
    up: Tensor | None = None
    up_bias: Tensor | None = None
    gain: Tensor | None = None
    scale: float = 0.0
    p: float = 0.0
    seed: Tensor | None = None


class Base(NamedTuple):
    """The frozen layer: y = x Wᵀ + b.

    Attributes:
        weight: `(out, in)`, None where `quantized` is not.
        bias: `(out,)` or None, frozen.
    """

    weight: Tensor | None
    bias: Tensor | None
    quantized: Quantized | None


def grouped_lora(x: Tensor, base: Base, shares: Sequence[Share], made_of: MadeOf | None = None) -> Tensor:
    """The output of the layer for the rows of all.

    Args:
        x: `(rows, tokens, in)`, in the dtype to compute in.
        shares: one for each adapter, in the order of their rows, which are all rows.
        made_of: what x was computed from, if that is to be kept instead.

    Returns:
        `(rows, tokens, out)` in the dtype of `x`. Differentiable once.
    """
    tensors = [tensor for share in shares for tensor in (share.down, share.up, share.up_bias, share.gain)]
    bare = tuple(share._replace(down=None, up=None, up_bias=None, gain=None) for share in shares)
    return _GroupedLora.apply(x, bare, base.quantized, made_of, base.weight, base.bias, *tensors)


class _GroupedLora(torch.autograd.Function):
    """See `grouped_lora`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shares: tuple[Share, ...],
        quantized: Quantized | None,
        made_of: MadeOf | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, kept = _forward(x, Base(weight, bias, quantized), _whole(shares, tensors))
        ctx.act = None if made_of is None else made_of[2]
        ctx.save_for_backward(*((x, None) if made_of is None else made_of[:2]), weight, bias, *kept, *tensors)
        ctx.shares, ctx.quantized = shares, quantized
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        first, second, weight, bias, *others = ctx.saved_tensors
        x = first if ctx.act is None else ctx.act(first) * second
        count = len(ctx.shares)
        lows, unscaled, tensors = others[:count], others[count : 2 * count], others[2 * count :]
        needs = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            dx, found = _backward(
                x,
                grad,
                Base(weight, bias, ctx.quantized),
                _whole(ctx.shares, tensors),
                lows,
                unscaled,
                needs[0],
            )
        wanted = [one if need else None for one, need in zip(found, needs[_LEADING:], strict=True)]
        return dx, *[None] * (_LEADING - 1), *wanted


def _whole(shares: Sequence[Share], tensors: Sequence[Any]) -> list[Share]:
    fields = ("down", "up", "up_bias", "gain")
    return [
        share._replace(**dict(zip(fields, tensors[i * _TENSORS : (i + 1) * _TENSORS], strict=True)))
        for i, share in enumerate(shares)
    ]


class _Rows:
    """The rows and tokens of one share in matrices of all: views where it has no padding, copies elsewhere."""

    def __init__(self, share: Share, tokens: int) -> None:
        self.share = share
        self.is_copy = share.tokens != tokens and share.stop - share.start > 1  # of one row, the beginning is a view

    def of(self, matrix: Tensor) -> Tensor:
        """`(all rows, tokens, width)` -> `(rows · own tokens, width)`."""
        return matrix[self.share.start : self.share.stop, : self.share.tokens].reshape(-1, matrix.shape[-1])

    def put(self, matrix: Tensor, part: Tensor) -> None:
        """What `of` gave, changed, back in its place."""
        if self.is_copy:
            place = matrix[self.share.start : self.share.stop, : self.share.tokens]
            place.copy_(part.view(place.shape))


def _forward(x: Tensor, base: Base, shares: list[Share]) -> tuple[Tensor, list[Tensor | None]]:
    """y, and of every share S `(tokens, r)` without the factor 1 / (1 - p), then what its gain multiplies."""
    rows = x.reshape(-1, x.shape[-1])
    if base.quantized is None:
        assert base.weight is not None
        wide = wide_dtype(rows)
        bias = None if base.bias is None else cast(base.bias, wide)
        y = F.linear(cast(rows, wide), cast(base.weight, wide), bias)  # (all tokens, out)
    else:
        y = base.quantized.product(rows)
    y = y.view(*x.shape[:-1], y.shape[-1])  # (all rows, tokens, out)
    if even.is_even(shares, x, y.shape[-1]):
        y, narrow_ones = even.add_all(y, x, shares)
        return y, [*narrow_ones, *[None] * len(shares)]
    lows: list[Tensor | None] = []
    unscaled: list[Tensor | None] = []
    for share in shares:
        low = z = None
        if share.down is not None and share.up is not None:
            place = _Rows(share, x.shape[1])
            own = place.of(x)
            read, positions = dropped_source(own, share.seed, _pattern(own, share), 0, share.p)
            low = narrow(read, share.down, positions)  # (own tokens, r)
            added = None if share.up_bias is None else share.up_bias * share.scale
            part = widen_(place.of(y), low, share.up.t(), factor_of(share.scale, share.p), added)
            if share.gain is not None:
                z = part.clone()  # kept for the gradient of g
                part.copy_(_scaled(part, share.gain, base.bias))
            place.put(y, part)
        lows.append(low)
        unscaled.append(z)
    return cast(y, x.dtype), [*lows, *unscaled]


def _scaled(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """The bias is in z already, and no part of what g multiplies: (z - b) · g + b."""
    return z * gain if bias is None else torch.addcmul(bias - bias * gain, z, gain)


def _pattern(x: Tensor, share: Share) -> list[Tensor] | None:
    return None if share.seed is None else [draw_pattern(x, int(share.seed), share.p)]


def _backward(
    x: Tensor,
    grad: Tensor,
    base: Base,
    shares: list[Share],
    lows: Sequence[Tensor | None],
    unscaled: Sequence[Tensor | None],
    needs_dx: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, and of every share the gradients of A, B, c and g."""
    found: list[Tensor | None] = []
    tokens, dx = x.shape[1], None
    wide = wide_dtype(x.reshape(-1, x.shape[-1]))
    grad = cast(grad, wide).contiguous()  # (all rows, tokens, out)
    if needs_dx:
        weight = base.weight if base.quantized is None else base.quantized.dense(wide)
        assert weight is not None
        scaled = _with_gains(grad, shares)
        dx = torch.mm(scaled.view(-1, scaled.shape[-1]), cast(weight, wide)).view(x.shape)  # (all rows, tokens, in)
        del weight  # a dequantized weight is large
    if even.is_even(shares, x, grad.shape[-1]):
        return even.gradients(dx, grad, x, shares, lows)  # type: ignore[arg-type]
    for share, low, z in zip(shares, lows, unscaled, strict=True):
        if share.down is None or share.up is None or low is None:
            found += [None] * _TENSORS
            continue
        place = _Rows(share, tokens)
        own, dy = place.of(x), place.of(grad)
        factor, gain = factor_of(share.scale, share.p), share.gain
        up = share.up if gain is None else share.up * gain.unsqueeze(1)  # (out, r)
        d_low = narrow(dy, up.t())  # (own tokens, r), without its factor
        d_up = narrow_sum(low, dy).t() * factor  # (out, r)
        total = None
        if gain is not None or share.up_bias is not None:
            total = dy.sum(0, dtype=torch.promote_types(torch.float32, dy.dtype))  # (out,)
        d_gain = None
        if gain is not None:
            d_up.mul_(gain.unsqueeze(1))
            d_gain = (dy * cast(z, gain.dtype)).sum(0)  # type: ignore[arg-type]
            d_gain = d_gain if base.bias is None or total is None else d_gain - total * base.bias
        pattern = _pattern(own, share)
        if dx is not None:
            part = place.of(dx)
            add_down_part(
                part, d_low, share.down, factor, share.seed, 0, share.p, None if pattern is None else pattern[0]
            )
            place.put(dx, part)
        read, positions = dropped_source(cast(own, wide), share.seed, pattern, 0, share.p)
        d_down = narrow_sum(d_low, read, positions) * factor  # (r, in)
        d_up_bias = None
        if share.up_bias is not None and total is not None:
            d_up_bias = (total * share.scale * (1.0 if gain is None else gain)).to(share.up_bias.dtype)
        found += [d_down.to(share.down.dtype), d_up.to(share.up.dtype), d_up_bias, d_gain]
    return None if dx is None else cast(dx, x.dtype), found


def _with_gains(grad: Tensor, shares: list[Share]) -> Tensor:
    """dy · g on the rows of the shares that have one."""
    if all(share.gain is None for share in shares):
        return grad
    scaled = grad.clone()
    for share in shares:
        if share.gain is not None:
            scaled[share.start : share.stop].mul_(share.gain)
    return scaled
