"""Rows, a part at a time: a whole data set of texts need not be in memory. What is made of them: see `encoded`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Value
from datasets import Features as RowFeatures
from datasets.formatting import get_formatter
from datasets.table import InMemoryTable

from adapters_kit.artifacts.mapped_table import kept, on_disk, release_pages
from adapters_kit.errors import DataError

_AT_ONCE = 1000  # rows tokenized in one call; the tokenizer holds them whole, cut or not
_BYTES = 1 << 20  # of a part, where rows are long
_APART = 50  # numbers, of which a selection has one: further apart, rows are taken one by one,
_FAR_APART = 100  # so many at once
_NUMBERS = 1 << 16  # of rows, of a selection that stays in memory
_FAR = 12  # characters a token, behind which a text is looked at only if its tokens do not fill the row


def in_parts(data: Dataset, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """(number of the first row, columns of some rows), over all of `data`."""
    python = get_formatter(None, features=data.select_columns(list(dict.fromkeys(columns))).features)
    for start, table in tables_in_parts(data, columns):
        yield start, python.format_batch(table)


def tables_in_parts(data: Dataset, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """As `in_parts`, as Arrow has them."""
    rows = data.select_columns(list(dict.fromkeys(columns)))
    start = 0
    while start < len(rows):
        part = _table(rows, start, min(start + _AT_ONCE, len(rows)))
        yield start, part
        release_pages()
        start += len(part)


def _table(rows: Dataset, start: int, stop: int) -> pa.Table:
    """Some rows, fewer where they are long; `datasets` takes those of a selection one by one, ten times as slowly."""
    if rows._indices is None:
        near = rows.data.table.slice(start, stop - start)
        return near if near.nbytes <= _BYTES or len(near) == 1 else _table(rows, start, start + -(-len(near) // 4))
    numbers = rows._indices.table.column(0).slice(start, stop - start).to_numpy()
    first, last = int(numbers.min()), int(numbers.max())
    if last - first >= _APART * len(numbers):
        return rows.with_format("arrow")[start : min(stop, start + _FAR_APART)]
    near = rows.data.table.slice(first, last + 1 - first)
    if near.nbytes * len(numbers) > _BYTES * len(near) and len(numbers) > 1:
        return _table(rows, start, start + -(-len(numbers) // 4))
    return near.take(pa.array(numbers - first))


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
    tables = on_disk([every]) if len(rows) > _NUMBERS else [every]
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


def texts_in_parts(data: Dataset, column: str, role: str) -> Iterator[tuple[int, list[str]]]:
    """(number of the first row, texts of some rows) of a column of text.

    Raises:
        DataError: numbers, lists or missing values, with the first row concerned.
    """
    kind = data.features[column]
    if isinstance(kind, Value) and kind.dtype not in ("string", "large_string", "null"):
        raise DataError(
            f"Column {column!r} should be the {role}, but holds {kind.dtype} (first row: {data[0][column]!r}). "
            f"Name the right column: data.columns: {{{role}: NAME}}. There are: {', '.join(data.column_names)}."
        )
    for start, part in in_parts(data, [column]):
        for index, value in enumerate(part[column], start):
            if not isinstance(value, str):
                raise DataError(
                    f"Column {column!r} should be the {role}, but row {index + 1} holds {value!r} "
                    f"({type(value).__name__}), not a string."
                )
        yield start, part[column]


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


def numbers_of_texts(texts: Iterable[str | None]) -> np.ndarray:
    """A number for each text, (rows,) int64: equal ones of equal texts, in the order in which they come."""
    names = np.fromiter((digest(text or "").view(np.int64).item() for text in texts), np.int64)
    _, first, places = np.unique(names, return_index=True, return_inverse=True)
    ranks = np.empty(len(first), dtype=np.int64)
    ranks[np.argsort(first)] = np.arange(len(first))
    return ranks[places]


def one_row(row: Mapping[str, Any]) -> Dataset:
    """A data set of one row."""
    try:
        return Dataset.from_list([dict(row)])
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # turns of which some hold text and some a list
        written = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
        return Dataset.from_list([written])
