"""Products in the dtype that serves them: narrow ones exact to float32, wide ones as this machine multiplies fastest.

A product of 16-bit tensors is accumulated in float32 but rounded to 16 bit when it is stored. For the narrow result S
and for the gradients of A and B that rounding is worth avoiding: they are small, and the optimizer sees them. CUDA
stores float32 from 16-bit factors. A CPU does not; there are three ways on it, and `cpu_path` chooses one:

"float32": an x86 CPU without instructions for bf16 multiplies float32 up to twice as fast. A slice that fits its cache
is converted as fast as it is multiplied. From a few dozen tokens on, converting both factors pays for a frozen bf16
weight too: it is multiplied in float32, and the result rounded once.

"bf16": a CPU with AVX512-BF16 and no tiles multiplies bf16 twice as fast as float32, and other CPUs than x86 do not
convert as fast. Wide products stay in bf16 there; narrow ones are made as in "float32".

"tiles": a CPU with AMX tiles multiplies bf16 many times faster than it converts. There wide products stay in bf16, and
narrow ones are put together from bf16 products of the same tensors, without a conversion of the large one:

1. A float32 matrix M is M₁ + M₂ to about 16 bits, M₁ = bf16(M) and M₂ = bf16(M - M₁).
2. R = bf16(x M₁) is what a bf16 product stores; it loses L = x M₁ - R. The product that starts from -R instead of zero
   is accumulated in float32 before it is rounded: E = bf16(x M₁ - R), L to 8 bits of its own.
3. x M = R + E + bf16(x M₂), each term smaller than the one before by 2⁻⁸: together exact to about 2⁻¹⁶, where one
   bf16 product is exact to 2⁻⁸.
4. Adding s M (and a bias, one row more) to a bf16 y needs no R and E, since the sum is rounded to bf16 anyway:
   [s₁ s₂ s₁] [M₁; M₁; M₂] in one product that accumulates onto y.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from adapters_kit.devices import stores_float32
from adapters_kit.errors import UnknownNameError, did_you_mean

CPU_PATH = "ADAPTERS_KIT_CPU_PATH"  # environment variable: one of the names below in place of what the CPU suggests
PATHS = ("float32", "tiles", "bf16")
_SLICE = 2**18  # elements converted at a time for a narrow product: 1 MB
_BLOCK = 2**22  # and for a wide one: 16 MB, so that a long batch is not held in float32 as a whole
_WORTH = 32  # tokens from which a weight is worth converting


@functools.cache
def cpu_path() -> Literal["float32", "tiles", "bf16"]:
    """How products with bf16 tensors are made on this CPU, by what it is able to do; the same at every call.

    Raises:
        UnknownNameError: the environment asks for another.
    """
    asked = os.environ.get(CPU_PATH)
    if asked is not None:
        if asked not in PATHS:
            raise UnknownNameError(f"{CPU_PATH}={asked!r} is unknown. {did_you_mean(asked, PATHS)}")
        return asked  # type: ignore[return-value]
    able = torch.cpu.get_capabilities()
    if torch.backends.mkldnn.is_available():
        if able.get("amx_bf16"):
            return "tiles"
        if able.get("avx512_bf16"):
            return "bf16"
    return "float32" if able.get("architecture") == "x86_64" and able.get("avx2") else "bf16"


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which to multiply `x (tokens, in)` by a frozen weight: its own, or float32 if that is faster."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or len(x) < _WORTH or torch.compiler.is_compiling():
        return x.dtype
    return torch.float32 if cpu_path() == "float32" else x.dtype


def _in_tiles(x: Tensor) -> bool:
    """Whether narrow products with `x` are put together from bf16 products."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and _supported(x) and cpu_path() == "tiles"


def converts(x: Tensor) -> bool:
    """Whether narrow products with `x` are made of it in `fine_dtype(x)`, which it has or is converted to."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor) and not _in_tiles(x)


def _halves(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """M₁ and M₂ in bf16: `matrix` is their sum to 16 bits."""
    first = matrix.to(torch.bfloat16)
    return first, (matrix - first).to(torch.bfloat16)


def blocks(x: Tensor, wide: torch.dtype) -> list[slice] | None:
    """The rows of `x (tokens, in)` to convert to `wide` at a time; None for all at once."""
    step = max(512, _BLOCK // max(1, x.shape[1]))
    if wide == x.dtype or len(x) <= step or isinstance(x, FakeTensor):
        return None
    return [slice(start, min(start + step, len(x))) for start in range(0, len(x), step)]


def fine_dtype(x: Tensor) -> torch.dtype:
    """The dtype of narrow results for inputs like `x`."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) and _supported(x) else x.dtype


def _supported(x: Tensor) -> bool:
    # The compiler fuses conversions itself, and a loop would be unrolled.
    return (x.device.type == "cpu" or stores_float32(x)) and not torch.compiler.is_compiling()


