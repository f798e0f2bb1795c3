"""Text classification: one label, several labels, or a number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError
from adapters_kit.tasks import metrics
from adapters_kit.tasks.base import Features, Task, class_names, compact, labels_of, outputs_of, pad_inputs


class TextClassification(Task):
    name = "text-classification"
    needs = (("text", "label"),)
    optional = ("text_pair",)
    metric = "accuracy"
    higher_is_better = True
    problem = "single-label"

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        for data in (train, test) if test is not None else (train,):
            for role in ("text", "text_pair"):
                if role in self.columns:
                    self.text(data, role)
        first = train[0][self.columns["label"]]
        guess = "multi-label" if isinstance(first, list) else "single-label"
        self.problem = self.recipe.problem or guess
        if self.problem == "regression":
            self.metric, self.labels = "pearson", ["value"]
            for data in (train, test) if test is not None else (train,):
                self._numbers(data)
        else:
            if self.problem == "multi-label":
                self.metric = "f1"
            self.labels = class_names(train, test, self.columns["label"], self.recipe.labels)

    def strata(self, data: Dataset) -> list[Any] | None:
        return labels_of(data, self.columns["label"]) if self.problem == "single-label" else None

    def bind(self, processor: Any, model: nn.Module) -> None:
        super().bind(processor, model)
        # A checkpoint with a head for these very classes keeps its own order of them.
        self.labels = outputs_of(model)

    def adapt(self, model: nn.Module) -> None:
        # transformers chooses the loss by this field; left empty it would guess from the labels' dtype.
        model.config.problem_type = {
            "single-label": "single_label_classification",
            "multi-label": "multi_label_classification",
            "regression": "regression",
        }[self.problem]

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        texts = [self.text(data, role) for role in ("text", "text_pair") if role in self.columns]
        features = []
        encoded = self.processor(*texts, truncation=True, max_length=self.max_length)
        targets = self._targets(data) if answers else None
        for row, ids in enumerate(encoded["input_ids"]):
            feature = {"row": row, "input_ids": compact(ids)}
            if "token_type_ids" in encoded and len(texts) == 2:
                feature["token_type_ids"] = compact(encoded["token_type_ids"][row])
            if targets is not None:
                feature["labels"] = targets[row]
            features.append(feature)
        return features

    def _targets(self, data: Dataset) -> Sequence[Any]:
        column = self.columns["label"]
        if self.problem == "regression":
            return self._numbers(data)
        number = {name: index for index, name in enumerate(self.labels)}
        names = labels_of(data, column)
        unknown = sorted(set(names) - set(number))
        if unknown:
            raise DataError(
                f"Column {column!r} has labels that the model does not know: {unknown[:10]}; it knows {self.labels}."
            )
        if self.problem == "single-label":
            return [number[name] for name in names]
        rows, flat = [], iter(names)
        for value in data[column]:
            row = np.zeros(len(number), dtype=np.float32)
            for _ in range(len(value) if isinstance(value, list) else 1):
                row[number[next(flat)]] = 1
            rows.append(row)
        return rows

    def _numbers(self, data: Dataset) -> list[float]:
        column = self.columns["label"]
        values = data[column][:]
        for index, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise DataError(f"Regression needs numbers; column {column!r}, row {index + 1} holds {value!r}.")
        return [float(value) for value in values]

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        batch = pad_inputs(features, self.processor)
        if "labels" in features[0]:
            kind = torch.long if self.problem == "single-label" else torch.float32
            batch["labels"] = torch.as_tensor(np.asarray([f["labels"] for f in features]), dtype=kind)
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
        """Probabilities (classes,), or the number predicted (1,), of each example."""
        batch = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**batch).logits.float()
        if self.problem == "single-label":
            logits = logits.softmax(-1)
        elif self.problem == "multi-label":
            logits = logits.sigmoid()
        return list(logits.cpu().numpy())

    def score(self, results: Sequence[Any], features: Features) -> dict[str, float]:
        predicted = np.stack(results).astype(np.float64)
        labels = np.asarray([feature["labels"] for feature in features])
        if self.problem == "regression":
            return metrics.regression(predicted[:, 0], labels)
        score = metrics.classification if self.problem == "single-label" else metrics.multi_label
        return score(predicted, labels)

    def show(self, result: np.ndarray, row: Mapping[str, Any]) -> dict[str, Any]:
        shown = {role: row[self.columns[role]] for role in ("text", "text_pair") if role in self.columns}
        if self.problem == "regression":
            return {**shown, "value": float(result[0])}
        if self.problem == "multi-label":
            return {
                **shown,
                "labels": [name for name, p in zip(self.labels, result, strict=True) if p >= 0.5],
                "scores": {name: round(float(p), 6) for name, p in zip(self.labels, result, strict=True)},
            }
        best = int(result.argmax())
        return {**shown, "label": self.labels[best], "score": round(float(result[best]), 6)}
