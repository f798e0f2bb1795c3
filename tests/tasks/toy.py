"""A task not in the package: classes from the columns `words` and `count`. Its row is in test_task_table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.tasks import metrics
from adapters_kit.tasks.base import Features, Task, outputs_of, pad_inputs
from adapters_kit.tasks.labels import class_names, labels_of


class Counting(Task):
    """Reads the columns `words` and `count`."""

    name = "counting"
    needs = (("words", "count"),)
    targets = ("count",)
    metric = "accuracy"
    higher_is_better = True

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        column = self.columns["count"]
        seen, held_out = (labels_of(data, column) if data is not None else [] for data in (train, test))
        self.labels = class_names(seen, held_out, self.recipe.labels, column, self.notes)

    def bind(self, processor: Any, model: nn.Module) -> None:
        super().bind(processor, model)
        self.labels = outputs_of(model)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        ids = self.processor(list(self.texts(data, "words")), truncation=True, max_length=self.max_length)["input_ids"]
        features = [{"row": row, "input_ids": np.asarray(one)} for row, one in enumerate(ids)]
        if answers:
            for feature, label in zip(features, labels_of(data, self.columns["count"]), strict=True):
                feature["labels"] = self.labels.index(label)
        return features

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        batch = pad_inputs(features, self.processor)
        for key in ("labels", "row"):
            if key in features[0]:
                batch[key] = torch.tensor([feature[key] for feature in features])
        return batch

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return list(model(**inputs).logits.softmax(-1).numpy())

    def score(self, results: Sequence[np.ndarray], features: Features) -> dict[str, float]:
        return metrics.classification(np.stack(results), np.asarray([feature["labels"] for feature in features]))

    def show(self, result: np.ndarray, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"count": self.labels[int(result.argmax())]}
