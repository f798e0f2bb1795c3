"""One file of rows: the reader goes by the suffix; what is wrong in it is told as a `DataError` that names the file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features
from pyarrow import parquet

from adapters_kit.artifacts.mapped_table import on_disk, writing_rows
from adapters_kit.errors import AdapterError, DataError, gist
from adapters_kit.recipe_sections import PACKED_SUFFIXES, rows_suffix
from adapters_kit.tasks.notes import Notes
from adapters_kit.training.data.delimited import read_delimited
from adapters_kit.training.data.json_rows import read_json, read_json_lines
from adapters_kit.training.data.json_tables import KEEP_FEW, MOST_COLUMNS, together
from adapters_kit.training.data.other_text import read_conll, read_fasttext, read_text

_PIECE = 1 << 26  # bytes of a packed file that are unpacked at once
_DENSEST = 300  # texts shrink to a tenth, the same row a thousand times to less
_IN_MEMORY = 1 << 26  # bytes; the rows of a larger file are kept on the disk


@dataclass(frozen=True)
class Format:
    """What the recipe says of the form of text files, and where what is found out is noted.

    Attributes:
        encoding, delimiter: None where they are to be found out.
    """

    encoding: str | None = None
    delimiter: str | None = None
    notes: Notes = field(default_factory=Notes)
    """Where what is found out is noted."""


Parts = dict[str, Dataset]
Reader = Callable[[Path, Format], dict[str, Iterator[pa.Table]]]


def _parquet(path: Path, form: Format) -> dict[str, Iterator[pa.Table]]:
    return {"train": _row_groups(path)}


def _row_groups(path: Path) -> Iterator[pa.Table]:
    with parquet.ParquetFile(path) as file:
        yield file.schema_arrow.empty_table()
        for batch in file.iter_batches(batch_size=10_000):
            yield _undamaged(pa.Table.from_batches([batch]))


def _arrow(path: Path, form: Format) -> dict[str, Iterator[pa.Table]]:
    with pa.memory_map(str(path)) as file:
        try:
            reader = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(file)
        return {"train": iter([_undamaged(reader.read_all())])}


def _undamaged(table: pa.Table) -> pa.Table:
    """Arrow believes a file: text that is none, or places outside of the file, would be met when they are used."""
    for name, column in zip(table.column_names, table.columns, strict=True):  # of one name there may be two yet
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise pa.ArrowInvalid(f"the column {name!r} is damaged ({gist(error)})") from None
    return table


READERS: dict[str, Reader] = {
    ".csv": lambda path, form: {"train": read_delimited(path, form.encoding, form.delimiter, form.notes)},
    ".tsv": lambda path, form: {"train": read_delimited(path, form.encoding, form.delimiter, form.notes)},
    ".jsonl": lambda path, form: {"train": read_json_lines(path, form.encoding, form.notes)},
    ".ndjson": lambda path, form: {"train": read_json_lines(path, form.encoding, form.notes)},
    ".json": lambda path, form: read_json(path, form.encoding, form.notes),
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
    ".txt": lambda path, form: {"train": read_text(path, form.encoding, form.notes)},
    ".md": lambda path, form: {"train": read_text(path, form.encoding, form.notes)},
    ".conll": lambda path, form: {"train": read_conll(path, form.encoding, form.notes)},
    ".conllu": lambda path, form: {"train": read_conll(path, form.encoding, form.notes)},
    ".iob": lambda path, form: {"train": read_conll(path, form.encoding, form.notes)},
    ".bio": lambda path, form: {"train": read_conll(path, form.encoding, form.notes)},
    ".ft": lambda path, form: {"train": read_fasttext(path, form.encoding, form.notes)},
}


_SHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
_ARCHIVES = (".zip", ".tar", ".tgz", ".xz", ".7z", ".rar", *PACKED_SUFFIXES)
_OTHER_ROWS = (".pkl", ".pickle", ".db", ".sqlite", ".xml", ".h5", ".hdf5", ".dta", ".sav", ".rds", ".orc", ".avro")


def holds_rows(path: Path) -> bool:
    """Whether a file is meant to hold rows, by its name; not all of them can be read."""
    return rows_suffix(path) in READERS or path.suffix.lower() in (*_SHEETS, *_ARCHIVES, *_OTHER_ROWS)


def read_file(path: Path, form: Format) -> Parts:
    """The parts of a file as data sets: `train` alone, or those that a JSON document names.

    Raises:
        DataError: unknown suffix, or content that does not parse (with the line, where it is known).
    """
    if path.suffix.lower() in PACKED_SUFFIXES and rows_suffix(path) in READERS:
        return _unpacked(path, form)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"Cannot read {path}: {path.suffix or 'no suffix'} is none of {', '.join(READERS)}.{_other(path)}"
        )
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty.")
        large = path.stat().st_size > _IN_MEMORY
        return {name: _data_set(tables, large) for name, tables in reader(path, form).items()}
    except AdapterError:
        raise
    except RecursionError:
        raise DataError(f"Cannot read {path}: lists or objects are nested too deep.") from None
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        # Parsers of damaged files raise whatever the damage leads them to.
        raise DataError(f"Cannot read {path}: {gist(error)}") from error


def _unpacked(path: Path, form: Format) -> Parts:
    """The parts of a compressed file, which is unpacked beside the system's other temporary files while it is read."""
    with writing_rows():
        unpacked = tempfile.TemporaryDirectory()
    with unpacked as folder:
        plain = Path(folder) / path.stem
        try:
            with pa.input_stream(str(path), compression="detect") as packed, plain.open("wb") as file:
                while piece := packed.read(_PIECE):
                    with writing_rows():
                        file.write(piece)
                        file.flush()
                    if file.tell() > max(_DENSEST * path.stat().st_size, _PIECE):
                        raise DataError(
                            f"{path} unpacks to more than {_DENSEST} times its size, which rows of data do not. Unpack "
                            "it yourself if it is what it seems."
                        )
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"Cannot unpack {path}: {gist(error)}") from error
        try:
            return read_file(plain, form)
        except DataError as error:
            raise DataError(str(error).replace(str(plain), str(path))) from error


