"""Extractive question answering: the span of the context that answers; long contexts are read in windows."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError
from adapters_kit.tasks.base import Features, Task, compact, pad_inputs

_LONGEST_ANSWER = 30  # tokens
_CANDIDATES = 20  # starts and ends looked at


class QuestionAnswering(Task):
    name = "question-answering"
    needs = (("question", "context", "answers"),)
    targets = ("answers",)
    metric = "f1"
    higher_is_better = True

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        for data in (train, test) if test is not None else (train,):
            for role in ("question", "context"):
                self.text(data, role)
            for index in range(len(data)):
                spans_of(data[index], self.columns, index)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        questions, contexts = self.text(data, "question"), self.text(data, "context")
        encoded = self.processor(
            questions,
            contexts,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.max_length // 4,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        features = []
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            inside = np.asarray([part == 1 for part in encoded.sequence_ids(window)])
            feature = {
                "row": row,
                "input_ids": compact(encoded["input_ids"][window]),
                "offsets": np.asarray(encoded["offset_mapping"][window], dtype=np.int32),
                "inside": inside,
                "context": contexts[row],
            }
            if "token_type_ids" in encoded:
                feature["token_type_ids"] = compact(encoded["token_type_ids"][window])
            if answers:
                found = spans_of(data[row], self.columns, row)
                feature["answers"] = [text for _, text in found]
                feature["span"] = _token_span(feature, found)
            features.append(feature)
        return features

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        batch = pad_inputs(features, self.processor)
        if "span" in features[0]:
            spans = torch.tensor([feature["span"] for feature in features])
            batch["start_positions"], batch["end_positions"] = spans[:, 0], spans[:, 1]
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Logits of start and end, (tokens,) each, of each window."""
        inputs = {key: value for key, value in batch.items() if not key.endswith("_positions")}
        out = model(**inputs)
        starts, ends = out.start_logits.float().cpu().numpy(), out.end_logits.float().cpu().numpy()
        lengths = batch["attention_mask"].sum(-1).tolist()
        return [(s[:n], e[:n]) for s, e, n in zip(starts, ends, lengths, strict=True)]

    def score(self, results: Sequence[Any], features: Features) -> dict[str, float]:
        losses = []
        for (start, end), feature in zip(results, features, strict=True):
            for logits, at in ((start, feature["span"][0]), (end, feature["span"][1])):
                top = logits.max()
                losses.append(float(top + np.log(np.exp(logits - top).sum()) - logits[at]))
        guesses = best_answers(results, features)
        truth = {feature["row"]: feature["answers"] for feature in features}
        exact = [
            max((plain(guesses[row]) == plain(t) for t in texts), default=not guesses[row])
            for row, texts in truth.items()
        ]
        overlap = [
            max((word_f1(guesses[row], t) for t in texts), default=float(not guesses[row]))
            for row, texts in truth.items()
        ]
        return {
            "loss": float(np.mean(losses)),
            "exact_match": float(np.mean(exact)),
            "f1": float(np.mean(overlap)),
        }

    def predict(self, model: nn.Module, data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        features = self.encode(data, answers=False)
        found = best_answers(self.run(model, features, batch_size), features)
        return [
            {
                "question": data[row][self.columns["question"]],
                "context": data[row][self.columns["context"]],
                "answer": found[row],
            }
            for row in range(len(data))
        ]


def spans_of(row: Mapping[str, Any], columns: Mapping[str, str], index: int) -> list[tuple[int, str]]:
    """The answers of a row as (position in the context, text).

    Takes SQuAD's {"text": [...], "answer_start": [...]}, a list of strings, or one string; without positions the first
    occurrence in the context counts. An empty list is a question without an answer.
    """
    value, context = row[columns["answers"]], row[columns["context"]]
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
        found = list(zip(starts or [], texts or [], strict=True))
    else:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"Row {index + 1}: answers are a string, a list of strings or SQuAD's form, not {value!r}.")
        found = [(context.find(text), text) for text in texts]
    for start, text in found:
        if start is None or start < 0 or context[start : start + len(text)] != text:
            raise DataError(f"Row {index + 1}: the answer {text!r} does not stand in the context at {start}.")
    return found


def _token_span(feature: Mapping[str, Any], found: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0), the [CLS] token, if this window does not hold it."""
    if not found:
        return 0, 0
    begin, end = found[0][0], found[0][0] + len(found[0][1])
    offsets, inside = feature["offsets"], feature["inside"]
    first = np.flatnonzero(inside & (offsets[:, 0] <= begin) & (offsets[:, 1] > begin))
    last = np.flatnonzero(inside & (offsets[:, 0] < end) & (offsets[:, 1] >= end))
    return (int(first[0]), int(last[0])) if len(first) and len(last) else (0, 0)


def best_answers(results: Sequence[Any], features: Features) -> dict[int, str]:
    """The best span of each row over all its windows."""
    best: dict[int, tuple[float, str]] = {}
    for (start, end), feature in zip(results, features, strict=True):
        row, offsets = feature["row"], feature["offsets"]
        allowed = np.where(feature["inside"], 0, -np.inf)
        top_starts = np.argsort(start + allowed)[::-1][:_CANDIDATES]
        top_ends = np.argsort(end + allowed)[::-1][:_CANDIDATES]
        best.setdefault(row, (-np.inf, ""))
        for i in top_starts:
            for j in top_ends:
                if i <= j < i + _LONGEST_ANSWER and feature["inside"][i] and feature["inside"][j]:
                    value = float(start[i] + end[j])
                    if value > best[row][0]:
                        best[row] = value, feature["context"][offsets[i][0] : offsets[j][1]]
    return {row: text for row, (_, text) in best.items()}


def plain(text: str) -> str:
    """As SQuAD compares: lower case, no punctuation, no articles, single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(guess: str, truth: str) -> float:
    """F1 of the words that two answers share."""
    left, right = plain(guess).split(), plain(truth).split()
    shared = sum((Counter(left) & Counter(right)).values())
    if not left or not right:
        return float(left == right)
    return 2 * shared / (len(left) + len(right))
