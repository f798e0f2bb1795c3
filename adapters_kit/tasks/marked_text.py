"""Texts in which annotators have marked spans by their characters, as words with a tag each.

[0, 4, "PER"]                                                   doccano, spaCy
{"start": 0, "end": 4, "label": "PER"}                          Prodigy, spaCy's JSON, Label Studio (`labels`)
{"start_offset": 0, "end_offset": 4, "label": "PER"}            doccano with relations
{"label": ["PER"], "points": [{"start": 0, "end": 3, "text": "Anna"}]}        Dataturks, whose ends are inclusive
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.rows import check_text, in_parts, made
from adapters_kit.tasks.text_scores import stands_alone
from adapters_kit.tasks.turns import shortened, written_out

_STARTS = ("start", "start_offset", "begin", "start_char", "char_start", "startOffset", "beginOffset")
_ENDS = ("end", "end_offset", "stop", "end_char", "char_end", "endOffset")
_LABELS = ("label", "labels", "type", "entity", "entity_type", "entity_group", "tag", "class", "category")
_TEXTS = ("text", "value", "word", "entity_text")

Mended = Counter[str]
"""How many spans were mended, by what was done to them."""
_MENDED = {
    "spans_trimmed": "{} spans began or ended with blanks, which are left out.",
    "spans_ends_moved": "{} spans name their last character, as their texts show: they end behind it.",
    "spans_twice": "{} spans stand twice in their row and count once.",
    "spans_recounted": "{} spans count characters as UTF-16 does, as their texts show.",
}


class Span(NamedTuple):
    """Some characters of a text and what they are: `text[start:end]`."""

    start: int
    """Its first character."""
    end: int
    """The one behind its last."""
    label: str
    """What it is."""


def words_of(text: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end: letters, digits and their marks; a sign alone; where a script has no
    spaces, a character."""
    found: list[tuple[int, int]] = []
    before = ""
    for place, character in enumerate(text):
        kind = _kind(character)
        if (kind == "mark" and before) or (kind == before == "letter"):
            found[-1] = (found[-1][0], place + 1)
            continue
        if kind != "blank":
            found.append((place, place + 1))
        before = {"blank": "", "mark": "letter"}.get(kind, kind)
    return found


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if character.isspace() or category[0] in "ZC":
        return "mark" if character in "\u200c\u200d" else "blank"  # joiners are within words
    if category[0] == "M":
        return "mark"
    if stands_alone(character):
        return "alone"
    return "letter" if category[0] in "LN" or character == "_" else "sign"


def holds_spans(cell: Any) -> bool:
    """Whether a cell is a list of spans, at least one."""
    try:
        return any(True for _ in _read(cell, None, "", Counter()))
    except DataError:
        return False


def spans_of(cell: Any, text: str, where: str, mended: Mended) -> list[Span]:
    """The spans of a row in their order.

    Args:
        where: the row and the column, for messages.
        mended: counts spans that had to be mended.

    Raises:
        DataError: what is no span, lies outside the text, is not what it says that it is, or overlaps another.
    """
    read = list(_read(cell, text, where, mended))
    found = sorted(set(read))
    mended["spans_twice"] += len(read) - len(found)
    for one, other in pairwise(found):
        if other.start < one.end:
            told = " and ".join(f"{text[span.start : span.end]!r:.60} ({span.label})" for span in (one, other))
            raise DataError(
                f"{where}: the spans {told} overlap, and a word has one tag. Keep one of the two, or train a run for "
                "each."
            )
    return found


def tags_of(text: str, words: Sequence[tuple[int, int]], spans: Sequence[Span], where: str) -> list[str]:
    """A tag for each word: B- at the first word of a span, I- at its others, O outside.

    Raises:
        DataError: a span that begins or ends within a word.
    """
    tags = ["O"] * len(words)
    starts = {start: place for place, (start, _) in enumerate(words)}
    ends = {end: place for place, (_, end) in enumerate(words)}
    for start, end, label in spans:
        if start not in starts or end not in ends:
            inside = next(text[a:b] for a, b in words if a < start < b or a < end < b)
            raise DataError(
                f"{where}: the span {text[start:end]!r:.60} ({label}, {start} to {end}) cuts the word {inside!r:.60}. "
                "Move its edge to the word's; where all ends are one short, they count the last character: add 1."
            )
        first, last = starts[start], ends[end]
        tags[first : last + 1] = [f"B-{label}", *[f"I-{label}"] * (last - first)]
    return tags


