"""LoRA around one frozen linear layer, or around several that read the same input, as one autograd node.

    y_i = (x W_iᵀ + s · (dropout_i(x) A_iᵀ B_iᵀ + c_i)) · g_i + b_i              (Hu et al. 2021, arXiv:2106.09685)

`reference.py` is this in plain operations. What makes the node differ:

1. Kept for the backward pass are x, once, in the dtype it came in; S = dropout(x) [A_1; A_2; …]ᵀ, a few columns wide;
   the seeds of the dropout; where there is a g_i, what it multiplies. Plain autograd keeps x again for every
   projection, in the adapter's dtype, and a mask as large.
2. Everything else of the backward pass follows from these. With dz = dy · g and dS = s dz B (which is s dy (g B)):
   dx = dz W + drop(dS A);  dA = dSᵀ drop(x);  dB = s dzᵀ S;  dc = s Σ dz;  db = Σ dy;  dg = Σ dy · z for y = z · g + b.
3. Products with W are made in the dtype of x (after autocast), as the base would, or in float32 where a CPU multiplies
   bf16 at half the speed (`products.py`). The narrow ones with A and B are exact to float32 where x is bf16 or fp16;
   what they add to y and to dx is rounded once, together with it. A and B keep their own dtype; on a GPU they are
   rounded to that of x for the product.
4. g, s and 1 / (1 - p) multiply what is small (B, sums over tokens) and never a tensor like dy: no rounding is added.
   Only the wide product dz W sees dy · g, rounded to its dtype, as it would in plain operations.
5. Gradients of A and B come from float32 sums, in the dtype of A and B.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from adapters_kit.kernels import reference
from adapters_kit.kernels.dropout import cut, draw_pattern, draw_seeds, zero_dropped
from adapters_kit.kernels.low_rank import add_down_part, dropped_source, factor_of
from adapters_kit.kernels.products import blocks, cast, narrow, narrow_sum, wide_dtype, widen_
from adapters_kit.kernels.projection import TENSORS, Projection

# Where x is `act(gate) · up`: these three. They are kept, and x is computed again.
MadeOf = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]
_LEADING = 7  # arguments of the node before the tensors of the projections


def lora_linear(
    x: Tensor,
    projections: Sequence[Projection],
    scale: float,
    p: float = 0.0,
    shared_mask: bool = False,
    made_of: MadeOf | None = None,
) -> tuple[Tensor, ...]:
    """The outputs of all `projections` on `x`.

    Args:
        x: `(..., in)`, in the dtype to compute in.
        scale: LoRA's scaling, lora_alpha / r.
        p: dropout probability of LoRA's input, 0 in evaluation. Seeds are drawn from the default CPU generator, in the
            order of `projections`.
        shared_mask: one dropout mask for all of them, and so one down-projection. Off, each has its own as in peft.
        made_of: what x was computed from, if that is to be kept instead.

    Returns:
        One tensor `(..., out_i)` each, in the dtype of `x`.
    """
    seeds = draw_seeds(1 if shared_mask else len(projections)) if p > 0 else None
    tensors = [tensor for projection in projections for tensor in projection[:TENSORS]]
    quantized = tuple(projection.quantized for projection in projections)
    return LoraLinear.apply(x, seeds, scale, p, shared_mask, quantized, made_of, *tensors)


class LoraLinear(torch.autograd.Function):
    """See `lora_linear`; the tensors are those of the first projection, of the second, and so on."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seeds: Tensor | None,
        scale: float,
        p: float,
        shared_mask: bool,
        quantized: tuple[Any, ...],
        made_of: MadeOf | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Every y, and what is kept."""
        rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
        projections = _projections(tensors, quantized)
        device = x.device.type
        if any(quantized) or torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
            low, found = _forward(rows, seeds, scale, p, projections)
        else:  # x has the dtype that autocast asks for; from here on dtypes are chosen product by product
            with torch.autocast(device, enabled=False):
                low, found = _forward(rows, seeds, scale, p, projections)
        # z · g + b is the output; z is kept where g is trained.
        unscaled, outputs = [], []
        for i, (z, projection) in enumerate(zip(found, projections, strict=True)):
            gain = projection.gain
            gain_is_trained = ctx.needs_input_grad[_LEADING + i * TENSORS + Projection._fields.index("gain")]
            unscaled.append(z if gain_is_trained else None)
            y = z if gain is None else _scaled(z, gain, projection)
            # Not `view`: autograd forbids writing in place to a view that a custom node made, and models do write.
            outputs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])))
        ctx.act = None if made_of is None else made_of[2]
        ctx.save_for_backward(*((x, None) if made_of is None else made_of[:2]), seeds, low, *unscaled, *tensors)
        ctx.scale, ctx.p, ctx.shared_mask, ctx.quantized = scale, p, shared_mask, quantized
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """The gradients of x and of every tensor that needs one."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grads)
        saved = ctx.saved_tensors  # once: checkpointing recomputes for every access
        device = saved[0].device.type
        if torch.is_autocast_enabled(device):  # backward() called under autocast: the dtypes are settled already
            with torch.autocast(device, enabled=False):
                return _backward(ctx, saved, grads)
        return _backward(ctx, saved, grads)


