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

from adapters_kit.kernels.products import cast
from adapters_kit.kernels.projection import Projection


def row_norms(projection: Projection, scale: float) -> Tensor:
    """‖W + scale · B A‖ of every row: `(out,)`, float32, or float64 for an adapter of that dtype. Has no gradient.

    The square is ‖W‖² + 2 · scale · ⟨W Aᵀ, B⟩ + scale² · ⟨B A Aᵀ, B⟩.
    """
    with torch.no_grad(), torch.autocast(projection.down.device.type, enabled=False):
        dtype = torch.promote_types(torch.float32, projection.down.dtype)
        down, up = cast(projection.down, dtype), cast(projection.up, dtype)  # (r, in), (out, r)
        quantized = projection.quantized
        weight = projection.weight if quantized is None else quantized.dense(dtype)
        assert weight is not None
        weight = cast(weight, dtype)  # (out, in)
        mixed = 2 * scale * torch.mm(weight, down.t()) + scale**2 * torch.mm(up, torch.mm(down, down.t()))  # (out, r)
        squares = torch.linalg.vector_norm(weight, dim=1).square_() + (mixed * up).sum(1)  # (out,)
        return squares.clamp_min_(0).sqrt_()


def with_gain(projection: Projection, magnitude: Tensor, scale: float) -> Projection:
    """`projection` with g = m / ‖W + scale · B A‖, through which the magnitude m `(out,)` gets its gradient."""
    return projection._replace(gain=magnitude / row_norms(projection, scale))
