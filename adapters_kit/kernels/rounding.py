"""An update written into the blocks of a weight so that the layer's outputs keep it, though single weights cannot.

A small update is less than half a step of a 4-bit code nearly everywhere: rounding weight by weight gives the old file
back. What counts is X W'ᵀ on inputs X like those of the model:

1. Numbers. The fp16 d and m of a row's blocks that come closest in ‖X (W − W')ᵀ‖ are a small least-squares problem.
2. Codes. Column after column, each code moves to the value of its block's own grid that is best given all the others
   (coordinate descent; Behdin et al. 2023, arXiv:2309.01885); every move makes the outputs' error smaller. Quantizing
   once in column order with the error carried forward (GPTQ, arXiv:2210.17323) is worse here: its last columns take
   half a step of noise, which is more than a small update.
3. Numbers again, on the codes as they are now; and so on.

Without an update the base is the best there is, and nothing moves.
"""

import torch
from torch import Tensor

from adapters_kit.kernels.ggml import FORMATS, codes, dequantize, read_field, write_field

DAMPING = 0.01  # of the mean of the Hessian's diagonal
PASSES = 6  # over all columns; most of the gain is in the first three
TURNS = 2  # codes, then the fp16 numbers for these codes
COLUMNS = 64  # whose moves reach the other columns' slopes in one product
AT_ONCE = 1 << 23  # numbers of the equations of some rows


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
        `(out, bytes)`: other codes, and other fp16 numbers d and m.
    """
    hessian = hessian.double()
    hessian = hessian + DAMPING * hessian.diagonal().mean().clamp_min(1e-12) * torch.eye(len(hessian))
    target = target.float()
    raw = _refit(raw, kind, target, hessian)
    for _ in range(TURNS):
        raw = with_codes(raw, kind, _best_codes(raw, kind, target, hessian.float()))
        raw = _refit(raw, kind, target, hessian)
    return raw


def _refit(raw: Tensor, kind: int, target: Tensor, hessian: Tensor) -> Tensor:
    """The blocks with the d and m that come closest, their codes as they are.

    W = Σ d·u + m·v is linear in the numbers z of a row: with what they multiply as the columns of Z `(in, 2 blocks)`,
    ZᵀHZ Δz = ZᵀH e for the row's error e.
    """
    given = FORMATS[kind]
    fields = [(place, minimum) for place, minimum in ((given.scale, False), (given.minimum, True)) if place is not None]
    made = raw.clone(memory_format=torch.contiguous_format)
    blocks = raw.shape[1] // given.nbytes
    per_row = len(fields) * len(hessian) * blocks
    for rows in torch.arange(len(raw)).split(max(1, AT_ONCE // per_row)):
        part = raw[rows]
        error = (target[rows] - dequantize(part, kind, torch.float32)).double()  # (rows, in)
        units = torch.stack([codes(part, kind, minimum=minimum, dtype=torch.float64) for _, minimum in fields])
        units = units.unflatten(2, (blocks, -1))  # (fields, rows, blocks, weights)
        hz = torch.einsum("ibw,frbw->rifb", hessian.unflatten(1, (blocks, -1)), units).flatten(2)  # (rows, in, numbers)
        wide = hz.unflatten(1, (blocks, -1))  # (rows, blocks, weights, numbers)
        zhz = torch.einsum("frbw,rbwn->rfbn", units, wide).flatten(1, 2)
        zhe = (error.unsqueeze(1) @ hz).squeeze(1)  # (rows, numbers)
        # A block of zeros has no say: its equation is empty.
        ridge = 1e-9 * zhz.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-30)
        change = torch.linalg.solve(zhz + torch.diag_embed(ridge.unsqueeze(1).expand_as(zhe)), zhe)
        fresh = part.clone(memory_format=torch.contiguous_format)
        for (place, _), delta in zip(fields, change.unflatten(1, (len(fields), blocks)).unbind(1), strict=True):
            write_field(fresh, kind, place, read_field(part, kind, place).double() + delta)
        made[rows] = fresh
    return made


def _best_codes(raw: Tensor, kind: int, target: Tensor, hessian: Tensor) -> Tensor:
    """The codes, `(out, in)` uint8."""
    lowest, step = grid(raw, kind)
    top = _CODES[FORMATS[kind].name][0] - 1
    safe = torch.where(step == 0, torch.ones_like(step), step)
    q = ((target - lowest) / safe).round().clamp_(0, top)
    slope = (target - lowest - q * step) @ hessian  # (out, in); zero where a weight is best as it is
    for _ in range(PASSES):
        before = q.clone()
        for first in range(0, q.shape[1], COLUMNS):
            some = slice(first, first + COLUMNS)
            old, inner = q[:, some].clone(), slope[:, some].clone()
            for column in range(old.shape[1]):
                at = first + column
                wanted = inner[:, column] / (hessian[at, at] * safe[:, at])
                new = (q[:, at] + wanted.round()).clamp_(0, top)
                change = (new - q[:, at]) * step[:, at]
                inner.addr_(change, hessian[at, some], alpha=-1)
                q[:, at] = new
            slope.addmm_((q[:, some] - old) * step[:, some], hessian[some], alpha=-1)
        if torch.equal(q, before):
            break
    return q.to(torch.uint8)