def _projections(tensors: Sequence[Any], quantized: Sequence[Any]) -> list[Projection]:
    return [
        Projection._make([*tensors[start : start + TENSORS], base])
        for start, base in zip(range(0, len(tensors), TENSORS), quantized, strict=True)
    ]


def _forward(
    rows: Tensor, seeds: Tensor | None, scale: float, p: float, projections: list[Projection]
) -> tuple[Tensor, list[Tensor]]:
    """S `(tokens, r_1 + r_2 + …)`, without the factor 1 / (1 - p), and every z or y `(tokens, out_i)`."""
    patterns = _patterns(rows, seeds, p)
    wide = rows.dtype if any(one.quantized for one in projections) else wide_dtype(rows)
    parts = blocks(rows, wide)
    if parts is None:
        return _forward_part(rows, wide, seeds, patterns, scale, p, projections)
    done = [_forward_part(rows[part], wide, seeds, _cut(patterns, part, rows), scale, p, projections) for part in parts]
    return torch.cat([low for low, _ in done]), [torch.cat(ys) for ys in zip(*(ys for _, ys in done), strict=True)]


def _forward_part(
    rows: Tensor,
    wide: torch.dtype,
    seeds: Tensor | None,
    patterns: list[Tensor] | None,
    scale: float,
    p: float,
    projections: list[Projection],
) -> tuple[Tensor, list[Tensor]]:
    x = cast(rows, wide)  # (tokens, in)
    pieces = [
        narrow(source, _stacked([one.down for one in projections[span.start : span.stop]]), positions)
        for span, source, positions in _sources(x, seeds, patterns, p, len(projections))
    ]
    low = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)  # (tokens, r_1 + r_2 + …)
    factor = factor_of(scale, p)
    outputs, start = [], 0
    for one in projections:
        stop, added = start + one.up.shape[1], None
        if one.quantized is None:
            assert one.weight is not None
            first = None if one.gain is not None else one.bias  # behind a gain the bias comes last
            y = F.linear(x, cast(one.weight, wide), _joined_bias(first, one.up_bias, scale, wide))  # (tokens, out)
        else:
            y = one.quantized.product(rows)  # (tokens, out), with its bias
            added = None if one.up_bias is None else one.up_bias * scale
        outputs.append(cast(widen_(y, low[:, start:stop], one.up.t(), factor, added), rows.dtype))
        start = stop
    return low, outputs


def _scaled(z: Tensor, gain: Tensor, projection: Projection) -> Tensor:
    """z · g + b `(tokens, out)`, made in the wider dtype and rounded once."""
    bias = projection.bias
    if bias is None:
        return (z * gain).to(z.dtype)
    if projection.quantized is not None:  # it is in z already, where it is multiplied too
        bias = bias - bias * gain
    return torch.addcmul(cast(bias, gain.dtype), z, gain).to(z.dtype)


