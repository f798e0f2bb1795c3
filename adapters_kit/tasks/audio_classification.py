"""Audio classification: recordings, one class each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import RecipeError
from adapters_kit.tasks.base import Features, outputs_of
from adapters_kit.tasks.hearing import HearingTask
from adapters_kit.tasks.one_class import OneClassTask


class AudioClassification(OneClassTask, HearingTask):
    """One class for a recording."""

    name = "audio-classification"
    needs = (("audio", "label"),)
    medium = "audio"

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Learns the classes; opens every recording."""
        if self.recipe.training.max_length is not None:
            raise RecipeError(["training.max_length counts tokens, and recordings have none: set data.max_seconds"])
        self._learn_classes(train, test)
        self.look(train, test)

    def bind(self, processor: Any, model: nn.Module) -> None:
        """Takes the extractor; a checkpoint with a head for these very classes keeps its own order of them."""
        super().bind(processor, model)
        self.labels = outputs_of(model)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """Rows whose recordings are opened when their batch is made."""
        kinds = self.kinds(data, training=answers)
        if cut := self.too_long(kinds):
            self.notes.say(
                f"{len(cut):,} of {len(kinds):,} recordings are longer than {self.max_seconds:g} seconds "
                "(data.max_seconds): their end was cut.",
                recordings_cut=len(cut),
            )
        more: dict[str, Any] = {"positions": [self.positions(min(kind.seconds, self.max_seconds)) for kind in kinds]}
        if answers:
            more["labels"] = self._numbers(data)
        return self.opened(data, range(len(data)), more)

    def collate_training(self, features: Features) -> dict[str, torch.Tensor]:
        """The model's input, `attention_mask` where its extractor makes one, labels and row, (rows,) int64."""
        batch, _ = self.hear(features)
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        return {**batch, "row": torch.tensor([feature["row"] for feature in features])}

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """As to train on, with `lengths` (rows,) before padding."""
        batch, lengths = self.hear(features)
        return {**batch, "lengths": torch.tensor(lengths)}

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
        """Probabilities (classes,) of each recording."""
        inputs, lengths = {key: value for key, value in batch.items() if key != "lengths"}, batch["lengths"].tolist()
        if "attention_mask" in batch or len(set(lengths)) == 1:
            logits = model(**inputs).logits
        else:  # nothing tells such a model what is padding: it hears each by itself
            alone = [inputs[self.input][row : row + 1, :length] for row, length in enumerate(lengths)]
            logits = torch.cat([model(**{self.input: one}).logits for one in alone])
        return list(logits.float().softmax(-1).cpu().numpy())
