"""What a caller may hand over in place of a file: rows as a frame, a table, a list or a `Dataset`; a recipe as a dict.

A recipe names files, so that it can be written down and run again. Rows that are given in memory are therefore written
once, as Parquet under the sha256 of their content, and the recipe names that file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
)
from pyarrow import parquet

from adapters_kit.errors import DataError
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_sections import DataSpec
from adapters_kit.tasks.notes import Notes
from adapters_kit.training.data.json_tables import marked, marks_of, storable, tables, together, written

_OWN: Mapping[str, str] = MappingProxyType({})  # each role's column is called as the role
_LISTS = ("tokens", "tags", "messages")  # roles whose value in one row is a list

Given = Recipe | Mapping[str, Any] | str | os.PathLike[str]


def rows_from(value: Any, columns: Mapping[str, str] = _OWN) -> Dataset | None:
    """Rows in memory as a data set; None for a name, which has to be read.

    Args:
        value: a `datasets.Dataset`; a frame of pandas or polars; a pyarrow table; one dict, which is one row or a
            column under each name; or any iterable of dicts.
        columns: role to column name, as in a recipe.

    Raises:
        DataError: something else, or nothing in it.
    """
    if isinstance(value, str | os.PathLike):
        return None
    if isinstance(value, Dataset):
        rows = value
    elif isinstance(value, pa.Table):
        rows = Dataset(value)
    elif hasattr(value, "to_arrow"):  # polars
        rows = Dataset(value.to_arrow())
    elif hasattr(value, "columns") and hasattr(value, "to_dict"):  # pandas
        rows = _from_pandas(value)
    elif isinstance(value, Mapping):
        rows = _from_list(_from_columns(value, columns) or [dict(value)])
    elif isinstance(value, Iterable) and not isinstance(value, bytes):
        rows = _from_list(list(value))
    else:
        raise DataError(f"Rows are a file, a frame, a Dataset or a list of dicts; this is {_short(value)}.")
    if len(rows) == 0:
        raise DataError("The data has no rows.")
    return rows


def recipe_from(given: Given, folder: Path | None = None) -> Recipe:
    """The recipe that a caller means.

    Args:
        given: a `Recipe`, the path of a YAML file, or a mapping of a recipe's keys, whose `data` (or `data.train`,
            `data.test`, and `eval.keep`) may be rows in memory (see `rows_from`) or a `DatasetDict` with `train` and
            others.
        folder: where rows in memory are written, as HASH.parquet; by default the user's cache.

    Raises:
        RecipeError: every problem of the recipe.
        DataError: rows that are none.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str | os.PathLike):  # a `Run` is one, and means its folder
        return Recipe.read(os.fspath(given))
    if not isinstance(given, Mapping):
        raise DataError(f"A recipe is an ak.Recipe, a YAML file or a dict of its keys; this is {_short(given)}.")
    plain = {key: value for key, value in given.items() if "." not in str(key)}
    dotted = {key: value for key, value in given.items() if "." in str(key)}
    if (kept := _kept_in_memory(plain)) is not None:
        _made({**plain, "data": "rows in memory", "eval": {**plain["eval"], "keep": "rows in memory"}}, dotted)
        plain["eval"] = {**plain["eval"], "keep": _file(kept, folder or cache())}
    if "data" not in plain or isinstance(plain["data"], DataSpec | str | os.PathLike):
        return _made(plain, dotted)
    _made({**plain, "data": "rows in memory"}, dotted)  # nothing is written for a recipe that is refused
    return _made({**plain, "data": _named(plain["data"], folder or cache())}, dotted)


def _kept_in_memory(plain: Mapping[str, Any]) -> Any:
    """The rows of `eval.keep`, where they are no name; else None."""
    section = plain.get("eval")
    value = section.get("keep") if isinstance(section, Mapping) else None
    return None if isinstance(value, str | os.PathLike) else value


def default_folder(given: Given) -> Path:
    """Where a recipe's run goes that nobody named a folder for: `runs/` and the name of the recipe or data file.

    Args:
        given: as for `recipe_from`; a run folder is its own.
    """
    if isinstance(given, str | os.PathLike):
        return Path(given) if Path(given).is_dir() else Path("runs") / Path(given).stem
    data = given.data if isinstance(given, Recipe) else given.get("data") if isinstance(given, Mapping) else None
    file = data.train if isinstance(data, DataSpec) else data.get("train") if isinstance(data, Mapping) else data
    return Path("runs") / (Path(file).stem if isinstance(file, str | os.PathLike) else "run")


def _made(plain: Mapping[str, Any], dotted: Mapping[str, Any]) -> Recipe:
    recipe = Recipe(**plain)
    return recipe.changed(**dotted) if dotted else recipe


