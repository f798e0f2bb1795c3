"""evaluate(), predict() and stream(): a run, an adapter or a plain model on new rows."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from adapters_kit import tasks
from adapters_kit.errors import DataError, did_you_mean
from adapters_kit.inference.explain import check_explain, explained
from adapters_kit.inference.subject import NO_DATA, Subject, ask_for, describe, load_subject, make_task
from adapters_kit.loading import load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_sections import DATA_SUFFIXES, rows_suffix
from adapters_kit.tasks.base import Task
from adapters_kit.training.data import labelled
from adapters_kit.training.inputs import listed
from adapters_kit.training.resolve import prepare, rows_of

_WORDS = re.compile(r"\w+(?:[-'’.]\w+)*|[^\w\s]")

Name = str | os.PathLike[str]


def evaluate(
    name: Name, data_source: Any = None, *, batch_size: int | None = None, **recipe_keys: Any
) -> dict[str, float]:
    """The metrics of a run, an adapter or a model on `data_source`.

    Args:
        name: a run (its folder, or what `train` returned), an adapter folder, or a model: a folder, a .gguf file or a
            hub id. A model saved with the head of a task is known by it; others need `task=`.
        data_source: a path, a hub id, a list of dicts, a frame or a Dataset; by default the held-out part of the run's
            own data.
        batch_size: examples in a forward pass.
        **recipe_keys: recipe fields that the name does not tell: task, labels, data columns as {"data.columns": {...}}.

    Raises:
        ModelError, UnknownNameError: nothing of that name, or a task that cannot be told.
        DataError: rows that the task cannot read.
    """
    recipe, adapter = describe(name, **recipe_keys)
    if data_source is None and recipe.data.train == NO_DATA:
        raise DataError(f"{os.fspath(name)} does not say which data it is for: give data=FILE.")
    return scores_of(recipe, adapter, data_source, batch_size)


def scores_of(
    recipe: Recipe, adapter: Path | None, data_source: Any = None, batch_size: int | None = None
) -> dict[str, float]:
    """The metrics of a recipe's model with an adapter; by default on the recipe's own held-out rows."""
    if data_source is None:
        task, splits = prepare(recipe)
        rows = splits.test
    else:
        rows = rows_of(data_source, recipe.data)
        task = make_task(recipe, rows, answers=True)
        rows = labelled(task, rows, "the data")
        task.fit(rows, None)
        if recipe.labels:
            task.labels = list(recipe.labels)
    assert rows is not None
    subject = load_subject(recipe, task, adapter, trained=False)
    features = task.encode(rows)
    # Only where it is asked for: peft cannot take soft prompts off a classifier.
    with untouched(subject.model) if task.asks_base else contextlib.nullcontext():
        task.refer(subject.model, features, batch_size or 2 * recipe.training.batch_size)
    results = task.run(subject.model, features, batch_size or 2 * recipe.training.batch_size)
    _tell(task)
    return {**task.score(results, features), "examples": len(rows)}


def predict(
    name: Name,
    data_source: Any,
    *,
    batch_size: int | None = None,
    n_best: int = 1,
    explain: bool | str | os.PathLike[str] = False,
    **recipe_keys: Any,
) -> list[dict[str, Any]]:
    """One answer for each row; the target columns may be absent.

    Example:
        >>> ak.predict("runs/x", "what a film")  # doctest: +SKIP
        >>> ak.predict("runs/x", ["what a film", "oh dear"])  # doctest: +SKIP
        >>> ak.predict("runs/x", pandas.read_csv("new.csv"))  # doctest: +SKIP

    Args:
        name: as for `evaluate`.
        data_source: one text or a list of texts, where the task reads one text; a path; a hub id with its owner
            ("owner/name"); a list of dicts, a dict of columns, a frame, a Series or a Dataset. A text that is the name
            of a file here is that file.
        batch_size: rows in a forward pass.
        n_best: with more than 1, `best` holds so many answers a row, best first: classes with their probability, or
            texts of a beam search of that width with the mean log-probability of their tokens (nats).
        explain: adds `explained` to each answer: the tokens that it comes from, or the regions of a picture, with a
            score each, by integrated gradients. The name of an .html file writes a page of it too.
        **recipe_keys: as for `evaluate`.

    Raises:
        ModelError: as for `evaluate`; and a plain model that has no trained head for the task.
    """
    recipe, adapter = describe(name, **recipe_keys)
    if explain:
        check_explain(recipe.task, n_best, explain)
    subject, rows = _prepared(recipe, adapter, data_source, n_best)
    found = subject.task.predict(subject.model, rows, batch_size or 2 * recipe.training.batch_size)
    _tell(subject.task)
    return explained(subject, rows, found, explain) if explain else found


def beside(name: Name, text: str, **recipe_keys: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the base answers to one text, and what the tuned model does; without an adapter both are the same.

    Args:
        name, **recipe_keys: as for `predict`.
        text: one input of a task that reads one text.

    Raises:
        ModelError, DataError: as `predict`.
    """
    recipe, adapter = describe(name, **recipe_keys)
    subject, rows = _prepared(recipe, adapter, [text])
    tuned = subject.task.predict(subject.model, rows, 1)[0]
    without = getattr(subject.model, "disable_adapter", contextlib.nullcontext)
    with without():
        return subject.task.predict(subject.model, rows, 1)[0], tuned


