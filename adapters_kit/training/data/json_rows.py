"""JSON and JSON Lines: which part of a document is the rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes
from adapters_kit.training.data.annotators import exported, pair_row
from adapters_kit.training.data.coco import coco_rows, is_coco
from adapters_kit.training.data.encoding import encoding_of
from adapters_kit.training.data.json_tables import Row, tables

SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "heldout", "held_out")
# Keys under which documents keep their rows, beside keys that tell about them.
_HOLDERS = ("data", "rows", "examples", "instances", "records", "items", "samples", "dataset", "results")
_CONVERSATIONS = ("messages", "conversations", "conversation", "chat")
_WHOLE = 1 << 26  # bytes up to which a document is read whole
_NAMED = ' A row names its values: {"text": ..., "label": ...}.'


def read_json_lines(path: Path, encoding: str | None, notes: Notes) -> Iterator[pa.Table]:
    """The rows of a file with one object a line, in parts.

    Raises:
        DataError: a line that is no object, with its number.
    """
    with path.open(encoding=encoding_of(path, encoding, notes), newline="\n") as file:
        yield from tables(_line_rows(path, file), path, notes)


def _line_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Row, int]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"line {number}"
        value = pair_row(_parsed(path, line, place))
        if not isinstance(value, dict):
            raise DataError(f"{path}, {place}: each line is one {{...}} object, this is {line.strip()[:80]}{_NAMED}")
        yield place, value, len(line)


def _parsed(path: Path, text: str, place: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}" if place == "the file" else place
        before, behind = text[: error.pos].rpartition("\n")[2], text[error.pos :].partition("\n")[0]
        shown = (before[-40:] + behind[:40]).strip() or text.strip()[:80]
        raise DataError(f"{path}, {place}: not JSON ({error.msg}).{_hint(text, error.pos)} It reads: {shown}") from None
    except RecursionError:
        raise DataError(f"{path}, {place}: lists or objects are nested too deep to be read.") from None
    except _Twice as error:
        raise DataError(
            f"{path}, {place}: the key {error.key!r} stands twice in one object; one would be lost."
        ) from None
    except ValueError as error:  # a whole number of thousands of digits
        raise DataError(f"{path}, {place}: {error}") from None


def _hint(text: str, at: int) -> str:
    """What is wrong at a place where JSON ends, if it is one of the usual things."""
    before, behind = text[:at].rstrip(), text[at:].lstrip()
    after = behind[1:].lstrip() if behind[:1] == "," else behind  # Python 3.13 points to the comma, others behind it
    if (before.endswith(",") or behind[:1] == ",") and (after[:1] in ("]", "}") or not behind):
        return " No comma stands behind the last value: take it out."
    if behind[:1] == "," and not behind[1:].strip():
        return " No comma stands behind an object that has a line of its own: take it out."
    if behind[:1] == "'":
        return " JSON's quotes are double ones."
    if not behind and before[:1] == "{" and len(before) < 40:
        return " An object of JSON Lines stands on one line; objects over several lines are a list, in a .json file."
    return " Comments are not part of JSON: take them out." if behind[:2] in ("//", "/*") or behind[:1] == "#" else ""


class _Twice(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_json(path: Path, encoding: str | None, notes: Notes) -> dict[str, Iterator[pa.Table]]:
    """The parts of a document, each as tables: `train` alone, or those that the document names.

    Raises:
        DataError: no JSON, or no rows in it that can be told from other content.
    """
    codec = encoding_of(path, encoding, notes)
    if path.stat().st_size > _WHOLE:
        with path.open(encoding=codec) as file:
            begins = file.read(1024).lstrip("\ufeff \t\r\n")[:1]
        if begins == "[":
            return {"train": tables(_elements(path, codec), path, notes)}
        if begins == "{" and _first_line_is_an_object(path, codec):
            return {"train": read_json_lines(path, encoding, notes)}
    text = path.read_text(encoding=codec)
    try:
        value = _parsed(path, text, "the file")
    except DataError as whole:
        # Several objects one after the other: JSON Lines under another name.
        if text.lstrip()[:1] == "{" and "\n" in text.strip() and not isinstance(whole.__cause__, RecursionError):
            return {"train": tables(_line_rows(path, text.split("\n")), path, notes)}
        raise
    return {
        name: tables(((f"row {i + 1}", row, 0) for i, row in enumerate(rows)), path, notes)
        for name, rows in parts_of(value, path, notes).items()
    }


def _first_line_is_an_object(path: Path, codec: str) -> bool:
    with path.open(encoding=codec) as file:
        line = file.readline(_WHOLE)
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _elements(path: Path, codec: str) -> Iterator[tuple[str, Row, int]]:
    """The objects of one long list, read a piece at a time."""
    with path.open(encoding=codec) as file:
        text = file.read(_WHOLE).lstrip("\ufeff \t\r\n")[1:]
        number = at = 0
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            try:
                if at >= len(text):
                    raise json.JSONDecodeError("Unterminated list", text, at)
                if text[at] == "]":
                    return
                value, end = _DECODER.raw_decode(text, at)
            except json.JSONDecodeError as error:
                more = file.read(_WHOLE)
                if not more:
                    raise DataError(f"{path}, row {number + 1}: not JSON ({error.msg}): {text[at : at + 80]}") from None
                text, at = text[at:] + more, 0
                continue
            except (RecursionError, _Twice, ValueError):
                _parsed(path, text[at:], f"row {number + 1}")
                raise
            number += 1
            if not isinstance(value, dict):
                raise DataError(f"{path}, row {number}: each row is one {{...}} object, this is {text[at : at + 80]}")
            yield f"row {number}", value, end - at
            at = end


def parts_of(value: Any, path: Path, notes: Notes) -> dict[str, Sequence[Row]]:
    """The rows that a parsed document means, by part; `train` where it has one part only."""
    if isinstance(value, Mapping) and len(value) > 0:
        named = {name: part for name, part in value.items() if name.lower() in SPLITS and isinstance(part, list | dict)}
        if "train" in {name.lower() for name in named} and (len(named) > 1 or len(value) == 1):
            left = [name for name in value if name not in named]
            if left:
                notes.say(f"{path.name}: {', '.join(map(repr, left))} stand beside the parts and are not used.")
            return {name.lower(): _rows_of(part, path, notes) for name, part in named.items()}
    return {"train": _rows_of(value, path, notes)}


def _rows_of(value: Any, path: Path, notes: Notes) -> Sequence[Row]:
    if isinstance(value, list):
        return _rows_of_list(value, path, notes)
    if not isinstance(value, Mapping):
        raise DataError(f"{path} holds no list of objects.")
    if any(_is_conversation(value.get(key)) for key in _CONVERSATIONS):
        return [value]
    if is_coco(value):
        return coco_rows(value, path, notes)
    columns = _columns(value)
    if columns is not None:
        notes.say(f"{path.name} holds columns, {', '.join(columns)}, which are put together to rows.")
        names = list(columns)
        return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    lists = {key: part for key, part in value.items() if _is_rows(part)}
    holder = next((key for key in _HOLDERS if key in lists), None)
    if holder is None and len(lists) == 1 and not _looks_like_a_row(value):
        holder = next(iter(lists))
    if holder is not None:
        rest = [key for key in value if key != holder]
        if rest:
            others = ", ".join(map(repr, rest[:10]))
            notes.say(f"{path.name}: the rows are those of {holder!r}; {others} beside them are not used.")
        return _rows_of_list(lists[holder], path, notes)
    if len(lists) > 1:
        raise DataError(
            f"{path} holds several lists of objects, {', '.join(map(repr, lists))}, and does not say which are the "
            'rows. Keep one, or name it "data"; parts are named "train" and "test".'
        )
    if len(value) > 1 and all(isinstance(part, Mapping) for part in value.values()):
        rows = list(value.values())
        if all(set(row) & set(rows[0]) for row in rows):
            notes.say(f"{path.name} holds an object a row; their names are put into a column 'key'.")
            return [{"key": key, **row} for key, row in value.items()]
    if isinstance(value.get("data"), list) and isinstance(value.get("columns"), list):  # pandas: orient="split"
        return [dict(zip(value["columns"], row, strict=True)) for row in value["data"]]
    return [value]


def _rows_of_list(items: Sequence[Any], path: Path, notes: Notes) -> Sequence[Row]:
    if items and all(isinstance(item, str) for item in items):
        return [{"text": item} for item in items]
    if items and all(_is_conversation(item) for item in items):
        return [{"messages": item} for item in items]
    items = exported(items, path, notes)
    for number, item in enumerate(items, 1):
        if not isinstance(item, Mapping):
            raise DataError(f"{path} holds no list of objects: row {number} is {item!r:.80}.{_NAMED}")
    if items and all(set(item) >= {"row_idx", "row"} for item in items):  # the hub's viewer
        short = [number for number, item in enumerate(items, 1) if item.get("truncated_cells")]
        if short:
            raise DataError(
                f"{path} was saved from the hub's viewer, which has cut long values (first: row {short[0]}, "
                f"{', '.join(map(str, items[short[0] - 1]['truncated_cells']))}). Download the data set's own files."
            )
        return [item["row"] for item in items]
    if items and all(isinstance(item.get("paragraphs"), list) for item in items):
        notes.say(f"{path.name} has SQuAD's form: one row a question.")
        return [row for item in items for row in _squad_rows(item)]
    return items


def _squad_rows(article: Row) -> Iterator[Row]:
    """The questions of one article of SQuAD as it is published, versions 1 and 2."""
    for paragraph in article["paragraphs"]:
        for asked in paragraph.get("qas", ()):
            given = [] if asked.get("is_impossible") else asked.get("answers", [])
            answers = {
                "text": [answer["text"] for answer in given],
                "answer_start": [answer["answer_start"] for answer in given],
            }
            yield {
                "id": asked.get("id"),
                "title": article.get("title"),
                "context": paragraph["context"],
                "question": asked["question"],
                "answers": answers,
            }


def _is_rows(value: Any) -> bool:
    """Whether it is a list of objects, or of what annotators' tools write in their place."""
    filled = [pair_row(item) for item in value if item is not None] if isinstance(value, list) else []
    return bool(filled) and all(isinstance(item, Mapping) for item in filled)


def _is_conversation(value: Any) -> bool:
    return _is_rows(value) and all(isinstance(turn, Mapping) and {"role", "from"} & set(turn) for turn in value)


def _looks_like_a_row(value: Row) -> bool:
    """Whether an object with one list of objects in it is itself an example: its other fields are text."""
    return any(
        isinstance(part, str) and key in ("text", "question", "prompt", "context") for key, part in value.items()
    )


def _columns(value: Row) -> dict[str, list[Any]] | None:
    """The columns of {"a": [...], "b": [...]} and of pandas' {"a": {"0": ...}, "b": {"0": ...}}; else None."""
    parts = list(value.values())
    if {key.lower() for key in value} <= {"tokens", "words", "tags", "ner_tags", "pos_tags"}:
        return None  # one sentence with its tags
    if all(isinstance(part, list) and not _is_rows(part) for part in parts):
        return dict(value) if parts and parts[0] and len({len(part) for part in parts}) == 1 else None
    if len(parts) > 0 and all(isinstance(part, Mapping) and len(part) > 0 for part in parts):
        keys = list(parts[0])
        if all(key.isdigit() for key in keys) and all(list(part) == keys for part in parts):
            return {name: [part[key] for key in keys] for name, part in value.items()}
    return None
