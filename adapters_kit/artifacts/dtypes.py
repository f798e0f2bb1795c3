"""Number formats: what people, torch, safetensors and GGUF call them. A new one is a row here."""

from dataclasses import dataclass

import torch

from adapters_kit.errors import UnknownNameError, did_you_mean


@dataclass(frozen=True)
class Float:
    """A float format that models are loaded, trained and merged in.

    Attributes:
        name: torch's name, as in `torch.bfloat16`.
        short: what recipes call it.
        stored: how a safetensors header spells it.
        gguf: what llama.cpp's converters call it.
    """

    name: str
    short: str
    stored: str
    gguf: str

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype."""
        return STORED[self.stored]


FLOATS = (
    Float("float32", "fp32", "F32", "f32"),
    Float("bfloat16", "bf16", "BF16", "bf16"),
    Float("float16", "fp16", "F16", "f16"),
)

# As a safetensors header spells it -> torch's dtype. Those of less than a byte a value are read by nobody here.
STORED: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in STORED.items()}
# Full and short name -> torch's dtype.
DTYPES: dict[str, torch.dtype] = {name: one.torch for one in FLOATS for name in (one.name, one.short)}
GGUF: dict[str, str] = {name: one.gguf for one in FLOATS for name in (one.name, one.short)} | {"q8_0": "q8_0"}


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype for a name such as "bf16", "bfloat16" or "torch.bfloat16".

    Raises:
        UnknownNameError: not one of `FLOATS`.
    """
    found = DTYPES.get(name_of(dtype))
    if found is None:
        raise UnknownNameError(f"Unknown dtype {str(dtype)!r}. {did_you_mean(str(dtype), DTYPES)}")
    return found


def name_of(dtype: str | torch.dtype) -> str:
    """A dtype's name without `torch.`: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
