"""The order of the examples: a function of seed and epoch alone, so that a resumed run sees the same batches."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


class OrderedByEpoch(Sampler[int]):
    """A new random order every epoch, by default with examples of similar length next to each other.

    Grouping looks at `window` batches at a time: inside a window rows are sorted by length and cut into batches, and
    the batches are shuffled. The batch with the longest row comes first, so that a lack of memory shows at once.

    Attributes:
        epoch: set it before iterating.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, *, group: bool = True, window: int = 50
    ) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size, self.seed, self.group, self.window = batch_size, seed, group, window
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        few = len(self.lengths) < 2**31  # the same numbers, at four bytes each
        order = torch.randperm(len(self.lengths), generator=generator, dtype=torch.int32 if few else torch.int64)
        if not self.group:
            return one_by_one(order)
        for part in order.split(self.batch_size * self.window):
            part.copy_(part[self.lengths[part].argsort(descending=True, stable=True)])
        # A short last batch must stay last: everything else has to fill up exactly.
        full = len(order) // self.batch_size
        batches = order[: full * self.batch_size].view(full, self.batch_size)
        if full:
            batches = batches[torch.randperm(full, generator=generator)]
            # A batch begins with its longest row; the first of the longest goes to the front.
            longest = int(self.lengths[batches[:, 0]].numpy().argmax())
            batches[: longest + 1] = batches[: longest + 1].roll(1, 0)
            order[: full * self.batch_size] = batches.flatten()
        return one_by_one(order)


@contextmanager
def own_draws(features: Sequence[Mapping[str, Any]], seed: int, epoch: int) -> Iterator[None]:
    """Draws of torch's generator on the CPU that hang on these rows, the seed and the epoch, and on nothing else.

    A batch is made while the step before it runs, whose draws a checkpoint keeps: a resumed run makes it anew, and has
    to draw the same.
    """
    told = b"".join(np.asarray(one.get("input_ids", one.get("row", 0))).tobytes() for one in features)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed((seed << 32) + zlib.crc32(told, epoch))
        yield


def one_by_one(order: torch.Tensor) -> Iterator[int]:
    """The numbers of a tensor; as a list of Python's they would take four times the memory."""
    return (int(number) for number in order.numpy())
