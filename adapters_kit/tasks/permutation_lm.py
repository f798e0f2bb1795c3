"""Permutation language modelling, as XLNet is pretrained: spans are guessed in a random order (Yang and others 2019,
arXiv 1906.08237). transformers' `DataCollatorForPermutationLanguageModeling` draws spans and orders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorForPermutationLanguageModeling

from adapters_kit.errors import ModelError
from adapters_kit.methods import find_method
from adapters_kit.methods.bottleneck.config import BottleneckConfig
from adapters_kit.methods.configs import build
from adapters_kit.names import is_adapter_folder
from adapters_kit.tasks.base import IGNORED, Features, pad_inputs
from adapters_kit.tasks.masked_lm import MaskedLM

_TRIES = 100  # a short text may lie between two spans


class PermutationLM(MaskedLM):
    """Spans of a text, each guessed from the rest and from the spans before it in an order drawn at random."""

    name = "permutation-lm"

    def bind(self, processor: Any, model: nn.Module) -> None:
        """Needs a model that takes an order, and a tokenizer with a mask token."""
        if "perm_mask" not in inspect.signature(model.forward).parameters:
            raise ModelError(
                f"{self.recipe.model} ({type(model).__name__}) takes no order of tokens (perm_mask), as XLNet does. "
                "causal-lm and masked-lm train other models on texts."
            )
        self._check_method(model)
        super().bind(processor, model)
        self._draw = DataCollatorForPermutationLanguageModeling(processor)

    def _check_method(self, model: nn.Module) -> None:
        """Refuses adapters that hold the stream beside a branch: of the two streams they would hold one.

        Raises:
            ModelError: with the methods that do.
        """
        named = self.recipe.method.name
        for name in [named] if isinstance(named, str) else named:
            if is_adapter_folder(name) or find_method(name).config_class is not BottleneckConfig:
                continue
            options = self.recipe.method.options
            options = options if isinstance(named, str) else options.get("parts", {}).get(name, {})
            sites = build(model, name, options).sites or {}
            if any(site["reads"] not in ("branch", "normed") for site in sites.values()):
                raise ModelError(
                    f"method: {name} reads what runs beside a branch, and in permutation-lm two streams run through "
                    f"{type(model).__name__} by turns. Take pfeiffer, lora or ia3."
                )

    def _hidden(self, ids: np.ndarray, draw: np.random.Generator) -> dict[str, Any] | None:
        """The seed of a piece's spans and its order in evaluations; None where there is nothing to guess."""
        return None if np.isin(ids, self._special).all() else {"seed": int(draw.integers(2**62))}

    def _ordered(self, ids: np.ndarray, seed: int) -> Mapping[str, torch.Tensor]:
        """One row with its spans masked, who sees whom, and what is to be guessed."""
        pad = [self.processor.pad_token_id] * (len(ids) % 2)  # the collator takes even lengths
        row = torch.tensor([[*pad, *ids.tolist()]], dtype=torch.long)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for _ in range(_TRIES):
                shown, order, _, labels = self._draw.torch_mask_tokens(row.clone())
                if (labels != IGNORED).any():
                    break
            else:
                place = len(pad) + int(np.flatnonzero(~np.isin(ids, self._special))[0])
                labels[0, place], shown[0, place] = row[0, place], self.processor.mask_token_id
                order[0, :, place] = 1
        return {"input_ids": shown[0], "order": order[0], "labels": labels[0]}

    def _unordered(self, ids: np.ndarray) -> Mapping[str, torch.Tensor]:
        """A row to be asked about: nobody sees what is masked."""
        row = torch.as_tensor(ids.astype(np.int64))
        hidden = (row == self.processor.mask_token_id).float()
        return {"input_ids": row, "order": hidden.expand(len(row), -1).clone()}

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """Ids, attention mask and labels (rows, tokens) int64; `perm_mask` and `target_mapping` (rows, tokens, tokens)
        float32, 1 where a token does not see another."""
        drawn = [
            self._ordered(feature["input_ids"], feature["seed"])
            if "seed" in feature
            else self._unordered(feature["input_ids"])
            for feature in features
        ]
        batch = pad_inputs([{"input_ids": one["input_ids"].numpy()} for one in drawn], self.processor, "left")
        rows, length = batch["input_ids"].shape
        batch["attention_mask"] &= batch["input_ids"] != self.processor.pad_token_id
        batch["perm_mask"] = torch.zeros(rows, length, length)
        batch["target_mapping"] = torch.eye(length).expand(rows, -1, -1).clone()
        labels = torch.full((rows, length), IGNORED)
        for row, one in enumerate(drawn):
            start = length - len(one["input_ids"])
            batch["perm_mask"][row, start:, start:] = one["order"]
            if "labels" in one:
                labels[row, start:] = one["labels"]
        if "seed" in features[0]:
            batch["labels"] = labels
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def collate_training(self, features: Features) -> dict[str, torch.Tensor]:
        """As `collate`, with spans and orders drawn anew."""
        # torch's generator is what a resumed run restores.
        return self.collate([{**feature, "seed": int(torch.randint(2**62, ()))} for feature in features])
