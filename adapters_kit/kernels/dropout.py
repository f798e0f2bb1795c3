"""Dropout that keeps a seed instead of a mask: the backward pass draws the same positions again.

The positions are an exact function of (seed, shape, p, kind of device). On the CPU and for the small p of adapters,
only the dropped positions are drawn, as geometric gaps, which costs far less than a random number for every element.
"""

import math

import torch
from torch._subclasses.fake_tensor import FakeTensor

_SPARSE_BELOW = 0.25  # above, drawing every element is as fast


def draw_seeds(count: int) -> torch.Tensor:
    """`count` seeds, int64 of shape `(count,)`, from the default CPU generator.

    From that generator because `torch.manual_seed` governs it, activation checkpointing replays it, and a seed that is
    already on the CPU never makes the host wait for a GPU.
    """
    return torch.randint(0, 2**62, (count,))


def _positions(count: int, seed: int, p: float) -> torch.Tensor:
    """Which of `count` elements are dropped: sorted int64 indices, each element with probability p."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    draws = int(count * p + 8 * math.sqrt(count * p) + 16)  # eight standard deviations; made up below if too few
    found, last, smallest = [], -1, 2**-25  # half of what uniform_ resolves: a zero has no logarithm
    while last < count:
        gaps = torch.empty(draws, dtype=torch.float32, device="cpu").uniform_(smallest, 1, generator=generator)
        gaps = gaps.log_().mul_(1 / math.log1p(-p)).add_(1).to(torch.int64)  # geometric, at least 1
        gaps[0] += last
        found.append(gaps.cumsum(0))
        last = int(found[-1][-1])
    index = found[0] if len(found) == 1 else torch.cat(found)
    return index[: int(torch.searchsorted(index, count))]


def draw_pattern(x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """Which elements of a tensor like `x` are dropped.

    Args:
        x: shape, dtype and device count, values do not.
        seed: one of `draw_seeds`.
        p: probability of dropping an element, 0 <= p <= 1.

    Returns:
        Either int64 `(dropped,)`, sorted positions in the flattened tensor, or a mask like `x`, 0 where dropped and 1
        where kept.
    """
    if x.device.type == "cpu" and 0 < p < _SPARSE_BELOW:
        return _positions(x.numel(), seed, p)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return mask.bernoulli_(1 - p, generator=generator)


def is_mask(pattern: torch.Tensor) -> bool:
    """Which of its two forms a pattern has."""
    return pattern.is_floating_point()


def zero_dropped(x: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """A copy of `x` with the dropped elements at zero. The others are *not* scaled by 1 / (1 - p)."""
    if is_mask(pattern):
        return x * pattern
    return x.clone(memory_format=torch.contiguous_format).view(-1).scatter_(0, pattern, 0.0).view(x.shape)


def cut(pattern: torch.Tensor, start: int, stop: int, width: int) -> torch.Tensor:
    """The pattern of the rows `start` to `stop` of a matrix `width` wide."""
    if is_mask(pattern):
        return pattern[start:stop]
    ends = torch.searchsorted(pattern, torch.tensor([start * width, stop * width]))
    return pattern[int(ends[0]) : int(ends[1])] - start * width


def dropped(x: torch.Tensor, seeds: torch.Tensor, which: int, p: float) -> torch.Tensor:
    """`x` with the elements at zero that the seed drops; the others are not rescaled."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return _dropped_op(x, seeds, which, p)
    return zero_dropped(x, draw_pattern(x, int(seeds[which]), p))


@torch.library.custom_op("adapters_kit::dropped", mutates_args=())
def _dropped_op(x: torch.Tensor, seeds: torch.Tensor, which: int, p: float) -> torch.Tensor:
    """`dropped` for torch.compile, which cannot trace a generator, and for `plan`, whose seeds have no values."""
    return zero_dropped(x.contiguous(), draw_pattern(x, int(seeds[which]), p))


@_dropped_op.register_fake
def _(x: torch.Tensor, seeds: torch.Tensor, which: int, p: float) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
