"""Rows as objects become tables, a part at a time; a column whose values are of several kinds is kept, as JSON's text.

Whether such a column matters is known later, when columns get roles: see `columns.recognise`. Until then its field in
the table says what is wrong with it, and `unlike` reads that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes

Row = Mapping[str, Any]
MOST_COLUMNS = 5000
KEEP_FEW = "Keep those that are used: an input, a target, a few beside them."
_AT_ONCE = 1 << 22  # characters of a table's part; as Python's objects they take ten times the memory
_UNLIKE = b"adapters_kit:unlike"  # why the values do not fit one column
_NESTED = b"adapters_kit:nested"  # they are lists and objects alone, whose text whoever reads such things can parse


def unlike(table: pa.Table, column: str, *, nested: bool = False) -> str | None:
    """Why a column's values are JSON's text and not what the file holds; None for a column as it was.

    Args:
        nested: whether lists and objects that differ from row to row are as good as their text.
    """
    told = table.schema.field(column).metadata or {}
    return None if _UNLIKE not in told or (nested and _NESTED in told) else told[_UNLIKE].decode()


def written(table: pa.Table, column: str) -> pa.Table:
    """The table with a column of lists and objects as JSON's text."""
    name = f"Column {column!r} holds objects without any field."
    return marked(_written(table, [column]), {column: {_UNLIKE: name.encode(), _NESTED: b"1"}})


def tables(rows: Iterable[tuple[str, Row, int]], path: Path, notes: Notes) -> Iterator[pa.Table]:
    """Rows as tables of some ten megabytes each.

    Args:
        rows: where a row stands, the row, its size in characters (0 where it is in memory already).

    Raises:
        DataError: far too many columns.
    """
    part: list[tuple[str, Row]] = []
    size = 0
    keys: dict[str, None] = {}
    made = False
    for place, row, length in rows:
        part.append((place, row))
        keys.update(dict.fromkeys(row))
        if len(keys) > MOST_COLUMNS:
            raise DataError(
                f"{path}, {place}: the rows have more than {MOST_COLUMNS:,} keys, each a column. {KEEP_FEW}"
            )
        size += length
        if size > _AT_ONCE:
            yield _table(part, list(keys), path, notes)
            part, size, made = [], 0, True
    if part or not made:
        yield _table(part, list(keys), path, notes)


def storable(kind: pa.DataType) -> bool:
    """Whether a Parquet file can hold values of a type: it has no objects without any field."""
    inner = [kind.field(index).type for index in range(kind.num_fields)]
    return not (pa.types.is_struct(kind) and not inner) and all(map(storable, inner))


def marks_of(table: pa.Table) -> dict[str, dict[bytes, bytes]]:
    """What the fields of a table say of columns that are JSON's text; some ways of copying a table leave it out."""
    return {field.name: field.metadata for field in table.schema if _UNLIKE in (field.metadata or {})}


def marked(table: pa.Table, marks: Mapping[str, dict[bytes, bytes]]) -> pa.Table:
    """The table with these marks."""
    fields = [field.with_metadata(marks.get(field.name, field.metadata)) for field in table.schema]
    return table.cast(pa.schema(fields, table.schema.metadata))


