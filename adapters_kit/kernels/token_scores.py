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

from adapters_kit.anatomy import base_model, output_embeddings
from adapters_kit.kernels.base_layers import is_plain
from adapters_kit.kernels.cross_entropy import LAZY, ChunkedHead, LazyLogits, tokens_at_once

IGNORED = -100


@contextmanager
def lazy_logits(model: nn.Module) -> Iterator[None]:
    """Inside, a model that `chunked_loss` has changed returns `LazyLogits`, labels or not."""
    base = base_model(model)
    base.__dict__[LAZY] = True
    try:
        yield
    finally:
        del base.__dict__[LAZY]


@contextmanager
def lazy_head(model: nn.Module) -> Iterator[bool]:
    """Inside, a causal model that is only asked returns `LazyLogits`, whatever is trained of it; without gradients.

    Gives whether it does: an output head of its own kind, a hooked or a sharded one makes its logits as ever.
    """
    base = base_model(model)
    path = output_embeddings(base)
    head = base if path is None else base.get_submodule(path)
    lazy = (
        type(head) in (nn.Linear, ChunkedHead)
        and not (head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__)
        and all(is_plain(parameter) for parameter in head.parameters())
    )
    if lazy:
        assert isinstance(head, nn.Linear)
        head.forward = lambda hidden: LazyLogits(hidden, head)  # type: ignore[assignment,return-value]
    try:
        yield lazy
    finally:
        if lazy:
            del head.forward


def log_probabilities(logits: Tensor | LazyLogits, labels: Tensor) -> Tensor:
    """The log-probability of every label (nats), float32 `(rows, length - 1)`; 0 where there is none to predict.

    Args:
        logits: `(rows, length or more, vocabulary)`; what is more stands before the text (virtual tokens).
        labels: `(rows, length)`, -100 where nothing is predicted; each is predicted by the position before it.
    """
    target = labels[:, 1:]
    kept = target != IGNORED
    wanted = target[kept]

    def score(start: int, z: Tensor) -> Tensor:
        right = wanted[start : start + len(z), None]
        return z.gather(1, right).squeeze(1) - torch.logsumexp(z, dim=1)

    found = by_token(score, kept, logits)
    return torch.zeros(target.shape, dtype=found.dtype, device=found.device).masked_scatter(kept, found)


def divergences(logits: Tensor | LazyLogits, taught: Tensor | LazyLogits, kept: Tensor, heat: float = 1.0) -> Tensor:
    """KL(taught, logits) in nats of every token that is `kept`, at a temperature, times its square; float32 (tokens,).

    Args:
        logits: as for `log_probabilities`; they get the gradient.
        taught: of the teacher, of the same vocabulary.
        kept: as for `by_token`.
    """

    def divergence(start: int, z: Tensor, theirs: Tensor) -> Tensor:
        theirs = (theirs / heat).log_softmax(-1)
        return heat**2 * (theirs.exp() * (theirs - (z / heat).log_softmax(-1))).sum(-1)

    return by_token(divergence, kept, logits, taught)


def by_token(score: Callable[..., Tensor], kept: Tensor, *many: Tensor | LazyLogits) -> Tensor:
    """`score(start, z, …)` of the tokens that are `kept`, in pieces, one after the other.

    Args:
        score: from the float logits `(tokens, vocabulary)` of each of `many`, of the tokens from number `start` on, to
            `(tokens,)`.
        kept: bool `(rows, length - 1)`: of every position but the last of a text, whether it counts.
        many: logits as for `log_probabilities`.
    """
    length = kept.shape[1] + 1
    sources = [one.hidden if isinstance(one, LazyLogits) else one for one in many]
    chosen = [source[:, source.shape[1] - length : -1][kept] for source in sources]
    size = tokens_at_once(many[0].shape[-1], kept.device.type != "cpu")

    def piece(start: int, *parts: Tensor) -> Tensor:
        made = [
            LazyLogits(part, one.head, one.steps).make() if isinstance(one, LazyLogits) else part
            for part, one in zip(parts, many, strict=True)
        ]
        return score(start, *(z.to(torch.promote_types(z.dtype, torch.float32)) for z in made))

    found = []
    for start in range(0, len(chosen[0]), size):
        parts = [one[start : start + size] for one in chosen]
        again = torch.is_grad_enabled()
        found.append(checkpoint(piece, start, *parts, use_reentrant=False) if again else piece(start, *parts))
    return torch.cat(found) if found else sources[0].new_zeros(0, dtype=torch.float32)
