"""Text classification: one label, several labels, or a number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, LargeList
from datasets import List as ListFeature
from torch import nn

from adapters_kit.errors import DataError
from adapters_kit.recipe import Recipe
from adapters_kit.tasks import metrics
from adapters_kit.tasks.base import Features, Task, outputs_of, pad_inputs, same_padding
from adapters_kit.tasks.encoded import Encoded
from adapters_kit.tasks.labels import class_names, declared_names, lists_of, named_labels, places, separated
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.numbers import numbers_of
from adapters_kit.tasks.rows import cells, check_text, in_parts, number_cut, truncated_ids

_LOSSES = {  # transformers chooses the loss by this field; left empty it would guess from the labels' dtype
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}


_NAMES_OF_LABELS = {"label", "labels", "class", "category", "sentiment", "rating", "stars", "score", "gold_label"}


class TextClassification(Task):
    """A class, a set of classes or a number for a text.

    Attributes:
        problem: "single-label", "multi-label" or "regression": the recipe's, or what the labels look like.
    """

    name = "text-classification"
    needs: ClassVar[tuple[tuple[str, ...], ...]] = (("text", "label"),)
    optional: ClassVar[tuple[str, ...]] = ("text_pair",)
    metric = "accuracy"
    higher_is_better = True

    def __init__(
        self, recipe: Recipe, columns: Mapping[str, str], labels: list[str] | None = None, notes: Notes | None = None
    ) -> None:
        super().__init__(recipe, columns, labels, notes)
        self.problem: str = recipe.problem or "single-label"
        self._apart: Callable[[str], list[str]] | None = None
        self._marked: bool | None = None  # whether a row says 0 or 1 of each class, as the training rows show
        self._end: str | None = None
        self._side = "right"
        self._set_metric()

    @classmethod
    def refuse(cls, data: Dataset, given: Mapping[str, str]) -> None:
        """Refuses a column of 0 and 1 a class, where no column holds the labels. Raises DataError."""
        names = {name.lower().strip() for name in data.column_names}
        if "label" in given or names & {
            "label",
            "labels",
            "class",
            "category",
            "sentiment",
            "rating",
            "stars",
            "score",
        }:
            return
        first = data.select(range(min(len(data), 1000)))[:]
        marks = [name for name in data.column_names if set(map(str, first[name])) <= {"0", "1", "True", "False"}]
        if len(marks) > 1 and len(data) > 1:
            raise DataError(
                f"No column holds labels; {', '.join(marks)} say 0 or 1 of a class each. Give every row the list of "
                "its classes: import pandas; frame = pandas.read_csv(FILE); frame['labels'] = [[name for name in "
                f"{marks} if str(row[name]) in ('1', 'True')] for row in frame.to_dict('records')]; "
                "frame.to_parquet('labelled.parquet'). Then data: labelled.parquet, problem: multi-label"
            )

    def _set_metric(self) -> None:
        self.metric = {"multi-label": "f1", "regression": "pearson"}.get(self.problem, type(self).metric)

    def unlabelled(self, data: Dataset) -> Sequence[int] | np.ndarray:
        """Rows without a label, or without a number for a regression; an empty list of labels is one."""
        problem, column = self._guess(data), self.columns["label"]
        if problem == "regression":
            return np.flatnonzero(np.isnan(numbers_of(data, column, "Regression")))
        if problem == "multi-label":
            lists = lists_of(data, column, self.recipe.labels)
            text = not _is_list(data, column)
            none = (names is None or None in names or (text and not names) for names in lists)
            return np.flatnonzero(np.fromiter(none, bool, len(data)))
        return named_labels(data, column, self.recipe.labels).rows_of(None)

    def _guess(self, data: Dataset) -> str:
        guess = "multi-label" if _is_list(data, self.columns["label"]) else "single-label"
        return self.recipe.problem or guess

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Checks the texts; learns the kind of target and the classes."""
        self.problem = self._guess(train)
        self._set_metric()
        parts = (train,) if test is None else (train, test)
        roles = [role for role in ("text", "text_pair") if role in self.columns]
        for data in parts:
            empty = 0
            for start, part in in_parts(data, [self.columns[role] for role in roles]):
                for role in roles:
                    texts = check_text(part[self.columns[role]], start, self.columns[role], role, data.column_names)
                    empty += sum(not text.strip() for text in texts) if role == "text" else 0
            if empty:
                where = "training data" if data is train else "held-out data"
                self.notes.say(f"{where}: {empty:,} of {len(data):,} texts are empty.", empty_texts=empty)
        if self.problem == "regression":
            self.labels = ["value"]
            return
        column = self.columns["label"]
        if self.problem == "multi-label" and not _is_list(train, column):
            self._apart = separated(named_labels(train, column, self.recipe.labels), self.notes, column)
        guessed = self.recipe.problem is None and self.problem == "multi-label"
        if guessed and all(len(names or ()) < 2 for names in cells(train, column)):
            self.notes.say(
                f"Column {column!r} holds lists, each of one label: problem: multi-label is taken: a row may have "
                "several. For one label a row, write it without a list."
            )
        self._marked = places(train, column, self.recipe.labels) is not None
        seen = [self._seen(data) for data in parts]
        declared = declared_names(train, column)
        held_out = seen[1] if test is not None else set()
        least = 1 if self.problem == "multi-label" and "" in seen[0] else 2
        names = seen[0] - {""}, held_out - {""}
        self.labels = class_names(*names, self.recipe.labels, column, self.notes, declared, least=least)

    def _seen(self, data: Dataset) -> set[str]:
        """The labels that occur; an empty one where a row has none."""
        if self.problem == "multi-label":
            return {name for names in self._sets(data) for name in names or [""]}
        return {name or "" for name in named_labels(data, self.columns["label"], self.recipe.labels).values}

    def _sets(self, data: Dataset) -> Iterator[list[str]]:
        """The labels of each row, under multi-label."""
        column = self.columns["label"]
        if not _is_list(data, column):
            named = named_labels(data, column, self.recipe.labels)
            apart = self._apart or (lambda name: [name])
            lists = [apart(name) if name else [] for name in named.values]  # one for all rows with the same
            return (lists[place] for place in named.places)
        if self._marked is not False and (names := places(data, column, self.recipe.labels)) is not None:
            return ([name for name, mark in zip(names, row, strict=True) if mark] for row in cells(data, column))
        return ([name for name in row or () if name] for row in lists_of(data, column, self.recipe.labels))

    def strata(self, data: Dataset) -> Sequence[Any] | None:
        """The class of each row; None where a row has not exactly one."""
        if self.problem != "single-label":
            return None
        return named_labels(data, self.columns["label"], self.recipe.labels)

    def found(self) -> dict[str, Any]:
        """The problem too: predictions have no labels to tell it from."""
        return {**super().found(), "problem": self.problem}

    def bind(self, processor: Any, model: nn.Module) -> None:
        """A checkpoint with a head for these very classes keeps its own order of them."""
        super().bind(processor, model)
        self.labels = outputs_of(model)

    def adapt(self, model: nn.Module) -> None:
        """The loss, and one padding token for tokenizer and model: a decoder reads the token before the padding.

        An encoder-decoder reads the end of the text, which no row may have more often than others; and some encoders
        (XLNet) the very last token, padding or not.
        """
        model.config.problem_type = _LOSSES[self.problem]
        if model.config.is_encoder_decoder:
            _pad_without_end(self.processor, model)
        same_padding(self.processor, model, self.recipe.model)
        self._end = self.processor.eos_token if model.config.is_encoder_decoder else None
        self._side = "left" if getattr(model.config, "summary_type", None) == "last" else "right"

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """Ids, token types of pairs, and the target: a class number, (classes,) zeros and ones, or a number."""
        roles = [role for role in ("text", "text_pair") if role in self.columns]
        names = [self.columns[role] for role in roles]
        features = Encoded(small=("input_ids", "token_type_ids"))
        targets = self._targets(data) if answers else None
        cut = ends = 0
        for start, part in in_parts(data, names):
            texts = [
                check_text(part[name], start, name, role, data.column_names)
                for role, name in zip(roles, names, strict=True)
            ]
            if self._end:
                ends += sum(any(self._end in text for text in row) for row in zip(*texts, strict=True))
                texts = [[text.replace(self._end, " ") for text in column] for column in texts]
            if len(texts) == 1:
                encoded = {"input_ids": truncated_ids(self.processor, texts[0], self.max_length)}
            else:
                encoded = self.processor(*texts, truncation=True, max_length=self.max_length)
            cut += number_cut(self.processor, texts, encoded["input_ids"], self.max_length)
            rows = range(start, start + len(texts[0]))
            made: dict[str, Any] = {
                "row": rows,
                **{key: encoded[key] for key in ("input_ids", "token_type_ids") if key in encoded},
            }
            features.extend(made if targets is None else {**made, "labels": list(islice(targets, len(rows)))})
        if ends:
            self.notes.say(
                f"{ends:,} of {len(data):,} texts hold {self._end!r}, by which the model's head finds the end of a "
                "text: it was left out of them.",
                ends_left_out=ends,
            )
        if cut:
            more = " training.max_length can be raised." if self.longest > self.max_length else ""
            side = "beginning" if getattr(self.processor, "truncation_side", "right") == "left" else "end"
            self.notes.say(
                f"{cut:,} of {len(data):,} texts are longer than max_length {self.max_length}: their {side} was "
                f"cut.{more}",
                texts_cut=cut,
            )
        return features

    def _targets(self, data: Dataset) -> Iterator[Any]:
        """What is learned of each row, one after the other."""
        if self.problem == "regression":
            return map(float, numbers_of(data, self.columns["label"], "Regression"))
        labels = self.labels or []
        number = {name: index for index, name in enumerate(labels)}
        if self.problem == "single-label":
            return self._numbered(data, number)
        unknown = sorted(self._seen(data) - {"", *number})
        if unknown:
            raise self._unknown(unknown)
        return (
            np.isin(np.arange(len(labels)), [number[name] for name in names]).astype(np.float32)
            for names in self._sets(data)
        )

    def _numbered(self, data: Dataset, number: Mapping[str, int]) -> Iterator[int]:
        """The class of each row by its number."""
        named = named_labels(data, self.columns["label"], self.recipe.labels)
        if unknown := sorted(str(name) for name in named.values if name is not None and name not in number):
            raise self._unknown(unknown)
        missing = named.rows_of(None)
        if len(missing):
            raise DataError(
                f"Column {self.columns['label']!r}: row {missing[0] + 1} has no label, which a score needs."
            )
        return (number[named.values[place]] for place in named.places)

    def _unknown(self, names: Sequence[str]) -> DataError:
        column = self.columns["label"]
        return DataError(
            f"Column {column!r} has labels that the model does not know: {names[:10]}; it knows {self.labels}."
        )

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """Ids, mask and labels: (rows,) int64, or float32 of (rows, classes) or (rows,)."""
        batch = pad_inputs(features, self.processor, self._side)
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
        """See `metrics`."""
        predicted = np.stack(results).astype(np.float64)
        labels = np.asarray([feature["labels"] for feature in features])
        if self.problem == "regression":
            return metrics.regression(predicted[:, 0], labels)
        score = metrics.classification if self.problem == "single-label" else metrics.multi_label
        return score(predicted, labels)

    def show(self, result: np.ndarray, row: Mapping[str, Any]) -> dict[str, Any]:
        """The texts, and the label with its probability, the labels with all of them, or the value."""
        labels = self.labels or []
        shown: dict[str, Any] = {r: row[self.columns[r]] for r in ("text", "text_pair") if r in self.columns}
        if self.problem == "regression":
            return {**shown, "value": float(result[0])}
        if self.problem == "multi-label":
            return {
                **shown,
                "labels": [name for name, p in zip(labels, result, strict=True) if p >= 0.5],
                "scores": {name: round(float(p), 6) for name, p in zip(labels, result, strict=True)},
            }
        best = int(result.argmax())
        return {**shown, "label": labels[best], "score": round(float(result[best]), 6)}


def _pad_without_end(tokenizer: Any, model: nn.Module) -> None:
    """Lets a tokenizer pad with another token than that of the end, by which the head finds the end of a text."""
    own = getattr(model.config, "pad_token_id", None)
    others = (own, tokenizer.unk_token_id)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        pad = next((token for token in others if token not in (None, tokenizer.eos_token_id)), None)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad) if pad is not None else tokenizer.pad_token


def _is_list(data: Dataset, column: str) -> bool:
    return isinstance(data.features[column], ListFeature | LargeList | list)
