"""The order of the examples: a function of seed and epoch alone, so that a resumed run sees the same batches."""

from collections.abc import Iterator, Sequence

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
        self, lengths: Sequence[int], batch_size: int, seed: int, *, group: bool = True, window: int = 50
    ) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size, self.seed, self.group, self.window = batch_size, seed, group, window
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(len(self.lengths), generator=generator)
        if not self.group:
            return iter(order.tolist())
        batches: list[torch.Tensor] = []
        for part in order.split(self.batch_size * self.window):
            part = part[self.lengths[part].argsort(descending=True, stable=True)]
            batches += part.split(self.batch_size)
        # A short last batch must stay last: everything else has to fill up exactly.
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        if shuffled:
            longest = max(range(len(shuffled)), key=lambda i: int(self.lengths[shuffled[i]].max()))
            shuffled.insert(0, shuffled.pop(longest))
        return iter(torch.cat(shuffled + last).tolist())
