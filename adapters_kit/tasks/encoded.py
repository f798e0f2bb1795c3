"""Features of many rows, in arrays that move to a file as they grow: as dictionaries they take ten times the memory.

features = Encoded(small=("input_ids",))
for start, texts in texts_in_parts(data, "text", "text"):
    ids = processor(texts)["input_ids"]
    features.extend({"row": range(start, start + len(ids)), "input_ids": ids})
features[3]   # {"row": 3, "input_ids": array([...])}
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, overload

import numpy as np

from adapters_kit.artifacts.growing import Growing
from adapters_kit.artifacts.mapped_table import release_pages

AT_ONCE = 1000  # rows that are put away together, or read before mapped pages are given back
_VALUES = 1 << 16  # of rows that wait to be put away
_NUMBERS = {bool: "b", int: "q", float: "d"}


class MadeRows(Sequence[dict[str, Any]], ABC):
    """Features of rows that are put together when they are asked for, by number or by slice."""

    @overload
    def __getitem__(self, row: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, row: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, row: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        return self._made(self._place(row))

    def _place(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return row

    @abstractmethod
    def _made(self, row: int) -> dict[str, Any]:
        """The features of one row that there is."""


class Encoded(MadeRows):
    """Features of many rows, each key in one array.

    A numpy array may have another length in every row. Its whole numbers are kept as int32 (a token id at 4 bytes;
    with `small` at 2, while all fit), truth values at a byte. Numbers and truth values stay Python's, as do texts and
    lists of them, which are kept as bytes.
    """

    def __init__(self, small: Sequence[str] = ()) -> None:
        """`small`: keys of arrays whose numbers are mostly below 65,536: at two bytes each until one is not."""
        self._columns: dict[str, Growing] = {}
        self._ends: dict[str, Growing] = {}  # of arrays: the place behind each row's values
        self._kinds: dict[str, type] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, Growing] = {}  # of texts: two numbers a row, as equal ones lie there once
        self._last: dict[str, Any] = {}
        self._small = set(small)
        self._waiting: list[Mapping[str, Any]] = []
        self._rows = self._read = self._size = 0

    def append(self, feature: Mapping[str, Any]) -> None:
        """One row; every row has the same keys."""
        self._waiting.append(feature)
        self._size += sum(len(value) for value in feature.values() if isinstance(value, list | np.ndarray))
        if len(self._waiting) == AT_ONCE or self._size > _VALUES:
            self._take()

    def _take(self) -> None:
        waiting, self._waiting, self._size = self._waiting, [], 0
        if waiting:
            self.extend({key: [feature[key] for feature in waiting] for key in waiting[0]})

    def extend(self, rows: Mapping[str, Sequence[Any]]) -> None:
        """Some rows at once: under each key a value a row. A list of whole numbers is taken for an array."""
        self._take()
        self._rows += len(next(iter(rows.values())))
        self.add(rows)

    def add(self, rows: Mapping[str, Sequence[Any]]) -> None:
        """More keys, of the first rows that lack them."""
        self._take()
        for key, values in rows.items():
            if not len(values):
                continue
            first = values[0].item() if isinstance(values[0], np.generic) else values[0]
            listed = isinstance(first, list) and (not first or isinstance(first[0], int)) and key not in self._places
            kind = self._kinds.setdefault(key, np.ndarray if listed else type(first))
            if kind is np.ndarray:
                flat = np.concatenate(values) if not listed else np.fromiter(chain.from_iterable(values), np.int64)
                column = self._array(key, flat.dtype, flat.shape[1:])
                width = math.prod(flat.shape[1:])
                self._ends[key].extend(len(column) + width * np.cumsum([len(value) for value in values]))
                column.extend(flat)
            elif kind in _NUMBERS:
                self._column(key, _NUMBERS[kind]).extend(np.asarray(values))
            else:
                for value in values:
                    self._put(key, value)

    def drop(self, key: str) -> None:
        """Forgets what is under a key, if there is anything."""
        for held in (self._columns, self._ends, self._kinds, self._shapes, self._places, self._last):
            held.pop(key, None)

    def _column(self, key: str, code: str) -> Growing:
        if key not in self._columns:
            self._columns[key] = Growing(code)
        return self._columns[key]

    def _array(self, key: str, kind: np.dtype, shape: tuple[int, ...]) -> Growing:
        if key not in self._ends:
            self._ends[key], self._shapes[key] = Growing("q"), shape
            own = {"f": "d" if kind.itemsize == 8 else "f", "b": "b"}.get(kind.kind, "i")
            self._column(key, "H" if key in self._small else own)
        return self._columns[key]

    def _put(self, key: str, value: Any) -> None:
        column = self._column(key, "B")
        places = self._places.setdefault(key, Growing("q"))
        if value is not self._last.get(key) or not len(places):  # windows of one text have it in common
            text = self._kinds[key] is str
            written = value.encode("utf-8", "surrogatepass") if text else json.dumps(value).encode()
            column.extend(np.frombuffer(written, dtype=np.uint8))
            self._last[key] = value
            places.extend(np.asarray([len(column) - len(written), len(column)]))
        else:
            places.extend(places[len(places) - 2 : len(places)])

    def __len__(self) -> int:
        return self._rows + len(self._waiting)

    def _place(self, row: int) -> int:
        return super()._place(row + len(self) if row < 0 else row)

    def _made(self, row: int) -> dict[str, Any]:
        self._take()
        self._read += 1
        if self._read % AT_ONCE == 0:
            release_pages()
        found: dict[str, Any] = {}
        for key, column in self._columns.items():
            if key in self._places:
                start, stop = self._places[key][2 * row : 2 * row + 2].tolist()
                written = column[start:stop].tobytes()
                kind = self._kinds[key]
                value = written.decode("utf-8", "surrogatepass") if kind is str else json.loads(written)
                found[key] = tuple(value) if kind is tuple else value
            elif key not in self._ends:
                found[key] = self._kinds[key](column[row : row + 1].item())
            else:
                ends = self._ends[key][max(row - 1, 0) : row + 1]
                start, stop = (int(ends[0]) if row else 0), int(ends[-1])
                values = column[start:stop].reshape(-1, *self._shapes[key])
                found[key] = values.view(bool) if column.dtype.itemsize == 1 else values
        return found

    def holds(self, key: str) -> bool:
        """Whether there are arrays under a key."""
        self._take()
        return key in self._ends

    def values(self, key: str) -> np.ndarray:
        """All numbers under a key, one row's after the other's."""
        self._take()
        return self._columns[key][:]

    def lengths(self, key: str) -> np.ndarray:
        """How many values each row has under a key of lists, (rows,) int32."""
        self._take()
        found, ends = np.empty(len(self), dtype=np.int32), self._ends[key]
        for start in range(0, len(self), AT_ONCE):
            part = ends[max(start - 1, 0) : start + AT_ONCE]
            found[start : start + AT_ONCE] = np.diff(part) if start else np.diff(part, prepend=0)
        release_pages()
        return found
