"""What tools for annotators export, as rows: Label Studio's tasks, spaCy's pairs of a text and its entities.

Spans stay as they are; `tasks.marked_text` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes

Row = Mapping[str, Any]


def pair_row(item: Any) -> Any:
    """spaCy's ["text", {"entities": [...]}] as one object; everything else as it is."""
    pair = isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Mapping)
    return {"text": item[0], **item[1]} if pair else item


def exported(items: Sequence[Any], path: Path, notes: Notes) -> Sequence[Any]:
    """The rows of a list that such a tool wrote; any other list as it is.

    Raises:
        DataError: a task of Label Studio with the work of several annotators.
    """
    if any(isinstance(item, list) for item in items):
        filled = [pair_row(item) for item in items if item is not None]
        if all(isinstance(item, Mapping) for item in filled):
            notes.say(f"{path.name} holds pairs of a text and what was marked in it, as spaCy has them.")
            return filled
    if items and all(isinstance(item, Mapping) and _is_task(item) for item in items):
        return _tasks(items, path, notes)
    return items


def _is_task(item: Row) -> bool:
    work = _work(item)
    if not isinstance(item.get("data"), Mapping) or not isinstance(work, list):
        return False
    results = [one.get("result") if isinstance(one, Mapping) else None for one in work]
    return all(isinstance(one, list) and all(isinstance(part, Mapping) for part in one) for one in results)


def _work(item: Row) -> Any:
    return item.get("annotations", item.get("completions"))


def _tasks(items: Sequence[Row], path: Path, notes: Notes) -> list[dict[str, Any]]:
    """A row a task: its data, and under each control's name what was annotated there."""
    rows: list[dict[str, Any]] = []
    names: dict[str, bool] = {}  # of the controls; whether they mark spans
    skipped = 0
    for number, item in enumerate(items, 1):
        done = [one for one in _work(item) if not one.get("was_cancelled")]
        if len(done) > 1:
            raise DataError(
                f"{path}, row {number}: {len(done)} annotations of one task (Label Studio's id {item.get('id')}), and "
                "which of them is right is not said. Delete the others there, or in the file, and export again."
            )
        skipped += not done
        made: dict[str, Any] = {}
        for result in done[0]["result"] if done else ():
            value = result.get("value")
            if not isinstance(value, Mapping):
                continue  # a relation between two spans
            name = str(result.get("from_name", "label"))
            name = name if name not in item["data"] else f"{name}_annotated"
            span = "start" in value
            names[name] = names.get(name, False) or span
            if not span:
                made[name] = _choice(value)
            elif isinstance(before := made.setdefault(name, []), list):
                before.append(dict(value))
        rows.append({**item["data"], "_done": bool(done), **made})
    for row in rows:
        done = row.pop("_done")
        for name, spans in names.items():
            row.setdefault(name, [] if spans and done else None)
    notes.say(
        f"{path.name} has Label Studio's form: one row a task, its annotations in {', '.join(names) or 'no column'}"
        f"{f'; {skipped:,} tasks are not annotated' if skipped else ''}."
    )
    return rows


def _choice(value: Row) -> Any:
    """What was chosen, written or counted: the one thing, or the list of several."""
    found = next((value[key] for key in ("choices", "text", "rating", "number", "taxonomy") if key in value), None)
    return found[0] if isinstance(found, list) and len(found) == 1 else found
