"""Several files that are one part of the data: shards, and files whose folders are named after values or classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Value, concatenate_datasets

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes
from adapters_kit.training.data.encoding import encoding_of
from adapters_kit.training.data.json_rows import SPLITS
from adapters_kit.training.data.json_tables import together
from adapters_kit.training.data.row_file import Format, Parts, holds_rows, read_file

_NOT_TOLD = "__HIVE_DEFAULT_PARTITION__"  # a folder's value where the rows have none
_BOXES = "_annotations.coco.json"  # beside the pictures that it is about, as Roboflow writes it
_WITHOUT_CLASS = ("unsup", "unlabeled", "unlabelled", "unsupervised")
_ABOUT = re.compile(
    r"(readme|licen[cs]e|changelog|citation|notice|authors)(\.(md|txt|rst|html?|pdf|cff|bib))?|dataset_infos\.json",
    re.IGNORECASE,
)
_TEXTS = ("", ".txt", ".text", ".md")


def listed(folder: Path) -> list[Path]:
    """What lies in a folder, in order, without hidden things and what only tells about the data (README, LICENSE)."""
    shown = (path for path in folder.iterdir() if not path.name.startswith((".", "_")) or path.name == _BOXES)
    found = sorted(shown)
    return [path for path in found if not (_ABOUT.fullmatch(path.name) and path.is_file())]


def row_files(folder: Path) -> list[Path]:
    """The files of rows in a folder and in those below it."""
    found: list[Path] = []
    for path in listed(folder):
        found += row_files(path) if path.is_dir() else [path] * holds_rows(path)
    return found


def joined(files: Sequence[Path], form: Format) -> Dataset:
    """The rows of several files as one.

    Raises:
        DataError: files of which one has parts itself, or of which the columns differ.
    """
    return together_rows([_only_part(path, form) for path in files], [path.name for path in files], form.notes)


def _only_part(path: Path, form: Format) -> Dataset:
    inside = read_file(path, form)
    if len(inside) > 1:
        raise DataError(f"{path} holds the parts {', '.join(inside)} itself: name that file instead of its folder.")
    return next(iter(inside.values()))


def together_rows(parts: Sequence[Dataset], names: Sequence[str], notes: Notes) -> Dataset:
    """The rows of all parts. A column that one lacks is empty there, which is said; if they share none, refused.

    Raises:
        DataError: parts without a column in common.
    """
    if len(parts) == 1:
        return parts[0]
    for name, part in zip(names[1:], parts[1:], strict=True):
        if not set(part.column_names) & set(parts[0].column_names):
            raise DataError(
                f"{name} has the columns {', '.join(part.column_names)}, {names[0]} has "
                f"{', '.join(parts[0].column_names)}: shards of one part have the same."
            )
    kinds = {column: kind for part in reversed(parts) for column, kind in part.features.items()}
    for column, kind in kinds.items():
        lacking = [name for name, part in zip(names, parts, strict=True) if column not in part.column_names]
        if lacking:
            notes.say(
                f"{len(lacking):,} of {len(parts):,} files have no column {column!r}, which is empty in their rows "
                f"(first: {lacking[0]})."
            )
            parts = [
                part if column in part.column_names else part.add_column(column, [None] * len(part), feature=kind)
                for part in parts
            ]
    try:
        return concatenate_datasets(list(parts))
    except (pa.ArrowException, ValueError, TypeError):
        odd = [column for column, kind in kinds.items() if any(part.features[column] != kind for part in parts)]
        return _of_several_kinds(parts, odd)


def _of_several_kinds(parts: Sequence[Dataset], odd: Sequence[str]) -> Dataset:
    """The rows of all parts, whose columns `odd` are of other kinds here than there."""
    written = []
    parts = [part.flatten_indices() for part in parts]  # a selection is its table's rows
    for part in parts:
        table = part.data.table.select(odd)
        for index, column in enumerate(odd):
            if isinstance(kind := part.features[column], ClassLabel):
                cells = [None if value is None or value < 0 else kind.int2str(value) for value in part[column][:]]
                table = table.set_column(index, column, pa.array(cells, pa.string()))
        written.append(table)
    joined = together(written)
    alike = concatenate_datasets([part.remove_columns(odd) for part in parts])
    table = alike.data.table
    for field, column in zip(joined.schema, joined.columns, strict=True):
        table = table.append_column(field, column)
    features = Features({**Features.from_arrow_schema(joined.schema), **alike.features})
    return Dataset(table, DatasetInfo(features=features))


def texts_by_class(folder: Path, form: Format) -> Dataset | None:
    """One row a text file, its folder's name its class; None for a folder that is not laid out so.

    Two folders at least, each with nothing but texts in it. Folders named as those of unlabelled texts are left out.
    """
    entries = listed(folder)
    classes = {path.name: listed(path) for path in entries if path.is_dir()}
    texts = all(files and all(path.is_file() and path.suffix in _TEXTS for path in files) for files in classes.values())
    if len(classes) < 2 or not texts:
        return None
    for name in [name for name in classes if name.lower() in _WITHOUT_CLASS]:
        left = len(classes.pop(name))
        form.notes.say(f"{folder.name}/{name}: {left:,} texts without a class were left out.", rows_left_out=left)
    if beside := [path.name for path in entries if path.is_file()]:
        form.notes.say(f"{folder.name}: {', '.join(beside[:10])} lie beside the classes' folders and are not read.")
    told = ", ".join(f"{name} ({len(files):,})" for name, files in classes.items())
    form.notes.say(f"{folder.name}: each file is one text, its folder's name the label: {told}.")
    rows = [(path, name) for name, files in classes.items() for path in files]
    text = _texts([path for path, _ in rows], form)
    return Dataset.from_dict({"text": text, "label": [name for _, name in rows]})


def _texts(paths: Sequence[Path], form: Format) -> list[str]:
    """The files' whole texts; how many of them are in which other encoding than UTF-8 is said."""
    found: list[str] = []
    others: dict[str, list[str]] = {}
    for path in paths:
        codec = encoding_of(path, form.encoding, Notes())
        if codec not in ("utf-8", "utf-8-sig", form.encoding):
            others.setdefault(codec, []).append(path.name)
        found.append(path.read_text(encoding=codec).strip())
    for codec, names in others.items():
        form.notes.say(
            f"{len(names):,} of {len(paths):,} files are not UTF-8 and are read as {codec} (first: {names[0]}). If "
            "their letters are wrong, name the right one: data.encoding."
        )
    return found