def _backward(ctx: Any, saved: tuple[Any, ...], grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    count = len(ctx.quantized)
    x, seeds, low, *others = _with_input(ctx, saved)
    unscaled, projections = others[:count], _projections(others[count:], ctx.quantized)
    needs = _projections(ctx.needs_input_grad[_LEADING:], ctx.quantized)
    rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
    flat = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]  # (tokens, out_i)
    patterns = _patterns(rows, seeds, ctx.p)
    wide = wide_dtype(rows)
    parts = blocks(rows, wide)
    if parts is None:
        dx, *sums = _backward_part(ctx, rows, wide, low, seeds, patterns, flat, projections, needs)
    else:
        pieces, sums = [], []
        for part in parts:
            some = [None if grad is None else grad[part] for grad in flat]
            cut_patterns = _cut(patterns, part, rows)
            piece, *found = _backward_part(
                ctx, rows[part], wide, low[part], seeds, cut_patterns, some, projections, needs
            )
            pieces += [] if piece is None else [piece]
            sums = [_added(a, b) for a, b in zip(sums, found, strict=True)] if sums else found
        dx = torch.cat(pieces) if pieces else None
    totals, d_downs, d_ups = sums
    factor = factor_of(ctx.scale, ctx.p)
    result: list[Tensor | None] = []
    for i, (one, need) in enumerate(zip(projections, needs, strict=True)):
        d_bias = d_up_bias = d_gain = None
        grad, total, d_down, d_up = flat[i], totals[i], d_downs[i], d_ups[i]
        if total is not None:
            if need.bias and one.bias is not None:
                d_bias = total.to(one.bias.dtype)  # (out,)
            if need.up_bias and one.up_bias is not None:
                scaled = total * ctx.scale if one.gain is None else total * one.gain * ctx.scale
                d_up_bias = scaled.to(one.up_bias.dtype)  # (out,)
        if need.gain and one.gain is not None and grad is not None:
            d_gain = (grad * cast(unscaled[i], one.gain.dtype)).sum(0)  # (out,)
            if one.quantized is not None and one.bias is not None:
                d_gain = d_gain - grad.sum(0, dtype=one.gain.dtype) * one.bias
        if d_down is not None:
            d_down = (d_down * factor).to(one.down.dtype)  # (r, in)
        if d_up is not None:  # laid out as the parameter is, or autograd would copy it
            d_up = torch.mul(d_up.t(), factor, out=d_up.new_empty(one.up.shape))  # (out, r)
            d_up = (d_up if one.gain is None else d_up.mul_(one.gain.unsqueeze(1))).to(one.up.dtype)
        result += [None, d_bias, d_down, d_up, d_up_bias, d_gain]
    return (None if dx is None else dx.view(x.shape), *[None] * (_LEADING - 1), *result)


