"""Token classification: a tag for every word (names, parts of speech); words are split into pieces by the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError, MissingPackageError
from adapters_kit.tasks.base import (
    IGNORED,
    Features,
    Task,
    class_names,
    compact,
    labels_of,
    outputs_of,
    pad,
    pad_inputs,
)


class TokenClassification(Task):
    name = "token-classification"
    needs = (("tokens", "tags"),)
    targets = ("tags",)
    metric = "f1"
    higher_is_better = True

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        words, tags = self.columns["tokens"], self.columns["tags"]
        for data in (train, test) if test is not None else (train,):
            for index, (left, right) in enumerate(zip(data[words], data[tags], strict=True)):
                if not isinstance(left, list) or not isinstance(right, list) or len(left) != len(right):
                    raise DataError(
                        f"Row {index + 1}: {words!r} and {tags!r} are lists of equal length, one tag a word; "
                        f"here {left!r} and {right!r}."
                    )
        self.labels = class_names(train, test, tags, self.recipe.labels)

    def bind(self, processor: Any, model: nn.Module) -> None:
        super().bind(processor, model)
        self.labels = outputs_of(model)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        encoded = self.processor(
            data[self.columns["tokens"]][:], is_split_into_words=True, truncation=True, max_length=self.max_length
        )
        number = {name: index for index, name in enumerate(self.labels or [])}
        tags = iter(labels_of(data, self.columns["tags"])) if answers else None
        features = []
        for row, ids in enumerate(encoded["input_ids"]):
            words = encoded.word_ids(row)
            # A word's tag counts at its first piece.
            first = [
                word is not None and word != before for word, before in zip(words, [None, *words[:-1]], strict=True)
            ]
            feature = {"row": row, "input_ids": compact(ids), "first": np.asarray(first)}
            if tags is not None:
                own = [number[next(tags)] for _ in data[row][self.columns["tags"]]]
                feature["labels"] = compact(
                    [own[word] if keep else IGNORED for word, keep in zip(words, first, strict=True)]
                )
            features.append(feature)
        return features

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        batch = pad_inputs(features, self.processor)
        if "labels" in features[0]:
            batch["labels"] = pad([feature["labels"] for feature in features], IGNORED)
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
        """Probabilities (tokens, classes) of each example."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        probabilities = model(**inputs).logits.float().softmax(-1).cpu().numpy()
        lengths = batch["attention_mask"].sum(-1).tolist()
        return [row[:length] for row, length in zip(probabilities, lengths, strict=True)]

    def score(self, results: Sequence[np.ndarray], features: Features) -> dict[str, float]:
        truth, guess, picked, right = [], [], [], 0
        for result, feature in zip(results, features, strict=True):
            labels = feature["labels"]
            at = np.flatnonzero(labels != IGNORED)
            best = result[at].argmax(-1)
            right += int((best == labels[at]).sum())
            picked.append(np.log(np.clip(result[at, labels[at]], 1e-12, None)))
            truth.append([self.labels[i] for i in labels[at]])
            guess.append([self.labels[i] for i in best])
        words = sum(map(len, truth))
        scores = {"loss": float(-np.concatenate(picked).sum() / words), "accuracy": right / words}
        if all(name == "O" or name[:2] in ("B-", "I-", "E-", "S-") for name in self.labels):
            return {**scores, **spans(truth, guess)}
        from sklearn.metrics import f1_score

        flat = [[tag for tags in rows for tag in tags] for rows in (truth, guess)]
        return {
            **scores,
            "f1": float(f1_score(*flat, average="macro", zero_division=0)),
            "f1_micro": float(f1_score(*flat, average="micro", zero_division=0)),
        }

    def show(self, result: np.ndarray, row: Mapping[str, Any]) -> dict[str, Any]:
        words = row[self.columns["tokens"]]
        encoded = self.processor([words], is_split_into_words=True, truncation=True, max_length=self.max_length)
        tags = ["" for _ in words]  # words behind max_length get none
        for index, word in reversed(list(enumerate(encoded.word_ids(0)))):
            if word is not None:
                tags[word] = self.labels[int(result[index].argmax())]
        return {"tokens": words, "tags": tags}


def spans(truth: list[list[str]], guess: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole spans (an entity counts if its type and both ends are right)."""
    try:
        from seqeval import metrics
    except ImportError as error:
        raise MissingPackageError("Span scores need seqeval: pip install 'adapters-kit[metrics]'") from error
    return {
        "f1": float(metrics.f1_score(truth, guess, zero_division=0)),
        "precision": float(metrics.precision_score(truth, guess, zero_division=0)),
        "recall": float(metrics.recall_score(truth, guess, zero_division=0)),
    }
