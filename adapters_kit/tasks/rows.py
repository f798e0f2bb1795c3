"""Rows in and features out, a part at a time: a whole data set of texts or of token lists need not be in memory.

rows = Encoded()
for start, part in in_parts(data, ["text"]):
    for offset, ids in enumerate(processor(part["text"])["input_ids"]):
        rows.append({"row": start + offset, "input_ids": ids})
rows[3]   # {"row": 3, "input_ids": array([...])}
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
from datasets import Dataset

from adapters_kit.artifacts.growing import Growing
from adapters_kit.artifacts.mapped_table import release_pages
from adapters_kit.errors import DataError

_AT_ONCE = 1000  # rows tokenized in one call; the tokenizer holds them whole, cut or not
_CHARACTERS = 1 << 20  # of a part, where rows are long
_FAR = 12  # characters a token, behind which a text is looked at only if its tokens do not fill the row


def in_parts(data: Dataset, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """(number of the first row, columns of some rows), over all of `data`."""
    rows = data.select_columns(list(dict.fromkeys(columns)))
    start, size = 0, 100
    while start < len(rows):
        part = rows[start : start + size]
        yield start, part
        release_pages()
        start += len(part[columns[0]])
        longest = max((sum(map(_length, part[name])) for name in columns), default=0)
        size = int(min(max(_CHARACTERS * size / max(longest, 1), 10), _AT_ONCE))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list) else 1


def check_text(values: Sequence[Any], start: int, column: str, role: str, names: Sequence[str]) -> list[str]:
    """The values, known to be texts.

    Args:
        start: number of their first row.
        names: the columns that there are, for the message.

    Raises:
        DataError: with the first row that holds something else.
    """
    for index, value in enumerate(values, start):
        if not isinstance(value, str):
            raise DataError(
                f"Column {column!r} should be the {role}, but row {index + 1} holds {value!r:.80} "
                f"({type(value).__name__}), "
                f"not a string. Name the right column: data.columns: {{{role}: NAME}}. There are: {', '.join(names)}."
            )
    return list(values)


def truncated_ids(processor: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """The token ids of each text, cut to `max_length`; of a long text little more than what is kept is tokenized.

    1. A text is cut at a blank far behind where `max_length` tokens usually end.
    2. Its tokens up to there are those of the whole text: no token reaches over a blank into the next word.
    3. If they fill the row, all that was cut lies behind the row's end. If not, the whole text is tokenized.
    """
    options = {"truncation": True, "max_length": max_length}
    if getattr(processor, "truncation_side", "right") != "right":
        return list(processor(list(texts), **options)["input_ids"])
    far = max(_FAR * max_length, 200)
    short = [_up_to_a_blank(text, far) for text in texts]
    found = list(processor(short, **options)["input_ids"])
    again = [i for i, ids in enumerate(found) if len(short[i]) < len(texts[i]) and len(ids) < max_length]
    if again:
        for i, ids in zip(again, processor([texts[i] for i in again], **options)["input_ids"], strict=True):
            found[i] = ids
    return found


def number_cut(processor: Any, texts: Sequence[Sequence[str]], ids: Sequence[Sequence[int]], max_length: int) -> int:
    """How many rows are longer than `max_length` tokens.

    Args:
        texts: one or two columns.
        ids: the rows' ids, cut to `max_length`; only those that fill it are tokenized again, with one token more.
    """
    full = [row for row, own in enumerate(ids) if len(own) >= max_length]
    if not full:
        return 0
    parts = [[column[row] for row in full] for column in texts]
    if len(parts) == 1:
        longer: Sequence[Sequence[int]] = truncated_ids(processor, parts[0], max_length + 1)
    else:
        longer = processor(*parts, truncation=True, max_length=max_length + 1)["input_ids"]
    return sum(len(own) > max_length for own in longer)


def _up_to_a_blank(text: str, far: int) -> str:
    blank = text.find(" ", far) if len(text) > 2 * far else -1
    return text if blank < 0 else text[:blank]


def digest(text: str) -> np.ndarray:
    """What tells a text from others in eight bytes: (2,) int32."""
    found = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.frombuffer(found, dtype=np.int32)


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
    """Features of many rows, each key in one array: as dictionaries of arrays they take ten times the memory.

    A numpy array may have another length in every row. Its whole numbers are kept as int32 (a token id at 4 bytes;
    with `small` at 2, while all fit), truth values at a byte, others as float32. Numbers stay Python's; everything else
    is kept as it is.

    Attributes:
        columns: key to its values, one after the other.
        ends: key of arrays to the place behind each row's values.
    """

    def __init__(self, small: Sequence[str] = ()) -> None:
        """`small`: keys of arrays whose numbers are mostly below 65,536: at two bytes each until one is not."""
        self.columns: dict[str, Growing | list[Any]] = {}
        self.ends: dict[str, Growing] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._small = set(small)
        self._rows = self._read = 0

    def append(self, feature: Mapping[str, Any]) -> None:
        """One row; every row has the same keys."""
        for key, value in feature.items():
            if isinstance(value, np.ndarray):
                self._extend(key, value)
            else:
                self._put(key, value)
        self._rows += 1

    def _extend(self, key: str, value: np.ndarray) -> None:
        if key not in self.ends:
            self.ends[key] = Growing("q")
            code = "H" if key in self._small else {"f": "f", "b": "b"}.get(value.dtype.kind, "i")
            self.columns[key] = Growing(code)
            self._shapes[key] = value.shape[1:]
        column = self.columns[key]
        assert isinstance(column, Growing)
        column.extend(value)
        self.ends[key].append(len(column))

    def _put(self, key: str, value: Any) -> None:
        if key not in self.columns:
            whole = isinstance(value, int) and not isinstance(value, bool)
            self.columns[key] = Growing("q") if whole else Growing("d") if isinstance(value, float) else []
        self.columns[key].append(value)

    def __len__(self) -> int:
        return self._rows

    def _place(self, row: int) -> int:
        return super()._place(row + len(self) if row < 0 else row)

    def _made(self, row: int) -> dict[str, Any]:
        self._read += 1
        if self._read % _AT_ONCE == 0:
            release_pages()
        found: dict[str, Any] = {}
        for key, column in self.columns.items():
            if not isinstance(column, Growing):
                found[key] = column[row]
            elif key not in self.ends:
                found[key] = column[row : row + 1].item()
            else:
                ends = self.ends[key][max(row - 1, 0) : row + 1]
                start, stop = (int(ends[0]) if row else 0), int(ends[-1])
                values = column[start:stop].reshape(-1, *self._shapes[key])
                found[key] = values.view(bool) if column.dtype.itemsize == 1 else values
        return found

    def lengths(self, key: str) -> np.ndarray:
        """How many values each row has under a key of lists, (rows,) int64."""
        return np.diff(self.ends[key][:], prepend=0)


def one_row(row: Mapping[str, Any]) -> Dataset:
    """A data set of one row."""
    try:
        return Dataset.from_list([dict(row)])
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # turns of which some hold text and some a list
        written = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
        return Dataset.from_list([written])