def cache() -> Path:
    """Where rows in memory are kept for recipes that have no run folder yet."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "adapters_kit" / "data"


def _named(value: Any, folder: Path) -> Any:
    """`data` of a recipe with files in place of rows."""
    if (
        isinstance(value, Mapping)
        and not isinstance(value, DatasetDict)
        and ("train" in value or not _from_columns(value))
    ):
        parts = {name: value[name] for name in ("train", "test") if value.get(name) is not None}
        return {**value, **{name: _file(part, folder) for name, part in parts.items()}}
    if isinstance(value, DatasetDict):
        if "train" not in value:
            raise DataError(f"A DatasetDict for training needs a part named train; this one has {', '.join(value)}.")
        return {"train": _folder({name: rows for name, rows in value.items() if len(rows)}, folder)}
    return _file(value, folder)


def _folder(parts: Mapping[str, Dataset], folder: Path) -> str:
    """All parts, a file each, in a folder under the sha256 of their content; their rows tell which is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as made:
        for name, rows in parts.items():
            path = Path(_file(rows, Path(made)))
            digest.update(f"{name} {path.name} ".encode())
            path.rename(path.with_name(f"{name}.parquet"))
        target = folder / digest.hexdigest()[:16]
        if not target.exists():
            os.chmod(made, 0o755)
            os.rename(made, target)
    return str(target)


def _file(value: Any, folder: Path) -> str:
    rows = rows_from(value)
    if rows is None:
        return str(value)
    rows = _storable(rows)
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(handle)
    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        rows.to_parquet(name)
        if marks := marks_of(rows.data.table):
            parquet.write_table(marked(parquet.read_table(name), marks), name)
        with open(name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        path = folder / f"{digest[:16]}.parquet"
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    finally:
        if not silent:
            enable_progress_bars()
    return str(path)


def _storable(rows: Dataset) -> Dataset:
    """The rows with what no Parquet file can hold as JSON's text."""
    table = rows.data.table
    odd = [field.name for field in table.schema if not storable(field.type)]
    for name in odd:
        table = written(rows.flatten_indices().data.table if table is rows.data.table else table, name)
    kinds = {name: rows.features.get(name) for name in table.column_names if name not in odd}
    features = Features({**Features.from_arrow_schema(table.schema), **kinds})
    return Dataset(table, DatasetInfo(features=features)) if odd else rows


def _from_pandas(frame: Any) -> Dataset:
    named = {name for name in frame.index.names if name is not None}
    if named and not named & set(frame.columns):  # a column of the user's that was made the index
        frame = frame.reset_index()
    names = [str(name) for name in frame.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"The frame has two columns named {twice[0]!r}.")
    frame = frame.set_axis(names, axis=1)
    try:
        return Dataset.from_pandas(frame, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return _from_list(frame.to_dict("records"))


def _from_columns(value: Mapping[str, Any], names: Mapping[str, str] = _OWN) -> list[dict[str, Any]] | None:
    """The rows of a dict of columns; None if the dict is one row, in which words, turns and labels are lists too."""
    held = {name: listed(column) for name, column in value.items()}
    if not all(isinstance(column, list) for column in held.values()) or len({len(one) for one in held.values()}) != 1:
        return None
    words = {names.get(role, role) for role in _LISTS} & held.keys()
    if any(not isinstance(one, list) for name in words for one in held[name]):
        return None
    if any(isinstance(one, Mapping) for column in held.values() for one in column):
        return None
    return [dict(zip(held, row, strict=True)) for row in zip(*held.values(), strict=True)]


def listed(value: Any) -> Any:
    """What holds values one by one (a Series, an array, an iterator, a column of a Dataset) as a list."""
    whole = isinstance(value, str | bytes | os.PathLike | Mapping | Dataset | list) or hasattr(value, "columns")
    if whole or not isinstance(value, Iterable):
        return value
    for plain in ("to_pylist", "tolist"):  # of pyarrow; of numpy and pandas, whose numbers become Python's
        if hasattr(value, plain):
            return getattr(value, plain)()
    return list(value)


def _from_list(rows: list[Any]) -> Dataset:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"Each row is a dict of columns; row {number} is {_short(row)}.")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    made = [_column(key, [row.get(key) for row in rows]) for key in keys]
    if len(made) < 2:
        return made[0] if made else Dataset.from_dict({})
    joined = concatenate_datasets(made, axis=1)
    marks = {name: mark for one in made for name, mark in marks_of(one.data.table).items()}
    return Dataset(marked(joined.data.table, marks), DatasetInfo(features=joined.features)) if marks else joined


def _column(name: str, values: list[Any]) -> Dataset:
    try:
        return Dataset.from_dict({name: values})
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # turns of which some hold text and some a list; or a real mistake
        places = ((f"row {number}", {name: value}, 0) for number, value in enumerate(values, 1))
        return Dataset(together(list(tables(places, Path("the rows"), Notes()))))


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}{' …' if len(text) > 60 else ''} ({type(value).__name__})"
