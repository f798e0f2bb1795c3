"""LoRA around one frozen linear layer, or around several that read the same input, as one autograd node.

    y_i = x W_iᵀ + b_i + s · (dropout_i(x) A_iᵀ B_iᵀ + c_i)                       (Hu et al. 2021, arXiv:2106.09685)

Kept for the backward pass: x, once, in the dtype it came in; S = dropout(x) [A_1; A_2; …]ᵀ, a few columns wide; the
seeds of the dropout. Plain autograd keeps x again for every projection, in the adapter's dtype, and a mask as large.

What is computed in which dtype: the products with W in the dtype of x (after autocast), as the base would, or in
float32 where a CPU multiplies bf16 at half the speed of float32 (`products.py`). The narrow products with A and B in
float32 where x is bf16 or fp16; what they add to y and to dx is rounded once, together with it. A and B keep their own
dtype; on a GPU they are rounded to that of x for the product. Gradients of A and B come from float32 sums, in the dtype
of A and B.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from adapters_kit.kernels.dropout import cut, draw_pattern, draw_seeds, dropped, is_mask, zero_dropped
from adapters_kit.kernels.products import blocks, cast, narrow, narrow_sum, wide_dtype, widen_


class Quantized(NamedTuple):
    """A frozen base whose weight is not a plain matrix.

    Attributes:
        product: `x -> x Wᵀ + b`, the base's own forward.
        dense: `dtype -> W`, `(out, in)`; called in the backward pass and freed after use.
    """

    product: Callable[[Tensor], Tensor]
    dense: Callable[[torch.dtype], Tensor]


class Projection(NamedTuple):
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
    *columns, quantized = zip(*projections, strict=True)
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
        rows = x.reshape(-1, x.shape[-1])
        arguments = (rows, seeds, scale, p, quantized, _columns(tensors, len(quantized)))
        device = x.device.type
        if any(quantized) or torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
            low, outputs = _forward(*arguments)
        else:  # x has the dtype that autocast asks for; from here on dtypes are chosen product by product
            with torch.autocast(device, enabled=False):
                low, outputs = _forward(*arguments)
        # Not `view`: autograd forbids writing in place to a view that a custom node made, and models do write.
        outputs = [torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])) for y in outputs]
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


def _forward(
    rows: Tensor,
    seeds: Tensor | None,
    scale: float,
    p: float,
    quantized: tuple[Quantized | None, ...],
    columns: list[list[Any]],
) -> tuple[Tensor, list[Tensor]]:
    """S `(tokens, r_1 + r_2 + …)`, without the factor 1 / (1 - p), and every y `(tokens, out_i)`."""
    patterns = _patterns(rows, seeds, p)
    wide = rows.dtype if any(quantized) else wide_dtype(rows)
    parts = blocks(rows, wide)
    if parts is None:
        return _forward_part(rows, wide, seeds, patterns, scale, p, quantized, columns)
    done = [
        _forward_part(rows[part], wide, seeds, _cut(patterns, part, rows), scale, p, quantized, columns)
        for part in parts
    ]
    return torch.cat([low for low, _ in done]), [torch.cat(ys) for ys in zip(*(ys for _, ys in done), strict=True)]


def _forward_part(
    rows: Tensor,
    wide: torch.dtype,
    seeds: Tensor | None,
    patterns: list[Tensor] | None,
    scale: float,
    p: float,
    quantized: tuple[Quantized | None, ...],
    columns: list[list[Any]],
) -> tuple[Tensor, list[Tensor]]:
    weights, biases, downs, ups, up_biases = columns
    x = cast(rows, wide)
    pieces = [
        narrow(source, _stacked([downs[i] for i in span]), positions)
        for span, source, positions in _sources(x, seeds, patterns, p, len(downs))
    ]
    low = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    factor = _factor(scale, p)
    outputs, start = [], 0
    for i, up in enumerate(ups):
        stop = start + up.shape[1]
        added = None
        if quantized[i] is None:
            y = F.linear(x, cast(weights[i], wide), _joined_bias(biases[i], up_biases[i], scale, wide))
        else:
            y = quantized[i].product(rows)
            added = None if up_biases[i] is None else up_biases[i] * scale
        outputs.append(cast(widen_(y, low[:, start:stop], up.t(), factor, added), rows.dtype))
        start = stop
    return low, outputs


def _backward(
    ctx: Any, saved: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    count = len(ctx.quantized)
    x, seeds, low, *tensors = _with_input(ctx, saved)
    _, biases, downs, ups, up_biases = columns = _columns(tensors, count)
    needs = _columns(ctx.needs_input_grad[7:], count)
    rows = x.reshape(-1, x.shape[-1])
    grads = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
    patterns = _patterns(rows, seeds, ctx.p)
    wide = wide_dtype(rows)
    parts = blocks(rows, wide)
    if parts is None:
        dx, *sums = _backward_part(ctx, rows, wide, low, seeds, patterns, grads, columns, needs)
    else:
        pieces, sums = [], None
        for part in parts:
            some = [None if grad is None else grad[part] for grad in grads]
            cut_patterns = _cut(patterns, part, rows)
            piece, *found = _backward_part(ctx, rows[part], wide, low[part], seeds, cut_patterns, some, columns, needs)
            pieces.append(piece)
            sums = found if sums is None else [_added(a, b) for a, b in zip(sums, found, strict=True)]
        dx = torch.cat(pieces) if ctx.needs_input_grad[0] and pieces[0] is not None else None
    totals, d_downs, d_ups = sums
    factor = _factor(ctx.scale, ctx.p)
    d_biases, d_up_biases = [None] * count, [None] * count
    for i in range(count):
        if totals[i] is not None:
            d_biases[i] = totals[i].to(biases[i].dtype) if needs[1][i] else None
            d_up_biases[i] = (totals[i] * ctx.scale).to(up_biases[i].dtype) if needs[4][i] else None
        if d_downs[i] is not None:
            d_downs[i] = (d_downs[i] * factor).to(downs[i].dtype)
        if d_ups[i] is not None:  # laid out as the parameter is, or autograd would copy it
            d_ups[i] = torch.mul(d_ups[i].t(), factor, out=d_ups[i].new_empty(ups[i].shape)).to(ups[i].dtype)
    dx = None if dx is None else dx.view(x.shape)
    return (dx, None, None, None, None, None, None, *[None] * count, *d_biases, *d_downs, *d_ups, *d_up_biases)


def _backward_part(
    ctx: Any,
    rows: Tensor,
    wide: torch.dtype,
    low: Tensor,
    seeds: Tensor | None,
    patterns: list[Tensor] | None,
    grads: list[Tensor | None],
    columns: list[list[Any]],
    needs: list[list[bool]],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """dx in the dtype of `rows`, and sums over the tokens: of every dy, for every A `(r, in)` and every Bᵀ `(r, out)`.

    The sums lack their constant factors.
    """
    weights, _, downs, ups, _ = columns
    _, need_biases, need_downs, need_ups, need_up_biases = needs
    count, factor = len(downs), _factor(ctx.scale, ctx.p)
    totals: list[Tensor | None] = [None] * count
    d_downs, d_ups, d_lows = list(totals), list(totals), list(totals)
    dx, start = None, 0
    for i, grad in enumerate(grads):
        stop = start + downs[i].shape[0]
        if grad is not None:
            grad = cast(
                grad, wide
            )  # it may arrive in another dtype, and strided any way (an expanded sum, a transpose)
            d_lows[i] = narrow(grad, ups[i].t())
            if need_ups[i]:
                d_ups[i] = narrow_sum(low[:, start:stop], grad)
            if need_biases[i] or need_up_biases[i]:
                totals[i] = grad.sum(0, dtype=torch.promote_types(torch.float32, grad.dtype))
            if ctx.needs_input_grad[0]:
                weight = cast(weights[i], wide) if ctx.quantized[i] is None else ctx.quantized[i].dense(wide)
                dx = torch.mm(grad, weight) if dx is None else dx.addmm_(grad, weight)
                del weight  # a dequantized weight is large
        start = stop
    for which, span in enumerate(_spans(ctx.p > 0, seeds, count)):
        live = [i for i in span if grads[i] is not None]
        if not live:
            continue
        d_low = _side_by_side([d_lows[i] for i in live])
        if dx is not None:
            pattern = None if patterns is None else patterns[which]
            _add_down_part(dx, d_low, _stacked([downs[i] for i in live]), factor, seeds, which, ctx.p, pattern)
        if any(need_downs[i] for i in live):
            source, positions = _source(cast(rows, wide), seeds, patterns, which, ctx.p)
            stacked = narrow_sum(d_low, source, positions)
            for i, piece in zip(live, stacked.split([downs[i].shape[0] for i in live]), strict=True):
                d_downs[i] = piece if need_downs[i] else None
    return None if dx is None else cast(dx, rows.dtype), totals, d_downs, d_ups


def _add_down_part(
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
    if p <= 0:
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


def _spans(dropout: bool, seeds: Tensor | None, count: int) -> list[range]:
    """Projections that see the same (dropped) input: their products are made together."""
    return [range(count)] if not dropout or len(seeds) == 1 else [range(i, i + 1) for i in range(count)]


def _patterns(rows: Tensor, seeds: Tensor | None, p: float) -> list[Tensor] | None:
    """What each seed drops; None without dropout, for the compiler (no generators) and for fake seeds (no values)."""
    if p <= 0 or torch.compiler.is_compiling() or isinstance(rows, FakeTensor):
        return None
    return [draw_pattern(rows, seed, p) for seed in seeds.tolist()]


def _cut(patterns: list[Tensor] | None, part: slice, rows: Tensor) -> list[Tensor] | None:
    return None if patterns is None else [cut(pattern, part.start, part.stop, rows.shape[1]) for pattern in patterns]


def _sources(
    x: Tensor, seeds: Tensor | None, patterns: list[Tensor] | None, p: float, count: int
) -> Iterable[tuple[range, Tensor, Tensor | None]]:
    """Which projections, and `_source` of each."""
    for which, span in enumerate(_spans(p > 0, seeds, count)):
        yield span, *_source(x, seeds, patterns, which, p)


def _source(
    x: Tensor, seeds: Tensor | None, patterns: list[Tensor] | None, which: int, p: float
) -> tuple[Tensor, Tensor | None]:
    """What a down-projection reads, without the factor 1 / (1 - p), and positions in it that count as zero."""
    if p <= 0:
        return x, None
    if patterns is None:
        return dropped(x, seeds, which, p), None
    pattern = patterns[which]
    return (x * cast(pattern, x.dtype), None) if is_mask(pattern) else (x, pattern)


def _factor(scale: float, p: float) -> float:
    return scale / (1 - p) if p < 1 else 0.0


def _added(ours: list[Tensor | None], more: list[Tensor | None]) -> list[Tensor | None]:
    return [None if a is None else a.add_(b) for a, b in zip(ours, more, strict=True)]


def _side_by_side(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim=1)


def _differentiable_backward(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients as a graph of plain operations, for `create_graph=True`."""
    count = len(ctx.quantized)
    x, seeds, _, *tensors = _with_input(ctx, ctx.saved_tensors)
    weights, biases, downs, ups, up_biases = _columns(tensors, count)
    outputs = []
    for i in range(count):
        weight = weights[i] if ctx.quantized[i] is None else ctx.quantized[i].dense(x.dtype)
        y = F.linear(x, cast(weight, x.dtype), None if biases[i] is None else cast(biases[i], x.dtype))
        kept = x
        if ctx.p > 0:
            ones = torch.ones(x.shape, dtype=x.dtype, device=x.device)
            mask = zero_dropped(ones, draw_pattern(ones, int(seeds[0 if ctx.shared_mask else i]), ctx.p))
            kept = x * mask / (1 - ctx.p)
        delta = F.linear(F.linear(kept, cast(downs[i], x.dtype)), cast(ups[i], x.dtype))
        if up_biases[i] is not None:
            delta = delta + cast(up_biases[i], x.dtype)
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


def _with_input(ctx: Any, saved: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The saved tensors with x itself in front, computed again if it was not kept."""
    first, second, *others = saved
    return (first if ctx.act is None else ctx.act(first) * second, *others)


def _columns(items: Any, count: int) -> list[list[Any]]:
    return [list(items[start : start + count]) for start in range(0, 5 * count, count)]


def _stacked(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _joined_bias(bias: Tensor | None, up_bias: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor | None:
    if up_bias is None:
        return None if bias is None else cast(bias, dtype)
    added = up_bias * scale
    return (added if bias is None else bias + added).to(dtype)
