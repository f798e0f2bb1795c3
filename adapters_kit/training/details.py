"""What a run's page shows beside its scores: the examples that it gets most wrong, and how long the examples are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from adapters_kit.artifacts.files import write_json
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Features, Task
from adapters_kit.tasks.metrics import confusion
from adapters_kit.training import pictures

_MOST = 20
_LONGEST = 400  # characters of an input that are shown


def details(
    task: Task, recipe: Recipe, results: Sequence[Any], held_out: Features, rows: Dataset, train: Features
) -> dict[str, Any]:
    """What `pages.run_page` reads from details.json.

    Args:
        results: of the adapter on the held-out examples, in their order.
        held_out, train: the encoded examples.
        rows: the held-out rows.
    """
    return {
        "model": recipe.model,
        "task": recipe.task,
        "method": recipe.method.label,
        "metric": task.metric,
        "worst": _worst(task, results, held_out, rows),
        "lengths": {
            name: found
            for name, part in (("training data", train), ("held-out data", held_out))
            if (found := _lengths(task, part))
        },
    }


def _worst(task: Task, results: Sequence[Any], features: Features, rows: Dataset) -> list[dict[str, Any]]:
    """Wrong answers that the model was surest of; for language models the texts that surprised it most."""
    found: list[tuple[float, dict[str, Any]]] = []
    for result, feature in zip(results, features, strict=True):
        told = _classified(task, result, feature) or _surprised(result)
        if told is not None:
            row = rows[int(feature["row"])]
            found.append((told[0], {"input": _input(task, row), "row": int(feature["row"]) + 1, **told[1]}))
    found.sort(key=lambda one: -one[0])
    return [one for _, one in found[:_MOST]]


def _classified(task: Task, result: Any, feature: Mapping[str, Any]) -> tuple[float, dict[str, Any]] | None:
    labels, truth = task.labels or [], feature.get("labels")
    if len(labels) < 2 or np.shape(result) != (len(labels),) or not isinstance(truth, int | np.integer):
        return None
    guess = int(np.argmax(result))
    if guess == truth:
        return None
    sure = float(result[guess])
    return sure, {"true": labels[int(truth)], "predicted": labels[guess], "probability": round(sure, 4)}


def _surprised(result: Any) -> tuple[float, dict[str, Any]] | None:
    """A result of (negative log-likelihood, tokens)."""
    if not (isinstance(result, tuple) and len(result) >= 2 and isinstance(result[0], float) and result[1]):
        return None
    loss = result[0] / result[1]
    return loss, {"loss of a token": round(loss, 4), "tokens": int(result[1])}


def _input(task: Task, row: Mapping[str, Any]) -> str:
    columns = [column for role, column in task.columns.items() if role not in task.targets]
    text = "  |  ".join(value if isinstance(value, str) else repr(value) for value in (row[name] for name in columns))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def _lengths(task: Task, features: Features) -> dict[str, Any] | None:
    if not len(features) or "input_ids" not in features[0]:
        return None
    lengths = task.lengths(features)
    counts, edges = np.histogram(lengths, bins=min(30, int(lengths.max() - lengths.min()) + 1))
    return {"examples": len(lengths), "counts": counts.tolist(), "edges": [round(float(edge), 2) for edge in edges]}


def _has_classes(task: Task, results: list[Any]) -> bool:
    """Whether the task gives each example one class, and the results are a number for every class."""
    single = getattr(task, "problem", "single-label") == "single-label"
    return task.labels is not None and single and np.ndim(results[0]) == 1


def majority(task: Task, results: list[Any], features: Features) -> float | None:
    """The accuracy of always giving the most frequent class of the held-out rows."""
    if task.metric != "accuracy" or not _has_classes(task, results):
        return None
    return max(Counter(int(feature["labels"]) for feature in features).values()) / len(features)


def write_confusion(out: Path, task: Task, base: list[Any], tuned: list[Any], features: Features) -> None:
    """Which class is taken for which, base beside tuned, for tasks with one class an example."""
    if task.labels is None or not _has_classes(task, tuned):
        return
    truth = [feature["labels"] for feature in features]
    before, after = (
        confusion([int(result.argmax()) for result in results], truth, len(task.labels)) for results in (base, tuned)
    )
    write_json(out / "confusion.json", {"labels": task.labels, "base": before, "tuned": after})
    if pictures.available():
        pictures.confusion(before, after, task.labels, out / "confusion.png")
