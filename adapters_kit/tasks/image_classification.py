"""Image classification: files, bytes or PIL images, one class each."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError, MissingPackageError
from adapters_kit.tasks import metrics
from adapters_kit.tasks.base import Features, Task, class_names, labels_of, outputs_of


class ImageClassification(Task):
    name = "image-classification"
    needs = (("image", "label"),)
    metric = "accuracy"
    higher_is_better = True

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        self.labels = class_names(train, test, self.columns["label"], self.recipe.labels)
        for data in (train, test) if test is not None else (train,):
            for index in range(len(data)):
                value = data[index][self.columns["image"]]
                if isinstance(value, str) and not Path(value).is_file():
                    raise DataError(f"Row {index + 1}: no image file {value!r}.")

    def strata(self, data: Dataset) -> list[Any] | None:
        return labels_of(data, self.columns["label"])

    def bind(self, processor: Any, model: nn.Module) -> None:
        self.processor = getattr(processor, "image_processor", processor)
        self.max_length = self.longest = self.recipe.training.max_length or 512  # images have one size
        self.labels = outputs_of(model)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        number = {name: index for index, name in enumerate(self.labels)}
        labels = [number[name] for name in labels_of(data, self.columns["label"])] if answers else None
        return Pictures(data, self.columns["image"], labels)

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
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
        return metrics.classification(np.stack(results).astype(np.float64), np.asarray(features.labels))

    def show(self, result: np.ndarray, row: Mapping[str, Any]) -> dict[str, Any]:
        value, best = row[self.columns["image"]], int(result.argmax())
        shown = {"image": value} if isinstance(value, str) else {}
        return {**shown, "label": self.labels[best], "score": round(float(result[best]), 6)}

    def length(self, feature: Any) -> int:
        return 1


class Pictures(Sequence):
    """Rows of images that are opened when their batch is made: decoded, a data set would not fit in memory."""

    def __init__(self, data: Dataset, column: str, labels: list[int] | None) -> None:
        self.data, self.column, self.labels = data, column, labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        feature = {"row": row, "image": self.data[row][self.column]}
        return feature if self.labels is None else {**feature, "labels": self.labels[row]}


def open_image(value: Any, row: int) -> Any:
    """A path, {"bytes": ...} or a PIL image as an RGB image.

    Raises:
        DataError: none of these, or a file that is no image.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingPackageError("Images need pillow: pip install pillow") from error
    if isinstance(value, Mapping):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")
    try:
        picture = Image.open(value) if isinstance(value, str | io.BytesIO) else value
        return picture.convert("RGB")
    except (OSError, UnidentifiedImageError, AttributeError) as error:
        raise DataError(f"Row {row + 1}: {value!r} is no image that can be read ({error}).") from error
