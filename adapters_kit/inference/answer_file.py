"""predict_file(): answers to a file of rows, into a file. Memory does not grow with the rows; a stopped run goes on.

Answers go to `.OUT.part` first, a JSON line a row, flushed after every piece. Its first line says what it is made from:
the same call goes on behind its last whole line, another call is refused. At the end it becomes OUT, in one step.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from pyarrow import parquet

from adapters_kit.artifacts.files import replacing
from adapters_kit.artifacts.mapped_table import release_pages
from adapters_kit.errors import DataError
from adapters_kit.inference.answers import Name
from adapters_kit.inference.subject import Subject, ask_for, describe, load_subject, make_task
from adapters_kit.names import check_name
from adapters_kit.system import writing
from adapters_kit.tasks.base import Task
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.rows import each_row
from adapters_kit.training.resolve import rows_of

PIECE = 1024
"""Rows that are read, sorted by length, answered and written together."""
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Written:
    """What `predict_file` did.

    Attributes:
        path: the file.
        rows: in it.
        kept: rows of them that an earlier, stopped call had answered.
        seconds: of this call, loading included.
        notes: what was done to rows that nobody asked for (texts that were cut), of the rows that this call answered.
    """

    path: Path
    rows: int
    kept: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        kept = f" ({self.kept:,} of them from the call before)" if self.kept else ""
        return "\n".join([f"{self.rows:,} rows in {self.path}{kept}, {self.seconds:.1f} s", *self.notes])


def predict_file(
    name: Name,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    batch_size: int | None = None,
    n_best: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **recipe_keys: Any,
) -> Written:
    """Every row of a file with the answer beside it: the file's own columns, then `predicted_…`.

    A classifier writes `predicted_label`, `predicted_score` and, for each class, its probability as `p_CLASS`; a model
    that writes text `predicted_answer`.

    Args:
        name: as for `predict`.
        source: CSV, TSV, JSON, JSONL or Parquet file, a folder or a hub id.
        out: the file to write; its suffix says how: .csv, .tsv, .jsonl or .parquet.
        batch_size: rows in a forward pass; rows of similar length are put together.
        n_best: as for `predict`; the column is `predicted_best`.
        overwrite: replace `out`, and forget what a stopped call left.
        progress: called with the rows done and the rows in all.
        **recipe_keys: as for `predict`.

    Raises:
        DataError: `out` exists, is of another kind, or a stopped call on other rows left its answers; the source has a
            column that the answers would cover; rows that the task cannot read.
        WriteError: `out` cannot be written: no space, no permission.
    """
    begun = time.perf_counter()
    check_name(out, DataError)
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise DataError(f"{out}: predictions are written as {', '.join(FORMATS)}; give the file one of these suffixes.")
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists already. Choose another file, or give overwrite=True to replace it.")
    recipe, adapter = describe(name, **recipe_keys)
    rows = rows_of(os.fspath(source))
    task = make_task(recipe, rows, answers=False)
    ask_for(task, recipe, n_best)
    own = [column for column in rows.column_names if column.startswith(("predicted_", "p_"))]
    part = _part_of(out)
    made_from = {"rows": os.fspath(source), "fingerprint": _fingerprint(Path(source)), "subject": os.fspath(name)}
    asked = recipe_keys | ({"n_best": n_best} if n_best > 1 else {})
    made_from["keys"] = json.dumps(asked, sort_keys=True, default=str)
    if overwrite:
        part.unlink(missing_ok=True)
    done = kept = _answered(part, made_from)
    subject = load_subject(recipe, task, adapter)
    told = _Told(subject.task.notes)
    with writing(out, "What was answered so far is kept: the same call goes on."):
        out.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a", encoding="utf-8", newline="\n") as file:
            if part.stat().st_size == 0:
                file.write(json.dumps(made_from) + "\n")
            while done < len(rows):
                piece = rows.select(range(done, min(done + PIECE, len(rows))))
                subject.task.notes = Notes()
                answers = _answers(subject, piece, batch_size or 2 * recipe.training.batch_size, done)
                told.add(subject.task.notes, done, done + len(piece))
                if clash := sorted(set(own) & set(answers[0])):
                    part.unlink()
                    raise DataError(f"{source} has a column {clash[0]!r} already, which would be covered: rename it.")
                file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
                file.flush()
                done += len(piece)
                if progress is not None:
                    progress(done, len(rows))
        with replacing(out) as beside:
            _WRITERS[out.suffix.lower()](beside, rows, lambda: _lines(part))
        part.unlink()
    return Written(out, len(rows), kept, time.perf_counter() - begun, tuple(told.sentences()))


class _Told:
    """What was noted of each piece, put together: a sentence for each thing that was counted."""

    def __init__(self, before: Notes) -> None:
        self._general = list(before.sentences)
        self._found: dict[str, tuple[str, int, int]] = {}  # by kind: the first sentence, pieces, rows or what else

    def add(self, notes: Notes, first: int, end: int) -> None:
        """The notes of the rows from `first` to before `end`."""
        for sentence, counts in notes.counted.items():
            kind = " ".join(counts) or sentence
            text, pieces, count = self._found.get(kind, (f"Rows {first + 1:,} to {end:,}: {sentence}", 0, 0))
            self._found[kind] = text, pieces + 1, count + sum(counts.values())

    def sentences(self) -> list[str]:
        """One for each kind."""
        return self._general + [
            text if pieces == 1 else f"{text} The same in {pieces - 1:,} more parts of the file: {count:,} in all."
            for text, pieces, count in self._found.values()
        ]


def _part_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.part")


def _fingerprint(path: Path) -> list[int]:
    """Size and time of a file: whether a stopped call saw the same one."""
    if not path.is_file():
        return []
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _answered(part: Path, made_from: dict[str, Any]) -> int:
    """How many rows a stopped call answered; what it left of a torn line is cut off."""
    if not part.is_file():
        return 0
    whole, lines = 0, 0
    with part.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if lines == 0 and json.loads(line) != made_from:
                raise DataError(
                    f"{part} holds the answers of a call on other rows or by another model: {line.decode()[:99]}"
                    " Repeat that call, or give overwrite=True to forget it."
                )
            whole, lines = whole + len(line), lines + 1
    os.truncate(part, whole)
    return max(lines - 1, 0)


def _answers(subject: Subject, piece: Dataset, batch_size: int, first: int) -> list[dict[str, Any]]:
    """One mapping a row, without the row's own columns."""
    task, model = subject.task, subject.model
    given = set(task.columns)
    try:
        # Tasks that take over `predict` show more than one result at a time; the others tell every class's probability.
        if type(task).predict is not Task.predict:
            return [_named(answer, given) for answer in task.predict(model, piece, batch_size)]
        features = task.encode(piece, answers=False)
        results = task.run(model, features, batch_size)
        return [
            {
                **_named({**task.show(result, piece[feature["row"]]), **task.likeliest(result)}, given),
                **_probabilities(task, result),
            }
            for result, feature in zip(results, features, strict=True)
        ]
    except DataError as error:
        raise DataError(f"In rows {first + 1} to {first + len(piece)} (counted from there): {error}") from error


