"""Taking some of the rows, and setting some aside."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Audio, Dataset, Image

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.rows import Numbered, chosen, in_parts


class Splits(NamedTuple):
    """The rows to train on and the held-out ones."""

    train: Dataset
    """The rows to train on."""
    test: Dataset
    """The held-out rows."""


def take(data: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most `limit` rows, drawn with the seed."""
    if limit is None or limit >= len(data):
        return data
    return chosen(data, np.random.default_rng(seed).permutation(len(data))[:limit])  # as `data.shuffle` draws them


def in_both(parts: Splits) -> int:
    """How many held-out rows stand, with all their columns, among the training rows too."""
    columns = parts.train.column_names
    if any(isinstance(kind, Image | Audio) for kind in parts.train.features.values()):
        return 0  # files: to compare them is to read them all
    asked = np.concatenate([*_hashes(parts.test, columns), np.zeros(0, dtype=np.int64)])
    names, counts = np.unique(asked, return_counts=True)
    seen = np.zeros(len(names), dtype=bool)
    for found in _hashes(parts.train, columns):
        places = np.searchsorted(names, found).clip(max=len(names) - 1)
        seen[places[names[places] == found]] = True
    return int(counts[seen].sum())


def _hashes(rows: Dataset, columns: Sequence[str]) -> Iterator[np.ndarray]:
    """A number for each row, equal for equal rows; a part of the rows at a time."""
    for _, part in in_parts(rows, columns):
        written = (repr(row) for row in zip(*(part[name] for name in columns), strict=True))
        yield np.fromiter(map(hash, written), np.int64)


def split(
    data: Dataset,
    size: float,
    seed: int,
    classes: Sequence[Any] | None = None,
    notes: Notes | None = None,
    groups: Sequence[Hashable] | np.ndarray | None = None,
) -> Splits:
    """Sets aside a held-out part, of the same mixture of classes where `classes` (one per row) is given.

    A class of one row stays in the training part: held out, it could not be learned. Where no row can be set aside,
    both parts are all rows.

    Args:
        size: a fraction below 1, or a number of rows.
        groups: one per row, or its number: rows of one group go to the same part, of which there are `size` rows or
            some more.
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
    named = Numbered.of(classes) if classes is not None else None
    if groups is not None:
        numbers = groups if isinstance(groups, np.ndarray) else Numbered.of(groups).places
        held_out = _whole_groups(numbers, count, seed)
    else:
        held_out = _any_rows(rows, count, seed) if named is None else _stratified(named, count, seed)
    if named is not None and notes is not None and len(held_out):
        shown = {str(named.values[place]) for place in np.unique(named.places[held_out])}
        lacking = sorted({str(name) for name in named.values} - shown)
        if lacking:
            notes.say(
                f"{len(lacking)} classes are not in the held-out part of {count:,} rows, so that no score tells of "
                f"them: {', '.join(lacking[:10])}."
            )
    if not len(held_out):
        alone = "each is the only one of its class" if groups is None else "all belong together"
        return _all_in_both(data, alone, notes)
    kept = np.ones(rows, dtype=bool)
    kept[held_out] = False
    return Splits(chosen(data, np.flatnonzero(kept)), chosen(data, np.flatnonzero(~kept)))


def _all_in_both(data: Dataset, reason: str, notes: Notes | None) -> Splits:
    if notes is None:
        raise DataError(f"None of {len(data):,} rows can be set aside: {reason}. Give held-out rows: data.test.")
    notes.say(
        f"None of {len(data):,} rows can be set aside, since {reason}: they are trained on and scored as well, which "
        "tells what was learned by heart and no more. data.test names held-out rows.",
        rows_in_both=len(data),
    )
    return Splits(data, data)


def _any_rows(rows: int, count: int, seed: int) -> np.ndarray:
    """The rows that scikit-learn's train_test_split sets aside, which needs five times the memory."""
    return np.random.RandomState(seed).permutation(rows)[:count]


def _whole_groups(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At least `count` rows in whole groups; none if that would be all groups."""
    sizes = np.bincount(groups)
    order = np.random.default_rng(seed).permutation(len(sizes))[:-1]
    before = np.cumsum(sizes[order]) - sizes[order]
    held_out = np.zeros(len(sizes), dtype=bool)
    held_out[order[before < count]] = True
    return np.flatnonzero(held_out[groups])


def _stratified(classes: Numbered, count: int, seed: int) -> np.ndarray:
    """Rows to set aside: of every class as many as its share, and never all of a class."""
    counts = np.bincount(classes.places, minlength=len(classes.values))
    several = counts > 1
    kinds, divisible = int(several.sum()), int(counts[several].sum())
    if count >= kinds and divisible - count >= kinds > 1:
        by_name = sorted(range(len(counts)), key=lambda place: str(classes.values[place]))
        held_out = _by_shares(classes.places, [place for place in by_name if several[place]], count, seed)
        # Rounded shares can take the whole of a small class.
        if (np.bincount(classes.places[held_out], minlength=len(counts)) < counts).all():
            return held_out
    found: list[int] = []
    for row in np.random.default_rng(seed).permutation(len(classes)):
        if len(found) == count:
            break
        if counts[classes.places[row]] > 1:
            counts[classes.places[row]] -= 1
            found.append(int(row))
    return np.asarray(found, dtype=np.int64)


def _by_shares(places: np.ndarray, kinds: Sequence[int], count: int, seed: int) -> np.ndarray:
    """The rows that scikit-learn's stratified train_test_split sets aside, which makes lists of all rows on the way.

    Args:
        places: the class of each row.
        kinds: the classes of which rows are set aside, in the order in which they are drawn from.
    """
    rng = np.random.RandomState(seed)
    counts = np.bincount(places)
    sizes = counts[list(kinds)]
    kept = _shares(sizes, int(sizes.sum()) - count, rng)
    held = _shares(sizes - kept, count, rng)
    order = np.argsort(places, kind="stable")
    ends = np.cumsum(counts)
    found = []
    for kind, size, behind, more in zip(kinds, sizes, kept, held, strict=True):
        members = order[ends[kind] - size : ends[kind]]
        found.append(members[rng.permutation(size)[behind : behind + more]])
    return np.concatenate(found)


def _shares(sizes: np.ndarray, draws: int, rng: np.random.RandomState) -> np.ndarray:
    """How many of `draws` fall to each class: its share, rounded down, and one more where most was cut off; among
    equal ones, chance decides."""
    exact = sizes / sizes.sum() * draws
    found = np.floor(exact)
    rest, left = exact - found, int(draws - found.sum())
    for most in sorted(set(rest.tolist()), reverse=True):
        if left <= 0:
            break
        equal = np.flatnonzero(rest == most)
        more = rng.choice(equal, size=min(len(equal), left), replace=False)
        found[more] += 1
        left -= len(more)
    return found.astype(np.int64)
