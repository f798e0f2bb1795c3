"""What a name stands for when something is asked of it: a run, an adapter or a plain model, with its recipe."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import nn

from adapters_kit import tasks
from adapters_kit.artifacts import foreign
from adapters_kit.artifacts.adapter import CONFIG, adapter_folder, named_base, read_raw
from adapters_kit.artifacts.base_config import read_base_config
from adapters_kit.artifacts.hub_ping import described_on_hub
from adapters_kit.artifacts.identity import check_base
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.errors import DataError, ModelError, UnknownNameError, did_you_mean
from adapters_kit.methods.adapterhub.folder import is_adapterhub
from adapters_kit.names import check_name, looks_like_path
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_sections import DATA_SUFFIXES, rows_suffix
from adapters_kit.serving.prove import replay
from adapters_kit.task_table import TASKS
from adapters_kit.tasks.base import Task
from adapters_kit.training import data
from adapters_kit.training.assembly import load_base
from adapters_kit.training.resolve import resolve
from adapters_kit.training.run import recipe_of
from adapters_kit.wrapping import wrap

NO_DATA = "(none)"
_PROBLEMS = {
    "single_label_classification": "single-label",
    "multi_label_classification": "multi-label",
    "regression": "regression",
}


def describe(name: str | os.PathLike[str], **recipe_keys: Any) -> tuple[Recipe, Path | None]:
    """The recipe behind a name, and its adapter folder (None for a plain model).

    Args:
        name: a run (folder or `Run`), an adapter (a folder or a hub id), or a model: a folder, a .gguf file or a hub
            id. A model saved with the head of a task is known by it; others need `task`.
        **recipe_keys: recipe fields to change, or to add where the name does not tell them.

    Raises:
        ModelError: the task cannot be told.
        UnknownNameError: it looks like a path, and nothing is there.
    """
    check_name(name, UnknownNameError)
    path = Path(name)
    if not path.exists() and not looks_like_path(name):
        _check_there(name, path)
        path = described_on_hub(os.fspath(name), CONFIG) or path
    folder = adapter_folder(path)
    if (folder / CONFIG).is_file():
        if (found_recipe := recipe_of(folder)) is not None:
            recipe = _with_problem(found_recipe, folder.parent / "metrics.json")
            # A run may come from elsewhere: what its author trusted is for whoever asks to say again.
            recipe = recipe.changed(trust_remote_code=False)
            return (recipe.changed(**recipe_keys) if recipe_keys else recipe), folder
        raw = read_json(folder / CONFIG) if is_adapterhub(folder) else read_raw(folder)
        base = named_base(folder, raw.get("base_model_name_or_path"))
        if not base and "model" not in recipe_keys:
            raise ModelError(f"{folder} does not say which model it sits on: give model=BASE.")
        found = _told(raw.get("task_type"))
        if "task" not in recipe_keys and found is None:
            raise ModelError(f"{folder} has no recipe.yaml beside it: say which task it is for, task=TASK. {_TASKS}")
        return _bare(str(recipe_keys.get("model", base)), {**({"task": found} if found else {}), **recipe_keys}), folder
    _check_there(name, path)
    if path.is_dir():
        foreign.check_either(path)
    if "task" not in recipe_keys:
        known = task_of_model(path)
        if not known:
            absent = "" if path.exists() else " (nothing of that name is here, and the hub tells nothing of it)"
            raise ModelError(
                f"{os.fspath(name)} is no run and no adapter folder{absent}, and as a model it does not tell what it "
                f"is for: give task=TASK. {_TASKS}"
            )
        recipe_keys = {**known, **recipe_keys}
    return _bare(os.fspath(name), recipe_keys), None


_TASKS = f"There are: {', '.join(TASKS)}."


def ask_for(task: Task, recipe: Recipe, n_best: int) -> None:
    """Lets a task give several answers a row.

    Raises:
        DataError: no number of answers, or a task whose answer is neither a class nor a text.
    """
    if n_best < 1:
        raise DataError(f"n_best={n_best}: how many answers a row, 1 or more.")
    several = {"tokens", "objects"} & set(task.needs[0])  # a row has many answers, each of its own class
    classes = TASKS[task.name].labelled and not several and recipe.problem != "regression"
    if n_best > 1 and not (classes or task.generates):
        what = "a regression" if recipe.problem == "regression" else task.name
        raise DataError(f"n_best={n_best}: only classes and written texts have a second best; this is {what}.")
    task.n_best = n_best


def _with_problem(recipe: Recipe, metrics: Path) -> Recipe:
    """Runs of the first versions did not write down which kind of target a classifier had; their scores tell."""
    if recipe.task != "text-classification" or recipe.problem or not metrics.is_file():
        return recipe
    scores = read_json(metrics)
    kind = "regression" if "pearson" in scores else "single-label" if "mcc" in scores else "multi-label"
    return recipe.changed(problem=kind)


def _told(task_type: Any) -> str | None:
    return next((name for name, row in TASKS.items() if task_type and row.task_type == str(task_type)), None)


def task_of_model(path: Path) -> dict[str, Any]:
    """The recipe keys that a model folder tells by the head that it was saved with: `task`, and a classifier's
    `problem`. Empty where it was saved without a head, or is not here."""
    if path.is_file() and path.suffix == ".gguf":
        return {"task": "causal-lm"}
    if not (path / "config.json").is_file():
        return {}
    config = read_base_config(path)
    saved_as = (config.get("architectures") or [""])[0]
    for task, row in TASKS.items():
        if row.auto_class == "AutoModel" and not (path / "modules.json").is_file():
            continue  # any body: it makes sentence vectors where sentence-transformers has said how
        mappings = [getattr(transformers, auto_class)._model_mapping._model_mapping for auto_class in row.auto_classes]
        names = [name for mapping in mappings for name in mapping.values()]
        if any(saved_as in ((name,) if isinstance(name, str) else name) for name in names):
            problem = _PROBLEMS.get(str(config.get("problem_type"))) if task == "text-classification" else None
            return {"task": task, **({"problem": problem} if problem else {})}
    return {}


def _check_there(name: str | os.PathLike[str], path: Path) -> None:
    text = os.fspath(name)
    if path.exists():
        if path.is_dir() and (path / "recipe.yaml").is_file() and not (path / "config.json").is_file():
            raise ModelError(f"{text} is a run that has not finished and has no adapter yet: go on with resume=True.")
        return
    if looks_like_path(name) or rows_suffix(path) in (".gguf", *DATA_SUFFIXES):
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, beside) if beside else f"The folder {path.parent} does not exist either."
        raise UnknownNameError(f"There is no run, adapter or model at {text!r}. {hint}")
    first = Path(text.split("/")[0])
    if "/" in text and first.is_dir():  # runs/x, where runs/ is here: no hub id
        hint = did_you_mean(path.name, [entry.name for entry in first.iterdir()])
        raise UnknownNameError(f"There is no run, adapter or model {text!r}. {hint}")


def _bare(model: str, keys: dict[str, Any]) -> Recipe:
    plain = {key: value for key, value in keys.items() if "." not in key}
    dotted = {key: value for key, value in keys.items() if "." in key}
    recipe = Recipe(**{"data": NO_DATA, **plain, "model": model})
    return recipe.changed(**dotted) if dotted else recipe


@dataclass
class Subject:
    """Something that can be asked: the model with its adapter, ready, and the task that reads its answers."""

    recipe: Recipe
    """The run's; for a plain model or an adapter alone, one that has its keys."""
    adapter: Path | None
    task: Task
    model: nn.Module

    @property
    def name(self) -> str:
        """What it is called in messages: its adapter's folder, or the model's name."""
        return str(self.adapter) if self.adapter is not None else self.recipe.model


