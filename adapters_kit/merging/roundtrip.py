"""Weights as a quantized base held them while the adapter was trained.

A linear in 4 or 8 bit computes with rounded weights, and the adapter learned to correct that rounding too. So what was
trained is `dequantized + update`, and a merge has to start from the dequantized weights, not from the original ones.
"""

from typing import Any

import torch

from adapters_kit.errors import MissingPackageError, ShippingError


def roundtrip(weight: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """A weight quantized and dequantized again by bitsandbytes.

    Args:
        weight: of a linear, `(out, in)`, in the dtype that the base was loaded in.
        settings: `quantize` of the adapter's record: type "nf4", "fp4" or "int8"; for 4 bit blocksize and nested.

    Returns:
        The weight that the linear computed with, same shape, same dtype (float32 for int8).
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise MissingPackageError(
            "This adapter was trained on a base quantized by bitsandbytes, whose rounding the merge has to repeat: "
            "pip install bitsandbytes. Or merge into the original weights with base='original'."
        ) from error
    kind = settings.get("type")
    if kind == "int8":
        rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half().contiguous())
        return bnb.functional.int8_vectorwise_dequant(rows, scales)
    if kind not in {"nf4", "fp4"}:
        raise ShippingError(f"The adapter's base was quantized as {kind!r}; nf4, fp4 and int8 are known here.")
    packed, state = bnb.functional.quantize_4bit(
        weight.contiguous(),
        blocksize=settings.get("blocksize", 64),
        compress_statistics=settings.get("nested", True),
        quant_type=kind,
    )
    return bnb.functional.dequantize_4bit(packed, state)
