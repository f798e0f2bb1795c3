"""Image classification: files, bytes or PIL images, one class each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from datasets import Dataset, Image
from torch import nn

from adapters_kit.tasks import metrics
from adapters_kit.tasks.base import Features, Task, outputs_of
from adapters_kit.tasks.images import check_image, open_image
from adapters_kit.tasks.labels import class_numbers, classes_of, labels_of


class ImageClassification(Task):
    """One class for a picture."""

    name = "image-classification"
    needs = (("image", "label"),)
    metric = "accuracy"
    higher_is_better = True

    def unlabelled(self, data: Dataset) -> list[int]:
        """Rows without a class."""
        names = labels_of(data, self.columns["label"], self.recipe.labels)
        return [row for row, name in enumerate(names) if name is None]

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Learns the classes; looks at the head of every picture."""
        image = self.columns["image"]
        self.labels = classes_of(train, test, self.columns["label"], self.recipe.labels, self.notes)
        for data in (train,) if test is None else (train, test):
            for row, value in enumerate(undecoded(data, image).select_columns([image])):
                check_image(value[image], row)

    def strata(self, data: Dataset) -> list[Any] | None:
        """The class of each row."""
        return labels_of(data, self.columns["label"], self.recipe.labels)

    def bind(self, processor: Any, model: nn.Module) -> None:
        """Takes the image processor; a checkpoint with a head for these very classes keeps its own order of them."""
        self.processor = getattr(processor, "image_processor", processor)
        self.max_length = self.longest = self.recipe.training.max_length or 512  # images have one size
        self.labels = outputs_of(model)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """Rows whose pictures are opened when their batch is made."""
        labels: list[int] | None = None
        if answers:
            labels = class_numbers(data, self.columns["label"], self.recipe.labels, self.labels or [])
        return Pictures(undecoded(data, self.columns["image"]), self.columns["image"], labels)

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """Pixels, (rows, channels, height, width), and labels (rows,) int64."""
        pictures = [open_image(feature["image"], feature["row"]) for feature in features]
        batch = {"pixel_values": self.processor(pictures, return_tensors="pt")["pixel_values"]}
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
        """Probabilities (classes,) of each image."""
        return list(model(pixel_values=batch["pixel_values"]).logits.float().softmax(-1).cpu().numpy())

    def score(self, results: Sequence[np.ndarray], features: Features) -> dict[str, float]:
        """See `metrics.classification`."""
        assert isinstance(features, Pictures)
        return metrics.classification(np.stack(results).astype(np.float64), np.asarray(features.labels))

    def show(self, result: np.ndarray, row: Mapping[str, Any]) -> dict[str, Any]:
        """The class with its probability, and the picture's path where it has one."""
        value, best = row[self.columns["image"]], int(result.argmax())
        shown = {"image": value} if isinstance(value, str) else {}
        return {**shown, "label": (self.labels or [])[best], "score": round(float(result[best]), 6)}

    def length(self, feature: Any) -> int:
        """All pictures take equally long."""
        return 1


def undecoded(data: Dataset, column: str) -> Dataset:
    """The rows with pictures as bytes or paths: `datasets` would open each, its own way, when it is looked at."""
    return data.cast_column(column, Image(decode=False)) if isinstance(data.features[column], Image) else data


class Pictures(Sequence[dict[str, Any]]):
    """Rows of images that are opened when their batch is made: decoded, a data set would not fit in memory."""

    def __init__(self, data: Dataset, column: str, labels: list[int] | None) -> None:
        self.data, self.column, self.labels = data, column, labels

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, row: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, row: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, row: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        feature = {"row": row, "image": self.data[row][self.column]}
        return feature if self.labels is None else {**feature, "labels": self.labels[row]}
