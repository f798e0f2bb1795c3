"""One class for a picture or a recording: what such tasks share, whatever is looked at or heard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from adapters_kit.tasks import metrics
from adapters_kit.tasks.base import Features, Task
from adapters_kit.tasks.labels import class_numbers, classes_of, named_labels
from adapters_kit.tasks.opened import Opened
from adapters_kit.tasks.rows import Numbered


class OneClassTask(Task):
    """A task that gives each row one class.

    Attributes:
        medium: the role of the column that the class is of.
    """

    medium: ClassVar[str]
    metric = "accuracy"
    higher_is_better = True

    def unlabelled(self, data: Dataset) -> np.ndarray:
        """Rows without a class."""
        return self.strata(data).rows_of(None)

    def strata(self, data: Dataset) -> Numbered:
        """The class of each row."""
        return named_labels(data, self.columns["label"], self.recipe.labels)

    def _learn_classes(self, train: Dataset, test: Dataset | None) -> None:
        self.labels = classes_of(train, test, self.columns["label"], self.recipe.labels, self.notes)

    def _numbers(self, data: Dataset) -> np.ndarray:
        """The number of every row's class."""
        return class_numbers(data, self.columns["label"], self.recipe.labels, self.labels or [])

    def score(self, results: Sequence[np.ndarray], features: Features) -> dict[str, float]:
        """See `metrics.classification`."""
        assert isinstance(features, Opened)
        return metrics.classification(np.stack(results).astype(np.float64), np.asarray(features.more["labels"]))

    def show(self, result: np.ndarray, row: Mapping[str, Any]) -> dict[str, Any]:
        """The class with its probability, and the file's path where it has one."""
        value, best = row[self.columns[self.medium]], int(result.argmax())
        shown = {self.medium: value} if isinstance(value, str) else {}
        return {**shown, "label": (self.labels or [])[best], "score": round(float(result[best]), 6)}
