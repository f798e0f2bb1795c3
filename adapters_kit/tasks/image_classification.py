"""Image classification: files, bytes or PIL images, one class each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.tasks.base import Features, outputs_of
from adapters_kit.tasks.images import check_image, open_image
from adapters_kit.tasks.one_class import OneClassTask
from adapters_kit.tasks.opened import Opened, undecoded


class ImageClassification(OneClassTask):
    """One class for a picture."""

    name = "image-classification"
    needs = (("image", "label"),)
    medium = "image"

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Learns the classes; looks at the head of every picture."""
        image = self.columns["image"]
        self._learn_classes(train, test)
        for data in (train,) if test is None else (train, test):
            for row, value in enumerate(undecoded(data, image).select_columns([image])):
                check_image(value[image], row)

    def bind(self, processor: Any, model: nn.Module) -> None:
        """Takes the image processor; a checkpoint with a head for these very classes keeps its own order of them."""
        self.processor = getattr(processor, "image_processor", processor)
        self.max_length = self.longest = self.recipe.training.max_length or 512  # images have one size
        self.labels = outputs_of(model)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """Rows whose pictures are opened when their batch is made."""
        more = {"labels": self._numbers(data)} if answers else {}
        return Opened(data, {"image": self.columns["image"]}, range(len(data)), more)

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

    def length(self, feature: Any) -> int:
        """All pictures take equally long."""
        return 1
