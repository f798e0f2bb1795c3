"""Numbers that are added row after row: in memory while they are few, beyond that in a file without a name."""

from __future__ import annotations

import mmap
from array import array
from typing import IO, Any

import numpy as np

from adapters_kit.artifacts.mapped_table import keep_mapped, temporary, writing_rows

_IN_MEMORY = 1 << 22  # bytes of one column


class Growing:
    """A column of numbers of one type.

    column = Growing("i")
    column.extend(np.asarray([1, 2, 3]))
    column[0:2]                                # array([1, 2], dtype=int32)
    """

    def __init__(self, code: str) -> None:
        """`code`: the type, as `array` and numpy name it: "H" uint16, "i" int32, "q" int64, "f" float32, "b" int8."""
        self._tail: array[Any] = array(code)
        self.dtype = np.dtype(code)
        self._file: IO[bytes] | None = None
        self._written = 0  # numbers in the file
        self._mapped: np.ndarray | None = None  # what of the file has been looked at

    def extend(self, values: np.ndarray) -> None:
        """Adds numbers to the end; at two bytes each only while all of them fit."""
        if self.dtype.itemsize == 2 and len(values) and not 0 <= values.min() <= values.max() < 1 << 16:
            self._widen()
        cast = values.astype(self.dtype, copy=False)
        self._tail.frombytes(cast.tobytes())
        self._spill()

    def append(self, value: float) -> None:
        """Adds one number to the end."""
        self._tail.append(value)
        self._spill()

    def _widen(self) -> None:
        """Four bytes a number from here on, and for those that are there."""
        wider = Growing("i")
        for start in range(0, len(self), _IN_MEMORY):
            wider.extend(self[start : start + _IN_MEMORY])
        vars(self).update(vars(wider))

    def _spill(self) -> None:
        if len(self._tail) * self.dtype.itemsize < _IN_MEMORY:
            return
        with writing_rows():
            self._file = self._file or temporary()
            self._file.seek(0, 2)
            self._tail.tofile(self._file)
            self._file.flush()
        self._written += len(self._tail)
        self._tail, self._mapped = array(self._tail.typecode), None

    def __len__(self) -> int:
        return self._written + len(self._tail)

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        if start >= self._written:
            return np.frombuffer(self._tail[start - self._written : stop - self._written], dtype=self.dtype)
        first = self._of_file()[start : min(stop, self._written)]
        if stop <= self._written:
            return np.array(first)
        return np.concatenate([first, np.frombuffer(self._tail[: stop - self._written], dtype=self.dtype)])

    def _of_file(self) -> np.ndarray:
        if self._mapped is None:
            assert self._file is not None
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            keep_mapped(mapped)
            self._mapped = np.frombuffer(mapped, dtype=self.dtype)
        return self._mapped
