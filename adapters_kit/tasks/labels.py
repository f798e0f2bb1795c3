"""Labels as data sets hold them: spelled as they are, in the order that the data gives; what is no label is none.

A cell without a label is None, NaN, an empty text, -1 or -100, by which the hub's data sets mean "not told", or "-", by
which SNLI says that its readers did not agree (not where "+" stands in the column too). Where one of them is a class of
its own, the recipe says so: `labels: ["-1", "1"]`.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.rows import in_parts

_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_NOT_A_NUMBER = {"nan", "na", "n/a", "null", "none"}
_SEPARATORS = ("|", ";", ",")
_SCALE = 20  # so many different numbers with fractions are a scale, and no classes


def label_reader(data: Dataset, column: str, given: Sequence[str] | None) -> Callable[[Any, int], str | None]:
    """A function of a cell (or an item of a list in one) and its row that gives the label's name, None for no label.

    Args:
        given: the recipe's `labels`.

    It raises DataError for what is no label: numbers with a fraction, objects.
    """
    kind = data.features[column]
    inner = getattr(kind, "feature", kind)
    names = inner.names if isinstance(inner, ClassLabel) else None
    numbers = names is None and getattr(inner, "dtype", "") in ("string", "large_string") and _all_numbers(data, column)
    none = {"-1", "-100"} - set(given or ())

    def read(value: Any, row: int) -> str | None:
        if names is not None and isinstance(value, int):
            return (names[value].strip() and names[value]) or None if 0 <= value < len(names) else None
        if isinstance(value, bool):
            return "true" if value else "false"
        if value is None or value != value:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, datetime | date | time):
            return value.isoformat()
        if not isinstance(value, str | int | Decimal):
            number = isinstance(value, float) and inner is kind
            hint = (
                "To predict a number, set problem: regression."
                if number
                else "Give a class by its name or its number; shares of several classes are not read."
            )
            raise DataError(
                f"Labels are strings or integers; column {column!r}, row {row + 1} holds {value!r:.80} "
                f"({type(value).__name__}). {hint}"
            )
        text = str(value)
        if not text.strip() or (numbers and text.strip().lower() in _NOT_A_NUMBER):
            return None
        return None if text in none else text

    return read


def _all_numbers(data: Dataset, column: str) -> bool:
    """Whether every text in a column is a number or a word for none, as in tables that pandas wrote."""
    found = False
    for value in distinct(data, column)[0]:
        if not isinstance(value, str) or not value.strip() or value.strip().lower() in _NOT_A_NUMBER:
            continue
        if not _NUMBER.fullmatch(value.strip()):
            return False
        found = True
    return found


def labels_of(data: Dataset, column: str, given: Sequence[str] | None = None) -> list[str | None]:
    """The label of every row; None where it has none.

    Raises:
        DataError: lists, where a row has one label; values that are no labels.
    """
    names, rows = named_labels(data, column, given)
    return [names[number] for number in rows.tolist()]


def named_labels(data: Dataset, column: str, given: Sequence[str] | None = None) -> tuple[list[str | None], np.ndarray]:
    """As `labels_of`: the names, of which some may be equal or None, and the place of every row's among them, (rows,)
    int64: eight bytes a row, however long the names."""
    read = label_reader(data, column, given)
    values, rows = distinct(data, column)
    dash = given is None or "-" not in given
    dash = dash and "-" in values and "+" not in values
    first = dict(zip(*(part.tolist() for part in np.unique(rows, return_index=True)), strict=True))
    names: list[str | None] = []
    for number, value in enumerate(values):
        row = first.get(number, 0)
        if isinstance(value, list):
            raise DataError(
                f"Column {column!r}, row {row + 1} holds a list of labels, {value!r:.80}, where the task takes one. "
                "For texts "
                "with several labels set problem: multi-label; else give each row one label."
            )
        names.append(None if dash and value == "-" else read(value, row))
    return names, rows


def distinct(data: Dataset, column: str) -> tuple[list[Any], np.ndarray]:
    """The values of a column, each once, in the order in which they come, and the place of every row's among them,
    (rows,) int64. Lists are not compared: each is a value of its own."""
    values: list[Any] = []
    known: dict[Any, int] = {}
    rows = np.empty(len(data), dtype=np.int64)
    for start, part in in_parts(data, [column]):
        for row, value in enumerate(part[column], start):
            key = (type(value), repr(value) if value != value else value)
            place = len(values) if isinstance(value, list | dict) else known.setdefault(key, len(values))
            if place == len(values):
                values.append(value)
            rows[row] = place
    return values, rows


def lists_of(data: Dataset, column: str, given: Sequence[str] | None = None) -> list[list[str | None] | None]:
    """The labels of every row of a column of lists; None where the list itself is missing."""
    read = label_reader(data, column, given)
    return [
        None if value is None else [read(item, row) for item in (value if isinstance(value, list) else [value])]
        for row, value in enumerate(data[column][:])
    ]


def places(data: Dataset, column: str, given: Sequence[str] | None) -> list[str] | None:
    """The names of a column's places, if each row says 0 or 1 of each class, [0, 1, 1]; None where it lists labels.

    Args:
        given: the recipe's `labels`; without them a class is called by its place, from "0".
    """
    if isinstance(data.features[column], Value | ClassLabel):
        return None
    values = [value for value in data[column][:] if value is not None]
    if isinstance(getattr(data.features[column], "feature", None), ClassLabel) or not values:
        return None
    if not all(isinstance(value, list) and len(value) == len(values[0]) > 1 for value in values):
        return None
    fits = given is not None and len(given) == len(values[0])
    # As numbers of classes, these would be all classes in every row.
    if not all(isinstance(mark, bool | int | float) and mark in (0, 1) for value in values for mark in value):
        return None
    return list(map(str, range(len(values[0])))) if given is None else list(given) if fits else None


def separated(values: Sequence[str], notes: Notes, column: str) -> Callable[[str], list[str]]:
    """How texts hold several labels, as a list in brackets or with a mark between them: how to take them apart.

    A blank is such a mark only if every label between blanks stands alone, or beside others, in other rows too.
    """
    filled = [value.strip() for value in values if value.strip()]
    if filled and all(value[0] == "[" and value[-1] == "]" for value in filled):
        notes.say(f"Column {column!r}: the labels are read from lists such as {filled[0]!r:.60}.")
        return from_brackets
    mark = next((mark for mark in _SEPARATORS if any(mark in value for value in filled)), None)
    if mark is None and any(" " in value for value in filled):
        together = Counter(part for value in filled for part in set(value.split()))
        alone = {value for value in filled if " " not in value}
        joined = {value for value in filled if " " in value}
        if all(part in alone or together[part] > filled.count(value) for value in joined for part in value.split()):
            mark = " "
    if mark is None:
        return lambda text: [text]
    notes.say(f"Column {column!r}: the labels of a row are separated by {mark!r}.")
    return lambda text: [part.strip() for part in text.split(mark) if part.strip()]


def from_brackets(text: str) -> list[str]:
    """The items of a list that is written out, by JSON, Python or numpy, or without quotes."""
    quoted = re.findall(r"'([^']*)'|\"([^\"]*)\"", text)
    if len(quoted) > 1 and re.search(r"['\"]\s+['\"]", text):  # numpy writes no commas: ['a' 'b']
        return [first or second for first, second in quoted]
    try:
        items = json.loads(text)
    except ValueError:
        try:
            items = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            items = text.strip("[]").replace(",", " ").split()
    return [str(item) for item in items]


def class_names(
    train: Iterable[str],
    test: Iterable[str],
    given: Sequence[str] | None,
    column: str,
    notes: Notes,
    declared: Sequence[str] | None = None,
    *,
    least: int = 2,
) -> list[str]:
    """The classes in the order of the model's outputs: as the user gives them, as the data declares them, or sorted.

    Args:
        train, test: labels that occur in each part.
        given: the recipe's `labels`.
        declared: the names of a column whose type has them (`datasets.ClassLabel`).
        notes: told of classes that only the held-out part shows.
        least: how many there must be to learn anything; one, where rows without it are told from those with it.

    Raises:
        DataError: a class that `given` leaves out; fewer than `least` classes.
    """
    seen, held_out = set(train), set(test)
    if given is not None:
        unknown = sorted((seen | held_out) - set(given))
        if unknown:
            raise DataError(f"labels: {list(given)} leaves out classes of column {column!r}: {unknown[:10]}.")
        return list(given)
    if len(seen) < least:
        classes = f"[{next(iter(seen), 'NAME')}, OTHER]"
        raise DataError(
            f"Column {column!r} has one class only, {sorted(seen)}: nothing can be learned from it. Name another "
            f"column in data.columns, or, where rows of other classes are to come, all classes: labels: {classes}."
        )
    if declared is None:
        _tell_numbers(seen, column, notes)
    extra = held_out - seen
    if extra:
        notes.say(
            f"The held-out data has classes that the training data never shows: {', '.join(sorted(extra)[:10])}. The "
            "model cannot learn them; their rows count as wrong.",
            classes_held_out_only=len(extra),
        )
    if alike := _alike(seen | extra):
        notes.say(
            f"Column {column!r}: {'; '.join(map(repr, alike[:5]))} differ in blanks, in capital letters or in how "
            "a number is written only; they are classes of their own."
        )
    return list(declared) if declared is not None else sorted(seen | extra, key=_by_value)


def _tell_numbers(names: set[str], column: str, notes: Notes) -> None:
    """Says, or beyond a few refuses, that numbers which are no counts are taken as names of classes."""
    fractions = [name for name in names if _NUMBER.fullmatch(name.strip()) and not float(name).is_integer()]
    if not fractions or not all(_NUMBER.fullmatch(name.strip()) for name in names):
        return
    told = f"Column {column!r} holds {len(names):,} different numbers, such as {min(fractions, key=float)}"
    if len(names) > _SCALE:
        raise DataError(
            f"{told}. To predict a number, set problem: regression; to have a class for each, name them all: labels."
        )
    notes.say(f"{told}: each is a class of its own. To predict a number, set problem: regression.")


def _alike(names: Iterable[str]) -> list[list[str]]:
    """Names that may be meant as one."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        plain = name.strip().casefold()
        plain = str(float(plain)) if _NUMBER.fullmatch(plain) else plain
        found.setdefault(plain, []).append(name)
    return [same for same in found.values() if len(same) > 1]


