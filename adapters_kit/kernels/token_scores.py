"""Scores of single tokens from a causal model's logits, a few tokens at a time: those of a batch never exist at once.

Where the head is frozen, `lazy_logits` lets the model return its head's input instead of logits; what is computed from
it, piece by piece, is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapters_kit.anatomy import base_model
from adapters_kit.kernels.cross_entropy import LAZY, LazyLogits, tokens_at_once

IGNORED = -100


@contextmanager
def lazy_logits(model: nn.Module) -> Iterator[None]:
    """Inside, a model that `chunked_loss` has changed returns `LazyLogits` while it is trained, labels or not."""
    base = base_model(model)
    base.__dict__[LAZY] = True
    try:
        yield
    finally:
        del base.__dict__[LAZY]


def log_probabilities(logits: Tensor | LazyLogits, labels: Tensor) -> Tensor:
    """The log-probability of every label (nats), float32 `(rows, length - 1)`; 0 where there is none to predict.

    Args:
        logits: `(rows, length or more, vocabulary)`; what is more stands before the text (virtual tokens).
        labels: `(rows, length)`, -100 where nothing is predicted; each is predicted by the position before it.
    """
    target = labels[:, 1:]
    kept = target != IGNORED
    wanted = target[kept]

    def score(z: Tensor, start: int) -> Tensor:
        right = wanted[start : start + len(z), None]
        return z.gather(1, right).squeeze(1) - torch.logsumexp(z, dim=1)

    found = by_token(logits, kept, score)
    return torch.zeros(target.shape, dtype=found.dtype, device=found.device).masked_scatter(kept, found)


def by_token(logits: Tensor | LazyLogits, kept: Tensor, score: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`score(z, start)` of the tokens that are `kept`, in pieces.

    Args:
        logits: as for `log_probabilities`.
        kept: bool `(rows, length - 1)`: of every position but the last of a text, whether it counts.
        score: from the float logits `(tokens, vocabulary)` of the tokens from number `start` on to `(tokens,)`.
    """
    length = kept.shape[1] + 1
    source = logits.hidden if isinstance(logits, LazyLogits) else logits
    chosen = source[:, source.shape[1] - length : -1][kept]
    size = tokens_at_once(logits.shape[-1], chosen.device.type != "cpu")

    def piece(part: Tensor, start: int) -> Tensor:
        z = LazyLogits(part, logits.head, logits.steps).make() if isinstance(logits, LazyLogits) else part
        return score(z.to(torch.promote_types(z.dtype, torch.float32)), start)

    parts = [
        checkpoint(piece, chosen[start : start + size], start, use_reentrant=False)
        if torch.is_grad_enabled()
        else piece(chosen[start : start + size], start)
        for start in range(0, len(chosen), size)
    ]
    return torch.cat(parts) if parts else source.new_zeros(0, dtype=torch.float32)