def together(parts: Sequence[pa.Table]) -> pa.Table:
    """The rows of several tables as one; columns that one of them lacks are empty there.

    A column that is of one kind here and of another there becomes JSON's text, and its field says so.
    """
    reasons: dict[str, dict[bytes, bytes]] = {}
    odd: list[str] = []
    held = [dict.fromkeys(part.column_names) for part in parts]  # pyarrow makes the list anew each time it is asked
    for name in {name: None for names in held for name in names}:
        fields = [part.schema.field(name) for part, names in zip(parts, held, strict=True) if name in names]
        told = [field.metadata for field in fields if _UNLIKE in (field.metadata or {})]
        try:
            pa.unify_schemas([pa.schema([field]) for field in fields], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            nested = {_NESTED: b"1"} if all(pa.types.is_nested(field.type) for field in fields) else {}
            told = told or [{_UNLIKE: _several(name, [str(field.type) for field in fields]).encode(), **nested}]
        if told and len({field.type for field in fields}) > 1:
            odd.append(name)
        if told:
            reasons[name] = told[0] if all(_NESTED in one for one in told) else {_UNLIKE: told[0][_UNLIKE]}
    parts = [_written(part, [name for name in odd if name in names]) for part, names in zip(parts, held, strict=True)]
    return marked(pa.concat_tables(parts, promote_options="permissive"), reasons)


def _several(column: str, kinds: Sequence[str]) -> str:
    here, there, *_ = dict.fromkeys(kinds)
    return f"Column {column!r} holds {here:.80} in one part of the rows and {there:.80} in another. Write them alike."


def _written(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """The table with some columns as JSON's text."""
    texts = {
        name: pa.array(_texts(table.column(name).to_pylist()), pa.string())
        for name in columns
        if not pa.types.is_string(table.schema.field(name).type)
    }
    fields = [pa.field(field.name, pa.string()) if field.name in texts else field for field in table.schema]
    made = [texts.get(field.name, column) for field, column in zip(table.schema, table.columns, strict=True)]
    return pa.Table.from_arrays(made, schema=pa.schema(fields, table.schema.metadata)) if texts else table


def _table(part: Sequence[tuple[str, Row]], keys: Sequence[str], path: Path, notes: Notes) -> pa.Table:
    made, fields = [], []
    for key in keys:
        values = [row.get(key) for _, row in part]
        told: dict[bytes, bytes] | None = None
        try:
            column = pa.array(values)
        except UnicodeEncodeError:
            column = pa.array(_mended(values, key, part, path, notes))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
            told = {_UNLIKE: _reason(path, key, part, values, error).encode()}
            told |= {_NESTED: b"1"} if all(isinstance(value, list | dict | None) for value in values) else {}
            column = pa.array(_texts(_mended(values, key, part, path, notes)), pa.string())
        made.append(column)
        fields.append(pa.field(key, column.type, metadata=told))
    return pa.Table.from_arrays(made, schema=pa.schema(fields))


def _mended(values: Sequence[Any], key: str, part: Sequence[tuple[str, Row]], path: Path, notes: Notes) -> list[Any]:
    """The values without lone surrogates; how many had one is said."""
    whole = [_whole(value) for value in values]
    at = [place for (place, _), new, old in zip(part, whole, values, strict=True) if new is not old]
    if at:
        notes.say(
            f"{path.name}, column {key!r}: {len(at):,} values hold half a character (a lone surrogate, as when a text "
            f"is cut inside an emoji; first: {at[0]}), which is replaced by U+FFFD.",
            characters_replaced=len(at),
        )
    return whole


def _texts(values: Sequence[Any]) -> list[str | None]:
    """What is no text as JSON's; what JSON does not know (dates, bytes) as Python writes it."""
    return [
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for value in values
    ]


def _whole(value: Any) -> Any:
    """The value without lone surrogates; the very object if it has none."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value
    if isinstance(value, list):
        made: Any = [_whole(item) for item in value]
        return made if any(new is not old for new, old in zip(made, value, strict=True)) else value
    if isinstance(value, Mapping):
        made = {_whole(key): _whole(item) for key, item in value.items()}
        same = (
            all(new is old for new, old in zip(made.values(), value.values(), strict=True))
            and made.keys() == value.keys()
        )
        return value if same else made
    return value


def _kind_of(value: Any) -> str:
    """What a value is, in JSON's words."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "nothing"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    names = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _reason(path: Path, key: str, part: Sequence[tuple[str, Row]], values: Sequence[Any], error: Exception) -> str:
    """Which row's value has another kind than those before it."""
    known: tuple[str, str] | None = None
    for (place, _), value in zip(part, values, strict=True):
        kind = _kind_of(value)
        if kind == "nothing":
            continue
        if known is None:
            known = place, kind
        elif kind != known[1]:
            return (
                f"{path}, {place}, column {key!r}: {value!r:.60} is {kind}, while {known[0]} holds {known[1]}. A "
                "column holds values of one kind."
            )
    reason = str(error).splitlines()[0]
    return (
        f"{path}, column {key!r}: the values from {part[0][0]} to {part[-1][0]} do not fit one column: {reason}. "
        "Write them alike, as texts for example."
    )
