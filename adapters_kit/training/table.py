"""Finished runs beside each other, best first, as a table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from adapters_kit.errors import TrainingError
from adapters_kit.pages.comparison_page import rows_table
from adapters_kit.pages.verdict import LESS_IS_BETTER
from adapters_kit.recipe_changes import flat
from adapters_kit.training.run import Run, metric_of

_COSTS = ("trainable_params", "train_seconds", "tokens_per_second", "peak_memory_bytes")

# Fields that another one decides unless they are given: they differ because it does.
_FOLLOWS = {"training.head_learning_rate": "training.learning_rate", "training.eval_batch_size": "training.batch_size"}


class Table(list[dict[str, Any]]):
    """Rows as dicts, and what has to be said about them.

    Attributes:
        notes: sentences that belong under the table: why it is not ranked.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], notes: Sequence[str] = ()) -> None:
        super().__init__(rows)
        self.notes = list(notes)

    def _repr_html_(self) -> str:
        """For a notebook: a table that sorts, the notes above it."""
        return "".join(f"<p>{escape(note)}</p>" for note in self.notes) + rows_table(self)


def compare_runs(paths: Iterable[str | os.PathLike[str]]) -> Table:
    """One row a run: its name, the recipe fields in which the runs differ, its scores, parameters, time and memory.

    Rows are sorted by the task's metric, best first; runs that were scored on different rows stay in the order given,
    and `notes` says so.

    Raises:
        TrainingError: a folder without a finished run, fewer than two runs, or runs of different tasks.
    """
    runs = [Run.open(Path(path)) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if len(runs) < 2:
        raise TrainingError(f"Comparing needs two runs or more, here is {len(runs)}.")
    kinds = sorted({run.recipe.task for run in runs})
    if len(kinds) > 1:
        raise TrainingError(f"These runs have different tasks, whose scores do not compare: {', '.join(kinds)}.")
    recipes = [flat(run.recipe.model_dump()) for run in runs]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    differing = [key for key in keys if len({repr(recipe.get(key)) for recipe in recipes}) > 1]
    differing = [key for key in differing if _FOLLOWS.get(key) not in differing]
    rows = [row_of(run, {key: recipe.get(key) for key in differing}) for run, recipe in zip(runs, recipes, strict=True)]
    if notes := _other_rows(runs, differing):
        return Table(rows, notes)
    metric = metric_of(runs[0])
    return Table(sorted(rows, key=lambda row: row[metric], reverse=metric not in LESS_IS_BETTER))


def row_of(run: Run, differing: dict[str, Any]) -> dict[str, Any]:
    """A run in the table: its folder, what sets it apart, its scores and what it cost."""
    metric = metric_of(run)
    _check_numbers(run, (metric, f"base_{metric}"))
    scores = {name[5:]: run.metrics.get(name[5:]) for name in run.metrics if name.startswith("base_")}
    costs = {name: run.metrics.get(name) for name in _COSTS}
    return {"run": str(run.path), **differing, **scores, f"base_{metric}": run.metrics[f"base_{metric}"], **costs}


def _other_rows(runs: Sequence[Run], differing: Sequence[str]) -> list[str]:
    """Why the scores of these runs do not rank them: they were held against different rows."""
    held_out = [key for key in differing if key in ("data.test", "data.test_size", "data.test_limit", "data.subset")]
    if any(run.recipe.data.test is None for run in runs):
        # The held-out part is taken out of the training rows, by the seed.
        held_out += [key for key in differing if key in ("data.train", "training.seed")]
    if len({run.metrics.get("test_examples") for run in runs}) > 1:
        held_out.append("test_examples")
    if not held_out:
        return []
    return [
        f"These runs were scored on different held-out rows ({', '.join(held_out)} differ): they are not ranked. "
        "To compare them, score all on the same rows: adapters-kit eval RUN --data FILE."
    ]


def _check_numbers(run: Run, names: Iterable[str]) -> None:
    """Refuses a run whose metrics.json does not hold them, as one that was edited by hand may not."""
    for name in names:
        if not isinstance(run.metrics.get(name), int | float):
            raise TrainingError(
                f"{run.path / 'metrics.json'}: {name} is {run.metrics.get(name)!r}, where a number belongs."
            )


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of text."""
    return "\n".join([aligned(cells(rows)), *getattr(rows, "notes", ())])


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The names of the columns, then each row, as people read them."""

    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [columns, *[[shown(row.get(key, "")) for key in columns] for row in rows]]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