def _named(answer: dict[str, Any], given: set[str]) -> dict[str, Any]:
    return {f"predicted_{key}": value for key, value in answer.items() if key not in given and key != "scores"}


def _probabilities(task: Task, result: Any) -> dict[str, float]:
    labels = task.labels or []
    if len(labels) < 2 or np.shape(result) != (len(labels),):
        return {}
    return {f"p_{label}": round(float(p), 6) for label, p in zip(labels, result, strict=True)}


def _lines(part: Path) -> Iterator[dict[str, Any]]:
    with part.open(encoding="utf-8") as file:
        for line in islice(file, 1, None):
            yield json.loads(line)


Answers = Callable[[], Iterator[dict[str, Any]]]


def _write_jsonl(path: Path, rows: Dataset, answers: Answers) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for (_, row), answer in zip(each_row(rows), answers(), strict=True):
            file.write(json.dumps({**row, **answer}, ensure_ascii=False, default=str) + "\n")


def _write_csv(path: Path, rows: Dataset, answers: Answers, delimiter: str = ",") -> None:
    def cell(value: Any) -> Any:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value

    names = [*rows.column_names, *next(answers())]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow(names)
        for (_, row), answer in zip(each_row(rows), answers(), strict=True):
            whole = {**row, **answer}
            writer.writerow([cell(whole.get(name)) for name in names])


def _write_parquet(path: Path, rows: Dataset, answers: Answers) -> None:
    def pieces() -> Iterator[pa.Table]:
        found = answers()
        while piece := list(islice(found, PIECE)):
            yield pa.Table.from_pylist(piece)

    added = pa.unify_schemas([piece.schema for piece in pieces()], promote_options="permissive")
    own = rows.features.arrow_schema.remove_metadata()
    with parquet.ParquetWriter(path, pa.schema([*own, *added])) as writer:
        done = 0
        for piece in pieces():
            given = rows.select(range(done, done + len(piece))).with_format("arrow")[:]
            columns = [*(given[name] for name in own.names), *piece.cast(added).columns]
            writer.write_table(pa.table(columns, schema=pa.schema([*own, *added])))
            done += len(piece)
            release_pages()


_WRITERS: dict[str, Callable[[Path, Dataset, Answers], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".tsv": lambda path, rows, answers: _write_csv(path, rows, answers, "\t"),
    ".parquet": _write_parquet,
}
