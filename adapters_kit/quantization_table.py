"""The kinds of quantization, a row each: all that anything here needs to know about one. Floor 0, no torch.

To add a kind that bitsandbytes has, write its row here and its name in `Quantization`; nothing else lists kinds.

    nf4, fp4   4 bits a weight and a scale for every 64 of them (Dettmers et al. 2023, arXiv:2305.14314)
    int8       8 bits a weight and a scale for every row (Dettmers et al. 2022, arXiv:2208.07339)
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Quantization = Literal["nf4", "fp4", "int8"]
"""The kinds of rounding that a base can be loaded with."""
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)

BLOCK = 64  # weights that share a scale in 4-bit formats

Tensor = Any  # a torch.Tensor: no torch on the ground floor


@dataclass(frozen=True)
class Coded:
    """A weight as it is stored, and as it comes back.

    Attributes:
        parts: name in a checkpoint of bitsandbytes -> tensor; together they stand for the weight.
        weight: (out, in), dequantized.
    """

    parts: dict[str, Tensor]
    weight: Tensor


class Kind(ABC):
    """How bitsandbytes holds a linear's weight."""

    block: int
    """Weights that share a scale; rows of another length than its multiples may be unpacked wrongly. 1: any length."""
    bytes_per_weight: float
    """What a weight takes, its share of the scales included."""
    computes_in_fp32: bool
    """Whether its products can be made in float32."""

    @abstractmethod
    def options(self, compute_dtype: Any, double_quant: bool, storage: Any) -> dict[str, Any]:
        """The keywords of `transformers.BitsAndBytesConfig` that make this kind, for those of `bnb_config`."""

    @abstractmethod
    def is_saved_as(self, settings: Mapping[str, Any]) -> bool:
        """Whether the `quantization_config` of a saved model is of this kind."""

    @abstractmethod
    def layer(self, weight: Tensor, bias: bool, config: Any) -> Any:
        """A linear of bitsandbytes that holds `weight` (out, in); its bias lies on the meta device."""

    @abstractmethod
    def code(self, weight: Tensor, name: str = "weight", *, blocksize: int = BLOCK, nested: bool = True) -> Coded:
        """Quantizes a weight (out, in) that a checkpoint stores as `name`.

        Args:
            blocksize: weights that share a scale, in 4 bit.
            nested: quantize the scales too, in 4 bit.
        """


@dataclass(frozen=True)
class FourBit(Kind):
    """Four bits a weight: the nearest of 16 values, times the scale of its block.

    Attributes:
        values: bitsandbytes' name for the 16 values.
    """

    values: str
    block = BLOCK
    bytes_per_weight = 0.5 + 1 / BLOCK + 4 / (BLOCK * 256)  # a scale of 8 bits shares an fp32 scale with 255 others
    computes_in_fp32 = True

    def options(self, compute_dtype: Any, double_quant: bool, storage: Any) -> dict[str, Any]:
        """See `Kind.options`."""
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.values,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_quant_storage": storage,
        }

    def is_saved_as(self, settings: Mapping[str, Any]) -> bool:
        """See `Kind.is_saved_as`."""
        is_four_bit = settings.get("load_in_4bit") and not settings.get("load_in_8bit")
        return bool(is_four_bit) and settings.get("bnb_4bit_quant_type", "fp4") == self.values

    def layer(self, weight: Tensor, bias: bool, config: Any) -> Any:
        """See `Kind.layer`."""
        import bitsandbytes as bnb

        rows, width = weight.shape
        new = bnb.nn.Linear4bit(
            width,
            rows,
            bias,
            config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
            device="meta",
        )
        options = {**new.weight.__dict__, "module": new}
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options).to(weight.device)
        return new

    def code(self, weight: Tensor, name: str = "weight", *, blocksize: int = BLOCK, nested: bool = True) -> Coded:
        """See `Kind.code`."""
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(
            weight.contiguous(), blocksize=blocksize, compress_statistics=nested, quant_type=self.values
        )
        scales = {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        return Coded({name: packed, **scales}, bnb.dequantize_4bit(packed, state))


@dataclass(frozen=True)
class EightBit(Kind):
    """Eight bits a weight: a whole number from -127 to 127, times the scale of its row. Computes in 16 bits."""

    block = 1
    bytes_per_weight = 1.0
    computes_in_fp32 = False

    def options(self, compute_dtype: Any, double_quant: bool, storage: Any) -> dict[str, Any]:
        """See `Kind.options`."""
        return {"load_in_8bit": True}

    def is_saved_as(self, settings: Mapping[str, Any]) -> bool:
        """See `Kind.is_saved_as`."""
        return bool(settings.get("load_in_8bit"))

    def layer(self, weight: Tensor, bias: bool, config: Any) -> Any:
        """See `Kind.layer`."""
        import bitsandbytes as bnb

        rows, width = weight.shape
        threshold = config.llm_int8_threshold
        new = bnb.nn.Linear8bitLt(width, rows, bias, has_fp16_weights=False, threshold=threshold, device="meta")
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
        return new

    def code(self, weight: Tensor, name: str = "weight", *, blocksize: int = BLOCK, nested: bool = True) -> Coded:
        """See `Kind.code`."""
        import bitsandbytes.functional as bnb

        rows, scales, _ = bnb.int8_vectorwise_quant(weight.half().contiguous())
        prefix = name.removesuffix("weight")
        row_major = rows.new_zeros(()).byte()
        parts = {name: rows, f"{prefix}SCB": scales, f"{prefix}weight_format": row_major}
        return Coded(parts, bnb.int8_vectorwise_dequant(rows, scales))


KINDS: dict[str, Kind] = {"nf4": FourBit("nf4"), "fp4": FourBit("fp4"), "int8": EightBit()}