def _slices(x: Tensor, dtype: torch.dtype, positions: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """A few rows of `x (tokens, wide)` after the other in `dtype`, with zeros at `positions`.

    They share memory, so each is to be used before the next; views of `x` itself if there was nothing to change.
    """
    rows, width = x.shape
    if positions is None and x.dtype == dtype:
        yield slice(0, rows), x
        return
    count = 1 if isinstance(x, FakeTensor) else max(1, -(-rows * width // _SLICE))  # without values there is no cache
    step = max(1, -(-rows // count))
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    copied = positions is not None or x.dtype != dtype
    scratch = x.new_empty(min(step, rows), width, dtype=dtype) if copied else x
    zeros: Sequence[Tensor] = [] if positions is None else [positions]
    if positions is not None and len(parts) > 1:
        ends = torch.searchsorted(positions, torch.tensor([part.stop * width for part in parts[:-1]])).tolist()
        zeros = positions.tensor_split(ends)
    for number, part in enumerate(parts):
        piece = scratch[: part.stop - part.start].copy_(x[part]) if copied else x[part]
        if zeros:
            piece.view(-1).scatter_(0, zeros[number] - part.start * width if number else zeros[number], 0.0)
        yield part, piece


def narrow(x: Tensor, matrix: Tensor, positions: Tensor | None = None) -> Tensor:
    """`x (tokens, in)` times `matrix (r, in)` transposed: `(tokens, r)` in `fine_dtype(x)`.

    On a GPU in the dtype of x, to which every product with it there would round it: two launches fewer.

    Args:
        positions: int64, sorted, in the flattened `x`: these elements count as zero. Only on a CPU.
    """
    fine = fine_dtype(x)
    if (fine == x.dtype and positions is None) or stores_float32(x):
        return torch.mm(x, cast(matrix, x.dtype).t())
    if _in_tiles(x):
        first, second = _halves(matrix)  # (r, in) each
        result = x.new_empty(x.shape[0], len(matrix), dtype=fine)
        for part, piece in _slices(x, x.dtype, positions):
            rough = torch.mm(piece, torch.cat([first, second]).t())  # (tokens, 2 r)
            lost = torch.addmm(rough[:, : len(matrix)], piece, first.t(), beta=-1)  # (tokens, r)
            torch.add(rough[:, : len(matrix)], lost.to(fine).add_(rough[:, len(matrix) :]), out=result[part])
        return result
    matrix = cast(matrix, fine).t()
    result = x.new_empty(x.shape[0], matrix.shape[1], dtype=fine)
    for part, piece in _slices(x, fine, positions):
        torch.mm(piece, matrix, out=result[part])
    return result


def narrow_sum(d: Tensor, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """`d (tokens, r)` transposed times `x (tokens, wide)`: `(r, wide)` in `fine_dtype(x)`. `d` is in that dtype.

    Args:
        positions: as in `narrow`.
    """
    fine = fine_dtype(x)
    if fine == x.dtype and positions is None:
        return torch.mm(d.t(), x)
    if stores_float32(x):
        return torch.mm(d.to(x.dtype).t(), x, out_dtype=fine)
    result = None
    if _in_tiles(x):
        r = d.shape[1]
        halves = torch.cat(_halves(d), dim=1).t()  # (2 r, tokens)
        for part, piece in _slices(x, x.dtype, positions):
            rough = torch.mm(halves[:, part], piece)  # (2 r, wide)
            lost = torch.addmm(rough[:r], halves[:r, part], piece, beta=-1)  # (r, wide)
            sum_ = lost.to(fine).add_(rough[r:]).add_(rough[:r])
            result = sum_ if result is None else result.add_(sum_)
        return x.new_zeros(r, x.shape[1], dtype=fine) if result is None else result
    for part, piece in _slices(x, fine, positions):
        result = torch.mm(d[part].t(), piece) if result is None else result.addmm_(d[part].t(), piece)
    return x.new_zeros(d.shape[1], x.shape[1], dtype=fine) if result is None else result


def widen_(y: Tensor, s: Tensor, matrix: Tensor, factor: float, bias: Tensor | None = None) -> Tensor:
    """Add `factor · s (tokens, r) · matrix (r, wide) + bias (wide,)` to `y (tokens, wide)`, in place.

    Rounded once where `fine_dtype` differs from the dtype of `y` on a CPU, else once more for a bias.
    """
    fine = fine_dtype(y)
    if fine == y.dtype or stores_float32(y):
        y.addmm_(cast(s, y.dtype), cast(matrix, y.dtype), alpha=factor)
        return y if bias is None else y.add_(cast(bias, y.dtype))
    if _in_tiles(y):
        matrix = cast(matrix, fine) * factor
        if bias is not None:  # one row more, so that the sum is rounded once
            s = torch.cat([s, s.new_ones(len(s), 1)], dim=1)  # (tokens, r + 1)
            matrix = torch.cat([matrix, cast(bias, fine).unsqueeze(0)])  # (r + 1, wide)
        (s1, s2), (m1, m2) = _halves(s), _halves(matrix)
        return y.addmm_(torch.cat([s1, s2, s1], dim=1), torch.cat([m1, m1, m2]))
    matrix = cast(matrix, fine)
    for part, piece in _slices(y, fine, None):
        sum_ = piece.addmm_(s[part], matrix, alpha=factor)
        y[part] = sum_ if bias is None else sum_.add_(bias)
    return y


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` itself where it has the dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