def partitioned(folder: Path, form: Format) -> Parts | None:
    """The rows of files in folders such as `label=good/`, which stand for a column; `split=train/` for a part.

    None for a folder that is not laid out so.
    """
    entries = listed(folder)
    if not entries or not all(path.is_dir() and "=" in path.name for path in entries):
        return None
    rows: dict[str, list[Dataset]] = {}
    names: dict[str, list[str]] = {}
    told: dict[str, None] = {}
    for path in row_files(folder):
        above = path.relative_to(folder).parts[:-1]
        pairs = [(key, unquote(value)) for key, mark, value in (name.partition("=") for name in above) if mark]
        part = next((value for key, value in pairs if key == "split" and value in SPLITS), "train")
        made = _only_part(path, form)
        for key, value in pairs:
            told[key] = None
            if key not in made.column_names and (key, value) != ("split", part):
                cell = None if value == _NOT_TOLD else value
                made = made.add_column(key, [cell] * len(made), feature=Value("string"))
        rows.setdefault(part, []).append(made)
        names.setdefault(part, []).append(str(path.relative_to(folder)))
    if not rows:
        return None
    form.notes.say(f"{folder.name}: the names of its folders tell the values of {', '.join(told)}.")
    return {part: together_rows(parts, names[part], form.notes) for part, parts in rows.items()}
