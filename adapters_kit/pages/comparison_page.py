"""The page of a comparison or a sweep: a table that sorts, and the score against what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from adapters_kit.artifacts.files import write_text
from adapters_kit.pages import html, plots
from adapters_kit.pages.run_page import PAGE

# Column -> what its axis says, and in which unit of the column's.
_COSTS = {
    "trainable_params": ("trained parameters", 1),
    "train_seconds": ("seconds of training", 1),
    "peak_memory_bytes": ("peak memory, GiB", 2**30),
}


def write_table_page(
    folder: Path, title: str, rows: Sequence[Mapping[str, Any]], score: str, name: str, notes: Sequence[str] = ()
) -> Path:
    """Writes `report.html` into a folder.

    Args:
        rows: one mapping a run or method.
        score: the column by which they compare.
        name: the column that tells them apart.
        notes: sentences above the table.
    """
    return write_text(folder / PAGE, table_page(title, rows, score, name, notes))


def write_search_page(
    folder: Path,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    score: str,
    curves: Sequence[plots.Line],
    notes: Sequence[str] = (),
) -> Path:
    """The page of a search: its table, and how far each candidate went.

    Args:
        curves: name, steps and scores of each candidate, the best first.
    """
    body = f"<h1>{escape(title)}</h1>" + "".join(f"<p>{escape(note)}</p>" for note in notes)
    picture = plots.ladder(f"{score} of each candidate, as far as it went", curves, score)
    body += html.section("Who went how far", f"<div>{picture}</div>") if picture else ""
    return write_text(folder / PAGE, html.page(title, body + html.section("Table", rows_table(rows))))


def table_page(title: str, rows: Sequence[Mapping[str, Any]], score: str, name: str, notes: Sequence[str] = ()) -> str:
    """The whole page."""
    body = f"<h1>{escape(title)}</h1>" + "".join(f"<p>{escape(note)}</p>" for note in notes)
    return html.page(
        title, body + html.section("Table", rows_table(rows)) + html.section("Costs", _plots(rows, score, name))
    )


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table that sorts; a column that is empty in all of them is left out."""
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if value not in (None, "")))
    return html.table(columns, [[row.get(column) for column in columns] for row in rows], sortable=True)


def _plots(rows: Sequence[Mapping[str, Any]], score: str, name: str) -> str:
    made = []
    for cost, (label, unit) in _COSTS.items():
        known = [row for row in rows if _number(row.get(cost)) and _number(row.get(score))]
        if len(known) > 1:
            names = [Path(str(row.get(name))).name for row in known]
            x, y = [row[cost] / unit for row in known], [float(row[score]) for row in known]
            made.append(plots.dots(f"{score} against {label}", names, x, y, label, score))
    return f'<div class="plots">{"".join(f"<div>{plot}</div>" for plot in made if plot)}</div>' if any(made) else ""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
