"""Extractive question answering: the span of the context that answers, or none; long contexts are read in windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Features, Task, compact, of_the_text, pad_inputs
from adapters_kit.tasks.encoded import Encoded
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.rows import check_text, in_parts
from adapters_kit.tasks.slow_tokens import encode_pair, is_slow
from adapters_kit.tasks.text_scores import exact_match, overlap_of
from adapters_kit.tasks.turns import written_out

_LONGEST_ANSWER = 30  # tokens
_CANDIDATES = 20  # starts and ends looked at
_ROOM = 8  # tokens of context that a window must hold at least
Span = tuple[int, str]  # position in the context, text


class Window(NamedTuple):
    """A question with a piece of its context, tokenized.

    Attributes:
        ids, types: (tokens,); types are None for tokenizers that make none.
        offsets: (tokens, 2), places in the context.
        inside: (tokens,), whether a token is of the context.
    """

    row: int
    """Number of the question's row."""
    ids: Sequence[int]
    types: Sequence[int] | None
    offsets: np.ndarray
    inside: np.ndarray


class QuestionAnswering(Task):
    """The answer as a piece of the context.

    Attributes:
        unanswerable: whether questions may have no answer: then an empty answer is one, where the model is surer of the
            first token than of the best span (SQuAD 2). The recipe's, or whether the training data has such questions.
    """

    name = "question-answering"
    needs = (("question", "context", "answers"),)
    targets = ("answers",)
    metric = "f1"
    higher_is_better = True

    def __init__(
        self, recipe: Recipe, columns: Mapping[str, str], labels: list[str] | None = None, notes: Notes | None = None
    ) -> None:
        super().__init__(recipe, columns, labels, notes)
        self.unanswerable = bool(recipe.unanswerable)

    def found(self) -> dict[str, Any]:
        """Whether questions may have no answer, too: predictions have no answers to tell it from."""
        return {**super().found(), "unanswerable": self.unanswerable}

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Checks that every answer stands in its context; learns whether there are questions without one."""
        names = list(self.columns.values())
        without = several = 0
        for data in (train,) if test is None else (train, test):
            for start, part in in_parts(data, names):
                for role in ("question", "context"):
                    check_text(part[self.columns[role]], start, self.columns[role], role, data.column_names)
                for index in range(len(part[names[0]])):
                    row = {name: values[index] for name, values in part.items()}
                    spans = spans_of(row, self.columns, start + index)
                    without += not spans and data is train
                    context = row[self.columns["context"]]
                    several += not _placed(row[self.columns["answers"]]) and any(context.count(t) > 1 for _, t in spans)
        if several:
            self.notes.say(
                f"{several:,} answers without a position stand several times in their context; the first place is "
                "taken for the right one. answer_start tells it.",
                answers_placed_first=several,
            )
        if self.recipe.unanswerable is None:
            self.unanswerable = without > 0
        elif without and not self.unanswerable:
            raise DataError(
                f"{without:,} training rows have no answer, and the recipe says unanswerable: false. Take them out, "
                "or leave "
                "that key out."
            )

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """Windows: ids, places in the context and, with `answers`, the first and last token of the answer.

        Raises:
            DataError: a question that leaves no room for its context, by its row.
        """
        features = Encoded(small=("input_ids", "token_type_ids"))
        names = [self.columns[role] for role in ("question", "context", *(["answers"] if answers else []))]
        outside, long = 0, set()
        for start, part in in_parts(data, names):
            questions, contexts = (
                check_text(part[self.columns[role]], start, self.columns[role], role, data.column_names)
                for role in ("question", "context")
            )
            held: set[int] = set()
            found: dict[int, list[Span]] = {}
            if answers:
                rows = ({name: values[i] for name, values in part.items()} for i in range(len(questions)))
                found = {start + i: spans_of(row, self.columns, start + i) for i, row in enumerate(rows)}
            for window in self._windows(questions, contexts, start):
                feature = {
                    "row": window.row,
                    "input_ids": compact(window.ids),
                    "offsets": window.offsets,
                    "inside": window.inside,
                    "context": contexts[window.row - start],
                    "cls": self._first(window.ids),
                }
                if window.types is not None:
                    feature["token_type_ids"] = compact(window.types)
                if answers:
                    spans = found[window.row]
                    feature["answers"] = tuple(text for _, text in spans)
                    feature["span"] = first, last = _token_span(feature, spans)
                    if (first, last) != (feature["cls"],) * 2:
                        held.add(window.row)
                    if last - first >= _LONGEST_ANSWER:
                        long.add(window.row)
                features.append(feature)
            outside += sum(bool(spans) and row not in held for row, spans in found.items())
        if long:
            self.notes.say(
                f"{len(long):,} of {len(data):,} answers are longer than the {_LONGEST_ANSWER} tokens that an answer "
                "of the model may have: it can give a part of them.",
                answers_long=len(long),
            )
        if outside:
            self.notes.say(
                f"{outside:,} of {len(data):,} answers lie across the edge of every window of {self.max_length} "
                "tokens and teach "
                "nothing. Raise training.max_length.",
                answers_cut=outside,
            )
        return features

    def _first(self, ids: Sequence[int]) -> int:
        """The place that stands for "no answer": of the [CLS] token, or the first."""
        cls = getattr(self.processor, "cls_token_id", None)
        return list(ids).index(cls) if cls is not None and cls in ids else 0

    def _windows(self, questions: Sequence[str], contexts: Sequence[str], start: int) -> Iterator[Window]:
        stride = self.max_length // 4
        if is_slow(self.processor):
            typed = "token_type_ids" in self.processor.model_input_names
            for row, (question, context) in enumerate(zip(questions, contexts, strict=True), start):
                windows = encode_pair(self.processor, question, context, self.max_length, stride)
                if not windows:
                    raise self._too_long(row, len(self.processor(question)["input_ids"]))
                for ids, types, offsets, inside in windows:
                    yield Window(row, ids, types if typed else None, offsets, inside)
            return
        asked = self.processor(list(questions), add_special_tokens=False)["input_ids"]
        room = self.max_length - self.processor.num_special_tokens_to_add(pair=True)
        for row, ids in enumerate(asked, start):
            if len(ids) > room - _ROOM:
                raise self._too_long(row, len(ids))
        # The windows of one call overlap equally, and by less than what the longest question leaves of a window.
        stride = min(stride, (room - max(map(len, asked))) // 2)
        encoded = self.processor(
            list(questions),
            list(contexts),
            truncation="only_second",
            max_length=self.max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            inside = np.asarray([part == 1 for part in encoded.sequence_ids(window)])
            offsets = np.asarray(encoded["offset_mapping"][window], dtype=np.int32)
            kinds = encoded["token_type_ids"][window] if "token_type_ids" in encoded else None
            yield Window(start + row, encoded["input_ids"][window], kinds, offsets, inside)

    def _too_long(self, row: int, tokens: int) -> DataError:
        more = (
            f"Raise training.max_length (up to {self.longest}), or shorten it."
            if self.longest >= tokens + 2 * _ROOM
            else "Shorten it, or take the row out."
        )
        return DataError(
            f"Row {row + 1}: the question has {tokens} tokens, which leaves no room for its context within max_length "
            f"{self.max_length}. {more}"
        )

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """Ids, mask and the places of the answer, (rows,) int64 each."""
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
        length = batch["input_ids"].shape[1]
        starts, ends = (of_the_text(part, length).float().cpu().numpy() for part in (out.start_logits, out.end_logits))
        lengths = batch["attention_mask"].sum(-1).tolist()
        return [(s[:n], e[:n]) for s, e, n in zip(starts, ends, lengths, strict=True)]

    def score(self, results: Sequence[Any], features: Features) -> dict[str, float]:
        """Loss of the places, exact match and F1 as in SQuAD.

        With unanswerable questions also both scores of the questions that have an answer and of those that have none,
        and the best F1 with the `no_answer_threshold` that gives it, as in SQuAD 2.
        """
        losses = []
        truth: dict[int, list[str]] = {}
        for (start, end), feature in zip(results, features, strict=True):
            truth[feature["row"]] = feature["answers"]
            for logits, at in ((start, feature["span"][0]), (end, feature["span"][1])):
                top = logits.max()
                losses.append(float(top + np.log(np.exp(logits - top).sum()) - logits[at]))
        best = best_answers(results, features)
        threshold = self.recipe.no_answer_threshold if self.unanswerable else np.inf
        guesses = {row: answer.under(threshold) for row, answer in best.items()}
        exact = {row: exact_match(guesses[row], texts) for row, texts in truth.items()}
        overlap = {row: overlap_of(guesses[row], texts) for row, texts in truth.items()}
        scores = {
            "loss": float(np.mean(losses)),
            "exact_match": float(np.mean(list(exact.values()))),
            "f1": float(np.mean(list(overlap.values()))),
        }
        if not self.unanswerable:
            return scores
        for name, rows in (
            ("has_answer", [row for row, texts in truth.items() if texts]),
            ("no_answer", [row for row, texts in truth.items() if not texts]),
        ):
            if rows:
                scores[f"{name}_exact_match"] = float(np.mean([exact[row] for row in rows]))
                scores[f"{name}_f1"] = float(np.mean([overlap[row] for row in rows]))
        scores["best_f1"], scores["best_f1_threshold"] = _best_threshold(best, truth)
        return scores

    def predict(self, model: nn.Module, data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        """Question, context and answer of every row; an empty answer where there is none."""
        features = self.encode(data, answers=False)
        found = best_answers(self.run(model, features, batch_size), features)
        threshold = self.recipe.no_answer_threshold if self.unanswerable else np.inf
        return [
            {
                "question": data[row][self.columns["question"]],
                "context": data[row][self.columns["context"]],
                "answer": found[row].under(threshold),
            }
            for row in range(len(data))
        ]


class Answer(NamedTuple):
    """The best span of a row, and by how much "no answer" is likelier (nats, as a sum of two logits)."""

    text: str
    """The span; empty where there is none."""
    null_margin: float
    """By how much "no answer" is likelier, in nats."""
    place: tuple[int, int, int]
    """Number of the window, first and last token in it."""

    def under(self, threshold: float) -> str:
        """The text, or nothing if the margin is above `threshold`."""
        return "" if self.null_margin > threshold else self.text


_TEXTS = ("text", "value", "spans")  # keys of the answers' texts: SQuAD's, TriviaQA's, DROP's


def spans_of(row: Mapping[str, Any], columns: Mapping[str, str], index: int) -> list[Span]:
    """The answers of a row as (position in the context, text).

    Takes SQuAD's {"text": [...], "answer_start": [...]}, a list of strings or of {"text": ..., "answer_start": ...},
    TriviaQA's {"value": ...}, DROP's {"spans": [...]}, or one string; without positions the first occurrence in the
    context counts. None, an empty list and an empty text are a question without an answer.

    Raises:
        DataError: an answer that does not stand in the context.
    """
    value, context = row[columns["answers"]], row[columns["context"]]
    if isinstance(value, str) and isinstance(read := written_out(value), Mapping) and set(_TEXTS) & set(read):
        value = read
    if value is None or value == "":
        return []
    if isinstance(value, Mapping):
        key = next((key for key in _TEXTS if key in value), None)
        if key is None:
            raise DataError(
                f"Row {index + 1}: answers are a string, a list of strings or SQuAD's form, not {value!r:.200}."
            )
        texts, starts = value[key], value.get("answer_start")
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
        if starts is None and isinstance(texts, list):
            starts = [None] * len(texts)
    else:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list) and items and all(isinstance(item, Mapping) for item in items):
            texts, starts = [item.get("text") for item in items], [item.get("answer_start") for item in items]
        else:
            texts, starts = items, ([None] * len(items) if isinstance(items, list) else [])
    lists = all(isinstance(given, list | None) for given in (texts, starts))
    if not lists or not all(isinstance(text, str) for text in texts or []):
        raise DataError(
            f"Row {index + 1}: answers are a string, a list of strings or SQuAD's form, not {value!r:.200}."
        )
    if len(texts or []) != len(starts or []):
        raise DataError(f"Row {index + 1}: {len(texts or [])} answers with {len(starts or [])} positions.")
    found = []
    for start, text in zip(starts or [], texts or [], strict=True):
        if not text.strip():
            continue
        at = context.find(text) if start is None else int(start) if str(start).isdecimal() else start
        if not isinstance(at, int) or at < 0 or context[at : at + len(text)] != text:
            there = context.find(text)
            where = "" if start is None else f" at {start!r}"
            hint = f"first stands at {there}; places count characters, from 0" if there >= 0 else "stands nowhere in it"
            raise DataError(
                f"Row {index + 1}: the answer {text!r:.80} does not stand in the context{where}. It {hint}. Mend the "
                "row or leave it out; an answer without answer_start is looked for."
            )
        # A blank at an end of an answer is of no token.
        found.append((at + len(text) - len(text.lstrip()), text.strip()))
    return found


def _placed(value: Any) -> bool:
    """Whether answers come with their positions."""
    value = written_out(value)
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and first.get("answer_start") is not None


def _token_span(feature: Mapping[str, Any], found: Sequence[Span]) -> tuple[int, int]:
    """First and last token of the first answer; the [CLS] token, if this window does not hold it."""
    nowhere = (feature["cls"],) * 2
    if not found:
        return nowhere
    begin, end = found[0][0], found[0][0] + len(found[0][1])
    offsets, inside = feature["offsets"], feature["inside"]
    first = np.flatnonzero(inside & (offsets[:, 0] <= begin) & (offsets[:, 1] > begin))
    last = np.flatnonzero(inside & (offsets[:, 0] < end) & (offsets[:, 1] >= end))
    return (int(first[0]), int(last[-1])) if len(first) and len(last) else nowhere


def best_answers(results: Sequence[Any], features: Features) -> dict[int, Answer]:
    """The best span of each row over all its windows, and by how much no answer is likelier, at its lowest."""
    best: dict[int, tuple[float, str, tuple[int, int, int]]] = {}
    null: dict[int, float] = {}
    for number, ((start, end), feature) in enumerate(zip(results, features, strict=True)):
        row, offsets, cls = feature["row"], feature["offsets"], feature["cls"]
        null[row] = min(null.get(row, np.inf), float(start[cls] + end[cls]))
        allowed = np.where(feature["inside"], 0, -np.inf)
        top_starts = np.argsort(start + allowed)[::-1][:_CANDIDATES]
        top_ends = np.argsort(end + allowed)[::-1][:_CANDIDATES]
        best.setdefault(row, (-np.inf, "", (number, cls, cls)))
        for i in top_starts:
            for j in top_ends:
                if i <= j < i + _LONGEST_ANSWER and feature["inside"][i] and feature["inside"][j]:
                    value = float(start[i] + end[j])
                    if value > best[row][0]:
                        text = feature["context"][offsets[i][0] : offsets[j][1]]
                        best[row] = value, text, (number, int(i), int(j))
    return {row: Answer(text, null[row] - value, place) for row, (value, text, place) in best.items()}


def _best_threshold(best: Mapping[int, Answer], truth: Mapping[int, Sequence[str]]) -> tuple[float, float]:
    """The highest mean F1 that a threshold can give, and that threshold."""
    rows = sorted(truth, key=lambda row: best[row].null_margin)
    total = float(sum(not truth[row] for row in rows))  # everything empty
    highest, threshold = total, -np.inf
    for number, row in enumerate(rows):
        total += overlap_of(best[row].text, truth[row]) - float(not truth[row])
        if total > highest:
            behind = best[rows[number + 1]].null_margin if number + 1 < len(rows) else best[row].null_margin
            highest, threshold = total, (best[row].null_margin + behind) / 2
    if threshold == -np.inf:
        threshold = min((best[row].null_margin for row in rows), default=0.0) - 1.0
    return highest / max(len(rows), 1), float(threshold)
