"""Several sets of rows to train on as one (`data.mix`), each with its weight.

The rows of `train` come first, each once, then those of the others, in the order of the recipe: which rows these are
is a function of the recipe and its seed alone. Held-out rows are those of `train` and of nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from adapters_kit.errors import DataError
from adapters_kit.recipe_sections import DataSpec, MixSpec
from adapters_kit.tasks.base import Task
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.rows import chosen
from adapters_kit.training.data.columns import recognise
from adapters_kit.training.data.joined import together_rows
from adapters_kit.training.data.labelled import of_roles, refuse_unlabelled
from adapters_kit.training.data.sources import read
from adapters_kit.training.data.split import take


def mixed(train: Dataset, test: Dataset | None, task: Task, seed: int) -> Dataset:
    """The training rows of a recipe that mixes; the task has looked at them.

    Args:
        train: those of `data.train`, less what is held out.
        test: the held-out ones.

    Raises:
        DataError: a set that has other columns, too few rows, or what the task refuses.
    """
    spec, notes = task.recipe.data, task.notes
    others = [_read(name, one, spec, task) for name, one in spec.mix.items()]
    names = [Path(name).name for name in (spec.train, *spec.mix)]
    task.notes = Notes()  # told of the mixture below
    task.fit(train, test)
    task.notes = notes
    known = set(task.labels or ())
    counts = shares([len(train), *map(len, others)], [one.weight for one in spec.mix.values()], spec.limit, names)
    parts = [take(train, counts[0], seed)]
    parts += [_drawn(rows, counts[number], seed, number) for number, rows in enumerate(others, 1)]
    whole = together_rows(parts, names, notes)
    sizes = [len(train), *map(len, others)]
    told = "; ".join(_told(*one, sum(counts)) for one in zip(names, counts, sizes, strict=True))
    notes.say(f"{len(whole):,} training rows, in this order: {told}.", rows_mixed_in=sum(counts[1:]))
    with notes.about("the mixed training rows"):
        task.fit(whole, test)
    if known and (new := [name for name in task.labels or () if name not in known]):
        shown = ", ".join(map(str, new[:10]))
        kinds = f"{len(new):,} class{'es' * (len(new) > 1)}"
        notes.say(f"{names[0]} has no row of {kinds} that data.mix brings, and no score tells of: {shown}.")
    return whole


def shares(sizes: Sequence[int], weights: Sequence[float | str], limit: int | None, names: Sequence[str]) -> list[int]:
    """How many rows of each set make the mixture.

    Args:
        sizes: rows of the main set and of the others.
        weights: of the others: a share of all rows below 1, a number of rows from 1 on, or "all".
        limit: the most rows in all.
        names: as they are told.

    Raises:
        DataError: a number of rows that a set does not have; a limit that leaves none of the main set.
    """
    fixed: list[int] = []
    for name, size, weight in zip(names[1:], sizes[1:], weights, strict=True):
        number = size if weight == "all" else int(weight) if float(weight) >= 1 else 0
        if number > size:
            raise DataError(
                f"data.mix: {number:,} rows of {name} are asked for, and it has {size:,}. Ask for fewer, for all, or "
                "for a share of the training rows such as 0.3, for which rows are repeated."
            )
        fixed.append(number)
    parts = [0.0 if number else float(weight) for number, weight in zip(fixed, weights, strict=True)]
    left = 1 - sum(parts)
    total = (sizes[0] + sum(fixed)) / left
    total = total if limit is None else min(total, limit)
    main = min(round(total * left) - sum(fixed), sizes[0])
    if main < 1:
        raise DataError(
            f"data.limit: {limit} rows are fewer than data.mix takes ({sum(fixed):,} by number): none of {names[0]} "
            "would be left. Raise it, or give the sets shares below 1."
        )
    return [main, *(number or max(round(total * part), 1) for number, part in zip(fixed, parts, strict=True))]


def _read(name: str, one: MixSpec, spec: DataSpec, task: Task) -> Dataset:
    """The rows of one more set, under the column names of the main one.

    Raises:
        DataError: columns that do not play the same roles, with what to do.
    """
    short, notes = Path(name).name, task.notes
    with notes.about(f"data.mix, {short}"):
        asked = DataSpec(train=name, subset=one.subset, encoding=spec.encoding, delimiter=spec.delimiter)
        source = read(asked, notes)
        rows = source.train
        alike = {role: column for role, column in task.columns.items() if column in rows.column_names}
        task.refuse(rows, one.columns or alike)
        try:
            columns = recognise(rows, one.columns or alike, task.needs, task.optional)
        except DataError as error:
            raise DataError(str(error).replace("data.columns", f"data.mix: {name}: columns")) from error
        _check_roles(columns, task, short, Path(spec.train).name)
        rows = of_roles(rows, columns, task, source.folder)
        renamed = {column: task.columns[role] for role, column in columns.items() if column != task.columns[role]}
        if renamed:
            told = ", ".join(f"{old} as {new}" for old, new in renamed.items())
            notes.say(f"its columns are read by their roles: {told}.")
            rows = rows.rename_columns(renamed)
        if left := [*source.held_out, *source.others]:
            notes.say(f"its parts {', '.join(left)} are not used: rows are held out of the main set.")
        if set(columns) == set(task.columns):
            refuse_unlabelled(task, rows)
    return rows


def _check_roles(columns: Mapping[str, str], task: Task, name: str, main: str) -> None:
    """Refuses a set whose rows say something else than the main set's."""
    lacking = [role for role in task.columns if role not in columns and role not in task.optional]
    more = [role for role in columns if role not in task.columns]
    if not lacking and not more:
        return
    mine = ", ".join(f"{column} ({role})" for role, column in task.columns.items())
    its = ", ".join(f"{column} ({role})" for role, column in columns.items())
    if lacking:
        what = f"Write its rows with columns for {' and '.join(lacking)}, as those of {main} are"
    else:
        what = (
            f"Give the rows of {main} a column {columns[more[0]]!r} too, empty where there is nothing, or take it out "
            f"of {name}"
        )
    raise DataError(f"Its rows are read by other columns than those of {main}: {its}, against {mine}. {what}.")


def _drawn(rows: Dataset, count: int, seed: int, number: int) -> Dataset:
    """So many rows: all of them as often as they fit, and the rest drawn."""
    times, rest = divmod(count, len(rows))
    drawn = np.sort(np.random.default_rng([seed, number]).permutation(len(rows))[:rest])
    return chosen(rows, np.concatenate([np.tile(np.arange(len(rows)), times), drawn]))


def _told(name: str, count: int, size: int, total: int) -> str:
    """One set in a sentence: 30 of its 90 rows, and what part of all they are."""
    of = (
        f" of its {size:,}" if count < size else f", its {size:,} rows {count / size:.3g} times" if count > size else ""
    )
    return f"{count:,} rows of {name}{of} ({count / total:.1%})"
