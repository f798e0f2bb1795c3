"""Odds-ratio preference optimisation (arXiv 2403.07691): the chosen answer is learned, and preferred, in one pass.

There is no reference: the model itself says how likely both answers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from adapters_kit.kernels.token_scores import lazy_logits, log_probabilities
from adapters_kit.tasks.base import IGNORED, Features
from adapters_kit.tasks.causal_lm import CausalLM
from adapters_kit.tasks.objectives import trl_losses
from adapters_kit.tasks.objectives.preference import Preference, of_pairs


class ORPO(Preference):
    """Of two answers the better one, without a reference."""

    asks_base = False

    @cached_property
    def trl_loss(self) -> trl_losses.Loss:
        """TRL's odds-ratio loss of mean log-probabilities."""
        assert self.spec is not None
        return trl_losses.orpo(self.spec)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The chosen text's cross-entropy, prompt and answer, and the odds ratio of both answers, as TRL adds them."""
        labels, whole = batch["labels"], _whole(batch)
        with lazy_logits(model):
            logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}, use_cache=False).logits
        found = log_probabilities(logits, whole)
        pairs, mask = len(labels) // 2, labels[:, 1:] != IGNORED
        written = (whole[:pairs, 1:] != IGNORED).sum()
        means = (found * mask).sum(1) / mask.sum(1)
        return -found[:pairs].sum() / written + self.trl_loss.of(means[:, None], mask, means)

    def step(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Any]:
        """Of each pair what both answers, and what the chosen text with its prompt are worth: nats and tokens."""
        whole = {**batch, "labels": _whole(batch)}
        half = len(whole["labels"]) // 2
        texts = CausalLM.step(self, model, {key: value[:half] for key, value in whole.items()})
        return [(*pair, text) for pair, text in zip(super().step(model, batch), texts, strict=True)]

    def score(self, results: Sequence[Any], features: Features) -> dict[str, float]:
        """The loss; how often and by how much the chosen answer's mean log-likelihood, times beta, is the higher."""
        means = torch.tensor([[-one[0] / max(one[1], 1) for one in pair[:2]] for pair in results], dtype=torch.float64)
        rewards = self.trl_loss.beta * means
        flat = means.T.reshape(-1)
        odds = self.trl_loss.of(flat[:, None], torch.ones(len(flat), 1), flat)
        text = sum(pair[2][0] for pair in results) / sum(pair[2][1] for pair in results)
        return {
            "loss": text + float(odds),
            **of_pairs(rewards),
            "chosen_nll": -float(means[:, 0].mean()),
            "rejected_nll": -float(means[:, 1].mean()),
        }


def _whole(batch: dict[str, Tensor]) -> Tensor:
    """Labels of the chosen texts with their prompts, and of the rejected answers alone."""
    labels = batch["labels"].clone()
    pairs = len(labels) // 2
    ids, seen = batch["input_ids"][:pairs], batch["attention_mask"][:pairs]
    labels[:pairs] = ids.masked_fill(seen == 0, IGNORED)
    return labels
