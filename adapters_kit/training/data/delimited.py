"""Tables of separated fields (CSV, TSV): the separator, the quotes and the header are found by looking at the file.

Every field stays the text that the file has: a code `007`, a date or `true` is not turned into something else. Whoever
needs a number makes it of that text.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes
from adapters_kit.training.data.encoding import encoding_of

SEPARATORS = (",", "\t", ";", "|")
_NAMES = {"\t": "a tab", ",": "a comma", ";": "a semicolon", "|": "a vertical bar", " ": "a blank", ":": "a colon"}
_LOOKED_AT = 200  # records that show the separator
_AT_ONCE = 1 << 25  # characters of a table's part
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # 128 KiB by default, less than a long document


@dataclass(frozen=True)
class Dialect:
    """How one file separates its fields.

    Attributes:
        separator: one character.
        quotes: whether a field may stand in double quotes; else they are characters like others.
        escapes: whether a backslash takes the meaning from the quote behind it.
        skipped: lines before the header.
    """

    encoding: str
    """Python's name for it."""
    separator: str
    quotes: bool = True
    escapes: bool = False
    skipped: int = 0
    blanks: bool = False
    """Whether a blank stands behind every separator, of no field."""


def read_delimited(path: Path, encoding: str | None, delimiter: str | None, notes: Notes) -> Iterator[pa.Table]:
    """The rows in parts, every column a string.

    Args:
        encoding, delimiter: what the recipe says of them; found by looking where it does not.

    Raises:
        DataError: lines that do not have as many fields as the header, two columns of one name that differ, quotes that
            do not close.
    """
    dialect = _dialect(path, encoding_of(path, encoding, notes), delimiter, notes)
    records = _told(path, _records(path, dialect))
    first, header = next(records, (1, []))
    columns = _columns(path, header, dialect, notes)
    parts: list[list[str]] = []
    size = empty = again = 0
    spare = False
    for line, fields in records:
        if len(fields) > len(header) and not any(fields[len(header) :]):
            fields, spare = fields[: len(header)], True
        if len(fields) != len(header):
            raise DataError(_other_width(path, line, fields, header, first, dialect))
        if not any(fields):
            empty += 1
            continue
        if fields == header and len(header) > 1:
            again += 1
            continue
        parts.append(fields)
        size += sum(map(len, fields))
        if size > _AT_ONCE:
            yield _table(path, parts, columns)
            parts, size = [], 0
    if empty:
        notes.say(f"{path.name}: {empty:,} lines without any text were left out.", rows_left_out=empty)
    if again:
        notes.say(f"{path.name}: {again:,} lines repeat the header and were left out.", headers_left_out=again)
    if spare:
        notes.say(f"{path.name}: separators behind the last column are left out; nothing stands behind them.")
    yield _table(path, parts, columns)


class _Broken(Exception):
    """Quotes that are not closed, or not followed by a separator, in the record that begins on `line`."""

    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


