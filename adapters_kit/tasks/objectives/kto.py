"""Answers that are judged one by one, good or not: KTO (arXiv 2402.01306). Rows of pairs are two judged answers each.

How far the model has moved from the reference is measured on answers to other prompts: each row carries the answer of
the row before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.artifacts.growing import Growing
from adapters_kit.errors import DataError
from adapters_kit.kernels.token_scores import lazy_logits, log_probabilities
from adapters_kit.tasks.base import Features
from adapters_kit.tasks.conversation import Conversation
from adapters_kit.tasks.encoded import Encoded
from adapters_kit.tasks.objectives import trl_losses
from adapters_kit.tasks.objectives.pairs import Said, read
from adapters_kit.tasks.objectives.preference import Left, Preference, labelled
from adapters_kit.tasks.rows import each_row
from adapters_kit.tasks.windows import Cuts

_WORDS = {"true": True, "false": False}


class KTO(Preference):
    """Good and bad answers."""

    needs = (("prompt", "completion", "label"), ("prompt", "chosen", "rejected"), ("chosen", "rejected"))
    asks = (("prompt",), ("messages",), ("chosen",), ("text",))
    targets = ("label", "rejected")
    unplanned = ("reference", "good")

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Reads every row, and that there are good and bad ones. Raises DataError."""
        if "label" not in self.columns:
            super().fit(train, test)
            return
        _ = self.trl_loss
        self.tell_reference()
        for data in (train, test) if test is not None else (train,):
            found = {good for _, good, _ in self._judged(data)}
            if data is train and len(found) < 2:
                raise DataError(
                    f"All {len(data):,} answers are {'good' if found == {True} else 'bad'} (column "
                    f"{self.columns['label']!r}): KTO learns from both. Good answers alone are for training without "
                    "an objective."
                )

    def _judged(self, data: Dataset) -> Iterator[tuple[int, bool, Said]]:
        """(row, whether it is good, answer) of every answer."""
        for number, row in each_row(data):
            if "label" not in self.columns:
                for good, said in zip((True, False), self._pair(row, number), strict=True):
                    yield number, good, said
            else:
                yield number, self._good(row, number), read(row, self.columns, number, "completion", [])

    def _good(self, row: Mapping[str, Any], number: int) -> bool:
        value = row[self.columns["label"]]
        value = _WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
        if isinstance(value, bool | int | float) and value in (0, 1):
            return bool(value)
        raise DataError(
            f"Row {number + 1}, column {self.columns['label']!r}: a label is true or false (or 1 or 0), not "
            f"{row[self.columns['label']]!r}. Grades become labels by a threshold of yours."
        )

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """`input_ids` and `labels` of each answer, of another row's answer to its prompt as `rejected_…`, and `good`.

        Raises:
            DataError: no row has an answer.
        """
        if not answers:
            return self._prompts(data)
        cuts, left, features = Cuts(), Left(len(data)), Encoded(small=("input_ids", "rejected_ids"))
        before: Said | None = None  # the last answer stands before the first
        empty = Growing("b")
        for number, good, said in self._judged(data):
            sample = self.sample(said, number, cuts)
            empty.append(sample is None)
            if sample is None:
                left.out("have an empty answer", number)
                continue
            features.append({"row": number, **labelled(sample), "good": good})
            before = said
        left.tell(self.notes)
        if before is None:
            raise DataError(f"None of the {len(data):,} rows has an answer: {left.told()}")
        cuts.tell(self.notes, self.max_length)
        for place, (number, _, said) in enumerate(self._judged(data)):
            if empty[place : place + 1].item():
                continue
            sample = self.sample(self._with_answer_of(said, before), number, Cuts())
            assert sample is not None  # both had an answer
            features.add({key: [value] for key, value in labelled(sample, "rejected_", "rejected_ids").items()})
            before = said
        return features

    @staticmethod
    def _with_answer_of(one: Said, other: Said) -> Said:
        text = (one.text[0], other.text[1]) if one.text and other.text else None
        return Said(Conversation([*one.prompt, other.talk.turns[-1]], one.talk.tools), text, one.running)

    def collate(self, features: Features, side: str = "right") -> dict[str, torch.Tensor]:
        """All answers, then as many of other rows to the same prompts; and which are good (rows,)."""
        batch = super().collate(features, side)
        if "good" in features[0]:
            batch["good"] = torch.tensor([feature["good"] for feature in features])
        return batch

    @cached_property
    def trl_loss(self) -> trl_losses.Loss:
        """TRL's loss, of labels too."""
        assert self.spec is not None
        return trl_losses.kto(self.spec)

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """TRL's loss of the answers; those of other rows only measure how far the model has moved."""
        half = len(batch["good"])
        sums = []
        for part in (slice(None, half), slice(half, None)):
            inputs = {key: batch[key][part] for key in ("input_ids", "attention_mask")}
            with torch.set_grad_enabled(part.start is None), lazy_logits(model):
                logits = model(**inputs, use_cache=False).logits
                sums.append(log_probabilities(logits, batch["labels"][part]))
        found = torch.cat([sums[0].sum(1), sums[1].sum(1)])
        return self._loss(found, batch["reference"], batch["good"])

    def _loss(self, sums: torch.Tensor, reference: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
        return self.trl_loss.of(sums, good, reference)

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """Of each answer, and of the other row's, the summed negative log-likelihood and the tokens."""
        batch.pop("good", None)
        return super().step(model, batch)

    def score(self, results: Sequence[Any], features: Features) -> dict[str, float]:
        """The loss; how often a reward is above 0 for a good and below it for a bad answer (0 counts half); and how far
        the mean rewards of good and bad answers are apart."""
        sums = torch.tensor([[-one[0] for one in pair] for pair in results], dtype=torch.float64)
        reference = torch.from_numpy(np.stack([feature["reference"] for feature in features]))
        good = torch.tensor([feature["good"] for feature in features])
        rewards = self.trl_loss.beta * (sums - reference)[:, 0]
        signed = torch.where(good, rewards, -rewards)
        told = {
            "loss": float(self._loss(sums.T.reshape(-1), reference.T.reshape(-1), good)),
            "rewards_accuracy": float(((signed > 0).double() + (signed == 0).double() / 2).mean()),
        }
        if bool(good.any()) and not bool(good.all()):
            told["rewards_margin"] = float(rewards[good].mean() - rewards[~good].mean())
        for name, which in (("good_nll", good), ("bad_nll", ~good)):
            tokens = sum(pair[0][1] for pair, one in zip(results, which.tolist(), strict=True) if one)
            if tokens:
                told[name] = -float(sums[which, 0].sum()) / tokens
        return told
