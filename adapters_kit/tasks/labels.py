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
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Value

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.rows import Numbered, cells, tables_in_parts

_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_NOT_A_NUMBER = {"nan", "na", "n/a", "null", "none"}
_SEPARATORS = ("|", ";", ",")
_SCALE = 20  # so many different numbers with fractions are a scale, and no classes


def label_reader(
    data: Dataset, column: str, given: Sequence[str] | None, known: Distinct | None = None
) -> Callable[[Any, int], str | None]:
    """A function of a cell (or an item of a list in one) and its row that gives the label's name, None for no label.

    Args:
        given: the recipe's `labels`.
        known: the column's values, where they were looked at.

    It raises DataError for what is no label: numbers with a fraction, objects.
    """
    kind = data.features[column]
    inner = getattr(kind, "feature", kind)
    names = inner.names if isinstance(inner, ClassLabel) else None
    texts = names is None and getattr(kind, "dtype", "") in ("string", "large_string")
    numbers = texts and _all_numbers((known or distinct(data, column)).values)
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


def _all_numbers(values: Iterable[Any]) -> bool:
    """Whether every text is a number or a word for none, as in tables that pandas wrote."""
    found = False
    for value in values:
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
    return list(named_labels(data, column, given))


def named_labels(data: Dataset, column: str, given: Sequence[str] | None = None) -> Numbered:
    """As `labels_of`, by number."""
    found = distinct(data, column)
    read = label_reader(data, column, given, found)
    dash = given is None or "-" not in given
    dash = dash and "-" in found.values and "+" not in found.values
    names: list[str | None] = []
    for value, row in zip(found.values, found.first, strict=True):
        if isinstance(value, list):
            raise DataError(
                f"Column {column!r}, row {row + 1} holds a list of labels, {value!r:.80}, where the task takes one. "
                "For texts "
                "with several labels set problem: multi-label; else give each row one label."
            )
        names.append(None if dash and value == "-" else read(value, row))
    return Numbered(names, found.places)


class Distinct(NamedTuple):
    """The values of a column.

    Attributes:
        values: each once, in the order in which they come.
        places: of every row's among them, (rows,) int32.
        first: the first row of each.
    """

    values: list[Any]
    places: np.ndarray
    first: list[int]


def distinct(data: Dataset, column: str) -> Distinct:
    """The values of a column, each once. Lists are equal where they are written alike."""
    found = Distinct([], np.empty(len(data), dtype=np.int32), [])
    known: dict[Any, int] = {}
    for start, table in tables_in_parts(data, [column]):
        part = table.column(0).combine_chunks()
        plain = pa.types.is_string(part.type) or pa.types.is_large_string(part.type) or pa.types.is_integer(part.type)
        held = part.dictionary_encode("encode") if plain else None  # a thousand rows of few values at once
        numbers = held.indices.to_numpy() if held is not None else np.arange(len(part))
        firsts = np.unique(numbers, return_index=True)[1]
        places = []
        values = (held.dictionary if held is not None else part).to_pylist()
        for value, row in zip(values, firsts.tolist(), strict=True):
            key = (type(value), repr(value) if value != value or isinstance(value, list | dict) else value)
            places.append(known.setdefault(key, len(known)))
            if places[-1] == len(found.values):
                found.values.append(value)
                found.first.append(start + row)
        found.places[start : start + len(part)] = np.asarray(places, dtype=np.int32)[numbers]
    return found


def lists_of(data: Dataset, column: str, given: Sequence[str] | None = None) -> Iterator[list[str | None] | None]:
    """The labels of every row of a column of lists; None where the list itself is missing."""
    read = label_reader(data, column, given)
    for row, value in enumerate(cells(data, column)):
        items = value if isinstance(value, list) else [value]
        yield None if value is None else [read(item, row) for item in items]


def places(data: Dataset, column: str, given: Sequence[str] | None) -> list[str] | None:
    """The names of a column's places, if each row says 0 or 1 of each class, [0, 1, 1]; None where it lists labels.

    Args:
        given: the recipe's `labels`; without them a class is called by its place, from "0".
    """
    if isinstance(data.features[column], Value | ClassLabel):
        return None
    if isinstance(getattr(data.features[column], "feature", None), ClassLabel):
        return None
    width = 0
    for value in cells(data, column):
        if value is None:
            continue
        width = width or (len(value) if isinstance(value, list) else 0)
        if not isinstance(value, list) or len(value) != width or width < 2:
            return None
        # As numbers of classes, these would be all classes in every row.
        if not all(isinstance(mark, bool | int | float) and mark in (0, 1) for mark in value):
            return None
    if given is not None:
        return list(given) if len(given) == width else None
    return list(map(str, range(width))) or None


def separated(values: Numbered, notes: Notes, column: str) -> Callable[[str], list[str]]:
    """How texts hold several labels, as a list in brackets or with a mark between them: how to take them apart.

    A blank is such a mark only if every label between blanks stands alone, or beside others, in other rows too.
    """
    filled: Counter[str] = Counter()
    for value, count in zip(values.values, np.bincount(values.places, minlength=len(values.values)), strict=True):
        if value and value.strip():
            filled[value.strip()] += int(count)
    if filled and all(value[0] == "[" and value[-1] == "]" for value in filled):
        notes.say(f"Column {column!r}: the labels are read from lists such as {next(iter(filled))!r:.60}.")
        return from_brackets
    mark = next((mark for mark in _SEPARATORS if any(mark in value for value in filled)), None)
    if mark is None and any(" " in value for value in filled):
        together: Counter[str] = Counter()
        for value, count in filled.items():
            together.update(dict.fromkeys(value.split(), count))
        alone = {value for value in filled if " " not in value}
        joined = {value for value in filled if " " in value}
        if all(part in alone or together[part] > filled[value] for value in joined for part in value.split()):
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
    parts = [named_labels(data, column, given).values if data is not None else [] for data in (train, test)]
    seen, held_out = ([name for name in part if name] for part in parts)
    return class_names(seen, held_out, given, column, notes, declared_names(train, column))


def class_numbers(data: Dataset, column: str, given: Sequence[str] | None, classes: Sequence[str]) -> np.ndarray:
    """The place of every row's label among the classes of the model, (rows,) int64.

    Raises:
        DataError: a label that is none of them.
    """
    number = {name: index for index, name in enumerate(classes)}
    names = named_labels(data, column, given)
    strange = sorted({str(name) for name in names.values if name not in number})
    if strange:
        raise DataError(
            f"Column {column!r} has labels that the model does not know: {strange[:10]}; it knows {list(classes)}."
        )
    return np.asarray([number[name] for name in names.values], dtype=np.int64)[names.places]


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