def _told(path: Path, records: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    """The records; a broken one is told in the user's terms."""
    try:
        yield from records
    except _Broken as error:
        raise DataError(
            f"{path}, line {error.line}: a field begins with a double quote that is not closed before the next "
            'separator. Close it; a quote inside a quoted field is written twice (""). If quotes are plain text in '
            "this file, put them in no field that holds the separator or a line break."
        ) from None


def _records(path: Path, dialect: Dialect, strict: bool = True) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, fields) of every record; empty lines are none. Raises `_Broken`."""
    with path.open(encoding=dialect.encoding, newline="") as file:
        for _ in range(dialect.skipped):
            file.readline()
        reader = csv.reader(
            file,
            delimiter=dialect.separator,
            quoting=csv.QUOTE_MINIMAL if dialect.quotes else csv.QUOTE_NONE,
            escapechar="\\" if dialect.escapes else None,
            doublequote=not dialect.escapes,
            skipinitialspace=dialect.blanks,
            strict=strict,
        )
        begins = 1 + dialect.skipped
        try:
            for fields in reader:
                if fields:
                    yield begins, fields
                begins = reader.line_num + 1 + dialect.skipped
        except csv.Error:
            raise _Broken(begins) from None


def _dialect(path: Path, encoding: str, delimiter: str | None, notes: Notes) -> Dialect:
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    plain = Dialect(encoding, delimiter or usual)
    with path.open(encoding=encoding, newline="") as file:
        opening = [line.rstrip("\r\n") for line in islice(file, 50)]
    if opening and opening[0].lower().startswith("sep=") and len(opening[0]) == 5:  # what Excel writes and reads
        plain = replace(plain, separator=delimiter or opening[0][4], skipped=1)
    elif delimiter is None:
        remarks = next((i for i, line in enumerate(opening) if not line.startswith("#")), 0)
        if remarks and _width(path, plain) < 2 <= _width(path, replace(plain, skipped=remarks)):
            plain = replace(plain, skipped=remarks)
            notes.say(f"{path.name}: {remarks} lines before the header begin with # and were left out.")
        widths = {mark: _width(path, replace(plain, separator=mark)) for mark in SEPARATORS}
        if widths[usual] < 2:
            plain = replace(plain, separator=max(SEPARATORS, key=lambda mark: widths[mark]))
            if widths[plain.separator] < 2:
                plain = replace(plain, separator=usual)
        if plain.separator != usual:
            notes.say(f"{path.name}: fields are separated by {_NAMES[plain.separator]}.")
    if plain.separator != " " and _has_blanks(path, plain):
        plain = replace(plain, blanks=True)
        notes.say(f"{path.name}: the blank behind every separator is not part of the field.")
    return _quoting(path, plain, notes)


def _has_blanks(path: Path, dialect: Dialect) -> bool:
    """Whether each of the first records has a blank behind each of its separators, or at the end of its line none."""
    try:
        found = [fields[1:] for _, fields in islice(_records(path, replace(dialect, blanks=False)), _LOOKED_AT)]
    except _Broken:
        found = []
    filled = [field for fields in found for field in fields if field]
    return bool(found) and bool(found[0]) and all(field[0] == " " for field in filled) and bool(filled)


def _width(path: Path, dialect: Dialect) -> int:
    """Fields of the first records, if all have equally many (empty ones behind the last do not count); else 0."""
    try:
        found = [fields for _, fields in islice(_records(path, dialect, strict=False), _LOOKED_AT)]
    except _Broken:
        return 0
    if not found:
        return 0
    width = len(found[0])
    return width if all(len(fields) == width or not any(fields[width:]) for fields in found[1:]) else 0


def _quoting(path: Path, dialect: Dialect, notes: Notes) -> Dialect:
    """Whether quotes enclose fields. Read wrongly, one stray quote swallows all lines up to the next.

    Quotes enclose fields where the file, so read, is regular. They are plain characters where it is not, or where a
    quoted field would reach over lines each of which is a whole record without it.
    """
    quoted_header = _header_line(path, dialect).startswith('"')
    if not quoted_header and not _has_quotes(path, dialect.encoding):
        return dialect
    regular, lines_joined = _regular(path, dialect)
    if regular and (quoted_header or not lines_joined):
        return dialect
    unquoted = replace(dialect, quotes=False)
    escaped = replace(dialect, escapes=True)
    if (dialect.separator in _header_line(path, dialect) or not regular) and _regular(path, unquoted)[0]:
        notes.say(f"{path.name}: double quotes are part of the text; they do not enclose fields.")
        return unquoted
    if regular:
        return dialect
    if _regular(path, escaped)[0]:
        notes.say(f'{path.name}: a quote inside a quoted field is written \\".')
        return escaped
    return dialect  # whatever is wrong is told when the rows are read


def _regular(path: Path, dialect: Dialect) -> tuple[bool, bool]:
    """Whether every record has the header's number of fields, and whether a record spans several lines."""
    width, joined = 0, False
    try:
        for _, fields in _records(path, dialect):
            width = width or len(fields)
            if len(fields) != width and (len(fields) < width or any(fields[width:])):
                return False, joined
            joined = joined or any("\n" in field or "\r" in field for field in fields)
    except _Broken:
        return False, joined
    return True, joined


def _header_line(path: Path, dialect: Dialect) -> str:
    with path.open(encoding=dialect.encoding, newline="") as file:
        return next(islice((line for line in file if line.strip()), dialect.skipped, None), "")


def _has_quotes(path: Path, encoding: str) -> bool:
    with path.open(encoding=encoding, newline="") as file:
        return any('"' in line for line in file)


def _columns(path: Path, header: Sequence[str], dialect: Dialect, notes: Notes) -> list[str]:
    names = [name.strip() for name in header]
    named = [name or f"column {index + 1}" for index, name in enumerate(names)]
    counts = Counter(named)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        places = [str(index + 1) for index, name in enumerate(named) if name == twice[0]]
        raise DataError(
            f"{path}: the header has the name {twice[0]!r} {counts[twice[0]]} times (columns {', '.join(places)}). "
            "Give each column a name of its own."
        )
    return named


def _other_width(
    path: Path, line: int, fields: Sequence[str], header: Sequence[str], first: int, dialect: Dialect
) -> str:
    shown = dialect.separator.join(fields)[:80]
    name = _NAMES.get(dialect.separator, repr(dialect.separator))
    return (
        f"{path}, line {line}: {len(fields)} fields, where the header (line {first}) has {len(header)}: {shown!r}. The "
        f"separator is {name}. Put texts that hold it in double quotes, name the separator that is meant "
        "(data.delimiter), or take out lines above the header."
    )


def _table(path: Path, rows: Sequence[Sequence[str]], columns: Sequence[str]) -> pa.Table:
    fields: Sequence[Sequence[str]] = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
    return pa.table({name: pa.array(values, pa.string()) for name, values in zip(columns, fields, strict=True)})