def _tell(task: Task) -> None:
    """Warns of what was done to the rows that nobody asked for."""
    for note in task.notes.fresh():
        warnings.warn(note, UserWarning, stacklevel=3)


def stream(name: Name, prompts: str | Sequence[str], **recipe_keys: Any) -> Iterator[Iterator[str]]:
    """Answers while they are being written: one iterator a prompt, over pieces of its text. Read one before the next.

    Example:
        >>> for answer in ak.stream("runs/x", ["Tell me about otters."], max_new_tokens=64):  # doctest: +SKIP
        ...     for piece in answer:
        ...         print(piece, end="", flush=True)

    Args:
        name: as for `predict`.
        prompts: one text or several.
        **recipe_keys: as for `predict`.

    Raises:
        DataError: the task does not generate text; before the model is loaded.
    """
    recipe, adapter = describe(name, **recipe_keys)
    if not tasks.of(recipe).generates:
        raise DataError(f"{os.fspath(name)} is for {recipe.task}, which writes no text to stream: use predict.")
    subject, rows = _prepared(recipe, adapter, [prompts] if isinstance(prompts, str) else list(prompts))
    return (subject.task.stream(subject.model, row) for row in rows)


def generates(name: Name, **recipe_keys: Any) -> bool:
    """Whether the answers of a run, an adapter or a model are text that it writes, so that `stream` works."""
    return tasks.of(describe(name, **recipe_keys)[0]).generates


def _prepared(recipe: Recipe, adapter: Path | None, data_source: Any, n_best: int = 1) -> tuple[Subject, Dataset]:
    """The subject and the rows that it is asked about, whatever they were given as."""
    data_source = listed(data_source)
    if isinstance(data_source, str) and not _names_data(data_source):
        data_source = [data_source]
    if isinstance(data_source, list) and any(isinstance(item, str) for item in data_source):
        if odd := [number for number, item in enumerate(data_source, 1) if not isinstance(item, str)]:
            raise DataError(
                f"Texts are strings; number {odd[0]} of {len(data_source):,} is {data_source[odd[0] - 1]!r}."
            )
        data_source = [text_row(recipe, text, adapter) for text in data_source]
    rows = rows_of(data_source, recipe.data)
    task = make_task(recipe, rows, answers=False)
    ask_for(task, recipe, n_best)
    return load_subject(recipe, task, adapter), rows


def _names_data(text: str) -> bool:
    """Whether a string given as data is a file or a hub id rather than a text.

    Raises:
        DataError: it is spelt like a file, and there is none.
    """
    one_word = text.strip() and not any(space in text for space in " \n\t") and len(text) < 1000
    if not one_word:
        return False
    path = Path(text).expanduser()
    if os.path.exists(path):  # a word may be longer than any name
        return True
    if rows_suffix(path) in DATA_SUFFIXES or text.startswith(("./", "../", "/", "~")):
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"No data file {text!r}. {did_you_mean(path.name, beside)}")
    owner, slash, rest = text.partition("/")
    return bool(slash and owner and rest) and "/" not in rest


def untouched(model: Any) -> contextlib.AbstractContextManager[None]:
    """The model as it is without its adapter."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()


def text_row(recipe: Recipe, text: str, adapter: Path | None) -> dict[str, Any]:
    """A row with one text in it, for a task that reads one.

    An instruct model is asked through its template, unless it was trained here on plain text. A text to be tagged is
    taken apart into words and punctuation, as the tables that taggers learn from are; the answer shows them.
    """
    kind: type[Task] = tasks.of(recipe)
    columns = recipe.data.columns
    if "messages" in columns:
        return {columns["messages"]: [{"role": "user", "content": text}]}
    if not columns and recipe.task == "causal-lm":
        processor = load_processor(recipe.model, trust_remote_code=recipe.trust_remote_code)
        if getattr(processor, "chat_template", None):
            return {"prompt": text}
    if "tokens" in kind.needs[0] and "text" not in columns:
        return {columns.get("tokens", "tokens"): _WORDS.findall(text)}
    role = next((role for role in ("prompt", "text", "source", "image") if role in columns), kind.needs[-1][0])
    if role not in ("prompt", "text", "source", "image"):
        wanted = [name for name in kind.needs[-1] if name not in kind.targets]
        shown = ", ".join(f"{name!r}: …" for name in wanted)
        raise DataError(f"{recipe.task} reads {' and '.join(wanted)}, not one text: give rows, {{{shown}}}, or a file.")
    return {columns.get(role, role): text}
