"""Reranking: how well a document answers a query, by a model that reads both at once (a cross-encoder)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError
from adapters_kit.recipe import Recipe
from adapters_kit.tasks import metrics
from adapters_kit.tasks.base import Features, Task, compact
from adapters_kit.tasks.encoded import AT_ONCE, Encoded
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.numbers import numbers_of
from adapters_kit.tasks.rows import cells, check_text, digest, in_parts, number_cut, numbers_of_texts
from adapters_kit.tasks.text_classification import TextClassification

RELEVANCE = "relevance"
_CHARACTERS = 1 << 20  # of pairs tokenized in one call


class Reranking(TextClassification):
    """A number from 0 to 1 for a query and a document; the loss is binary cross-entropy.

    Rows are a query, a document and how relevant it is, or a query with lists of relevant and of other documents.
    """

    name = "reranking"
    needs: ClassVar[tuple[tuple[str, ...], ...]] = (("query", "document", "label"), ("query", "positive", "negative"))
    optional: ClassVar[tuple[str, ...]] = ()
    targets = ("label",)
    metric = "ndcg@10"

    def __init__(
        self, recipe: Recipe, columns: Mapping[str, str], labels: list[str] | None = None, notes: Notes | None = None
    ) -> None:
        super().__init__(recipe, columns, labels, notes)
        self.problem = "multi-label"  # one class, which holds or does not: binary cross-entropy
        self.metric = "ndcg@10"
        self.most: float = 1.0

    @classmethod
    def refuse(cls, data: Dataset, given: Mapping[str, str]) -> None:
        """Nothing: what a row holds is looked at by `fit`."""

    @property
    def target(self) -> str:
        """The column of labels, or of the relevant documents."""
        return self.columns.get("label") or self.columns["positive"]

    def unlabelled(self, data: Dataset) -> np.ndarray:
        """Rows that say of no document whether it is relevant."""
        if "label" in self.columns:
            return np.flatnonzero(np.isnan(self._labels(data)))
        empty: tuple[Any, ...] = (None, "", [])
        both = zip(cells(data, self.columns["positive"]), cells(data, self.columns["negative"]), strict=True)
        none = (right in empty and wrong in empty for right, wrong in both)
        return np.flatnonzero(np.fromiter(none, bool, len(data)))

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Checks texts and labels. Raises DataError."""
        parts = (train,) if test is None else (train, test)
        highest: list[float] = []
        for data in parts:
            labels = np.fromiter((label for _, _, _, label in self._pairs(data)), np.float64)
            if data is train and labels.min() == labels.max():
                raise DataError(
                    f"All {len(labels):,} pairs of the training data are {'relevant' if labels[0] else 'not relevant'}"
                    f" (column {self.target!r}): a reranker learns from both."
                )
            highest.append(float(labels.max()))
        self.most = max(highest)
        if self.most > 1:
            self.notes.say(
                f"Column {self.target!r} holds up to {self.most:g}: labels are divided by it, so that the most "
                "relevant is 1.",
                labels_divided=1,
            )
        self.labels = [RELEVANCE]

    def strata(self, data: Dataset) -> Sequence[Any] | None:
        """None: rows of one query stay together, see `groups`."""
        return None

    def groups(self, data: Dataset) -> np.ndarray | None:
        """The query of each row, by number: held out are whole queries, or there would be no list to rank."""
        return numbers_of_texts(cells(data, self.columns["query"])) if "label" in self.columns else None

    def found(self) -> dict[str, Any]:
        """What the same run needs again."""
        return Task.found(self)

    def _labels(self, data: Dataset) -> np.ndarray:
        found = numbers_of(data, self.columns["label"], "Reranking", truths=True)
        below = np.flatnonzero(found < 0)
        if len(below):
            row = int(below[0])
            raise DataError(
                f"How relevant a document is, is 0 or more; column {self.columns['label']!r}, row {row + 1} holds "
                f"{found[row]:g}."
            )
        return found

    def _pairs(self, data: Dataset, *, answers: bool = True) -> Iterator[tuple[int, str, str, float]]:
        """(row, query, document, label) of every pair, checked; the label is 0 where nobody asks for it."""
        listed = "document" not in self.columns
        labels = self._labels(data) if answers and not listed else None
        names = [self.columns[role] for role in ("query", "document", "positive", "negative") if role in self.columns]
        for start, part in in_parts(data, names):
            for offset, query in enumerate(part[self.columns["query"]]):
                row = start + offset
                for role in ("positive", "negative") if listed else ("document",):
                    value = part[self.columns[role]][offset]
                    texts = value if listed and isinstance(value, list) else [value]
                    for text in texts if value is not None or not listed else ():
                        check_text([query], row, self.columns["query"], "query", data.column_names)
                        check_text([text], row, self.columns[role], role, data.column_names)
                        label = float(role == "positive") if listed else 0.0 if labels is None else float(labels[row])
                        yield row, query, text, label

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """Ids and token types of each pair; `query` (2,) int32 tells equal queries."""
        features = Encoded(small=("input_ids", "token_type_ids"))
        cut = count = size = 0
        pairs: list[tuple[int, str, str, float]] = []

        def write() -> int:
            queries, documents = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
            encoded = self.processor(queries, documents, truncation=True, max_length=self.max_length)
            for place, (row, query, _, label) in enumerate(pairs):
                feature = {"row": row, "input_ids": compact(encoded["input_ids"][place]), "query": digest(query)}
                if "token_type_ids" in encoded:
                    feature["token_type_ids"] = compact(encoded["token_type_ids"][place])
                if answers:
                    feature["labels"] = label / self.most
                features.append(feature)
            return number_cut(self.processor, [queries, documents], encoded["input_ids"], self.max_length)

        for pair in self._pairs(data, answers=answers):
            pairs.append(pair)
            size += len(pair[1]) + len(pair[2])
            if len(pairs) == AT_ONCE or size > _CHARACTERS:
                cut, count, pairs, size = cut + write(), count + len(pairs), [], 0
        if pairs:
            cut, count = cut + write(), count + len(pairs)
        if cut:
            self.notes.say(
                f"{cut:,} of {count:,} pairs are longer than max_length {self.max_length}: the longer text of each was "
                "cut.",
                texts_cut=cut,
            )
        if answers:
            queries, labels = features.values("query").view(np.int64), features.values("labels")
            order = np.argsort(queries, kind="stable")
            same, other = np.diff(queries[order]) == 0, np.diff(labels[order]) != 0
            self.metric = "ndcg@10" if (same & other).any() else "average_precision"
        return features

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """Ids, mask and labels, float32 (rows, 1)."""
        batch = super().collate(features)
        if "labels" in batch:
            batch["labels"] = batch["labels"][:, None]
        return batch

    def predict(self, model: nn.Module, data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        """The score of each document; of rows with lists, their documents from the best to the worst."""
        features = self.encode(data, answers=False)
        scores = [round(float(result[0]), 6) for result in self.run(model, features, batch_size)]
        pairs = list(self._pairs(data, answers=False))
        if "document" in self.columns:
            return [{"query": p[1], "document": p[2], "score": s} for p, s in zip(pairs, scores, strict=True)]
        found: dict[int, dict[str, Any]] = {}
        for (row, query, document, _), score in zip(pairs, scores, strict=True):
            told = found.setdefault(row, {"query": query, "documents": []})
            told["documents"].append({"document": document, "score": score})
        for told in found.values():
            told["documents"].sort(key=lambda one: -one["score"])
        queries = data[self.columns["query"]]
        return [found.get(row, {"query": queries[row], "documents": []}) for row in range(len(data))]

    def _rankings(self, scores: np.ndarray, features: Features) -> metrics.Rankings:
        """Of the queries that have documents of more than one relevance."""
        lists: dict[bytes, list[int]] = {}
        for place, feature in enumerate(features):
            lists.setdefault(feature["query"].tobytes(), []).append(place)
        rankings = metrics.Rankings()
        for places in lists.values():
            relevant = np.asarray([features[place]["labels"] for place in places])
            if len(set(relevant)) > 1:
                rankings.add(scores[places], relevant)
        return rankings

    def score(self, results: Sequence[np.ndarray], features: Features) -> dict[str, float]:
        """Cross-entropy, average precision over all pairs; and how the documents of each query are ranked."""
        scores = np.asarray([result[0] for result in results], dtype=np.float64)
        labels = np.asarray([feature["labels"] for feature in features])
        clipped = np.clip(scores, 1e-12, 1 - 1e-12)
        loss = -(labels * np.log(clipped) + (1 - labels) * np.log(1 - clipped)).mean()
        told = {"loss": float(loss), "average_precision": metrics.average_precision(scores, labels)}
        rankings = self._rankings(scores, features)
        return {**told, **(rankings.means() if len(rankings) else {})}
