"""Fused LoRA as one would write it on a blackboard. `kernels/lora.py` computes the same, faster and with less kept.

It is what the fast node is tested against, and what it becomes where a graph of plain operations is asked for
(`create_graph=True`).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from adapters_kit.kernels.products import cast
from adapters_kit.kernels.projection import Projection


def lora_linear(
    x: Tensor, projections: Sequence[Projection], scale: float, kept: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """`y = (x Wᵀ + s (drop(x) Aᵀ Bᵀ + c)) · g + b` of every projection, in the dtype of `x`.

    Args:
        x: `(..., in)`.
        scale: s.
        kept: for each projection what dropout multiplies `x` by: 0, or 1 / (1 - p); None for no dropout.
    """
    outputs = []
    for projection, mask in zip(projections, kept or [None] * len(projections), strict=True):
        quantized, bias = projection.quantized, projection.bias
        weight = projection.weight if quantized is None else quantized.dense(x.dtype)
        assert weight is not None
        dropped = x if mask is None else x * mask  # (..., in)
        low = F.linear(dropped, cast(projection.down, x.dtype))  # (..., r)
        delta = F.linear(low, cast(projection.up, x.dtype))  # (..., out)
        if projection.up_bias is not None:
            delta = delta + cast(projection.up_bias, x.dtype)
        y = F.linear(x, cast(weight, x.dtype)) + scale * delta  # (..., out)
        if projection.gain is not None:
            y = y * cast(projection.gain, x.dtype)
        outputs.append(y if bias is None else y + cast(bias, x.dtype))
    return outputs