def classes_of(
    train: Dataset, test: Dataset | None, column: str, given: Sequence[str] | None, notes: Notes
) -> list[str]:
    """The classes of a column of one label a row; see `class_names`."""
    parts = [labels_of(data, column, given) if data is not None else [] for data in (train, test)]
    seen, held_out = ([name for name in part if name] for part in parts)
    return class_names(seen, held_out, given, column, notes, declared_names(train, column))


def class_numbers(data: Dataset, column: str, given: Sequence[str] | None, classes: Sequence[str]) -> list[int]:
    """The place of every row's label among the classes of the model.

    Raises:
        DataError: a label that is none of them.
    """
    number = {name: index for index, name in enumerate(classes)}
    names = labels_of(data, column, given)
    strange = sorted({str(name) for name in names if name not in number})
    if strange:
        raise DataError(
            f"Column {column!r} has labels that the model does not know: {strange[:10]}; it knows {list(classes)}."
        )
    return [number[name] for name in names if name is not None]


def declared_names(data: Dataset, column: str) -> list[str] | None:
    """The classes that a column's type names, in their order."""
    kind = data.features[column]
    inner = getattr(kind, "feature", kind)
    return list(inner.names) if isinstance(inner, ClassLabel) else None


def _by_value(name: str) -> tuple[int, float, str]:
    return (0, float(name), name) if _NUMBER.fullmatch(name) else (1, 0.0, name)


def tell_head(model: Any, now: Sequence[str], name: str, notes: Notes) -> None:
    """Says what becomes of the head that the checkpoint `name` brought, where its classes have other names.

    Args:
        model: from `load`.
        now: the classes that are learned, in the order of the outputs.
    """
    saved, is_new = model.saved_labels, bool(model.fresh_modules)
    named = not all(re.fullmatch(r"LABEL_\d+", label) for label in saved)
    if len(now) < 2 or [label.casefold() for label in saved] == [label.casefold() for label in now]:
        return
    if is_new and named:
        told = ", ".join(saved[:5]) + ", …" * (len(saved) > 5)
        notes.say(f"The head is new, as {name} names {len(saved):,} classes that are other ones ({told}).")
    elif not is_new:
        pairs = [f"{before} → {after}" for before, after in zip(saved, now, strict=True)]
        notes.say(
            f"The head of {name} is kept and its outputs renamed: {', '.join(pairs[:5])}{', …' * (len(pairs) > 5)}. If "
            "they mean other things, name the classes in the order of its outputs: labels: [...]"
        )
