"""Masked language modelling: adapting an encoder to the language of a domain, from plain text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError, ModelError
from adapters_kit.tasks.base import IGNORED, Features, Task, compact, pad, pad_inputs
from adapters_kit.tasks.encoded import Encoded
from adapters_kit.tasks.rows import check_text, in_parts
from adapters_kit.tasks.slow_tokens import is_slow

_MASKED = 0.15  # of the tokens; of these 80 % become [MASK], 10 % a random token, 10 % stay (BERT)


class MaskedLM(Task):
    """Words guessed from the words around them."""

    name = "masked-lm"
    needs = (("text",),)
    targets = ()
    metric = "loss"

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Checks that the column holds text."""
        column = self.columns["text"]
        for data in (train,) if test is None else (train, test):
            for start, part in in_parts(data, [column]):
                check_text(part[column], start, column, "text", data.column_names)

    def bind(self, processor: Any, model: nn.Module) -> None:
        """Needs a tokenizer with a mask token."""
        super().bind(processor, model)
        if processor.mask_token_id is None:
            raise ModelError(f"The tokenizer of {self.recipe.model} has no mask token; masked-lm needs one.")
        self._special = np.asarray(processor.all_special_ids)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """Pieces of `max_length` tokens; with `answers` also fixed masks, without pieces that have nothing to mask."""
        column = self.columns["text"]
        features = Encoded(small=("input_ids", "masked"))
        number = empty = 0
        for start, part in in_parts(data, [column]):
            texts = check_text(part[column], start, column, "text", data.column_names)
            for row, ids in self._pieces(texts, start):
                feature: dict[str, Any] = {"row": row, "input_ids": compact(ids)}
                if answers:  # fixed, so that evaluations can be compared; training draws its own in `collate_training`
                    draw = np.random.default_rng([self.recipe.training.seed, number])
                    number += 1
                    hidden = self._hidden(feature["input_ids"], draw)
                    if hidden is None:
                        empty += 1
                        continue
                    feature |= hidden
                features.append(feature)
        if empty:
            self.notes.say(f"{empty:,} texts are empty and are left out.", rows_left_out=empty)
        if not len(features):
            raise DataError(f"No row has text in column {column!r}.")
        return features

    def _hidden(self, ids: np.ndarray, draw: np.random.Generator) -> dict[str, Any] | None:
        """What evaluations hide of a piece; None where there is nothing to hide."""
        masked, labels = self._mask(ids, draw)
        return None if (labels == IGNORED).all() else {"masked": masked, "labels": labels}

    def _pieces(self, texts: Sequence[str], start: int) -> Iterator[tuple[int, Sequence[int]]]:
        """(row, ids): a long text gives several pieces."""
        if is_slow(self.processor):
            room = self.max_length - self.processor.num_special_tokens_to_add(pair=False)
            for row, text in enumerate(texts, start):
                ids = self.processor(text, add_special_tokens=False)["input_ids"]
                for at in range(0, max(len(ids), 1), room):
                    yield row, self.processor.build_inputs_with_special_tokens(ids[at : at + room])
            return
        options = {"truncation": True, "max_length": self.max_length, "return_overflowing_tokens": True}
        encoded = self.processor(list(texts), **options)
        for row, ids in zip(encoded["overflow_to_sample_mapping"], encoded["input_ids"], strict=True):
            yield start + row, ids

    def _mask(self, ids: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Ids with tokens masked, and labels that are the original ids at those places."""
        can = np.flatnonzero(~np.isin(ids, self._special))
        count = min(max(round(_MASKED * len(can)), 1), len(can))
        at = draw.choice(can, size=count, replace=False) if len(can) else can
        masked, labels = ids.astype(np.int32), np.full(ids.shape, IGNORED, dtype=np.int32)
        labels[at] = ids[at]
        kind = draw.random(len(at))
        masked[at[kind < 0.8]] = self.processor.mask_token_id
        swapped = at[(kind >= 0.8) & (kind < 0.9)]
        masked[swapped] = draw.integers(0, min(len(self.processor), self.embedded or 10**9), size=len(swapped))
        return masked, labels

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """Ids with masks, attention mask and labels, (rows, tokens) int64."""
        shown = [{**feature, "input_ids": feature.get("masked", feature["input_ids"])} for feature in features]
        batch = pad_inputs(shown, self.processor)
        if "labels" in features[0]:
            batch["labels"] = pad([feature["labels"] for feature in features], IGNORED)
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def collate_training(self, features: Features) -> dict[str, torch.Tensor]:
        """As `collate`, with masks drawn anew."""
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
        """Loss (nats a masked token), perplexity, and the part of them guessed."""
        tokens = max(sum(count for _, count, *_ in results), 1)
        loss = sum(nll for nll, *_ in results) / tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": sum(right for _, _, right, _ in results) / tokens,
        }

    def predict(self, model: nn.Module, data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        """Of every row the text and the words for its masks, those of a long text from all of its pieces."""
        features = self.encode(data, answers=False)
        guesses: dict[int, list[int]] = {}
        for result, feature in zip(self.run(model, features, batch_size), features, strict=True):
            guesses.setdefault(feature["row"], []).extend(result[-1])
        return [self.show((guesses[row],), data[row]) for row in range(len(data))]

    def show(self, result: Any, row: Mapping[str, Any]) -> dict[str, Any]:
        """The words for each mask token in the text."""
        return {"text": row[self.columns["text"]], "masks": self.processor.convert_ids_to_tokens(result[-1])}