def read_table(path: Path, form: Format | None = None) -> Dataset:
    """As `read_file`, of a file with one part, or its training part."""
    parts = read_file(Path(path), form or Format())
    return parts["train"] if "train" in parts else next(iter(parts.values()))


def _other(path: Path) -> str:
    """What to do about kinds of files that are common elsewhere."""
    suffix = path.suffix.lower()
    if suffix in _SHEETS:
        return " Save the sheet as CSV."
    if suffix in _ARCHIVES:
        return " Unpack it first."
    return " Write its rows as CSV or JSON Lines; or rename it if it is one of these."


def _data_set(tables: Iterable[pa.Table], large: bool) -> Dataset:
    plain = (_plain(table) for table in tables)
    parts = on_disk(plain) if large else list(plain)
    filled = [table for table in parts if len(table)] or parts[:1]
    joined, classes = _categories(together(filled))
    features = Features.from_arrow_schema(joined.schema)
    features.update(classes)
    # A fingerprint of its own: the default is a hash over all rows.
    return Dataset(joined, DatasetInfo(features=features), fingerprint=uuid4().hex)


def _plain(table: pa.Table) -> pa.Table:
    """Types that `datasets` does not know as those it does; refuses two columns of one name, and far too many."""
    if table.num_columns > MOST_COLUMNS:
        raise DataError(f"There are {table.num_columns:,} columns, and {MOST_COLUMNS:,} are the most. {KEEP_FEW}")
    if (odd := next((name for name in table.column_names if "\0" in name), None)) is not None:
        raise DataError(f"The column {odd!r} has a zero byte in its name, which no table can hold. Rename it.")
    for index, column in enumerate(table.schema):
        if pa.types.is_string_view(column.type):
            table = table.set_column(index, column.name, table.column(index).cast(pa.string()))
    if len(set(table.column_names)) != table.num_columns:
        twice = next(name for name in table.column_names if table.column_names.count(name) > 1)
        raise DataError(f"Two columns are called {twice!r}. Give each column a name of its own.")
    return table


def _categories(table: pa.Table) -> tuple[pa.Table, dict[str, ClassLabel]]:
    """Columns of categories as numbers, and the classes that these number: in the order that the file gives them."""
    classes: dict[str, ClassLabel] = {}
    for index, column in enumerate(table.schema):
        if not pa.types.is_dictionary(column.type):
            continue
        values = table.column(index).unify_dictionaries()
        names = values.chunk(0).dictionary.to_pylist() if values.num_chunks else []
        if names and all(isinstance(name, str) for name in names):
            classes[column.name] = ClassLabel(names=names)
            numbers = [chunk.indices.cast(pa.int64()) for chunk in values.chunks]
            table = table.set_column(index, column.name, pa.chunked_array(numbers, pa.int64()))
        else:
            table = table.set_column(index, column.name, values.cast(column.type.value_type))
    return table, classes
