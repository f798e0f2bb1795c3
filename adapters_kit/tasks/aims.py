"""What is explained of a model's answer: one number a row, and the inputs that it comes from, by task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import log_softmax, logsigmoid

from adapters_kit.errors import DataError
from adapters_kit.tasks.base import Features, Task, autocast, of_the_text
from adapters_kit.tasks.question_answering import best_answers

LOG_P, OUTPUT = "log-probability", "output"


@dataclass(frozen=True)
class Aim:
    """One number that the model gives for one row.

    Attributes:
        row: the row's number.
        of: what was answered: a class, the words of an answer, a tag.
        unit: LOG_P (nats), or OUTPUT where the answer is a number.
        batch: what the model is called with, one row, without labels but for a written answer's.
        value: the model's outputs for any number of rows like this one -> the number of each, (rows,) float32.
        read: how many of the first tokens are explained; None means all of them. What stands behind is the answer.
    """

    row: int
    of: str
    unit: str
    batch: dict[str, torch.Tensor]
    value: Callable[[Any], torch.Tensor]
    read: int | None = None


def check_aims(name: str) -> None:
    """Refuses tasks whose answers are not explained.

    Raises:
        DataError: naming those that are.
    """
    if name not in _AIMS:
        raise DataError(f"explain: answers of {name} are not explained; of these tasks they are: {', '.join(_AIMS)}.")


def aims(task: Task, model: nn.Module, data: Dataset) -> Iterator[Aim]:
    """Every number of every row that is explained, in the order of the rows."""
    features = task.encode(data, answers=False)
    task.check_ids(features)
    yield from _AIMS[task.name](task, model, features, data)


def _one(task: Task, model: nn.Module, feature: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    batch = task.collate([dict(feature)])
    return {key: tensor.to(device) for key, tensor in batch.items() if key not in ("row", "labels")}


def _of_a_class(task: Task, model: nn.Module, features: Features, data: Dataset) -> Iterator[Aim]:
    labels, problem = task.labels or [], getattr(task, "problem", "single-label")
    for feature, result in zip(features, task.run(model, features, 16), strict=True):
        batch = _one(task, model, feature)
        if problem == "regression":
            yield Aim(feature["row"], "value", OUTPUT, batch, lambda out: out.logits.float()[:, 0])
            continue
        chosen = [int(result.argmax())]
        if problem == "multi-label":
            chosen = [int(index) for index in np.flatnonzero(result >= 0.5)] or chosen
        log_p = logsigmoid if problem == "multi-label" else lambda logits: log_softmax(logits, -1)
        for index in chosen:

            def value(out: Any, index: int = index, log_p: Callable[..., Any] = log_p) -> torch.Tensor:
                return log_p(out.logits.float())[:, index]

            yield Aim(feature["row"], labels[index], LOG_P, batch, value)


def _of_tags(task: Any, model: nn.Module, features: Features, data: Dataset) -> Iterator[Aim]:
    """Every word whose tag is not O."""
    for feature, result in zip(features, task.run(model, features, 16), strict=True):
        shown = task.show(result, data[feature["row"]])
        ((_, owner),) = task._tokens([shown["tokens"]])
        batch = _one(task, model, feature)
        length = batch["input_ids"].shape[1]
        for word, (text, tag) in enumerate(zip(shown["tokens"], shown["tags"], strict=True)):
            if tag not in ("", "O"):

                def value(out: Any, at: int = owner.index(word), tag: int = task.labels.index(tag)) -> torch.Tensor:
                    return log_softmax(of_the_text(out.logits, length)[:, at].float(), -1)[:, tag]  # noqa: B023

                yield Aim(feature["row"], f"{text}: {tag}", LOG_P, batch, value)


def _of_a_span(task: Any, model: nn.Module, features: Features, data: Dataset) -> Iterator[Aim]:
    """The answer's two ends in the window that holds it; of no answer, those of the token that stands for it."""
    results = task.run(model, features, 16)
    threshold = task.recipe.no_answer_threshold if task.unanswerable else np.inf
    for row, found in best_answers(results, features).items():
        text, (window, *ends) = found.under(threshold), found.place
        if not text:
            mine = [number for number, feature in enumerate(features) if feature["row"] == row]
            cls = [features[number]["cls"] for number in mine]
            null = [results[n][0][at] + results[n][1][at] for n, at in zip(mine, cls, strict=True)]
            window = mine[int(np.argmin(null))]
            ends = [features[window]["cls"]] * 2
        batch = _one(task, model, {key: value for key, value in features[window].items() if key != "span"})
        length = batch["input_ids"].shape[1]

        def value(out: Any, ends: list[int] = ends, length: int = length) -> torch.Tensor:
            logits = [of_the_text(part, length).float() for part in (out.start_logits, out.end_logits)]
            return torch.stack([log_softmax(part, -1)[:, at] for part, at in zip(logits, ends, strict=True)]).sum(0)

        yield Aim(row, text or "(no answer)", LOG_P, batch, value)


def _of_a_written_answer(task: Any, model: nn.Module, features: Features, data: Dataset) -> Iterator[Aim]:
    """The whole answer, as `predict` writes it: the sum of its tokens' log-probabilities, given the prompt."""
    both = bool(model.config.is_encoder_decoder)
    for feature in features:
        batch = _one(task, model, feature)
        limit = task.new_tokens if both else task.limits.answer
        device, length = batch["input_ids"].device, batch["input_ids"].shape[1]
        with torch.no_grad(), autocast(model, device):
            made = model.generate(**batch, max_new_tokens=limit, do_sample=False, num_beams=1)
        ids = made[:, 1 if both else length :]
        text = task.processor.decode(ids[0], skip_special_tokens=True).strip()
        if not ids.shape[1]:
            continue
        if both:
            asked = {**batch, "labels": ids}
        else:
            whole = torch.cat([batch["input_ids"], ids], 1)
            asked = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}

        def value(out: Any, ids: torch.Tensor = ids, both: bool = both) -> torch.Tensor:
            logits = out.logits[:, : ids.shape[1]] if both else out.logits[:, -ids.shape[1] - 1 : -1]
            log_p = log_softmax(logits.float(), -1)
            return log_p.gather(-1, ids.expand(len(log_p), -1)[..., None])[..., 0].sum(-1)

        yield Aim(feature["row"], text, LOG_P, asked, value, None if both else length)


_AIMS: dict[str, Callable[[Any, nn.Module, Features, Dataset], Iterator[Aim]]] = {
    "text-classification": _of_a_class,
    "token-classification": _of_tags,
    "question-answering": _of_a_span,
    "causal-lm": _of_a_written_answer,
    "seq2seq": _of_a_written_answer,
    "image-classification": _of_a_class,
}
