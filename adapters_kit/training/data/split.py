"""Taking some of the rows, and setting some aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Audio, Dataset, Image
from sklearn.model_selection import train_test_split

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.rows import in_parts


class Splits(NamedTuple):
    """The rows to train on and the held-out ones."""

    train: Dataset
    """The rows to train on."""
    test: Dataset
    """The held-out rows."""


def take(data: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most `limit` rows, drawn with the seed."""
    return data if limit is None or limit >= len(data) else data.shuffle(seed=seed).select(range(limit))


def in_both(parts: Splits) -> int:
    """How many held-out rows stand, with all their columns, among the training rows too."""
    columns = parts.train.column_names
    if any(isinstance(kind, Image | Audio) for kind in parts.train.features.values()):
        return 0  # files: to compare them is to read them all
    seen, asked = (np.fromiter(map(hash, _written(rows, columns)), np.int64, len(rows)) for rows in parts)
    return int(np.isin(asked, seen).sum())


def _written(rows: Dataset, columns: Sequence[str]) -> Iterator[str]:
    for _, part in in_parts(rows, columns):
        for row in zip(*(part[name] for name in columns), strict=True):
            yield repr(row)


def split(
    data: Dataset,
    size: float,
    seed: int,
    classes: Sequence[Any] | None = None,
    notes: Notes | None = None,
    groups: Sequence[Hashable] | None = None,
) -> Splits:
    """Sets aside a held-out part, of the same mixture of classes where `classes` (one per row) is given.

    A class of one row stays in the training part: held out, it could not be learned. Where no row can be set aside,
    both parts are all rows.

    Args:
        size: a fraction below 1, or a number of rows.
        groups: one per row: rows of one group go to the same part, of which there are `size` rows or some more.
        notes: told of classes that the held-out part lacks, and of parts that are the same.

    Raises:
        DataError: more rows asked for than can be set aside; without `notes`, parts that would be the same.
    """
    rows = len(data)
    count = max(round(size * rows) if size < 1 else int(size), 1)
    if rows < 2:
        return _all_in_both(data, "there is one only", notes)
    if count >= rows:
        raise DataError(f"Cannot set {count} of {rows} rows aside: lower data.test_size or give data.test.")
    if groups is not None:
        held_out = _whole_groups(groups, count, seed)
    else:
        held_out = _any_rows(rows, count, seed) if classes is None else _stratified(classes, count, seed)
    if classes is not None and notes is not None and held_out:
        lacking = sorted({str(name) for name in classes} - {str(classes[row]) for row in held_out})
        if lacking:
            notes.say(
                f"{len(lacking)} classes are not in the held-out part of {count:,} rows, so that no score tells of "
                f"them: {', '.join(lacking[:10])}."
            )
    if not held_out:
        alone = "each is the only one of its class" if groups is None else "all belong together"
        return _all_in_both(data, alone, notes)
    kept = np.ones(rows, dtype=bool)
    kept[held_out] = False
    return Splits(data.select(np.flatnonzero(kept)), data.select(np.flatnonzero(~kept)))


def _all_in_both(data: Dataset, reason: str, notes: Notes | None) -> Splits:
    if notes is None:
        raise DataError(f"None of {len(data):,} rows can be set aside: {reason}. Give held-out rows: data.test.")
    notes.say(
        f"None of {len(data):,} rows can be set aside, since {reason}: they are trained on and scored as well, which "
        "tells what was learned by heart and no more. data.test names held-out rows.",
        rows_in_both=len(data),
    )
    return Splits(data, data)


def _any_rows(rows: int, count: int, seed: int) -> list[int]:
    return train_test_split(np.arange(rows), test_size=count, random_state=seed)[1].tolist()


def _whole_groups(groups: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """At least `count` rows in whole groups; none if that would be all groups."""
    members: dict[Hashable, list[int]] = {}
    for row, name in enumerate(groups):
        members.setdefault(name, []).append(row)
    names = list(members)
    found: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(names))[:-1]:
        if len(found) < count:
            found += members[names[number]]
    return found


def _stratified(classes: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """Rows to set aside: of every class as many as its share, and never all of a class."""
    counts = Counter(classes)
    divisible = np.fromiter((row for row, name in enumerate(classes) if counts[name] > 1), np.int64)
    kinds = sum(number > 1 for number in counts.values())
    if count >= kinds and len(divisible) - count >= kinds > 1:
        place = {name: number for number, name in enumerate(sorted(counts, key=str))}
        names = np.fromiter((place[classes[row]] for row in divisible), np.int64, len(divisible))
        found = train_test_split(divisible, test_size=count, random_state=seed, stratify=names)[1]
        # Rounded shares can take the whole of a small class.
        if all(held < counts[name] for name, held in Counter(classes[row] for row in found).items()):
            return found.tolist()
    left, found = Counter(counts), []
    for row in np.random.default_rng(seed).permutation(len(classes)).tolist():
        if len(found) < count and left[classes[row]] > 1:
            left[classes[row]] -= 1
            found.append(row)
    return found
