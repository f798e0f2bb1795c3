"""LoRA around one frozen linear layer, or around several that read the same input, as one autograd node.

    y_i = x W_iᵀ + b_i + s · (dropout_i(x) A_iᵀ B_iᵀ + c_i)                       (Hu et al. 2021, arXiv:2106.09685)

Kept for the backward pass: x, once, in the dtype it came in; S = dropout(x) [A_1; A_2; …]ᵀ, a few columns wide; the
seeds of the dropout. Plain autograd keeps x again for every projection, in the adapter's dtype, and a mask as large.

What is computed in which dtype: the products with W in the dtype of x (after autocast), as the base would. The narrow
products with A and B in float32 where x is bf16 or fp16 (`narrow.py`); what they add to y and to dx is rounded once,
together with it. A and B keep their own dtype; on a GPU they are rounded to that of x for the product. Gradients of A
and B come from float32 sums, in the dtype of A and B.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters_kit.kernels.dropout import draw_pattern, draw_seeds, is_mask, zero_dropped
from adapters_kit.kernels.narrow import narrow, narrow_sum, widen_


@dataclass(frozen=True)
class Quantized:
    """A frozen base whose weight is not a plain matrix.

    Attributes:
        product: `x -> x Wᵀ + b`, the base's own forward.
        dense: `dtype -> W`, `(out, in)`; called in the backward pass and freed after use.
    """

    product: Callable[[Tensor], Tensor]
    dense: Callable[[torch.dtype], Tensor]


@dataclass(frozen=True)
class Projection:
    """One linear layer and its LoRA.

    Attributes:
        weight: frozen `(out, in)`, any strides; None for a quantized base.
        bias: `(out,)` or None; may be trained.
        down, up: A `(r, in)` and B `(out, r)`.
        up_bias: c `(out,)` or None.
        quantized: the base where `weight` is None.
    """

    weight: Tensor | None
    bias: Tensor | None
    down: Tensor
    up: Tensor
    up_bias: Tensor | None = None
    quantized: Quantized | None = None


def lora_linear(
    x: Tensor,
    projections: list[Projection],
    scale: float,
    p: float = 0.0,
    shared_mask: bool = False,
    made_of: tuple[Tensor, Tensor, Callable[[Tensor], Tensor]] | None = None,
) -> tuple[Tensor, ...]:
    """The outputs of all `projections` on `x`.

    Args:
        x: `(..., in)`, in the dtype to compute in.
        scale: LoRA's scaling, lora_alpha / r.
        p: dropout probability of LoRA's input, 0 in evaluation. Seeds are drawn from the default CPU generator, in the
            order of `projections`.
        shared_mask: one dropout mask for all of them, and so one down-projection. Off, each has its own as in peft.
        made_of: `(gate, up, act)` where x is `act(gate) · up`: these are kept, and x is computed again.

    Returns:
        One tensor `(..., out_i)` each, in the dtype of `x`.
    """
    seeds = draw_seeds(1 if shared_mask else len(projections)) if p > 0 else None
    columns = [[getattr(item, name) for item in projections] for name in ("weight", "bias", "down", "up", "up_bias")]
    quantized = tuple(item.quantized for item in projections)
    tensors = [tensor for column in columns for tensor in column]
    return LoraLinear.apply(x, seeds, scale, p, shared_mask, quantized, made_of, *tensors)


class LoraLinear(torch.autograd.Function):
    """See `lora_linear`; the tensors come as all weights, then all biases, all A, all B, all c."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seeds: Tensor | None,
        scale: float,
        p: float,
        shared_mask: bool,
        quantized: tuple[Quantized | None, ...],
        made_of: tuple[Tensor, Tensor, Callable[[Tensor], Tensor]] | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = len(quantized)
        weights, biases, downs, ups, up_biases = _columns(tensors, count)
        rows = x.reshape(-1, x.shape[-1])
        low = _down(rows, seeds, p, shared_mask, downs)
        factor = scale / (1 - p) if p < 1 else 0.0
        outputs, start = [], 0
        for i in range(count):
            stop = start + downs[i].shape[0]
            added = None
            if quantized[i] is None:
                y = F.linear(rows, _as(weights[i], x.dtype), _joined_bias(biases[i], up_biases[i], scale, x.dtype))
            else:
                y = quantized[i].product(rows)
                added = None if up_biases[i] is None else up_biases[i] * scale
            widen_(y, low[:, start:stop], ups[i].t(), factor, added)
            # Not `view`: autograd forbids writing in place to a view that a custom node made, and models do write.
            outputs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])))
            start = stop
        ctx.act = None if made_of is None else made_of[2]
        ctx.save_for_backward(*((x, None) if made_of is None else made_of[:2]), seeds, low, *tensors)
        ctx.scale, ctx.p, ctx.shared_mask, ctx.quantized = scale, p, shared_mask, quantized
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grads)
        saved = ctx.saved_tensors  # once: checkpointing recomputes for every access
        device = saved[0].device.type
        if torch.is_autocast_enabled(device):  # backward() called under autocast: the dtypes are settled already
            with torch.autocast(device, enabled=False):
                return _backward(ctx, saved, grads)
        return _backward(ctx, saved, grads)