def _backward_part(
    ctx: Any,
    rows: Tensor,
    wide: torch.dtype,
    low: Tensor,
    seeds: Tensor | None,
    patterns: list[Tensor] | None,
    grads: list[Tensor | None],
    projections: list[Projection],
    needs: list[Projection],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """dx in the dtype of `rows`, and sums over the tokens: of every dy, for every A `(r, in)` and every Bᵀ `(r, out)`.

    The sums lack their constant factors, and that of Bᵀ its gain.
    """
    count, factor = len(projections), factor_of(ctx.scale, ctx.p)
    totals: list[Tensor | None] = [None] * count
    d_downs, d_ups, d_lows = list(totals), list(totals), list(totals)
    dx: Tensor | None = None
    start = 0
    for i, (one, need, grad) in enumerate(zip(projections, needs, grads, strict=True)):
        stop = start + one.down.shape[0]
        if grad is not None:
            # It may arrive in another dtype, and strided any way (an expanded sum, a transpose).
            grad = cast(grad, wide)  # (tokens, out)
            up = one.up if one.gain is None else one.up * one.gain.unsqueeze(1)  # (out, r)
            d_lows[i] = narrow(grad, up.t())  # (tokens, r)
            if need.up:
                d_ups[i] = narrow_sum(low[:, start:stop], grad)  # (r, out)
            if need.bias or need.up_bias:
                totals[i] = grad.sum(0, dtype=torch.promote_types(torch.float32, grad.dtype))  # (out,)
            if ctx.needs_input_grad[0]:
                weight = one.weight if one.quantized is None else one.quantized.dense(wide)
                assert weight is not None
                scaled = grad if one.gain is None else (grad * one.gain).to(wide)
                dx = torch.mm(scaled, cast(weight, wide)) if dx is None else dx.addmm_(scaled, cast(weight, wide))
                del weight  # a dequantized weight is large
        start = stop
    for which, span in enumerate(_spans(seeds, count)):
        live = [i for i in span if grads[i] is not None]
        if not live:
            continue
        d_low = _side_by_side([d_lows[i] for i in live])  # (tokens, r_1 + …)
        downs = [projections[i].down for i in live]
        if dx is not None:
            pattern = None if patterns is None else patterns[which]
            add_down_part(dx, d_low, _stacked(downs), factor, seeds, which, ctx.p, pattern)
        if any(needs[i].down for i in live):
            source, positions = dropped_source(cast(rows, wide), seeds, patterns, which, ctx.p)
            stacked = narrow_sum(d_low, source, positions)  # (r_1 + …, in)
            for i, piece in zip(live, stacked.split([down.shape[0] for down in downs]), strict=True):
                d_downs[i] = piece if needs[i].down else None
    return None if dx is None else cast(dx, rows.dtype), totals, d_downs, d_ups


def _spans(seeds: Tensor | None, count: int) -> list[range]:
    """Projections that see the same (dropped) input: their products are made together."""
    return [range(count)] if seeds is None or len(seeds) == 1 else [range(i, i + 1) for i in range(count)]


def _patterns(rows: Tensor, seeds: Tensor | None, p: float) -> list[Tensor] | None:
    """What each seed drops; None without dropout, for the compiler (no generators) and for fake seeds (no values)."""
    if seeds is None or torch.compiler.is_compiling() or isinstance(rows, FakeTensor):
        return None
    return [draw_pattern(rows, seed, p) for seed in seeds.tolist()]


def _cut(patterns: list[Tensor] | None, part: slice, rows: Tensor) -> list[Tensor] | None:
    return None if patterns is None else [cut(pattern, part.start, part.stop, rows.shape[1]) for pattern in patterns]


def _sources(
    x: Tensor, seeds: Tensor | None, patterns: list[Tensor] | None, p: float, count: int
) -> Iterable[tuple[range, Tensor, Tensor | None]]:
    """Which projections, and `dropped_source` of each."""
    for which, span in enumerate(_spans(seeds, count)):
        yield span, *dropped_source(x, seeds, patterns, which, p)


def _added(ours: list[Tensor | None], more: list[Tensor | None]) -> list[Tensor | None]:
    return [None if a is None or b is None else a.add_(b) for a, b in zip(ours, more, strict=True)]


def _side_by_side(matrices: list[Any]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim=1)


def _differentiable_backward(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The gradients as a graph of plain operations, for `create_graph=True`."""
    count = len(ctx.quantized)
    x, seeds, _, *others = _with_input(ctx, ctx.saved_tensors)
    tensors = others[count:]
    kept = None
    if ctx.p > 0:
        ones = torch.ones(x.shape, dtype=x.dtype, device=x.device)
        masks = [zero_dropped(ones, draw_pattern(ones, seed, ctx.p)) / (1 - ctx.p) for seed in seeds.tolist()]
        kept = masks * count if ctx.shared_mask else masks
    outputs = reference.lora_linear(x, _projections(tensors, ctx.quantized), ctx.scale, kept)
    inputs = [x, *[None] * (_LEADING - 1), *tensors]
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


def _stacked(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _joined_bias(bias: Tensor | None, up_bias: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor | None:
    if up_bias is None:
        return None if bias is None else cast(bias, dtype)
    added = up_bias * scale
    return (added if bias is None else bias + added).to(dtype)
