"""Steps of many trainings, laid together.

    each training         its batch, head, loss      →  backward to the body's output  →  clipping, optimizer, schedule
    the conductor         one forward of the body    ·  one backward of the body
                          over the rows of all          from the gradients of all

All wait at the beginning of a step, at every call of a body, and at the end of their own backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from adapters_kit.errors import gist
from adapters_kit.training.many.body import Body
from adapters_kit.training.many.layout import UnjoinableError
from adapters_kit.training.many.seat import Seat

STEP, BACKWARD = "step", "backward"
# A pass costs what reading the weights costs, which on a CPU is that of some 64 tokens, and the tokens that are in it.
_PADDING = 64


@dataclass
class BodyCall:
    """A training calls a body.

    Attributes:
        body: which, one that all with the same base dropout share.
        number: how many calls of this step came before.
        arguments: as the body takes them.
        autocast: what the training has switched on, as (enabled, dtype).
    """

    body: Body
    number: int
    arguments: dict[str, Any]
    autocast: tuple[bool, torch.dtype]

    def key(self) -> tuple[Any, ...]:
        """Calls of one key can share a pass."""
        given = tuple(name for name, value in self.arguments.items() if value is not None)
        return self.number, id(self.body), given, self.autocast

    def rows_and_length(self) -> tuple[int, int]:
        """Of the batch, as far as its longest axis of tokens."""
        tensors = [value for value in self.arguments.values() if isinstance(value, Tensor) and value.ndim > 1]
        if not tensors:
            return 1, 1
        return tensors[0].shape[0], max(tensor.shape[1] for tensor in tensors)


@dataclass
class Answer:
    """What a body gives one training, cut off from the graph: leaves whose gradients the conductor takes up.

    Attributes:
        output: as the body's own.
        padded: whether the pass was longer than the training's own batch.
    """

    output: Any
    padded: bool


@dataclass
class _Pass:
    """What is kept until the backward pass: for each training the body's tensors, and the leaves in their place."""

    seats: Sequence[Seat]
    pairs: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)


class Conductor:
    """Lets trainings run in turn, and the bodies for all of them."""

    def __init__(self, seats: Iterable[Seat]) -> None:
        self.seats = list(seats)
        self._passes: list[_Pass] = []

    def run(self) -> None:
        """Until every training has ended."""
        for seat in self.seats:
            seat.run()
        while live := [seat for seat in self.seats if not seat.has_ended]:
            calling = [seat for seat in live if isinstance(seat.request, BodyCall)]
            if calling:
                number = min(seat.request.number for seat in calling)
                for group in groups([seat for seat in calling if seat.request.number == number]):
                    for seat, answer in zip(group, self._forward(group), strict=True):
                        seat.run(answer)
                continue
            behind = [seat for seat in live if seat.request == BACKWARD]
            failed = self._backward(behind) if behind else None
            for seat in behind or live:
                seat.run(failed)

    def _forward(self, seats: list[Seat]) -> list[Answer | BaseException]:
        calls = [seat.request for seat in seats]
        enabled, dtype = calls[0].autocast
        kind = next(value.device.type for value in calls[0].arguments.values() if isinstance(value, Tensor))
        try:
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                layout, outputs = calls[0].body.run(seats, [call.arguments for call in calls])
        except Exception as error:
            # Out of memory is nothing that going alone would mend for all.
            told = isinstance(error, UnjoinableError) or should_reduce_batch_size(error)
            return [error if told else UnjoinableError(f"{type(error).__name__}: {gist(error)}")] * len(seats)
        made = _Pass(seats)
        answers: list[Answer | BaseException] = []
        for output in outputs:
            pairs: list[tuple[Tensor, Tensor]] = []
            answers.append(Answer(_cut_off(output, pairs), layout.is_padded))
            made.pairs.append(pairs)
        self._passes.append(made)
        return answers

    def _backward(self, seats: list[Seat]) -> BaseException | None:
        """The last body first: what it gives back to an earlier one's output is a part of that one's gradient."""
        passes, self._passes = self._passes, []
        try:
            while passes:
                made = passes.pop()
                told = [
                    pair for seat, pairs in zip(made.seats, made.pairs, strict=True) if seat in seats for pair in pairs
                ]
                told = [(output, leaf) for output, leaf in told if leaf.grad is not None]
                if told:
                    torch.autograd.backward([output for output, _ in told], [leaf.grad for _, leaf in told])
        except Exception as error:
            return error
        return None


def groups(seats: list[Seat]) -> list[list[Seat]]:
    """Which trainings share a pass: those whose batches have one form, where padding costs less than another pass."""
    kinds: dict[tuple[Any, ...], list[Seat]] = {}
    for seat in seats:
        kinds.setdefault(seat.request.key(), []).append(seat)
    found: list[list[Seat]] = []
    for members in kinds.values():
        sizes = {seat: seat.request.rows_and_length() for seat in members}
        longest = 0
        for seat in sorted(members, key=lambda seat: -sizes[seat][1]):
            rows, length = sizes[seat]
            wasted = rows * (longest - length)
            if not longest or wasted > max(_PADDING, rows * length // 8):
                found.append([])
                longest = length
            found[-1].append(seat)
    order = {seat: number for number, seat in enumerate(seats)}
    return [sorted(group, key=order.__getitem__) for group in found]


def _cut_off(value: Any, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    if isinstance(value, Tensor):
        if not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        pairs.append((value, leaf))
        return leaf
    if isinstance(value, Mapping):
        return type(value)(**{key: _cut_off(item, pairs) for key, item in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_cut_off(item, pairs) for item in value)
    return value


class Joined:
    """One training's way to the bodies that it shares, while a step of it is made.

    Args:
        own: its copies of the bodies; `shared`, in the same order, those that run.
    """

    def __init__(self, seat: Seat, own: Sequence[nn.Module], shared: Sequence[Body]) -> None:
        self.seat, self.own, self.shared = seat, own, shared
        self.count = 0
        self.padded = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """In the block, a call of a body waits for those of all trainings."""
        self.count, self.padded = 0, False
        for own, body in zip(self.own, self.shared, strict=True):
            own.forward = self._caller(own, body)
        try:
            yield
        finally:
            for own in self.own:
                own.__dict__.pop("forward", None)

    def _caller(self, own: Any, body: Body) -> Any:
        names = inspect.signature(type(own).forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = names.bind_partial(own, *args, **kwargs).arguments
            given.pop(next(iter(names.parameters)))
            for name, parameter in names.parameters.items():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    given |= given.pop(name, {})
            given.pop("num_items_in_batch", None)  # for the loss, which each makes itself
            if "use_cache" in names.parameters or "use_cache" in given:
                given["use_cache"] = False
            plain = given.get("attention_mask") is None and given.get("position_ids") is None
            if plain and "attention_mask" in names.parameters and given.get("input_ids") is not None:
                given["attention_mask"] = torch.ones_like(given["input_ids"])
            kind = next(value.device.type for value in given.values() if isinstance(value, Tensor))
            autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            answer = self.seat.wait(BodyCall(body, self.count, given, autocast))
            self.count += 1
            self.padded |= answer.padded
            return answer.output

        return forward
