"""The LoRA layers that several models have around one base layer, called as one: what `training/many` runs."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from adapters_kit.kernels.dora import with_gain
from adapters_kit.kernels.fuse import Call, draws_alone, plan_call
from adapters_kit.kernels.grouped import Base, Share, grouped_lora


def joint_linear(
    layers: Sequence[Any], x: Tensor, places: Sequence[tuple[int, int, int]], seeds: Callable[[int], Tensor]
) -> Tensor | None:
    """What the layers of several models around one base layer give, each for its own rows, in one node.

    Args:
        layers: one for each model; None where it has only the base layer. Not all are None.
        x: `(rows, tokens, in)`, the rows of all.
        places: first row, last row + 1 and own tokens in a row of each; the other tokens are padding.
        seeds: draws one seed for the dropout of the model at that place in `layers`.

    Returns:
        `(rows, tokens, out)`, or None where one of the layers has to run by itself.
    """
    calls = [None if layer is None else plan_call(layer, x) for layer in layers]
    planned = [call for call in calls if isinstance(call, Call)]
    for layer, call in zip(layers, calls, strict=True):
        if layer is not None and not (isinstance(call, Call) and draws_alone(layer)):
            return None
    first = planned[0]
    if any((call.dtype, call.result) != (first.dtype, first.result) for call in planned):
        return None
    shares = []
    for number, ((start, stop, tokens), call) in enumerate(zip(places, calls, strict=True)):
        share = Share(start, stop, tokens)
        if isinstance(call, Call):
            one = call.projection
            if call.magnitude is not None:
                one = with_gain(one, call.magnitude, call.scale)
            seed = seeds(number) if call.p > 0 else None
            share = Share(start, stop, tokens, one.down, one.up, one.up_bias, one.gain, call.scale, call.p, seed)
        shares.append(share)
    base = Base(first.projection.weight, first.projection.bias, first.projection.quantized)
    made_of = getattr(x, "_made_of", None) if x.dtype == first.dtype else None  # set by recompute.py
    y = grouped_lora(x.to(first.dtype), base, shares, made_of)
    return y.to(first.result)
