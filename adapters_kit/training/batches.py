"""What the batches of a run look like, as far as a plan needs it: from the recipe's data, or from a length alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from adapters_kit.anatomy import probe_inputs
from adapters_kit.errors import RecipeError
from adapters_kit.loading import load_processor, skeleton
from adapters_kit.recipe import Recipe
from adapters_kit.task_table import TASKS
from adapters_kit.tasks.base import IGNORED, Task, longest_input
from adapters_kit.training.memory import Batch
from adapters_kit.training.resolve import prepare
from adapters_kit.training.sampling import OrderedByEpoch


class Batches(Protocol):
    """Batches of any size for one recipe.

    Attributes:
        bare: the model without weights, on the meta device.
        rows: examples in the largest batch.
        length: tokens of its longest example; 1 for inputs that have none.
        longest: the most tokens that the model takes.
        padding: part of all batches that is padding.
        lengths: of every example, in tokens; empty if there are no examples.
        example: one tokenised example: (token, whether the loss counts it).
    """

    bare: nn.Module
    rows: int
    length: int
    longest: int
    padding: float
    lengths: list[int]
    example: list[tuple[str, bool]]

    def batch(self, rows: int, length: int) -> Batch:
        """The largest batch, or one of another size like it."""
        ...


class FromData:
    """Batches of the recipe's own data."""

    def __init__(self, recipe: Recipe) -> None:
        task, splits = prepare(recipe)
        self.bare = skeleton(recipe.model, recipe.head, labels=task.labels if TASKS[recipe.head].labelled else None)
        task.bind(load_processor(recipe.model), self.bare)
        if hasattr(self.bare.config, "apply_spec_augment"):  # looks at the mask's values, and keeps nothing
            self.bare.config.apply_spec_augment = False
        self.task = task
        features = task.training_features(task.encode(splits.train))
        lengths = task.lengths(features)
        self.lengths = lengths.tolist()
        self.rows = min(recipe.training.batch_size, len(features))
        self.largest = [features[i] for i in np.argsort(lengths, kind="stable")[-self.rows :].tolist()]
        # Recordings and pictures are not made longer or shorter: there are no columns of tokens to repeat.
        fixed = {"audio", "image"} & features[0].keys()
        self.length = 1 if fixed else max(task.length(feature) for feature in self.largest)
        self.longest = task.longest
        self.padding = _padding(recipe, self.lengths)
        self.example = _example(task, features[0])

    def batch(self, rows: int, length: int) -> Batch:
        """The longest examples, and more rows and tokens like them: the values of those are nobody's."""
        known = self.largest[:rows]
        batch = self.task.collate_training(known)
        for name in ("row", *self.task.unplanned):
            batch.pop(name, None)
        if "attention_mask" in batch and bool(batch["attention_mask"].all()):
            del batch["attention_mask"]  # a full mask is dropped inside the model, but only if its values can be seen
        now = batch["input_ids"].shape[1] if "input_ids" in batch else None
        if now is not None and length != self.length:
            columns = torch.arange(length) % now
            batch = {k: v[:, columns] if v.ndim >= 2 and v.shape[1] == now else v for k, v in batch.items()}
        if rows == len(known):
            return batch
        # Never filled: a card's worth of rows of a small model would take gigabytes here, and a minute to collate.
        # (An example may be several rows of the batch.)
        return {k: v.new_empty((-(-len(v) * rows // len(known)), *v.shape[1:])) for k, v in batch.items()}


class FromLength:
    """Batches of `length` tokens a row, with neither data nor a tokenizer: the model's config.json is enough."""

    def __init__(self, recipe: Recipe, length: int) -> None:
        self.recipe = recipe
        labels = recipe.labels or ["0", "1"]
        self.bare = skeleton(recipe.model, recipe.head, labels=labels if TASKS[recipe.head].labelled else None)
        self.longest = longest_input(None, self.bare)
        if not 1 <= length <= self.longest:
            raise RecipeError([f"a length of {length}: {recipe.model} takes 1 to {self.longest} tokens"], "--length")
        self.rows, self.padding = recipe.training.batch_size, 0.0
        self.lengths: list[int] = []
        self.example: list[tuple[str, bool]] = []
        self.length = length if "input_ids" in probe_inputs(self.bare) else 1

    def batch(self, rows: int, length: int) -> Batch:
        """Zeros of the shapes that the model reads and that its loss is computed from."""
        inputs = probe_inputs(self.bare, length)
        inputs.pop("attention_mask", None)
        made = {key: torch.zeros(rows, *value.shape[1:], dtype=value.dtype) for key, value in inputs.items()}
        head, problem = TASKS[self.recipe.head].auto_class, self.recipe.problem
        if head == "AutoModel":  # no head, no labels: two texts for each example
            made.pop("decoder_input_ids", None)
            return {key: torch.cat([value, value]) for key, value in made.items()}
        if head.endswith("QuestionAnswering"):
            return {**made, "start_positions": torch.zeros(rows).long(), "end_positions": torch.zeros(rows).long()}
        if head.endswith(("Seq2SeqLM", "SpeechSeq2Seq")):
            made.pop("decoder_input_ids", None)  # made from the labels
        if head.endswith("SpeechSeq2Seq") and "input_values" in made:
            return made  # CTC's loss looks at the values of labels, and keeps next to nothing
        if head.endswith("NextSentencePrediction"):
            return {**made, "labels": torch.zeros(rows).long()}
        if head.endswith(("SequenceClassification", "ImageClassification", "AudioClassification")):
            classes = self.bare.config.num_labels
            target = torch.zeros(rows, classes) if problem == "multi-label" else torch.zeros(rows).long()
            return {**made, "labels": target.float() if problem == "regression" else target}
        return {**made, "labels": torch.zeros(rows, length).long()}


def histogram(lengths: Sequence[int], bins: int = 10) -> list[tuple[int, int, int]]:
    """(from, to, examples), both ends included; at most `bins` of them."""
    if not lengths:
        return []
    counts, edges = np.histogram(lengths, bins=min(bins, max(lengths) - min(lengths) + 1))
    bounds = [int(np.ceil(edge)) for edge in edges]
    return [
        (low, high - (index < len(counts) - 1), int(count))
        for index, (low, high, count) in enumerate(zip(bounds[:-1], bounds[1:], counts, strict=True))
    ]


def _padding(recipe: Recipe, lengths: list[int]) -> float:
    """In the order that training will use."""
    size, group = recipe.training.batch_size, recipe.training.group_by_length
    order = list(OrderedByEpoch(lengths, size, recipe.training.seed, group=group))
    area = sum(
        max(lengths[i] for i in order[k : k + size]) * len(order[k : k + size]) for k in range(0, len(order), size)
    )
    return 1 - sum(lengths) / area


def _example(task: Task, feature: dict[str, Any]) -> list[tuple[str, bool]]:
    if "input_ids" not in feature or not hasattr(task.processor, "convert_ids_to_tokens"):
        return []
    tokens = task.processor.convert_ids_to_tokens([int(i) for i in feature["input_ids"]])
    labels = feature.get("labels")
    if labels is None or np.ndim(labels) != 1 or len(labels) != len(tokens):
        return [(token, False) for token in tokens]
    return [(token, bool(label != IGNORED)) for token, label in zip(tokens, labels, strict=True)]
