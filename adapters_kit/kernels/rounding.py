"""An update written into the blocks of a weight so that the layer's outputs keep it, though single weights cannot.

A small update is less than half a step of a 4-bit code nearly everywhere: rounding weight by weight gives the old file
back. What counts is X W'ᵀ on inputs X like those of the model:

1. Minima. Where a format stores one for each block, the change of all minima that comes closest in ‖X (W − W')ᵀ‖ is a
   least-squares problem with one matrix for all rows.
2. Codes. Column after column, each code moves to the value of its block's own grid that is best given all the others
   (coordinate descent; Behdin et al. 2023, arXiv:2309.01885). The base lies on this grid exactly, so without an update
   no code moves; every move makes the outputs' error smaller, so the result is never further off than plain rounding.
   Quantizing once in column order with the error carried forward (GPTQ, arXiv:2210.17323) is worse here: its last
   columns take half a step of noise, which is more than a small update.
3. Minima again, on the codes as they are now.
"""

import torch
from torch import Tensor

from adapters_kit.kernels.ggml import FORMATS, dequantize, read_field, write_field

DAMPING = 0.01  # of the mean of the Hessian's diagonal
PASSES = 6  # over all columns; most of the gain is in the first three


def _nibbles(blocks: Tensor, start: int, q: Tensor, run: int) -> None:
    """Half-bytes: of `2 · run` weights the first half low, the second high."""
    low, high = q.unflatten(1, (-1, 2, run)).unbind(2)
    blocks[:, start : start + low.shape[1] * run] = (low | high << 4).flatten(1)


def _set_q6_k(blocks: Tensor, q: Tensor) -> None:
    parts = q.unflatten(1, (2, 4, 32))  # (blocks, half, quarter, 32)
    low = parts & 15
    blocks[:, :128] = (low[:, :, :2] | low[:, :, 2:] << 4).flatten(1)
    high = parts >> 4
    blocks[:, 128:192] = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).flatten(1)


# Formats on an even grid: name -> (number of codes, how they are written into `blocks (blocks, bytes)`).
_CODES = {
    "Q4_0": (16, lambda blocks, q: _nibbles(blocks, 2, q, 16)),
    "Q4_1": (16, lambda blocks, q: _nibbles(blocks, 4, q, 16)),
    "Q4_K": (16, lambda blocks, q: _nibbles(blocks, 16, q, 32)),
    "Q6_K": (64, _set_q6_k),
    "Q8_0": (256, lambda blocks, q: blocks[:, 2:34].copy_(q ^ 128)),
}


def can_round(kind: int) -> bool:
    """Whether `rounded` knows the format."""
    return FORMATS[kind].name in _CODES


def with_codes(raw: Tensor, kind: int, q: Tensor) -> Tensor:
    """`raw (out, bytes)` with the codes `q (out, in)` uint8, counted from the format's lowest."""
    given = FORMATS[kind]
    made = raw.clone(memory_format=torch.contiguous_format)
    _CODES[given.name][1](made.view(-1, given.nbytes), q.reshape(-1, given.weights))
    return made


def grid(raw: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """The value of the lowest code and the step to the next, of every weight: `(out, in)` float32 each."""
    shape = (raw.shape[0], raw.shape[1] // FORMATS[kind].nbytes * FORMATS[kind].weights)
    lowest, second = (
        dequantize(with_codes(raw, kind, torch.full(shape, code, dtype=torch.uint8)), kind, torch.float32)
        for code in (0, 1)
    )
    return lowest, second - lowest


def rounded(raw: Tensor, kind: int, target: Tensor, hessian: Tensor) -> Tensor:
    """New blocks whose outputs are close to those of `target`.

    Args:
        raw: the base's blocks `(out, bytes)` uint8.
        kind: their type, one that `can_round`.
        target: the weight wanted, `(out, in)`.
        hessian: XᵀX `(in, in)` of the layer's inputs.

    Returns:
        `(out, bytes)`: other codes, other minima where the format has them for every weight alike, the same scales.
    """
    hessian = hessian.double()
    hessian = hessian + DAMPING * hessian.diagonal().mean().clamp_min(1e-12) * torch.eye(len(hessian))
    given = FORMATS[kind]
    refit = given.minimum is not None and given.run == given.weights
    if refit:
        raw = _with_minima(raw, kind, target, hessian)
    raw = with_codes(raw, kind, _best_codes(raw, kind, target.float(), hessian.float()))
    return _with_minima(raw, kind, target, hessian) if refit else raw


def _with_minima(raw: Tensor, kind: int, target: Tensor, hessian: Tensor) -> Tensor:
    given = FORMATS[kind]
    assert given.minimum is not None  # asked for by `rounded`, where there is one
    error = (target - dequantize(raw, kind, torch.float32)).double()  # (out, in)
    blocks = error.shape[1] // given.weights
    # P (in, blocks) adds a block's Δm to each of its weights: PᵀHP Δmᵀ = PᵀH Eᵀ.
    ph = hessian.unflatten(0, (blocks, -1)).sum(1)  # (blocks, in)
    php = ph.unflatten(1, (blocks, -1)).sum(2)  # (blocks, blocks)
    change = torch.linalg.solve(php, ph @ error.t()).t()  # (out, blocks)
    made = raw.clone(memory_format=torch.contiguous_format)
    write_field(made, kind, given.minimum, read_field(raw, kind, given.minimum).double() + change)
    return made


def _best_codes(raw: Tensor, kind: int, target: Tensor, hessian: Tensor) -> Tensor:
    """The codes, `(out, in)` uint8."""
    lowest, step = grid(raw, kind)
    top = _CODES[FORMATS[kind].name][0] - 1
    safe = torch.where(step == 0, torch.ones_like(step), step)
    q = ((target - lowest) / safe).round().clamp_(0, top)
    slope = (target - lowest - q * step) @ hessian  # (out, in); zero where a weight is best as it is
    for _ in range(PASSES):
        moved = False
        for column in range(q.shape[1]):
            wanted = slope[:, column] / (hessian[column, column] * safe[:, column])
            new = (q[:, column] + wanted.round()).clamp_(0, top)
            change = (new - q[:, column]) * step[:, column]
            if change.any():
                slope -= torch.outer(change, hessian[column])
                q[:, column], moved = new, True
        if not moved:
            break
    return q.to(torch.uint8)
