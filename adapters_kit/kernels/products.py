"""Products in the dtype that serves them: narrow ones in float32, wide ones as this machine multiplies fastest.

A product of 16-bit tensors is accumulated in float32 but rounded to 16 bit when it is stored. For the narrow result S
and for the gradients of A and B that rounding is worth avoiding: they are small, and the optimizer sees them. CUDA
stores float32 from 16-bit factors. A CPU does not, but converts a slice that fits its cache as fast as it multiplies.

x86 CPUs without AMX tiles multiply float32 up to twice as fast as bf16. From a few dozen tokens on, converting both
factors costs less than that, so there a frozen bf16 weight is multiplied in float32, and the result rounded once.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_SLICE = 2**18  # elements converted at a time for a narrow product: 1 MB
_BLOCK = 2**22  # and for a wide one: 16 MB, so that a long batch is not held in float32 as a whole
_WORTH = 32  # tokens from which a weight is worth converting


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which to multiply `x (tokens, in)` by a frozen weight: its own, or float32 if that is faster."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or len(x) < _WORTH or torch.compiler.is_compiling():
        return x.dtype
    return torch.float32 if _slow_at_bf16() else x.dtype


@functools.cache
def _slow_at_bf16() -> bool:
    able = torch.cpu.get_capabilities()
    return bool(able.get("architecture") == "x86_64" and able.get("avx2") and not able.get("amx_bf16"))


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
    return x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()


def _slices(x: Tensor, dtype: torch.dtype, positions: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """A few rows of `x (tokens, wide)` after the other in `dtype`, with zeros at `positions`.

    They share memory, so each is to be used before the next; views of `x` itself if there was nothing to change.
    """
    rows, width = x.shape
    count = 1 if isinstance(x, FakeTensor) else max(1, -(-rows * width // _SLICE))  # without values there is no cache
    step = max(1, -(-rows // count))
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    copied = positions is not None or x.dtype != dtype
    scratch = x.new_empty(min(step, rows), width, dtype=dtype) if copied else x
    zeros = [] if positions is None else [positions]
    if len(parts) > 1 and zeros:
        ends = torch.searchsorted(positions, torch.tensor([part.stop * width for part in parts[:-1]])).tolist()
        zeros = positions.tensor_split(ends)
    for number, part in enumerate(parts):
        piece = scratch[: part.stop - part.start].copy_(x[part]) if copied else x[part]
        if zeros:
            piece.view(-1).scatter_(0, zeros[number] - part.start * width if number else zeros[number], 0.0)
        yield part, piece


def narrow(x: Tensor, matrix: Tensor, positions: Tensor | None = None) -> Tensor:
    """`x (tokens, in)` times `matrix (r, in)` transposed: `(tokens, r)` in `fine_dtype(x)`.

    Args:
        positions: int64, sorted, in the flattened `x`: these elements count as zero. Only on a CPU.
    """
    fine = fine_dtype(x)
    if fine == x.dtype and positions is None:
        return torch.mm(x, cast(matrix, x.dtype).t())
    if x.is_cuda:
        return torch.mm(x, cast(matrix, x.dtype).t(), out_dtype=fine)
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
    if x.is_cuda:
        return torch.mm(d.to(x.dtype).t(), x, out_dtype=fine)
    result = None
    for part, piece in _slices(x, fine, positions):
        result = torch.mm(d[part].t(), piece) if result is None else result.addmm_(d[part].t(), piece)
    return x.new_zeros(d.shape[1], x.shape[1], dtype=fine) if result is None else result


def widen_(y: Tensor, s: Tensor, matrix: Tensor, factor: float, bias: Tensor | None = None) -> Tensor:
    """Add `factor · s (tokens, r) · matrix (r, wide) + bias (wide,)` to `y (tokens, wide)`, in place.

    Rounded once where `fine_dtype` differs from the dtype of `y` on a CPU, else once more for a bias.
    """
    fine = fine_dtype(y)
    if fine == y.dtype or y.is_cuda:
        y.addmm_(cast(s, y.dtype), cast(matrix, y.dtype), alpha=factor)
        return y if bias is None else y.add_(cast(bias, y.dtype))
    matrix = cast(matrix, fine)
    for part, piece in _slices(y, fine, None):
        sum_ = piece.addmm_(s[part], matrix, alpha=factor)
        y[part] = sum_ if bias is None else sum_.add_(bias)
    return y


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` itself where it has the dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
