"""Distillation: the model learns what a teacher says of every token, from all of the teacher's probabilities.

The teacher is another model of the same vocabulary, or the base itself in full precision, whose quantized form is the
student. Its logits are made again for every batch and a few tokens at a time: those of a batch never exist at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import ModelError
from adapters_kit.kernels.cross_entropy import chunked_loss
from adapters_kit.kernels.token_scores import divergences, lazy_logits
from adapters_kit.loading import load, load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import IGNORED, Features, of_the_text
from adapters_kit.tasks.causal_lm import LOGITS_AT_ONCE, CausalLM
from adapters_kit.tasks.notes import Notes


class Distill(CausalLM):
    """Rows as for causal-lm; learned are the tokens that would be learned there, by the teacher's probabilities."""

    asks_base = True
    own_loss = True
    metric = "loss"

    def __init__(
        self, recipe: Recipe, columns: Mapping[str, str], labels: list[str] | None = None, notes: Notes | None = None
    ) -> None:
        super().__init__(recipe, columns, labels, notes)
        assert recipe.objective is not None
        self.temperature = recipe.objective.temperature
        self.teacher_name = recipe.objective.teacher or recipe.model
        self.teacher: Any = None

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """As causal-lm; says who teaches. Raises DataError."""
        super().fit(train, test)
        if self.teacher_name == self.recipe.model:
            self.notes.say("The teacher is the base itself, in full precision.")

    def taught_by(self, model: nn.Module) -> Any:
        """The teacher, loaded when it is first asked.

        Raises:
            ModelError: its vocabulary is not the student's.
        """
        if self.teacher is None:
            self._check_vocabulary()
            device = next(model.parameters()).device
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
            trusted = self.recipe.trust_remote_code
            teacher = load(self.teacher_name, "causal-lm", dtype=dtype, trust_remote_code=trusted)
            ours, theirs = (one.config.get_text_config().vocab_size for one in (model, teacher))
            if theirs != ours:
                raise ModelError(
                    f"objective.teacher: {self.teacher_name} gives {theirs:,} probabilities for a token and "
                    f"{self.recipe.model} {ours:,}: token by token they cannot be compared."
                )
            self.teacher = teacher.to(device).eval().requires_grad_(False)
            chunked_loss(self.teacher)
        return self.teacher

    def _check_vocabulary(self) -> None:
        if self.teacher_name == self.recipe.model:
            return
        other = load_processor(self.teacher_name, trust_remote_code=self.recipe.trust_remote_code)
        ours, theirs = self.processor.get_vocab(), getattr(other, "tokenizer", other).get_vocab()
        if ours != theirs:
            odd = sorted(word for word in ours.keys() | theirs.keys() if ours.get(word) != theirs.get(word))
            raise ModelError(
                f"objective.teacher: {self.teacher_name} has another vocabulary than {self.recipe.model}: {len(odd):,} "
                f"tokens differ ({odd[0]!r} is number {theirs.get(odd[0])} to it and {ours.get(odd[0])} here). Take a "
                "teacher of the same family."
            )

    def refer(self, model: nn.Module, features: Features, batch_size: int) -> None:
        """Loads the teacher, so that one that does not fit is refused before training."""
        self.taught_by(model)

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean divergence KL(teacher, model) of the learned tokens (nats), at the temperature, times its square."""
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        teacher = self.taught_by(model)
        with torch.no_grad(), lazy_logits(teacher):
            taught = teacher(**inputs, use_cache=False).logits
        with lazy_logits(model):
            logits = model(**inputs, use_cache=False).logits
        return divergences(logits, taught, batch["labels"][:, 1:] != IGNORED, self.temperature).mean()

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """Of each example the summed negative log-likelihood, the counted tokens, and the summed divergence."""
        labels = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        found = super().step(model, batch)
        rows, length = labels.shape
        at_once = max(LOGITS_AT_ONCE // (2 * length * model.config.get_text_config().vocab_size), 1)
        made: list[Any] = []
        for start in range(0, rows, at_once):
            part = {key: value[start : start + at_once] for key, value in inputs.items()}
            kept = labels[start : start + at_once, 1:] != IGNORED
            taught = self.taught_by(model)(**part, use_cache=False).logits
            logits = of_the_text(model(**part, use_cache=False).logits, length)
            values = divergences(logits, taught, kept, self.temperature).double().split(kept.sum(1).tolist())
            made += [(*found[start + offset], float(value.sum())) for offset, value in enumerate(values)]
        return made

    def score(self, results: Sequence[Any], features: Features) -> dict[str, float]:
        """The mean divergence from the teacher (nats); and, as for causal-lm, how likely the texts themselves are."""
        tokens = max(sum(result[1] for result in results), 1)
        told = super().score([result[:2] for result in results], features)
        return {"loss": sum(result[2] for result in results) / tokens, "nll": told.pop("loss"), **told}
