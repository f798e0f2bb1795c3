"""Next-sentence prediction: does this sentence follow that one (Devlin and others 2018, arXiv 1810.04805)?

The pairs are made from running text: half of them as they stand, half with a sentence of another text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError
from adapters_kit.tasks import metrics
from adapters_kit.tasks.base import Features, Task, compact, pad_inputs
from adapters_kit.tasks.encoded import AT_ONCE, Encoded
from adapters_kit.tasks.rows import check_text, in_parts, number_cut

NAMES = ["next", "random"]  # the order of the outputs, as BERT was pretrained
_ENDS = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\s*\n\s*")


class NextSentence(Task):
    """Whether the second of two sentences follows the first."""

    name = "next-sentence"
    needs = (("text",),)
    targets = ()
    metric = "accuracy"
    higher_is_better = True

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Checks that there are texts of two sentences to take others' sentences for. Raises DataError."""
        for data in (train,) if test is None else (train, test):
            if sum(len(row["sentences"]) > 1 for row in self._sentences(data)) < 2:
                part = "training data" if data is train else "held-out data"
                raise DataError(
                    f"{part}: next-sentence needs two texts of several sentences at least, in the column "
                    f"{self.columns['text']!r}; a row is a text, whose sentences end with a mark (. ! ?) or a line."
                )

    def found(self) -> dict[str, Any]:
        """The names of the outputs are the task's own, and no key of a recipe."""
        return {key: value for key, value in super().found().items() if key != "labels"}

    def bind(self, processor: Any, model: Any) -> None:
        """The names of the outputs are known from here on; a checkpoint has none of its own for them."""
        super().bind(processor, model)
        self.labels = model.saved_labels = list(NAMES)

    def _sentences(self, data: Dataset) -> Encoded:
        """The `sentences` of each row."""
        column, found = self.columns["text"], Encoded()
        for start, part in in_parts(data, [column]):
            for text in check_text(part[column], start, column, "text", data.column_names):
                found.append({"sentences": tuple(one for one in map(str.strip, _ENDS.split(text)) if one)})
        return found

    def _pairs(self, documents: Encoded, useful: np.ndarray, answers: bool) -> Iterator[tuple[int, str, str, int]]:
        """(row, sentence, what follows it or is said to, which of `NAMES` it is), of the rows of several sentences."""
        number = 0
        for row in useful.tolist():
            own = documents[row]["sentences"]
            for first, second in pairwise(own):
                kind = 0
                if answers:
                    draw = np.random.default_rng([self.recipe.training.seed, number])
                    if number % 2:
                        place = int(draw.integers(len(useful) - 1))
                        other = documents[int(useful[place + (useful[place] >= row)])]["sentences"]
                        kind, second = 1, other[int(draw.integers(len(other)))]
                number += 1
                yield row, first, second, kind

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """Ids and token types of each pair and, with `answers`, which of `NAMES` it is."""
        documents = self._sentences(data)
        several = np.fromiter((len(row["sentences"]) > 1 for row in documents), bool, len(documents))
        pairs = self._pairs(documents, np.flatnonzero(several), answers)
        features = Encoded(small=("input_ids", "token_type_ids"))
        cut = 0
        while part := list(islice(pairs, AT_ONCE)):
            texts = [pair[1] for pair in part], [pair[2] for pair in part]
            encoded = self.processor(*texts, truncation=True, max_length=self.max_length)
            cut += number_cut(self.processor, texts, encoded["input_ids"], self.max_length)
            for place, (row, _, _, kind) in enumerate(part):
                feature = {"row": row, "input_ids": compact(encoded["input_ids"][place])}
                if "token_type_ids" in encoded:
                    feature["token_type_ids"] = compact(encoded["token_type_ids"][place])
                features.append({**feature, "labels": kind} if answers else feature)
        if answers and not several.all():
            alone = int((~several).sum())
            self.notes.say(f"{alone:,} of {len(documents):,} texts have one sentence: left out.", rows_left_out=alone)
        if cut:
            self.notes.say(
                f"{cut:,} of {len(features):,} pairs were cut to max_length {self.max_length}.", texts_cut=cut
            )
        return features

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """Ids, mask, token types and labels, (rows,) int64."""
        batch = pad_inputs(features, self.processor)
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
        """Probabilities, (2,) of each pair."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return list(model(**inputs).logits.float().softmax(-1).cpu().numpy())

    def score(self, results: Sequence[np.ndarray], features: Features) -> dict[str, float]:
        """See `metrics.classification`."""
        labels = np.asarray([feature["labels"] for feature in features])
        return metrics.classification(np.stack(results).astype(np.float64), labels)

    def predict(self, model: nn.Module, data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        """Of every text how likely each of its sentences follows the one before it."""
        features = self.encode(data, answers=False)
        found: dict[int, list[float]] = {}
        for result, feature in zip(self.run(model, features, batch_size), features, strict=True):
            found.setdefault(feature["row"], []).append(round(float(result[0]), 6))
        return [self.show(found.get(row, []), data[row]) for row in range(len(data))]

    def show(self, result: Any, row: Mapping[str, Any]) -> dict[str, Any]:
        """The text, and how likely each sentence but the first follows the one before it."""
        return {"text": row[self.columns["text"]], "follows": result}
