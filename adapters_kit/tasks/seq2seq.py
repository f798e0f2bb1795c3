"""Sequence to sequence: translation, summarisation; scored on what the model generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import MissingPackageError
from adapters_kit.tasks.base import IGNORED, Features, Task, compact, pad, pad_inputs


class Seq2Seq(Task):
    name = "seq2seq"
    needs = (("source", "target"),)
    targets = ("target",)
    metric = "loss"
    generates = True

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        for data in (train, test) if test is not None else (train,):
            for role in self.columns:
                self.text(data, role)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        options = {"truncation": True, "max_length": self.max_length}
        encoded = self.processor(self.text(data, "source"), **options)
        features = [{"row": row, "input_ids": compact(ids)} for row, ids in enumerate(encoded["input_ids"])]
        if answers:
            texts = self.text(data, "target")
            targets = self.processor(text_target=texts, **options)["input_ids"]
            for feature, ids, text in zip(features, targets, texts, strict=True):
                feature["labels"], feature["target"] = compact(ids), text
        return features

    def length(self, feature: Mapping[str, Any]) -> int:
        return len(feature["input_ids"]) + len(feature.get("labels", ()))

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        batch = pad_inputs(features, self.processor)
        batch.pop("token_type_ids", None)
        if "labels" in features[0]:
            batch["labels"] = pad([feature["labels"] for feature in features], IGNORED)
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[tuple[float, int, str]]:
        """Negative log-likelihood of the target (nats), its tokens, and the text that the model generates."""
        labels = batch["labels"]
        logits = model(**batch).logits
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        sums = loss.view(labels.shape).double().sum(-1).tolist()
        counts = (labels != IGNORED).sum(-1).tolist()
        return list(zip(sums, counts, self.generate(model, batch), strict=True))

    def generate(self, model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> list[str]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        limits = {"max_new_tokens": self.recipe.max_new_tokens, "do_sample": False, "num_beams": 1}
        out = model.generate(**inputs, **limits, **options)
        return self.processor.batch_decode(out, skip_special_tokens=True)

    def score(self, results: Sequence[tuple[float, int, str]], features: Features) -> dict[str, float]:
        loss = sum(nll for nll, *_ in results) / max(sum(count for _, count, _ in results), 1)
        guesses = [text.strip() for *_, text in results]
        truth = [feature["target"].strip() for feature in features]
        exact = sum(guess == text for guess, text in zip(guesses, truth, strict=True)) / len(truth)
        return {"loss": loss, "exact_match": exact, **text_scores(guesses, truth)}

    def predict(self, model: nn.Module, data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        features = self.encode(data, answers=False)
        texts = self.run(model, features, batch_size, self.generate)
        sources = self.text(data, "source")
        return [{"source": sources[f["row"]], "answer": text} for f, text in zip(features, texts, strict=True)]


def text_scores(guesses: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF (0 to 100), ROUGE-1, -2 and -L (F1, 0 to 1)."""
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise MissingPackageError(f"{error.name} is needed: pip install 'adapters-kit[metrics]'") from error
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds)
    each = [scorer.score(text, guess) for guess, text in zip(guesses, truth, strict=True)]
    return {
        "bleu": sacrebleu.corpus_bleu(list(guesses), [list(truth)]).score,
        "chrf": sacrebleu.corpus_chrf(list(guesses), [list(truth)]).score,
        **{kind: sum(score[kind].fmeasure for score in each) / len(each) for kind in kinds},
    }