def _backward(
    ctx: Any, saved: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    count = len(ctx.quantized)
    x, seeds, low, *tensors = _with_input(ctx, saved)
    weights, biases, downs, ups, up_biases = _columns(tensors, count)
    need_x, needs = ctx.needs_input_grad[0], _columns(ctx.needs_input_grad[7:], count)
    need_biases, need_downs, need_ups, need_up_biases = needs[1:]
    p, scale = ctx.p, ctx.scale
    factor = scale / (1 - p) if p < 1 else 0.0
    rows = x.reshape(-1, x.shape[-1])

    d_biases: list[Tensor | None] = [None] * count
    d_ups, d_up_biases = list(d_biases), list(d_biases)
    d_lows: list[Tensor] = []
    dx, start = None, 0
    for i, grad in enumerate(grads):
        stop = start + downs[i].shape[0]
        if grad is None:
            d_lows.append(torch.zeros_like(low[:, start:stop]))
        else:
            # A gradient may arrive in another dtype or strided any way (an expanded sum, a transpose).
            grad = _as(grad.reshape(-1, grad.shape[-1]), x.dtype)
            d_lows.append(narrow(grad, ups[i].t()))
            if need_ups[i]:
                d_ups[i] = narrow_sum(low[:, start:stop], grad).t().mul(factor).to(ups[i].dtype)
            if need_biases[i] or need_up_biases[i]:
                total = grad.sum(0, dtype=torch.promote_types(torch.float32, x.dtype))
                d_biases[i] = total.to(biases[i].dtype) if need_biases[i] else None
                d_up_biases[i] = (total * scale).to(up_biases[i].dtype) if need_up_biases[i] else None
            if need_x:
                weight = _as(weights[i], x.dtype) if ctx.quantized[i] is None else ctx.quantized[i].dense(x.dtype)
                dx = torch.mm(grad, weight) if dx is None else dx.addmm_(grad, weight)
                del weight  # a dequantized weight is large
        start = stop
    d_downs, dx = _down_backward(rows, seeds, ctx, downs, d_lows, dx, grads, need_downs, factor)
    if dx is not None:
        dx = dx.view(x.shape)
    return (dx, None, None, None, None, None, None, *[None] * count, *d_biases, *d_downs, *d_ups, *d_up_biases)


def _down(rows: Tensor, seeds: Tensor | None, p: float, shared_mask: bool, downs: list[Tensor]) -> Tensor:
    """S `(tokens, r_1 + r_2 + …)`, without the factor 1 / (1 - p)."""
    if p <= 0:
        return narrow(rows, _stacked(downs))
    if shared_mask or len(downs) == 1:
        return narrow(dropped(rows, seeds, 0, p), _stacked(downs))
    return torch.cat([narrow(dropped(rows, seeds, i, p), down) for i, down in enumerate(downs)], dim=1)


def _down_backward(
    rows: Tensor,
    seeds: Tensor | None,
    ctx: Any,
    downs: list[Tensor],
    d_lows: list[Tensor],
    dx: Tensor | None,
    grads: tuple[Tensor | None, ...],
    need_downs: list[bool],
    factor: float,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Gradients of every A, and dx with the LoRA part added in place."""
    d_downs: list[Tensor | None] = [None] * len(downs)
    sizes = [down.shape[0] for down in downs]
    # Projections that saw the same dropped input are multiplied together.
    together = ctx.p <= 0 or ctx.shared_mask or len(downs) == 1
    spans = [list(range(len(downs)))] if together else [[i] for i in range(len(downs))]
    for which, span in enumerate(spans):
        if all(grads[i] is None for i in span):
            continue
        d_low = d_lows[span[0]] if len(span) == 1 else torch.cat([d_lows[i] for i in span], dim=1)
        pattern = None
        if ctx.p > 0 and not torch.compiler.is_compiling():
            pattern = draw_pattern(rows, int(seeds[which]), ctx.p)
        if any(need_downs[i] for i in span):
            if ctx.p <= 0:
                source = rows
            else:
                source = dropped(rows, seeds, which, ctx.p) if pattern is None else zero_dropped(rows, pattern)
            stacked = narrow_sum(d_low, source)
            del source
            for i, piece in zip(span, stacked.split([sizes[i] for i in span]), strict=True):
                if need_downs[i] and grads[i] is not None:
                    d_downs[i] = (piece * factor).to(downs[i].dtype)
        if dx is not None:
            matrix = _stacked([downs[i] for i in span])
            if ctx.p <= 0:
                widen_(dx, d_low, matrix, factor)
            elif pattern is None:
                wide = torch.mm(d_low, _as(matrix, rows.dtype))
                dx.add_(dropped(wide, seeds, which, ctx.p), alpha=factor)
            elif is_mask(pattern):
                wide = torch.mm(_as(d_low, rows.dtype), _as(matrix, rows.dtype))
                dx.addcmul_(wide, pattern, value=factor)
            else:
                flat = dx.view(-1)
                before = flat[pattern]
                widen_(dx, d_low, matrix, factor)
                flat.index_copy_(0, pattern, before)
    return d_downs, dx


def _differentiable_backward(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients as a graph of plain operations, for `create_graph=True`."""
    count = len(ctx.quantized)
    x, seeds, _, *tensors = _with_input(ctx, ctx.saved_tensors)
    weights, biases, downs, ups, up_biases = _columns(tensors, count)
    outputs = []
    for i in range(count):
        weight = weights[i] if ctx.quantized[i] is None else ctx.quantized[i].dense(x.dtype)
        y = F.linear(x, _as(weight, x.dtype), None if biases[i] is None else _as(biases[i], x.dtype))
        kept = x
        if ctx.p > 0:
            ones = torch.ones(x.shape, dtype=x.dtype, device=x.device)
            mask = zero_dropped(ones, draw_pattern(ones, int(seeds[0 if ctx.shared_mask else i]), ctx.p))
            kept = x * mask / (1 - ctx.p)
        delta = F.linear(F.linear(kept, _as(downs[i], x.dtype)), _as(ups[i], x.dtype))
        if up_biases[i] is not None:
            delta = delta + _as(up_biases[i], x.dtype)
        outputs.append(y + delta * ctx.scale)
    inputs = [x, None, None, None, None, None, None, *tensors]
    wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
    pairs = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if grad is not None]
    result: list[Tensor | None] = [None] * len(inputs)
    if pairs:
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            [inputs[i] for i in wanted],
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
        for i, grad in zip(wanted, found, strict=True):
            result[i] = grad
    return tuple(result)


def dropped(x: Tensor, seeds: Tensor, which: int, p: float) -> Tensor:
    """`x` with the elements at zero that the seed drops; the others are not rescaled."""
    if torch.compiler.is_compiling():
        return _dropped_op(x, seeds, which, p)
    return zero_dropped(x, draw_pattern(x, int(seeds[which]), p))


@torch.library.custom_op("adapters_kit::dropped", mutates_args=())
def _dropped_op(x: Tensor, seeds: Tensor, which: int, p: float) -> Tensor:
    """`dropped` for torch.compile, which cannot trace a generator."""
    return zero_dropped(x.contiguous(), draw_pattern(x, int(seeds[which]), p))


@_dropped_op.register_fake
def _(x: Tensor, seeds: Tensor, which: int, p: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _with_input(ctx: Any, saved: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The saved tensors with x itself in front, computed again if it was not kept."""
    first, second, *others = saved
    return (first if ctx.act is None else ctx.act(first) * second, *others)


def _columns(items: Any, count: int) -> list[list[Any]]:
    return [list(items[start : start + count]) for start in range(0, 5 * count, count)]


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _stacked(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _joined_bias(bias: Tensor | None, up_bias: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor | None:
    if up_bias is None:
        return None if bias is None else _as(bias, dtype)
    added = up_bias * scale
    return (added if bias is None else bias + added).to(dtype)
