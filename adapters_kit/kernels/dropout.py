"""Dropout that keeps a seed instead of a mask: the backward pass draws the same positions again.

The positions are an exact function of (seed, shape, p, kind of device). On the CPU and for the small p of adapters,
only the dropped positions are drawn, as geometric gaps, which costs far less than a random number for every element.
"""

import math

import torch

_SPARSE_BELOW = 0.25  # above, drawing every element is as fast


def draw_seeds(count: int) -> torch.Tensor:
    """`count` seeds, int64 of shape `(count,)`, from the default CPU generator.

    From that generator because `torch.manual_seed` governs it, activation checkpointing replays it, and a seed that is
    already on the CPU never makes the host wait for a GPU.
    """
    return torch.randint(0, 2**62, (count,))


def _positions(count: int, seed: int, p: float) -> torch.Tensor:
    """Which of `count` elements are dropped: sorted int64 indices, each element with probability p."""
    generator = torch.Generator().manual_seed(seed)
    draws = int(count * p + 8 * math.sqrt(count * p) + 16)  # eight standard deviations; made up below if too few
    found, last = [], -1
    while last < count:
        uniform = torch.rand(draws, generator=generator)
        gaps = uniform.neg_().log1p_().mul_(1 / math.log1p(-p)).to(torch.int32).add_(1)
        found.append(gaps.cumsum(0, dtype=torch.int64).add_(last))
        last = int(found[-1][-1])
    index = found[0] if len(found) == 1 else torch.cat(found)
    return index[: int(torch.searchsorted(index, count))]


def zero_dropped(x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """Set the dropped elements of `x` to zero, in place. The others are *not* scaled by 1 / (1 - p).

    Args:
        x: contiguous, any floating dtype.
        seed: one of `draw_seeds`.
        p: probability of dropping an element, 0 <= p <= 1.
    """
    if p <= 0 or x.numel() == 0:
        return x
    if p >= 1:
        return x.zero_()
    if x.device.type == "cpu" and p < _SPARSE_BELOW:
        return x.view(-1).index_fill_(0, _positions(x.numel(), seed, p), 0).view(x.shape)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    return x.mul_(torch.empty_like(x).bernoulli_(1 - p, generator=generator))


def keep_mask(shape: tuple[int, ...], seed: int, p: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """The mask that `zero_dropped` applies: float32 of `shape`, 1 where kept and 0 where dropped."""
    return zero_dropped(torch.ones(shape, device=device), seed, p)
