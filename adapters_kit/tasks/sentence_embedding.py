"""Sentence embeddings: texts that belong together come to lie close to each other.

Three kinds of rows, each with a loss of sentence-transformers:

anchor, positive              every other text of the batch is told apart (MultipleNegativesRankingLoss)
anchor, positive, negative    and so are the negatives
anchor, positive, score       the higher the score, the closer (CoSENTLoss)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError, ModelError
from adapters_kit.recipe import Recipe
from adapters_kit.tasks import metrics
from adapters_kit.tasks.base import Features, Task, compact, of_the_text, pad_inputs
from adapters_kit.tasks.encoded import Encoded
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.numbers import numbers_of
from adapters_kit.tasks.rows import cells, check_text, digest, in_parts, number_cut, truncated_ids
from adapters_kit.tasks.sentence_layers import SentenceLayers, losses

_RANKED_AT_ONCE = 512  # anchors compared with all texts


class SentenceEmbedding(Task):
    """A vector for a text; cosines of vectors tell how close two texts are.

    Attributes:
        layers: what turns the vectors of a text's tokens into one, as sentence-transformers does with this model.
    """

    name = "sentence-embedding"
    needs = (("anchor", "positive", "score"), ("anchor", "positive"), ("anchor",))
    optional = ("negative",)
    targets = ("score",)
    metric = "ndcg@10"
    higher_is_better = True
    own_loss = True
    unplanned = ("example", "text", "scores")

    def __init__(
        self, recipe: Recipe, columns: Mapping[str, str], labels: list[str] | None = None, notes: Notes | None = None
    ) -> None:
        super().__init__(recipe, columns, labels, notes)
        self.metric = "spearman" if "score" in columns else self.metric
        self.layers: SentenceLayers | None = None

    def unlabelled(self, data: Dataset) -> Sequence[int] | np.ndarray:
        """Rows without a second text, or without a score."""
        if "positive" not in self.columns:
            return []
        empty: tuple[Any, ...] = (None, "", [])
        found = np.fromiter((value in empty for value in cells(data, self.columns["positive"])), bool, len(data))
        if "score" in self.columns:
            found |= np.isnan(self._scores(data))
        return np.flatnonzero(found)

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Checks texts and scores; what is learned from one text alone, or from one score, is nothing."""
        if "positive" not in self.columns:
            raise DataError(
                "sentence-embedding learns from texts that belong together: a second column is needed, data.columns: "
                f"{{anchor: {self.columns['anchor']}, positive: NAME}}. There are: {', '.join(train.column_names)}."
            )
        if {"score", "negative"} <= set(self.columns):
            raise DataError(
                f"Rows have a score ({self.columns['score']!r}) or negatives ({self.columns['negative']!r}), not both: "
                "name the columns that are meant under data.columns, and leave the other out of the file."
            )
        losses()
        for data in (train,) if test is None else (train, test):
            for start, part in in_parts(data, self._columns()):
                for offset in range(len(part[self.columns["anchor"]])):
                    self._texts(part, offset, start)
        if "score" in self.columns:
            scores = self._scores(train)
            if (scores == scores[0]).all():
                raise DataError(f"Column {self.columns['score']!r} holds one score only ({scores[0]:g}).")
        elif "negative" not in self.columns and self.recipe.training.batch_size == 1:
            raise DataError(
                "A text is told from the others of its batch, and training.batch_size is 1: raise it, or give rows "
                "negatives (data.columns: {negative: NAME})."
            )

    def _scores(self, data: Dataset) -> np.ndarray:
        return numbers_of(data, self.columns["score"], "sentence-embedding", truths=True)

    def _columns(self) -> list[str]:
        roles = ("anchor", "positive", "negative")
        return [self.columns[role] for role in roles if role in self.columns]

    def _texts(self, part: Mapping[str, list[Any]], offset: int, start: int) -> list[list[str]]:
        """The row's anchor, positives and negatives, known to be texts. Raises DataError."""
        found: list[list[str]] = []
        for role in ("anchor", "positive", "negative"):
            if role not in self.columns:
                continue
            value = part[self.columns[role]][offset]
            several = value if isinstance(value, list) and role != "anchor" else [value]
            if role == "negative":
                several = [text for text in several if text not in (None, "")]
            for text in several:
                check_text([text], start + offset, self.columns[role], role, list(part))
            found.append(several)
        return found

    def bind(self, processor: Any, model: nn.Module) -> None:
        """Takes the layers that the model's folder names, and the length that they were made for."""
        if model.config.is_encoder_decoder:
            raise ModelError(
                f"{self.recipe.model} is an encoder-decoder ({type(model).__name__}); sentence-embedding needs an "
                "encoder, or a decoder."
            )
        super().bind(processor, model)
        self.layers = SentenceLayers(self.recipe.model, model.config.get_text_config().hidden_size, self.notes)
        if self.recipe.training.max_length is None and self.layers.max_length is not None:
            self.max_length = min(self.max_length, self.layers.max_length)

    def adapt(self, model: Any) -> None:
        """A pooler that the checkpoint has no weights for is not trained: nothing reads it."""
        fresh = getattr(model, "fresh_modules", ())
        model.fresh_modules = [path for path in fresh if path.split(".")[0] != "pooler"]

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """`input_ids`: those of all texts of an example, one behind the other, each up to its place in `ends`.

        With `answers` an example is an anchor, one of its positives and all its negatives; without, an anchor with the
        positives that it is compared with. `text` (texts, 2) int32 tells equal texts.
        """
        features, cut, seen = Encoded(small=("input_ids",)), 0, 0
        scores = self._scores(data) if answers and "score" in self.columns else None
        for start, part in in_parts(data, self._columns()):
            rows = [self._texts(part, offset, start) for offset in range(len(part[self.columns["anchor"]]))]
            flat = [text for row in rows for texts in row for text in texts]
            ids = iter(truncated_ids(self.processor, flat, self.max_length))
            encoded = [[[(text, next(ids)) for text in texts] for texts in row] for row in rows]
            every = [one for row in encoded for texts in row for _, one in texts]
            cut, seen = cut + number_cut(self.processor, [flat], every, self.max_length), seen + len(flat)
            for row, (anchor, positives, negatives) in enumerate(((*one, [], [])[:3] for one in encoded), start):
                for example in [[one, *negatives] for one in positives] if answers else [positives]:
                    made = _example(row, [*anchor, *example])
                    features.append(made if scores is None else {**made, "score": float(scores[row])})
        if cut:
            self.notes.say(
                f"{cut:,} of {seen:,} texts are longer than max_length {self.max_length}: their end was cut.",
                texts_cut=cut,
            )
        return features

    def length(self, feature: Mapping[str, Any]) -> int:
        """Tokens of the longest text of an example."""
        return int(np.diff(feature["ends"], prepend=0).max())

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """A row for each text: all anchors, all positives, all others; `example` (rows,) tells whose they are."""
        split = [np.split(feature["input_ids"], feature["ends"][:-1]) for feature in features]
        places = _places([len(texts) for texts in split])
        batch = pad_inputs([{"input_ids": split[i][k]} for i, k in places], self.processor)
        batch |= self._marks(features, places)
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def _marks(self, features: Features, places: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """What the loss needs to know of the rows of a batch."""
        marks = {
            "example": torch.tensor([i for i, _ in places]),
            "text": torch.from_numpy(np.stack([features[i]["text"][k] for i, k in places])),
        }
        if "score" in features[0]:
            marks["scores"] = torch.tensor([feature["score"] for feature in features], dtype=torch.float32)
        return marks

    def embed(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(texts, width) float32."""
        assert self.layers is not None
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        hidden = of_the_text(model(**inputs)[0], inputs["input_ids"].shape[1])
        return self.layers(hidden, inputs["attention_mask"])

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """See the head of this file; a text that is the positive itself, or the anchor, is not told apart."""
        return self._loss(self.embed(model, batch), batch)

    def _loss(self, vectors: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        rows = int(batch["example"].max()) + 1
        anchors, positives, negatives = vectors[:rows], vectors[rows : 2 * rows], vectors[2 * rows :]
        if "scores" in batch:
            return losses().CoSENTLoss(None).compute_loss_from_embeddings([anchors, positives], batch["scores"])
        texts = batch["text"]
        same = _equal(texts[rows : 2 * rows], texts[rows:]) | _equal(texts[:rows], texts[rows:])
        same[:, :rows] |= _equal(texts[:rows], texts[:rows])  # the positives of an equal anchor
        same[:, :rows].fill_diagonal_(False)

        def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            found = nn.functional.normalize(a, dim=-1) @ nn.functional.normalize(b, dim=-1).T
            return found.masked_fill(same, -torch.inf)

        loss = losses().MultipleNegativesRankingLoss(None, similarity_fct=cosines)
        return loss.compute_loss_from_embeddings([anchors, positives, *([negatives] if len(negatives) else [])], None)

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
        """The vectors of each example's texts, (texts, width)."""
        vectors, owner = self.embed(model, batch).cpu().numpy(), batch["example"].cpu().numpy()
        return [vectors[owner == example] for example in range(owner.max() + 1)]

    def score(self, results: Sequence[np.ndarray], features: Features) -> dict[str, float]:
        """The loss, of batches like those of the training, in the rows' order; with scores how cosines go with them,
        else where an anchor's positives stand among all texts held out."""
        size = self.recipe.training.batch_size
        parts = [slice(start, start + size) for start in range(0, len(results), size)]
        losses = [float(self._loss_of(results[part], features[part])) * len(results[part]) for part in parts]
        return {"loss": sum(losses) / len(results), **self._scored(results, features)}

    def _loss_of(self, results: Sequence[np.ndarray], features: Features) -> torch.Tensor:
        places = _places([len(vectors) for vectors in results])
        vectors = torch.stack([torch.from_numpy(results[i][k]) for i, k in places])
        return self._loss(vectors, self._marks(features, places))

    def _scored(self, results: Sequence[np.ndarray], features: Features) -> dict[str, float]:
        if "score" in features[0]:
            found = np.asarray([_cosines(vectors[:1], vectors[1:])[0, 0] for vectors in results])
            return metrics.agreement(found, np.asarray([feature["score"] for feature in features]))
        anchors = np.stack([vectors[0] for vectors in results])
        places: dict[bytes, int] = {}
        vectors: list[np.ndarray] = []
        belongs: dict[bytes, set[int]] = {}
        for result, feature in zip(results, features, strict=True):
            names = [one.tobytes() for one in feature["text"]]
            for name, vector in zip(names[1:], result[1:], strict=True):
                if name not in places:
                    places[name] = len(places)
                    vectors.append(vector)
            belongs.setdefault(names[0], set()).add(places[names[1]])
        documents, rankings = np.stack(vectors), metrics.Rankings()
        for start in range(0, len(anchors), _RANKED_AT_ONCE):
            cosines = _cosines(anchors[start : start + _RANKED_AT_ONCE], documents)
            for row, cosine in enumerate(cosines, start):
                relevant = np.zeros(len(documents))
                relevant[list(belongs[features[row]["text"][0].tobytes()])] = 1
                rankings.add(cosine, relevant)
        told = rankings.means()
        if "negative" in self.columns:
            pairs = [_cosines(vectors[:1], vectors[1:])[0] for vectors in results if len(vectors) > 2]
            if pairs:
                told["triplet_accuracy"] = float(np.mean([one[0] > one[1:].max() for one in pairs]))
        return told

    def show(self, result: np.ndarray, row: Mapping[str, Any]) -> dict[str, Any]:
        """The text with its vector, or both texts with their cosine; a cosine each where there are several."""
        shown: dict[str, Any] = {"anchor": row[self.columns["anchor"]]}
        if len(result) == 1:
            return {**shown, "embedding": [round(float(value), 7) for value in result[0]]}
        given = row[self.columns["positive"]]
        cosines = [round(float(value), 6) for value in _cosines(result[:1], result[1:])[0]]
        return {**shown, "positive": given, "similarity": cosines if isinstance(given, list) else cosines[0]}

    def write_beside(self, adapter: Path, model: nn.Module) -> None:
        """What sentence-transformers needs to open the adapter with the layers that it was trained with."""
        assert self.layers is not None
        self.layers.save(adapter, self.max_length)


def _example(row: int, texts: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Any]:
    ids = [compact(one) for _, one in texts]
    return {
        "row": row,
        "input_ids": np.concatenate(ids),
        "ends": np.cumsum([len(one) for one in ids]).astype(np.int32),
        "text": np.stack([digest(text) for text, _ in texts]),
    }


def _places(texts: Sequence[int]) -> list[tuple[int, int]]:
    """(example, text) for each row of a batch: all anchors, all positives, all others."""
    places = [(i, k) for i, count in enumerate(texts) for k in range(count)]
    return sorted(places, key=lambda place: (min(place[1], 2), *place))


def _equal(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Which of the texts are equal, (some, others)."""
    return (some[:, None] == others[None]).all(-1)


def _cosines(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    a, b = (one / np.maximum(np.linalg.norm(one, axis=-1, keepdims=True), 1e-12) for one in (some, others))
    return a @ b.T
