"""What one frozen linear layer and its LoRA are to the arithmetic: a few tensors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Quantized(NamedTuple):
    """A frozen base whose weight is not a plain matrix.

    Attributes:
        product: `x -> x Wᵀ + b`, the base's own forward.
        dense: `dtype -> W`, `(out, in)`; called in the backward pass and freed after use.
    """

    product: Callable[[Tensor], Tensor]
    dense: Callable[[torch.dtype], Tensor]


class Projection(NamedTuple):
    """One linear layer and its LoRA: y = (x Wᵀ + s (x Aᵀ Bᵀ + c)) · g + b.

    Attributes:
        weight: W, frozen `(out, in)`, any strides; None for a quantized base.
        bias: b `(out,)` or None; may be trained.
        down, up: A `(r, in)` and B `(out, r)`.
        up_bias: c `(out,)` or None.
        gain: g `(out,)` or None: what DoRA rescales the columns by.
        quantized: the base where `weight` is None.
    """

    weight: Tensor | None
    bias: Tensor | None
    down: Tensor
    up: Tensor
    up_bias: Tensor | None = None
    gain: Tensor | None = None
    quantized: Quantized | None = None


TENSORS = 6  # the fields of a projection that are tensors come first
