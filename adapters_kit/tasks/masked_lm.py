"""Masked language modelling: adapting an encoder to the language of a domain, from plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import ModelError
from adapters_kit.tasks.base import IGNORED, Features, Task, compact, pad, pad_inputs

_MASKED = 0.15  # of the tokens; of these 80 % become [MASK], 10 % a random token, 10 % stay (BERT)


class MaskedLM(Task):
    name = "masked-lm"
    needs = (("text",),)
    targets = ()
    metric = "loss"

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        for data in (train, test) if test is not None else (train,):
            self.text(data, "text")

    def bind(self, processor: Any, model: nn.Module) -> None:
        super().bind(processor, model)
        if processor.mask_token_id is None:
            raise ModelError(f"The tokenizer of {self.recipe.model} has no mask token; masked-lm needs one.")
        self._special = np.asarray(processor.all_special_ids)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        encoded = self.processor(
            self.text(data, "text"), truncation=True, max_length=self.max_length, return_overflowing_tokens=True
        )
        rows = encoded.get("overflow_to_sample_mapping", range(len(encoded["input_ids"])))
        features = [
            {"row": row, "input_ids": compact(ids)} for row, ids in zip(rows, encoded["input_ids"], strict=True)
        ]
        if answers:  # fixed masks, so that evaluations can be compared; training draws its own in `collate_training`
            for number, feature in enumerate(features):
                seed = [self.recipe.training.seed, number]
                feature["masked"], feature["labels"] = self._mask(feature["input_ids"], np.random.default_rng(seed))
        return features

    def _mask(self, ids: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Ids with tokens masked, and labels that are the original ids at those places."""
        can = np.flatnonzero(~np.isin(ids, self._special))
        count = min(max(round(_MASKED * len(can)), 1), len(can))
        at = draw.choice(can, size=count, replace=False) if len(can) else can
        masked, labels = ids.copy(), np.full_like(ids, IGNORED)
        labels[at] = ids[at]
        kind = draw.random(len(at))
        masked[at[kind < 0.8]] = self.processor.mask_token_id
        swapped = at[(kind >= 0.8) & (kind < 0.9)]
        masked[swapped] = draw.integers(0, len(self.processor), size=len(swapped))
        return masked, labels

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        shown = [{**feature, "input_ids": feature.get("masked", feature["input_ids"])} for feature in features]
        batch = pad_inputs(shown, self.processor)
        if "labels" in features[0]:
            batch["labels"] = pad([feature["labels"] for feature in features], IGNORED)
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def collate_training(self, features: Features) -> dict[str, torch.Tensor]:
        # torch's generator is what a resumed run restores.
        fresh = []
        for feature in features:
            seed = int(torch.randint(2**62, ()))
            masked, labels = self._mask(feature["input_ids"], np.random.default_rng(seed))
            fresh.append({**feature, "masked": masked, "labels": labels})
        return self.collate(fresh)

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[tuple[float, int, int, list[int]]]:
        """Of each example: summed loss (nats) and number of masked tokens, how many were guessed, the guesses."""
        labels = batch.pop("labels", None)
        logits = model(**batch).logits.float()
        best = logits.argmax(-1)
        if labels is None:
            where = batch["input_ids"] == self.processor.mask_token_id
            return [(0.0, 0, 0, ids[at].tolist()) for ids, at in zip(best, where, strict=True)]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(labels.shape)
        at = labels != IGNORED
        right = ((best == labels) & at).sum(-1).tolist()
        guesses = [ids[where].tolist() for ids, where in zip(best, at, strict=True)]
        return list(zip(loss.double().sum(-1).tolist(), at.sum(-1).tolist(), right, guesses, strict=True))

    def score(self, results: Sequence[Any], features: Features) -> dict[str, float]:
        tokens = max(sum(count for _, count, *_ in results), 1)
        loss = sum(nll for nll, *_ in results) / tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": sum(right for _, _, right, _ in results) / tokens,
        }

    def show(self, result: Any, row: Mapping[str, Any]) -> dict[str, Any]:
        """The words for each mask token in the text."""
        return {"text": row[self.columns["text"]], "masks": self.processor.convert_ids_to_tokens(result[-1])}