def sentences(data: Dataset, text: str, spans: str | None, notes: Notes) -> Dataset:
    """The rows as `tokens` and, where `spans` names a column, `tags`.

    Raises:
        DataError: with the first row whose spans cannot be tags.
    """
    names = ["tokens", *(["tags"] if spans else [])]
    mended: Mended = Counter()
    empty = 0

    def parts() -> Iterator[dict[str, list[list[str]]]]:
        nonlocal empty
        for start, part in in_parts(data, [text, *([spans] if spans else [])]):
            texts = check_text(part[text], start, text, "text", data.column_names)
            rows: dict[str, list[list[str]]] = {name: [] for name in names}
            for row, value in enumerate(texts, start):
                words = words_of(value)
                rows["tokens"].append([value[a:b] for a, b in words])
                if spans:
                    where = f"Row {row + 1}, column {spans!r}"
                    found = spans_of(part[spans][row - start], value, where, mended)
                    empty += not found
                    rows["tags"].append(tags_of(value, words, found, where))
            yield rows

    whole = made(parts(), Features({name: List(Value("string")) for name in names}))
    if empty:
        notes.say(f"{empty:,} of {len(data):,} rows have no span: each of their words is O.", rows_without_spans=empty)
    for name, count in mended.items():
        if count:
            notes.say(_MENDED[name].format(f"{count:,}"), **{name: count})
    return whole


def marked(text: str, tags: Sequence[str]) -> list[dict[str, Any]]:
    """The spans that the tags of a text's words mean, as `start`, `end`, `label` and `text`."""
    found: list[dict[str, Any]] = []
    going = ""
    for (start, end), tag in zip(words_of(text), tags, strict=True):
        place, _, label = tag.partition("-")
        if place == "I" and label == going:
            found[-1]["end"] = end
        elif place in ("B", "I"):
            found.append({"start": start, "end": end, "label": label})
        going = label
    return [{**span, "text": text[span["start"] : span["end"]]} for span in found]


def _read(cell: Any, text: str | None, where: str, mended: Mended) -> Iterator[Span]:
    """The spans of a cell, as they stand there; `text` None: only whether they are any."""
    value = written_out(cell)
    if isinstance(value, Mapping) and value and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise DataError(
            f"{where}: {shortened(cell)} is no list of spans, [start, end, label] or {{start, end, label}}. Or give "
            "words and tags: data.columns: {tokens: NAME, tags: NAME}."
        )
    for item in value:
        for given in _points(item):
            start, end, label, said = _parts(given, where)
            yield Span(start, end, label) if text is None else _placed(start, end, label, said, text, where, mended)


def _points(item: Any) -> list[Any]:
    """Dataturks' marks of one label; everything else is a span itself."""
    if isinstance(item, Mapping) and isinstance(item.get("points"), list):
        label = item.get("label")
        return [{**point, "label": label} if isinstance(point, Mapping) else point for point in item["points"]]
    return [item]


def _parts(item: Any, where: str) -> tuple[int, int, str, str | None]:
    start = end = label = said = None
    if isinstance(item, list | tuple) and len(item) == 3:
        start, end, label = item
    elif isinstance(item, Mapping):
        start, end, label, said = (
            next((item[key] for key in keys if item.get(key) is not None), None)
            for keys in (_STARTS, _ENDS, _LABELS, _TEXTS)
        )
    if isinstance(label, list) and len(label) == 1:
        label = label[0]
    if isinstance(label, list):
        raise DataError(f"{where}: a span with {len(label)} labels, {shortened(item)}. A word has one tag: keep one.")
    numbers = [_number(value) for value in (start, end)]
    if numbers[0] is None or numbers[1] is None or not isinstance(label, str) or not label.strip():
        raise DataError(
            f"{where}: {shortened(item)} is no span. One is [start, end, label] or {{start, end, label}}: where it "
            "begins and ends in the text, in characters, and what it is."
        )
    return numbers[0], numbers[1], label.strip(), said if isinstance(said, str) else None


def _number(value: Any) -> int | None:
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _placed(start: int, end: int, label: str, said: str | None, text: str, where: str, mended: Mended) -> Span:
    """The span as it stands in the text, whichever way it was counted."""
    if said is not None and text[start:end].strip() != (plain := said.replace("\\n", "\n").strip()):
        bytes_of = text.encode("utf-16-le", "surrogatepass")
        here, there = (len(bytes_of[: 2 * at].decode("utf-16-le", "ignore")) for at in (start, end))
        if text[start : end + 1].strip() == plain:
            end = end + 1
            mended["spans_ends_moved"] += 1
        elif text[here:there].strip() == plain:
            start, end = here, there
            mended["spans_recounted"] += 1
        else:
            raise DataError(
                f"{where}: the span {start} to {end} ({label}) is {text[start:end]!r:.60} in the text, and says that "
                f"it is {said!r:.60}. Count its place again."
            )
    if not 0 <= start < end <= len(text):
        raise DataError(
            f"{where}: the span {start} to {end} ({label}) is empty or lies outside its text of {len(text):,} "
            "characters."
        )
    inner = text[start:end]
    if not inner.strip():
        raise DataError(f"{where}: the span {start} to {end} ({label}) has nothing but blanks in it.")
    trimmed = start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip())
    if trimmed != (start, end):
        mended["spans_trimmed"] += 1
    return Span(*trimmed, label)
