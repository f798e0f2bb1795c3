"""GGUF's block formats: numbers of a few bits, and beside each block of them the fp16 values that scale them.

    W[o, i] = d[o, block] · u[o, i] + m[o, block] · v[o, i]

The codes give u and v, whole numbers that do not change. d, and m where a format has it, are fp16 and stand at fixed
bytes of a block. K-quants and IQ formats are read by transformers (`integrations/gguf/dequant.py`: what its installed
version knows), the plain formats of 32 weights here, since no version knows all of them; u and v come from the same
reading, with d and m set to 1 and 0 or to 0 and 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from transformers.integrations.gguf import dequant as of_transformers

Q4_0, Q4_1, Q5_0, Q5_1, MXFP4 = 2, 3, 6, 7, 39  # ggml's own numbers


class Format(NamedTuple):
    """How the weights of one ggml type lie in a file.

    Attributes:
        name: as llama.cpp spells it.
        weights: in a block.
        nbytes: of a block.
        scale: byte of the block at which the fp16 value d stands; None where there is none.
        minimum: the same for m.
        run: weights in a row that share one v.
    """

    name: str
    weights: int
    nbytes: int
    scale: int | None
    minimum: int | None
    run: int


# Where d and m stand (ggml-common.h of llama.cpp): name -> (d, m, run).
_FIELDS = {
    "Q4_0": (0, None, 32),
    "Q4_1": (0, 2, 32),
    "Q5_0": (0, None, 32),
    "Q5_1": (0, 2, 32),
    "Q8_0": (0, None, 32),
    "Q2_K": (80, 82, 16),
    "Q3_K": (108, None, 16),
    "Q4_K": (0, 2, 32),
    "Q5_K": (0, 2, 32),
    "Q6_K": (208, None, 16),
    "IQ4_NL": (0, None, 32),
    "IQ4_XS": (0, None, 32),
}
_SIZES = {
    **{number: (of_transformers.GGML_NAME[number], *size) for number, size in of_transformers.GGML_BLOCK.items()},
    Q4_0: ("Q4_0", 32, 18),
    Q4_1: ("Q4_1", 32, 20),
    Q5_0: ("Q5_0", 32, 22),
    Q5_1: ("Q5_1", 32, 24),
    MXFP4: ("MXFP4", 32, 17),
}
FORMATS: dict[int, Format] = {
    number: Format(name, weights, nbytes, *_FIELDS.get(name, (None, None, weights)))
    for number, (name, weights, nbytes) in _SIZES.items()
}
# Twice the values of the 4-bit floats of MXFP4 (OCP Microscaling Formats 1.0).
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

AT_ONCE = 1 << 18  # weights unpacked at a time: 1 MB of float32, which stays in a processor's cache


def dequantize(raw: Tensor, kind: int, dtype: torch.dtype) -> Tensor:
    """The weights of some rows.

    Args:
        raw: `(rows, bytes)` uint8, whole blocks.
        kind: ggml's number of the type, a key of `FORMATS`.
        dtype: of the result; computed in float32 and rounded once.

    Returns:
        `(rows, weights)`.
    """
    given = FORMATS[kind]
    if isinstance(raw, FakeTensor):  # of shapes alone; transformers' tables of codes are real
        return raw.new_empty(*raw.shape[:-1], raw.shape[-1] // given.nbytes * given.weights, dtype=dtype)
    blocks = raw.reshape(-1, given.nbytes)
    values = torch.empty(len(blocks), given.weights, dtype=dtype, device=raw.device)
    step = AT_ONCE // given.weights
    for first in range(0, len(blocks), step):
        values[first : first + step] = _values(blocks[first : first + step], kind)
    return values.reshape(*raw.shape[:-1], -1)


def _values(blocks: Tensor, kind: int) -> Tensor:
    """`(blocks, bytes)` -> `(blocks, weights)` float32."""
    if kind in (Q4_0, Q4_1, Q5_0, Q5_1):
        return _plain(blocks, FORMATS[kind], five=kind in (Q5_0, Q5_1))
    if kind == MXFP4:
        return _mxfp4(blocks)
    return of_transformers.dequantize(blocks.reshape(-1), kind, torch.float32).view(len(blocks), -1)


def _plain(blocks: Tensor, given: Format, *, five: bool) -> Tensor:
    """Half-bytes, after d and m; for five bits the fifth ones stand together in four bytes before them."""
    start = 2 if given.minimum is None else 4
    packed = blocks[:, start + 4 * five :].contiguous()
    if five:
        places = torch.arange(8, device=blocks.device)
        fifth = (
            torch.arange(256, device=blocks.device)[:, None] >> places & 1
        ) * 16.0  # byte -> 16 for each of its bits
        q = fifth.index_select(0, blocks[:, start : start + 4].reshape(-1).int()).view(-1, 32)
        q[:, :16] += packed & 15
        q[:, 16:] += packed >> 4
    else:
        q = torch.empty(len(blocks), 32, device=blocks.device)
        q[:, :16] = packed & 15
        q[:, 16:] = packed >> 4
    d = blocks[:, :2].contiguous().view(torch.float16).float()
    if given.minimum is None:
        return q.sub_(16 if five else 8).mul_(d)
    return q.mul_(d).add_(blocks[:, 2:4].contiguous().view(torch.float16).float())


def _mxfp4(blocks: Tensor) -> Tensor:
    """A power of two for each block (an exponent of 8 bits, halved for the doubled table), and 4-bit floats."""
    scale = torch.ldexp(torch.ones_like(blocks[:, :1], dtype=torch.float32), blocks[:, :1].int() - 128)
    packed = blocks[:, 1:]
    codes = torch.cat([packed & 15, packed >> 4], dim=1).long()
    return scale * torch.tensor(_E2M1, dtype=torch.float32, device=blocks.device)[codes]


def read_field(raw: Tensor, kind: int, offset: int) -> Tensor:
    """One fp16 value of every block: `(rows, blocks)` float16, from `raw (rows, bytes)`."""
    blocks = raw.reshape(raw.shape[0], -1, FORMATS[kind].nbytes)
    return blocks[..., offset : offset + 2].contiguous().view(torch.float16).squeeze(-1)


def write_field(raw: Tensor, kind: int, offset: int, value: Tensor) -> None:
    """Put `value (rows, blocks)` in the place that `read_field` reads; `raw` is changed in place, contiguous."""
    blocks = raw.view(raw.shape[0], -1, FORMATS[kind].nbytes)
    blocks[..., offset : offset + 2] = value.to(torch.float16).contiguous().unsqueeze(-1).view(torch.uint8)


def codes(raw: Tensor, kind: int, *, minimum: bool, dtype: torch.dtype) -> Tensor:
    """u `(rows, weights)`; with `minimum`, v."""
    given = FORMATS[kind]
    copy = raw.clone(memory_format=torch.contiguous_format)
    for offset, one in ((given.scale, not minimum), (given.minimum, minimum)):
        if offset is not None:
            blocks = raw.shape[-1] // given.nbytes
            write_field(copy, kind, offset, torch.full((raw.shape[0], blocks), float(one), device=raw.device))
    return dequantize(copy, kind, dtype)
