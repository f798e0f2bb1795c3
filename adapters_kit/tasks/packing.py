"""Packing: several examples to a row, each seeing only itself, so that hardly any of a batch is padding.

The row carries `position_ids` that begin at 0 for every example and no attention mask; transformers builds the
block-diagonal mask from them. A model that does not is found by comparing logits, and refused.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from adapters_kit.errors import ModelError
from adapters_kit.tasks.base import IGNORED, Features, pad
from adapters_kit.tasks.encoded import Encoded


def pack(features: Features, capacity: int) -> Encoded:
    """Joins features (input_ids, labels, row) to rows of at most `capacity` tokens."""
    packed = Encoded(small=("input_ids",))
    lengths = np.fromiter((len(feature["input_ids"]) for feature in features), np.int32, len(features))
    for members in best_fit(lengths, capacity):
        parts = [features[i] for i in members]
        labels = [np.array(part["labels"]) for part in parts]
        for first in labels:
            first[0] = IGNORED  # it would be predicted from the last token of the example before
        packed.append(
            {
                "row": np.asarray([part["row"] for part in parts]),
                "input_ids": np.concatenate([part["input_ids"] for part in parts]),
                "labels": np.concatenate(labels),
                "position_ids": np.concatenate([np.arange(len(part["input_ids"])) for part in parts]),
            }
        )
    return packed


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> Iterator[list[int]]:
    """Bins of indices, longest first, each put where the least room is left."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    places = np.empty(len(order), dtype=np.int32)  # the bin of each, in this order
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    bins = 0
    for at_order, index in enumerate(order):
        length = int(lengths[index])
        at = bisect_left(rooms, (length, -1))
        if at == len(rooms):
            room, number, bins = capacity, bins, bins + 1
        else:
            room, number = rooms.pop(at)
        places[at_order] = number
        if room > length:
            insort(rooms, (room - length, number))
    order = order[np.argsort(places, kind="stable")]
    ends = np.cumsum(np.bincount(places, minlength=bins))
    return (order[start:end].tolist() for start, end in pairwise([0, *ends]))


def collate(features: Features, pad_token: int) -> dict[str, torch.Tensor]:
    """A batch of packed rows; padding tokens are examples of one token each, seen by nobody."""
    return {
        "input_ids": pad([feature["input_ids"] for feature in features], pad_token),
        "labels": pad([feature["labels"] for feature in features], IGNORED),
        "position_ids": pad([feature["position_ids"] for feature in features], 0),
        "row": torch.tensor([row for feature in features for row in feature["row"]]),
    }


@torch.no_grad()
def check(model: nn.Module, name: str) -> None:
    """Refuses a model whose packed examples see each other or know their place in the row.

    Raises:
        ModelError: with what to do instead.
    """
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    first, second = (torch.arange(n, device=device)[None] * 7 % min(vocabulary, 97) + 1 for n in (5, 6))
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None].to(device)
    was_training = model.training
    model.eval()
    try:
        alone = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in (first, second)], 1).float()
        ids = torch.cat([first, second], 1)
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
        difference = (together - alone).abs().max() / alone.abs().max()
    except TypeError:  # takes no position_ids
        difference = torch.tensor(torch.inf)
    finally:
        model.train(was_training)
    loosest = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.05
    if not difference <= loosest:
        raise ModelError(
            f"{name} ({type(model).__name__}) does not keep packed examples apart: its logits differ by "
            f"{difference.item():.1g} from those of the examples alone. Leave training.packing off; "
            "training.group_by_length saves most of the padding too."
        )
