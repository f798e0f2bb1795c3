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
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload
from uuid import uuid4

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo
from datasets import Features as RowFeatures
from datasets.table import InMemoryTable

from adapters_kit.artifacts.growing import Growing
from adapters_kit.artifacts.mapped_table import kept, release_pages
from adapters_kit.errors import DataError

_AT_ONCE = 1000  # rows tokenized in one call; the tokenizer holds them whole, cut or not
_BYTES = 1 << 20  # of a part, where rows are long
_APART = 50  # numbers, of which a selection has one: further apart, rows are taken one by one
_FAR = 12  # characters a token, behind which a text is looked at only if its tokens do not fill the row


def in_parts(data: Dataset, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """(number of the first row, columns of some rows), over all of `data`."""
    info = DatasetInfo(features=data.select_columns(list(dict.fromkeys(columns))).features)
    for start, table in tables_in_parts(data, columns):
        yield start, Dataset(table, info, fingerprint="part")[:]


def tables_in_parts(data: Dataset, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """As `in_parts`, as Arrow has them."""
    rows = data.select_columns(list(dict.fromkeys(columns)))
    start, size = 0, 100
    while start < len(rows):
        part = _table(rows, start, min(start + size, len(rows)))
        yield start, part
        release_pages()
        start += len(part)
        size = int(min(max(_BYTES * len(part) / max(part.nbytes, 1), 10), _AT_ONCE))


def _table(rows: Dataset, start: int, stop: int) -> pa.Table:
    """Some rows; `datasets` takes those of a selection one by one, which takes ten times as long."""
    if rows._indices is None:
        return rows.data.table.slice(start, stop - start)
    numbers = rows._indices.table.column(0).slice(start, stop - start).to_numpy()
    first, last = int(numbers.min()), int(numbers.max())
    if last - first >= _APART * len(numbers):
        return rows.with_format("arrow")[start:stop]
    return rows.data.table.slice(first, last + 1 - first).take(pa.array(numbers - first))


def cells(data: Dataset, column: str) -> Iterator[Any]:
    """The values of a column, one after the other."""
    for _, part in in_parts(data, [column]):
        yield from part[column]


def each_row(data: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of all of `data`."""
    for start, part in in_parts(data, data.column_names):
        for number, values in enumerate(zip(*part.values(), strict=True), start):
            yield number, dict(zip(part, values, strict=True))


def chosen(data: Dataset, rows: np.ndarray) -> Dataset:
    """The rows of these numbers, as `data.select` gives them; beyond a few, their numbers lie in a file."""
    if not len(rows) or (int(rows[-1]) - int(rows[0]) == len(rows) - 1 and (np.diff(rows) == 1).all()):
        return data.select(range(int(rows[0]), int(rows[-1]) + 1) if len(rows) else [])
    numbers = rows if data._indices is None else data._indices.table.column(0).to_numpy()[rows]
    every = pa.table({"indices": pa.array(numbers.astype(np.uint64, copy=False))})
    tables = kept(every.slice(start, _AT_ONCE * _AT_ONCE) for start in range(0, len(rows), _AT_ONCE * _AT_ONCE))
    return Dataset(data.data, data.info.copy(), data.split, InMemoryTable(pa.concat_tables(tables)), uuid4().hex)


def made(parts: Iterable[Mapping[str, Sequence[Any]]], features: RowFeatures) -> Dataset:
    """Rows that are made a part at a time; beyond a few, they lie in a file."""
    schema = features.arrow_schema
    tables = kept(pa.table(dict(part), schema=schema) for part in parts)
    whole = pa.concat_tables(tables) if tables else schema.empty_table()
    return Dataset(whole, DatasetInfo(features=features), fingerprint=uuid4().hex)


class Numbered(Sequence[Any]):
    """Values of which many are equal, one a row.

    Attributes:
        values: each once, in the order in which they come.
        places: of every row's among them, (rows,) int32: four bytes a row, however long the values.
    """

    def __init__(self, values: Sequence[Any], places: np.ndarray) -> None:
        """`values` may be equal in part."""
        first: dict[Hashable, int] = {}
        names = np.asarray([first.setdefault(value, len(first)) for value in values], dtype=np.int32)
        self.values: list[Any] = list(first)
        self.places = names[places] if len(places) else np.zeros(0, dtype=np.int32)

    @classmethod
    def of(cls, values: Iterable[Hashable]) -> Numbered:
        """These values by number."""
        if isinstance(values, Numbered):
            return values
        first: dict[Hashable, int] = {}
        places = np.fromiter((first.setdefault(value, len(first)) for value in values), np.int32)
        return cls(list(first), places)

    def rows_of(self, *values: Hashable) -> np.ndarray:
        """The numbers of the rows that hold one of some values."""
        return np.flatnonzero(np.isin(self.places, [self.values.index(one) for one in values if one in self.values]))

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Any]:
        return (self.values[place] for place in self.places)

    def __getitem__(self, row: Any) -> Any:
        found = self.places[row]
        return [self.values[place] for place in found] if isinstance(row, slice) else self.values[found]


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
        """How many values each row has under a key of lists, (rows,) int32."""
        found, ends = np.empty(len(self), dtype=np.int32), self.ends[key]
        for start in range(0, len(self), _AT_ONCE):
            part = ends[max(start - 1, 0) : start + _AT_ONCE]
            found[start : start + _AT_ONCE] = np.diff(part) if start else np.diff(part, prepend=0)
        release_pages()
        return found


def one_row(row: Mapping[str, Any]) -> Dataset:
    """A data set of one row."""
    try:
        return Dataset.from_list([dict(row)])
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # turns of which some hold text and some a list
        written = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
        return Dataset.from_list([written])
