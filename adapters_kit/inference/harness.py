"""harness(): a run, an adapter or a plain language model scored by lm-evaluation-harness, as it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from adapters_kit.artifacts.files import write_json
from adapters_kit.errors import DataError, MissingPackageError, UnknownNameError, did_you_mean, gist
from adapters_kit.inference.subject import describe, load_subject, make_task
from adapters_kit.training.run import recipe_of

RESULTS = "harness.json"
_READS = {"causal-lm": "text", "seq2seq": "source"}


def harness(
    name: str | os.PathLike[str],
    tasks: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    **recipe_keys: Any,
) -> dict[str, dict[str, float]]:
    """Scores of lm-evaluation-harness (the extra `harness`), of the model with its adapter as it is.

    Args:
        name: as for `evaluate`; it writes text. Of a run the scores stand in its harness.json too.
        tasks: names of tasks, such as "arc_easy", or .yaml files of your own in its format.
        limit: so many examples of each task.
        batch_size: rows in a forward pass.
        **recipe_keys: as for `evaluate`.

    Returns:
        Task -> score -> value.

    Raises:
        MissingPackageError: lm-eval is not installed.
        UnknownNameError: no task of that name.
        DataError: a model that writes no text; a task's data that cannot be had.
    """
    wanted = [os.fspath(tasks)] if isinstance(tasks, str | os.PathLike) else [os.fspath(task) for task in tasks]
    if limit is not None and (type(limit) is not int or limit < 1):
        raise DataError(f"limit={limit!r}: how many examples of each task, 1 or more.")
    recipe, adapter = describe(name, **recipe_keys)
    if recipe.task not in _READS:
        raise DataError(f"{os.fspath(name)} is for {recipe.task}; the harness asks models that write: use eval --data.")
    if find_spec("lm_eval") is None:
        raise MissingPackageError("--harness needs lm-evaluation-harness: pip install 'adapters-kit[harness]'")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager, get_task_dict

    files = [Path(task) for task in wanted if task.endswith((".yaml", ".yml"))]
    names = [_named(Path(task)) if Path(task) in files else task for task in wanted]
    manager = TaskManager(include_path=[str(file.absolute().parent) for file in files] or None)
    for task in names:
        if task not in manager.all_tasks:
            nearest = did_you_mean(task, manager.all_tasks)
            raise UnknownNameError(f"lm-evaluation-harness has no task {task!r}. {nearest}")
    for task in names:
        try:
            get_task_dict([task], manager)
        except Exception as error:  # whatever its loader, and that of its data, meet
            raise DataError(f"The data of {task} cannot be had ({type(error).__name__}: {gist(error)}).") from error
    rows = Dataset.from_list([{_READS[recipe.task]: "a"}])
    subject = load_subject(recipe, make_task(recipe, rows, answers=False), adapter, trained=False)
    model: Any = HFLM(pretrained=subject.model, tokenizer=subject.task.processor, batch_size=batch_size)
    found = simple_evaluate(model=model, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0)
    scores = {task: _scores(values) for task, values in found["results"].items()}
    if adapter is not None and recipe_of(adapter) is not None:
        write_json(adapter.parent / RESULTS, {"limit": limit, "results": scores})
    return scores


def _named(file: Path) -> str:
    """The name of a task by its file.

    Raises:
        DataError: no such file, or one that names no task.
    """
    if not file.is_file():
        beside = [path.name for path in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise DataError(f"No task file {str(file)!r}. {did_you_mean(file.name, beside)}")
    # Tasks may name functions (!function): only the name is wanted here.
    line = next((line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("task:")), "")
    named = (yaml.safe_load(line) or {}).get("task") if line else None
    if not isinstance(named, str):
        raise DataError(f"{file} names no task (task: NAME), as files of lm-evaluation-harness do.")
    return named


def _scores(values: dict[str, Any]) -> dict[str, float]:
    """`acc,none` as `acc`; what is no number is left out, and so are errors of the mean that were not drawn."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and "_stderr" not in key}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}
