"""Sequence to sequence: translation, summarisation; scored on what the model generates."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError
from adapters_kit.tasks.base import IGNORED, Features, Task, pad, pad_inputs
from adapters_kit.tasks.encoded import Encoded
from adapters_kit.tasks.generation import n_best, positions, set_stops, tell_endless, tell_settings, written
from adapters_kit.tasks.languages import set_languages
from adapters_kit.tasks.rows import texts_in_parts
from adapters_kit.tasks.text_scores import how_counted, text_scores


class Seq2Seq(Task):
    """From one text to another.

    Attributes:
        codes: the languages, by key of the recipe; empty for models that are told none.
        new_tokens: longest answer in tokens: `max_new_tokens`, or what the model has positions for.
    """

    name = "seq2seq"
    needs = (("source", "target"),)
    targets = ("target",)
    metric = "loss"
    generates = True

    def adapt(self, model: nn.Module) -> None:
        """Sets languages, stops and the longest answer; says which languages and prefixes there are.

        Raises:
            ModelError: a language that the model does not have.
        """
        spec = self.recipe.data
        codes = set_languages(self.processor, model, self.recipe.model, spec.source_lang, spec.target_lang)
        self.codes = codes or {}
        if codes and not (spec.source_lang and spec.target_lang):
            told = ", ".join(f"{key}: {code}" for key, code in codes.items())
            self.notes.say(f"The languages are those that the tokenizer was saved with: {told}.")
        set_stops(model, self.processor)
        tell_settings(model, self.recipe.model, self.notes)
        tell_endless(self.processor, self.recipe.model, self.notes)
        self.new_tokens = min(self.recipe.max_new_tokens, positions(model) - 1)
        known = {
            task: options["prefix"]
            for task, options in (getattr(model.config, "task_specific_params", None) or {}).items()
            if isinstance(options, dict) and options.get("prefix")
        }
        if known and spec.source_prefix is None:
            told = ", ".join(f"{prefix!r} ({task})" for task, prefix in known.items())
            self.notes.say(
                f"{self.recipe.model} was trained with a word for each job before the source: {told}. None is put "
                "there; data.source_prefix names one."
            )

    def found(self) -> dict[str, Any]:
        """What the same run needs again; the languages too."""
        return {**super().found(), **self.codes}

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Checks that sources and targets are text. Raises DataError."""
        for data in (train, test) if test is not None else (train,):
            for role in self.columns:
                deque(self.texts(data, role), maxlen=0)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """input_ids of the source behind `source_prefix`; with `answers` also `labels` and the text of the target."""
        prefix = self.recipe.data.source_prefix or ""
        features, targets = Encoded(small=("input_ids",)), self.texts(data, "target") if answers else iter(())
        cut, empty = Counter[str](), 0
        for start, texts in texts_in_parts(data, self.columns["source"], "source"):
            made: dict[str, Sequence[Any]] = {"row": range(start, start + len(texts))}
            made["input_ids"] = self._cut([prefix + text for text in texts], "sources", cut)
            if answers:
                wanted = list(islice(targets, len(texts)))
                empty += sum(not text.strip() for text in wanted)
                made |= {"labels": self._targets(wanted, start, cut), "target": wanted}
            features.extend(made)
        if empty:
            self.notes.say(
                f"{empty:,} of {len(data):,} targets are empty: from them the model learns to write nothing.",
                empty_targets=empty,
            )
        for what, count in cut.items():
            self.notes.say(
                f"{count:,} of {len(data):,} {what} are longer than max_length {self.max_length}: their end was cut. "
                "A higher training.max_length keeps more.",
                **{f"{what}_cut": count},
            )
        return features

    def _targets(self, texts: list[str], start: int, cut: Counter[str]) -> list[list[int]]:
        """Targets' ids with the token that ends a text; tokenizers made for decoders (T5Gemma's) leave it out."""
        end = self.processor.eos_token_id
        if end is not None and end not in self.processor(text_target="a")["input_ids"]:
            return [[*ids, end] for ids in self._cut(texts, "targets", cut, room=self.max_length - 1)]
        targets = self._cut(texts, "targets", cut)
        for row, ids in enumerate(targets, start):
            if not ids:
                raise DataError(
                    f"Row {row + 1}: the target is empty, and {self.recipe.model} has no token for the end of a text, "
                    "so that there is nothing to learn. Leave the row out, or name an eos_token in its "
                    "tokenizer_config.json."
                )
        return targets

    def _cut(self, texts: list[str], what: str, counts: Counter[str], room: int | None = None) -> list[list[int]]:
        """Token ids of texts; counts those that are longer than `room` (`max_length`)."""
        room = self.max_length if room is None else room
        keyword = "text" if what == "sources" else "text_target"
        cut = self.processor(**{keyword: texts}, truncation=True, max_length=room)["input_ids"]
        full = [row for row, ids in enumerate(cut) if len(ids) >= room]
        whole = self.processor(**{keyword: [texts[row] for row in full]})["input_ids"] if full else []
        if count := sum(len(ids) > room for ids in whole):
            counts[what] += count
        return [list(ids) for ids in cut]

    def length(self, feature: Mapping[str, Any]) -> int:
        """Tokens of source and target together."""
        return len(feature["input_ids"]) + len(feature.get("labels", ()))

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, labels, each (rows, longest) int64, padded on the right, and row (rows,)."""
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
        """What the model writes for each source, greedily; `options` go to `model.generate`."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        limits = {"max_new_tokens": self.new_tokens, "do_sample": False, "num_beams": 1}
        out = model.generate(**inputs, **limits, **options)
        # The first is the start token, which may be the one that ends a text as well.
        return [written(self.processor, ids, model) for ids in out[:, 1:].tolist()]

    def score(self, results: Sequence[tuple[float, int, str]], features: Features) -> dict[str, float]:
        """Mean loss of a token (nats), exact_match (0 to 1), BLEU and chrF (0 to 100), ROUGE (0 to 1)."""
        loss = sum(nll for nll, *_ in results) / max(sum(count for _, count, _ in results), 1)
        guesses = [text.strip() for *_, text in results]
        truth = [feature["target"].strip() for feature in features]
        if told := how_counted(truth):
            self.notes.say(told)
        exact = sum(guess == text for guess, text in zip(guesses, truth, strict=True)) / len(truth)
        return {"loss": loss, "exact_match": exact, **text_scores(guesses, truth)}

    def predict(self, model: nn.Module, data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        """Of each row the `source` and the `answer` that the model writes."""
        features = self.encode(data, answers=False)
        found = self.run(model, features, batch_size, self._write)
        sources = list(self.texts(data, "source"))
        return [{"source": sources[f["row"]], **self.answered(r)} for f, r in zip(features, found, strict=True)]

    def _write(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        if self.n_best == 1:
            return self.generate(model, batch)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return n_best(model, self.processor, inputs, self.n_best, 1, max_new_tokens=self.new_tokens)
