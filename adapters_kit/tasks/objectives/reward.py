"""A reward model: one number for a prompt and an answer, learned from pairs (Bradley and Terry)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Features, compact
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.objectives import trl_losses
from adapters_kit.tasks.objectives.pairs import read
from adapters_kit.tasks.objectives.preference import Preference, of_pairs
from adapters_kit.tasks.rows import each_row
from adapters_kit.tasks.windows import Cuts

REWARD = "reward"
_ANSWERS = ("completion", "chosen", "rejected", "messages")


class Reward(Preference):
    """A head of one output on the model's last token."""

    asks_base = False
    asks = (("prompt", "completion"), ("prompt", "chosen"), ("chosen",), ("messages",))
    optional = (*Preference.optional, "rejected")
    targets = ()
    generates = False
    problem = "score"
    unplanned = ("labels",)  # which only tell pairs from single answers

    def __init__(
        self, recipe: Recipe, columns: Mapping[str, str], labels: list[str] | None = None, notes: Notes | None = None
    ) -> None:
        super().__init__(recipe, columns, labels, notes)
        self.labels = [REWARD]

    @cached_property
    def trl_loss(self) -> trl_losses.Loss:
        """TRL's loss of scores."""
        assert self.spec is not None
        return trl_losses.reward(self.spec)

    def scores(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The score of every text of a batch, float32 (texts,)."""
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return model(**inputs).logits[:, 0].float()

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """TRL's loss of the scores of chosen and rejected answers."""
        scores = self.scores(model, batch)
        return self.trl_loss.of(scores, torch.ones_like(scores), scores)

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """The scores of both answers of each pair; of single answers, their scores."""
        scores = self.scores(model, batch).cpu()
        return scores.tolist() if "labels" not in batch else torch.stack(scores.chunk(2), dim=1).tolist()

    def score(self, results: Sequence[Any], features: Features) -> dict[str, float]:
        """The loss; how often and by how much the chosen answer's score is above the other's."""
        scores = torch.tensor(results, dtype=torch.float64)
        flat = scores.T.reshape(-1)
        return {"loss": float(self.trl_loss.of(flat, torch.ones_like(flat), flat)), **of_pairs(scores)}

    def collate(self, features: Features, side: str = "right") -> dict[str, torch.Tensor]:
        """Texts padded on the right: pairs as for every preference, or single answers without labels."""
        batch = super().collate(features, side)
        if "rejected_ids" not in features[0]:
            del batch["labels"]
        return batch

    def predict(self, model: nn.Module, data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        """Every row's columns with the `score` of its answer; of pairs `score_chosen` and `score_rejected`."""
        columns = {role: name for role, name in self.columns.items() if name in data.column_names}
        roles = [role for role in _ANSWERS if role in columns]
        cuts, features, whose = Cuts(), [], []
        for number, row in each_row(data):
            for role in roles:
                sample = self.sample(read(row, columns, number, role, [r for r in roles if r != role]), number, cuts)
                if sample is None:
                    raise DataError(f"Row {number + 1}, column {columns[role]!r}: an empty answer has no score.")
                features.append({"row": number, "input_ids": compact(sample[0]), "labels": compact([])})
                whose.append((number, role if len(roles) > 1 else ""))
        cuts.tell(self.notes, self.max_length)
        told: list[dict[str, Any]] = [{role: row[name] for role, name in columns.items()} for _, row in each_row(data)]
        for (number, role), found in zip(whose, self.run(model, features, batch_size), strict=True):
            told[number][f"score_{role}" if role else "score"] = round(float(found), 6)
        return told
