"""The parts of the data that a task can use: their columns, and rows that have the label which a score needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value

from adapters_kit.errors import DataError
from adapters_kit.task_table import roles_of
from adapters_kit.tasks.base import Task
from adapters_kit.tasks.rows import cells, chosen, in_parts, made
from adapters_kit.training.data.columns import header_is_a_row, recognise, unused
from adapters_kit.training.data.media import located
from adapters_kit.training.data.sources import Source


def usable_parts(source: Source, task: Task) -> tuple[Dataset, Dataset | None]:
    """The training rows and the held-out ones, each with the task's columns alone; None where none are there.

    A held-out part without the task's columns or without labels, as public benchmarks have, is passed over for the
    next one. Everything that is not used is noted.

    Raises:
        DataError: training rows without a label; held-out parts of which none can be used.
    """
    train = of_roles(source.train, task.columns, task, source.folder)
    refuse_unlabelled(task, train)
    objective = task.recipe.objective
    sentence = unused(source.train, task.columns, roles_of(task.name, objective.name if objective else None))
    if sentence:
        task.notes.say(sentence)
    row = header_is_a_row(source.train)
    if row and task.recipe.data.columns:
        task.notes.say(row)
    test: Dataset | None = None
    first_reason: DataError | None = None
    left = [*source.others]
    for name, part in source.held_out.items():
        if test is not None:
            left.append(name)
            continue
        try:
            test = labelled(task, of_roles(part, task.columns, task, source.folder), name)
        except DataError as error:
            first_reason = first_reason or error
            task.notes.say(f"The part {name!r} cannot be used as the held-out one: {error}")
    if source.held_out and test is None and first_reason is not None:
        raise first_reason
    if left:
        task.notes.say(f"Parts of the data that are not used: {', '.join(left)}.")
    return train, test


def of_roles(rows: Dataset, columns: Mapping[str, str], task: Task, folder: Path | None) -> Dataset:
    """The columns that play a role, alone; texts that were saved as categories are texts, paths start at `folder`.

    Args:
        columns: role to column name.

    Raises:
        DataError: columns that are not there.
    """
    recognise(rows, columns, task.needs, task.optional)
    rows = rows.select_columns(list(dict.fromkeys(columns.values())))
    for role, column in columns.items():
        kind = rows.features[column]
        if isinstance(kind, ClassLabel) and role not in task.targets:  # a text that was saved as categories
            rows = _spelled(rows, column, kind)
    for role in ("image", "audio"):
        if role in columns and folder is not None:
            rows = located(rows, columns[role], folder)
    return rows


def _spelled(rows: Dataset, column: str, kind: ClassLabel) -> Dataset:
    """The rows with a column's categories as texts."""
    parts = (
        {**part, column: [None if value is None else kind.int2str(value) for value in part[column]]}
        for _, part in in_parts(rows, rows.column_names)
    )
    return made(parts, Features({**rows.features, column: Value("string")}))


def refuse_unlabelled(task: Task, rows: Dataset) -> None:
    """Refuses training rows that have no label.

    Raises:
        DataError: with their numbers.
    """
    missing = np.asarray(task.unlabelled(rows))
    if len(missing):
        column = task.target
        raise DataError(
            f"{len(missing):,} of {len(rows):,} training rows have no label in column {column!r}: "
            f"{_numbers(missing)}. Give "
            f"them one, or take them out.{_mark_of_none(rows, column, missing)}"
        )


def labelled(task: Task, rows: Dataset, part: str) -> Dataset:
    """The rows that have a label; those without are noted and count in no score.

    Raises:
        DataError: no row has one.
    """
    missing = np.asarray(task.unlabelled(rows), dtype=np.int64)
    if not len(missing):
        return rows
    column = task.target
    if len(missing) == len(rows):
        raise DataError(
            f"No row of {part!r} has a label in column {column!r}, so that nothing can be scored. Name other rows: "
            "data.test."
        )
    task.notes.say(
        f"{len(missing):,} of {len(rows):,} rows of {part!r} have no label and count in no score: {_numbers(missing)}.",
        rows_without_label=len(missing),
    )
    left = np.ones(len(rows), dtype=bool)
    left[missing] = False
    return chosen(rows, np.flatnonzero(left))


def _numbers(rows: np.ndarray) -> str:
    shown = ", ".join(str(row + 1) for row in rows[:10])
    return f"row{'s' * (len(rows) > 1)} {shown}{' …' if len(rows) > 10 else ''}"


def _mark_of_none(rows: Dataset, column: str, missing: np.ndarray) -> str:
    mark = str(rows[int(missing[0])][column])
    if mark not in ("-1", "-"):
        return ""
    names = sorted({str(value) for value in cells(rows, column)})[:10]
    return f' {mark} means "no label"; if it is a class here, name the classes: labels: {names}.'
