"""Which part of a joint batch is whose: rows one after another, token axes padded to a common length.

    rows of seat 0   | ids ids ids pad |      `join` lays the tensors of the seats so, `parts` takes them apart again,
    rows of seat 1   | ids ids ids ids |      each at the shape that its own run has: padding that the others cause
    rows of seat 1   | ids ids pad pad |      is never seen by what draws random numbers or looks at a shape.

A token axis is known by its padded length, which is chosen to be no other size in the model.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class UnjoinableError(Exception):
    """These batches, or this model, cannot go through the body together; the text says why."""


class Layout:
    """The rows and lengths of the seats in one pass.

    Attributes:
        rows: of each seat.
        total: of all.
        axes: padded length -> the length that each seat's own batch has there.
    """

    def __init__(self, calls: Sequence[Mapping[str, Any]], taken: set[int], pad_token: int) -> None:
        """
        Args:
            calls: the keyword arguments with which each seat calls the body.
            taken: sizes that the model has; no padded length is one of them.
            pad_token: fills `input_ids`.
        """
        self.pad_token = pad_token
        shapes = list(_shapes(calls))
        if not shapes:
            raise UnjoinableError("the body is given no tensors")
        self.rows = list(shapes[0][0])
        self.total = sum(self.rows)
        vectors = list(dict.fromkeys(vector for dims in shapes for vector in dims[1:]))
        used = taken | {vector[0] for vector in vectors if len(set(vector)) == 1}
        self.axes: dict[int, tuple[int, ...]] = {}
        for vector in (vector for vector in vectors if len(set(vector)) > 1):
            size = max(vector)
            while size in used:
                size += 1
            used.add(size)
            self.axes[size] = vector
        self.sizes = used - taken
        self._known: deque[tuple[weakref.ref[Tensor], int, bool, list[Tensor]]] = deque(maxlen=4)

    @property
    def is_padded(self) -> bool:
        """Whether some seat's batch is longer than in its own run."""
        return bool(self.axes)

    def join_call(self, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The arguments of the pass."""
        return {name: self._joined(name, [call.get(name) for call in calls]) for name in calls[0]}

    def _joined(self, name: str, values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor) or any(isinstance(value, Tensor) for value in values):
            return self._joined_tensors(name, values)
        if isinstance(first, tuple | list) and any(isinstance(item, Tensor) for item in first):
            return type(first)(self._joined(name, list(items)) for items in zip(*values, strict=True))
        if any(value != first for value in values[1:]):
            raise UnjoinableError(f"{name} differs between the batches")
        return first

    def _joined_tensors(self, name: str, values: list[Any]) -> Tensor:
        if any(value is None for value in values):
            raise UnjoinableError(f"some batches have no {name}")
        if all(value.shape[:1] == (1,) for value in values) and set(self.rows) != {1}:
            values = [value.expand(rows, *value.shape[1:]) for value, rows in zip(values, self.rows, strict=True)]
        if [len(value) if value.ndim else -1 for value in values] != self.rows:
            raise UnjoinableError(f"{name} does not begin with the rows of the batch")
        fill = self.pad_token if name.endswith("input_ids") else 0
        return self.join(values, fill=fill)

    def join(self, parts: Sequence[Tensor], fill: float = 0) -> Tensor:
        """Tensors of the seats, (rows, ...) each, as one (all rows, ...)."""
        if len({part.ndim for part in parts}) > 1:
            raise UnjoinableError("its parts differ in their number of dimensions")
        padded = list(parts)
        for dim in range(1, parts[0].ndim):
            vector = tuple(part.shape[dim] for part in parts)
            if len(set(vector)) == 1:
                continue
            size = next((size for size, own in self.axes.items() if own == vector), None)
            if size is None:
                raise UnjoinableError(f"its parts have the sizes {vector} in dimension {dim}")
            after = parts[0].ndim - 1 - dim
            padded = [F.pad(part, [0, 0] * after + [0, size - part.shape[dim]], value=fill) for part in padded]
        return torch.cat(padded) if len(padded) > 1 else padded[0]

    def parts(self, value: Any) -> list[Any]:
        """What each seat's own run has in place of `value`, which the joint pass has.

        Args:
            value: a tensor (all rows, ...), or with rows and tokens flattened (all rows · tokens, ...), or one that all
                rows share (1, ...); a tuple, list or dictionary of such; anything without tensors is everybody's.
        """
        count = len(self.rows)
        if isinstance(value, Tensor):
            return self._tensor_parts(value)
        if isinstance(value, Mapping):
            split = {key: self.parts(item) for key, item in value.items()}
            made = type(value) if type(value) is not dict else dict
            return [made(**{key: items[seat] for key, items in split.items()}) for seat in range(count)]
        if isinstance(value, tuple | list):
            columns = [self.parts(item) for item in value]
            return [type(value)(column[seat] for column in columns) for seat in range(count)]
        return [value] * count

    def _tensor_parts(self, value: Tensor) -> list[Tensor]:
        # Layers that read one tensor find one tensor again, as those that compute for each other (siblings) look for.
        now = value._version, torch.is_grad_enabled()
        for known, *then, parts in self._known:
            if known() is value and now == tuple(then):
                return parts
        parts = self._taken_apart(value)
        self._known.append((weakref.ref(value), *now, parts))
        return parts

    def _taken_apart(self, value: Tensor) -> list[Tensor]:
        if value.ndim == 0:
            return [value] * len(self.rows)
        if value.shape[0] == self.total:
            return [self._cut(part, seat) for seat, part in enumerate(value.split(self.rows))]
        if (tokens := self.flattened(value)) is not None:
            whole = value.view(self.total, tokens, *value.shape[1:])
            return [self._cut(part, seat).flatten(0, 1) for seat, part in enumerate(whole.split(self.rows))]
        if value.shape[0] == 1:
            return [self._cut(value, seat) for seat in range(len(self.rows))]
        raise UnjoinableError(f"a tensor of shape {tuple(value.shape)} does not begin with the {self.total} rows")

    def _cut(self, part: Tensor, seat: int) -> Tensor:
        for dim in range(1, part.ndim):
            if (own := self.axes.get(part.shape[dim])) is not None:
                part = part.narrow(dim, 0, own[seat])
        return part

    def flattened(self, value: Tensor) -> int | None:
        """Tokens in a row, where `value` has rows and tokens in one dimension."""
        tokens, rest = divmod(value.shape[0], self.total)
        return tokens if not rest and tokens > 1 and tokens in self.sizes else None

    def places(self, value: Any) -> tuple[int, list[tuple[int, int, int]]] | None:
        """Where the rows of each seat are in what a linear layer reads.

        Returns:
            Tokens in a row, padding included, and for each seat its first row, its last row + 1 and its own tokens;
            None for a tensor that has other dimensions.
        """
        if not isinstance(value, Tensor) or value.ndim not in (2, 3) or not value.is_contiguous():
            return None
        if value.shape[0] == self.total:
            tokens = value.shape[1] if value.ndim == 3 else 1
        else:
            flat = self.flattened(value) if value.ndim == 2 else None
            if flat is None:
                return None
            tokens = flat
        own = self.axes.get(tokens, (tokens,) * len(self.rows))
        ends = list(accumulate(self.rows))
        return tokens, list(zip([0, *ends], ends, own, strict=False))

    def map(self, compute: Callable[[int, tuple[Any, ...], dict[str, Any]], Any], *args: Any, **kwargs: Any) -> Any:
        """`compute(seat, its arguments, its keyword arguments)` for every seat, joined again."""
        split, named = self.parts(args), self.parts(kwargs)
        found = [compute(seat, split[seat], named[seat]) for seat in range(len(self.rows))]
        first = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)), None)
        tokens = None if first is None or first.shape[0] == self.total else self.flattened(first)
        return self._rejoined(found, None if tokens is None else self.axes.get(tokens, (tokens,) * len(self.rows)))

    def _rejoined(self, found: list[Any], tokens: tuple[int, ...] | None) -> Any:
        if isinstance(found[0], Tensor):
            if tokens is None:
                return self.join(found)
            apart = [one.unflatten(0, (rows, n)) for one, rows, n in zip(found, self.rows, tokens, strict=True)]
            return self.join(apart).flatten(0, 1)
        if isinstance(found[0], tuple | list):
            return type(found[0])(self._rejoined(list(items), tokens) for items in zip(*found, strict=True))
        return found[0]


def _shapes(calls: Sequence[Mapping[str, Any]]) -> Iterator[list[tuple[int, ...]]]:
    """For every tensor that all seats give, the sizes of its dimensions: one vector over the seats each."""
    for name in calls[0]:
        values: list[Any] = [call.get(name) for call in calls]
        if all(isinstance(value, Tensor) and value.ndim for value in values) and len({v.ndim for v in values}) == 1:
            yield [tuple(value.shape[dim] for value in values) for dim in range(values[0].ndim)]
