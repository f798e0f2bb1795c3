"""evaluate() and predict(): a run, an adapter or a plain model on new rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from adapters_kit import tasks
from adapters_kit.artifacts.identity import check_base
from adapters_kit.errors import DataError, ModelError
from adapters_kit.names import is_adapter_folder
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Task
from adapters_kit.training import data
from adapters_kit.training.resolve import load_base, rows_of
from adapters_kit.wrapping import wrap


def evaluate(
    name: str | Path, data_source: Any = None, *, batch_size: int | None = None, **recipe_keys: Any
) -> dict[str, float]:
    """The metrics of a run, an adapter or a model on `data_source`.

    Args:
        name: a run folder, an adapter folder, or a model (a folder or hub id) with `task=` given.
        data_source: a path, a hub id, a list of dicts or a Dataset; by default the held-out part of the run's own data.
        batch_size: examples in a forward pass.
        **recipe_keys: recipe fields that the name does not tell: task, labels, data columns as {"data.columns": {...}}.
    """
    recipe, adapter = describe(name, **recipe_keys)
    if data_source is None:
        if recipe.data.train == _NO_DATA:
            raise DataError(f"{name} does not say which data it is for: give data.")
        from adapters_kit.training.resolve import prepare

        task, splits = prepare(recipe)
        rows = splits.test
    else:
        rows = rows_of(data_source)
        task = _task(recipe, rows, answers=True)
        task.fit(rows, None)
        if recipe.labels:
            task.labels = list(recipe.labels)
    model = _ready(recipe, task, adapter)
    features = task.encode(rows)
    results = task.run(model, features, batch_size or 2 * recipe.training.batch_size)
    return {**task.score(results, features), "examples": len(rows)}


def predict(
    name: str | Path, data_source: Any, *, batch_size: int | None = None, **recipe_keys: Any
) -> list[dict[str, Any]]:
    """One answer for each row; the target columns may be absent. Arguments as for `evaluate`.

    Plain strings work as rows where the task reads one text: `predict("runs/x", ["what a film", "oh dear"])`.
    """
    task, model, rows = _ready_to_answer(name, data_source, recipe_keys)
    return task.predict(model, rows, batch_size or 2 * task.recipe.training.batch_size)


def stream(name: str | Path, prompts: str | Sequence[str], **recipe_keys: Any) -> Iterator[Iterator[str]]:
    """Answers while they are being written: one iterator a prompt, over pieces of its text. Read one before the next.

    Example:
        >>> for answer in ak.stream("runs/x", ["Tell me about otters."], max_new_tokens=64):  # doctest: +SKIP
        ...     for piece in answer:
        ...         print(piece, end="", flush=True)

    Args:
        name, **recipe_keys: as for `predict`.

    Raises:
        DataError: the task does not generate text; before the model is loaded.
    """
    task, model, rows = _ready_to_answer(
        name, [prompts] if isinstance(prompts, str) else list(prompts), recipe_keys, generating=True
    )
    return (task.stream(model, row) for row in rows)


def generates(name: str | Path, **recipe_keys: Any) -> bool:
    """Whether the answers of a run, an adapter or a model are text that it writes, so that `stream` works."""
    return tasks.get(describe(name, **recipe_keys)[0].task).generates


def _ready_to_answer(
    name: str | Path, data_source: Any, recipe_keys: dict[str, Any], generating: bool = False
) -> tuple[Task, nn.Module, Dataset]:
    recipe, adapter = describe(name, **recipe_keys)
    kind = tasks.get(recipe.task)
    if generating and not kind.generates:
        raise DataError(f"{name} is for {recipe.task}, which writes no text to stream: use predict.")
    if isinstance(data_source, list) and data_source and all(isinstance(item, str) for item in data_source):
        data_source = [_row(recipe, kind, item) for item in data_source]
    rows = rows_of(data_source)
    task = _task(recipe, rows, answers=False)
    task.labels = list(recipe.labels) if recipe.labels else None
    return task, _ready(recipe, task, adapter), rows


def _row(recipe: Recipe, kind: type[Task], text: str) -> dict[str, Any]:
    """A row with one text in it, for a task that reads one."""
    columns = recipe.data.columns
    if "messages" in columns:
        return {columns["messages"]: [{"role": "user", "content": text}]}
    role = next((role for role in ("prompt", "text", "source", "image") if role in columns), kind.needs[-1][0])
    return {columns.get(role, role): text}


_NO_DATA = "(none)"


def describe(name: str | Path, **recipe_keys: Any) -> tuple[Recipe, Path | None]:
    """The recipe behind a name, and its adapter folder (None for a plain model)."""
    path = Path(name)
    folder = path / "adapter" if is_adapter_folder(path / "adapter") else path
    if is_adapter_folder(folder):
        for place in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
            if place.is_file():
                recipe = Recipe.read(place)
                return (recipe.changed(**recipe_keys) if recipe_keys else recipe), folder
        from peft import PeftConfig

        base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        if "task" not in recipe_keys:
            raise ModelError(f"{folder} has no recipe.yaml beside it: say which task it is for, task=...")
        return _bare(base, recipe_keys), folder
    if "task" not in recipe_keys:
        raise ModelError(f"{name} is no run and no adapter folder; for a plain model give task=...")
    return _bare(str(name), recipe_keys), None


def _bare(model: str, keys: dict[str, Any]) -> Recipe:
    plain = {key: value for key, value in keys.items() if "." not in key}
    dotted = {key: value for key, value in keys.items() if "." in key}
    recipe = Recipe(**{"data": _NO_DATA, **plain, "model": model})
    return recipe.changed(**dotted) if dotted else recipe


def _task(recipe: Recipe, rows: Any, *, answers: bool) -> Task:
    kind = tasks.get(recipe.task)
    given = {role: column for role, column in recipe.data.columns.items() if column in rows.column_names}
    needs = kind.needs
    if not answers:
        needs = tuple(tuple(role for role in roles if role not in kind.targets) for roles in kind.needs)
        given = {role: column for role, column in given.items() if role not in kind.targets}
    return kind(recipe, data.recognise(rows, given, needs, kind.optional))


def _ready(recipe: Recipe, task: Task, adapter: Path | None) -> nn.Module:
    torch.manual_seed(recipe.training.seed)
    if adapter is not None:
        check_base(adapter, recipe.model)
    model, _ = load_base(recipe, task)
    if adapter is not None:
        model = wrap(model, str(adapter))
    return model.eval()
