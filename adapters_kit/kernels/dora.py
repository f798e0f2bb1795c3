"""DoRA around the fused node: its columns rescaled to learned magnitudes.

    y = m / ‖W + s B A‖ · x (W + s B A)ᵀ + b, the norm taken row by row and without a gradient
                                                                        (Liu et al. 2024, arXiv:2402.09353, section 4.3)

peft adds up W + s B A at every step to take its norm, from a product of A and B with an identity matrix as wide as the
input. Here the norm comes from products as narrow as the rank, and what is kept for the backward pass beside LoRA's is
one tensor like the output. Under dropout DoRA multiplies the base weight by the dropped input too, a second wide
product that the node does not have: peft's forward does that.
"""

import torch
from torch import Tensor

from adapters_kit.kernels.lora import Projection
from adapters_kit.kernels.products import cast


def row_norms(projection: Projection, scale: float) -> Tensor:
    """‖W + scale · B A‖ of every row: `(out,)`, float32, or float64 for an adapter of that dtype. Has no gradient.

    The square is ‖W‖² + 2 · scale · ⟨W Aᵀ, B⟩ + scale² · ⟨B A Aᵀ, B⟩.
    """
    with torch.no_grad(), torch.autocast(projection.down.device.type, enabled=False):
        dtype = torch.promote_types(torch.float32, projection.down.dtype)
        down, up = cast(projection.down, dtype), cast(projection.up, dtype)
        quantized = projection.quantized
        weight = cast(projection.weight, dtype) if quantized is None else quantized.dense(dtype)
        mixed = 2 * scale * torch.mm(weight, down.t()) + scale**2 * torch.mm(up, torch.mm(down, down.t()))
        squares = torch.linalg.vector_norm(weight, dim=1).square_() + (mixed * up).sum(1)
        return squares.clamp_min_(0).sqrt_()


def rescaled(y: Tensor, projection: Projection, magnitude: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """What DoRA makes of LoRA's output.

    Args:
        y: `(..., out)`, the node's output for `projection`, with that projection's bias if it has one.
        magnitude: m `(out,)`.
        bias: b `(out,)` of the base layer or None.

    Returns:
        Like `y`; the products with m / norm are made in float32 or wider and rounded once.
    """
    factor = magnitude / row_norms(projection, scale)
    if bias is None:
        return (y * factor).to(y.dtype)
    if projection.bias is not None:  # it is in y already, and DoRA leaves it as it is
        bias = bias - bias * factor
    return torch.addcmul(cast(bias, factor.dtype), y, factor).to(y.dtype)
