"""Weights as a quantized base held them while the adapter was trained.

A linear in 4 or 8 bit computes with rounded weights, and the adapter learned to correct that rounding too. So what was
trained is `dequantized + update`, and a merge has to start from the dequantized weights, not from the original ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adapters_kit.artifacts.dtypes import as_dtype
from adapters_kit.errors import MissingPackageError, ShippingError
from adapters_kit.quantization_table import KINDS


@dataclass(frozen=True)
class Rounding:
    """How a base was quantized.

    Attributes:
        kind: "nf4", "fp4" or "int8".
        modules: paths of the linears that were.
        dtype: of the weights before they were quantized, and of everything that was not.
        blocksize: weights that share a scale, in 4 bit.
        nested: whether the scales are quantized too.
    """

    kind: str
    modules: frozenset[str]
    dtype: torch.dtype
    blocksize: int = 64
    nested: bool = True

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Rounding | None":
        """What a record says; None if nothing was quantized."""
        settings = record.get("quantize")
        if not settings:
            return None
        return cls(
            settings["type"],
            frozenset(settings["modules"]),
            as_dtype(record["dtype"]),
            settings.get("blocksize", 64),
            settings.get("nested", True),
        )

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """A linear's weight, quantized and dequantized again by bitsandbytes.

        Args:
            weight: (out, in), as the checkpoint stores it.

        Returns:
            The weight that the linear computed with, (out, in), in `dtype` (float32 for int8).

        Raises:
            MissingPackageError: no bitsandbytes.
        """
        if self.kind not in KINDS:
            raise ShippingError(f"The base was quantized as {self.kind!r}; {', '.join(KINDS)} are known here.")
        try:
            return KINDS[self.kind].code(weight.to(self.dtype), blocksize=self.blocksize, nested=self.nested).weight
        except ImportError as error:
            raise MissingPackageError(
                "This adapter was trained on a base quantized by bitsandbytes, whose rounding the merge has to repeat: "
                "pip install bitsandbytes. Or merge into the original weights with base='original'."
            ) from error