def make_task(recipe: Recipe, rows: Dataset, *, answers: bool) -> Task:
    """The recipe's task for these rows; without `answers` the target columns may be absent."""
    kind = tasks.of(recipe)
    given = {role: column for role, column in recipe.data.columns.items() if column in rows.column_names}
    needs = kind.needs
    if not answers:
        needs = tuple(tuple(role for role in roles if role not in kind.targets) for roles in kind.needs)
        needs = kind.asks or needs
        given = {role: column for role, column in given.items() if role not in kind.targets}
    if answers:
        kind.refuse(rows, given)
    try:
        columns = data.recognise(rows, given, needs, kind.optional)
    except DataError as error:
        lost = {role: column for role, column in recipe.data.columns.items() if role not in kind.targets}
        if lost and not given:
            wanted = ", ".join(f"{role}: {column!r}" for role, column in lost.items())
            raise DataError(f"{error} The run was trained with {wanted}.") from None
        raise
    task = kind(recipe, columns)
    task.labels = list(recipe.labels) if recipe.labels else None
    if getattr(task, "problem", None) is not None and recipe.problem:
        task.problem = recipe.problem  # type: ignore[attr-defined]
    return task


def load_subject(recipe: Recipe, task: Task, adapter: Path | None, *, trained: bool = True) -> Subject:
    """The model of a recipe with an adapter on it, in eval mode; `task` is bound to it.

    Args:
        trained: refuse a plain model whose head would start at random.

    Raises:
        ModelError: the model has no head for the task.
        ShippingError: the base is not the one that the adapter was trained on.
    """
    torch.manual_seed(recipe.training.seed)
    if adapter is not None:
        check_base(adapter, recipe.model)
    model, _ = load_base(resolve(recipe, trains=False), task)
    if trained:
        _check_head(recipe, adapter, model)
    if adapter is not None:
        model = wrap(model, str(adapter))
    elif TASKS[recipe.head].task_type == "CAUSAL_LM":
        told = replay(Path(recipe.model), model.eval(), task.processor)
        if told is not None:
            warnings.warn(told, UserWarning, stacklevel=2)
    return Subject(recipe, adapter, task, model.eval())


def _check_head(recipe: Recipe, adapter: Path | None, model: nn.Module) -> None:
    """A plain model without the head of its task would answer at random."""
    fresh = getattr(model, "fresh_modules", ())
    if adapter is None and fresh:
        raise ModelError(
            f"{recipe.model} has no trained head for {recipe.task} ({', '.join(fresh)} would start at random): its "
            "answers would mean nothing. Train an adapter first, or name a model that was trained for this task."
        )
