"""Causal language modelling: plain text, prompt and completion, or chat messages; the loss on the answer only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError
from adapters_kit.tasks import packing
from adapters_kit.tasks.base import IGNORED, Features, Task, compact, pad, pad_inputs
from adapters_kit.tasks.chat import as_messages, render, tokens_of_answers

LOGITS_AT_ONCE = 2**26  # 256 MiB of fp32 logits in an evaluation step


class CausalLM(Task):
    name = "causal-lm"
    needs = (("messages",), ("prompt", "completion"), ("text",))
    targets = ("completion",)
    metric = "loss"
    generates = True

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        for data in (train, test) if test is not None else (train,):
            for role in ("text", "prompt", "completion"):
                if role in self.columns:
                    self.text(data, role)
            if "messages" in self.columns:
                for index, value in enumerate(data[self.columns["messages"]]):
                    as_messages(value, index)

    def bind(self, processor: Any, model: nn.Module) -> None:
        super().bind(processor, model)
        if "messages" in self.columns and not getattr(processor, "chat_template", None):
            raise DataError(
                f"The tokenizer of {self.recipe.model} has no chat template, which the column "
                f"{self.columns['messages']!r} needs. Give prompt and completion columns, or an instruct model."
            )
        if self.recipe.training.packing and next(model.parameters()).device.type != "meta":
            packing.check(model, self.recipe.model)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        features = [
            {"row": row, "input_ids": compact(ids), "labels": compact(labels)}
            for row, ids, labels in (self._examples(data) if answers else self._prompts(data))
        ]
        if answers and not any((feature["labels"][1:] != IGNORED).any() for feature in features):
            raise DataError(
                f"No example has an answer token left within max_length {self.max_length}: raise training.max_length."
            )
        return features

    def _examples(self, data: Dataset) -> Iterator[tuple[int, list[int], list[int]]]:
        """(row, ids, labels); a long plain text gives several pieces, a long prompt loses its beginning."""
        end = [self.processor.eos_token_id] if self.processor.eos_token_id is not None else []
        if "text" in self.columns:
            for row, ids in enumerate(self.processor(self.text(data, "text"))["input_ids"]):
                ids = ids if ids[-1:] == end else ids + end
                for start in range(0, len(ids), self.max_length):
                    piece = ids[start : start + self.max_length]
                    if len(piece) > 1:
                        yield row, piece, piece
            return
        for row in range(len(data)):
            ids, answer = self._conversation(data[row], end)
            cut = max(len(ids) - self.max_length, 0)
            if cut and True in answer:
                first = answer.index(True)
                # Keep the answer: drop from the front, but never more than leaves one token before it.
                front = min(cut, max(first - 1, 0))
                ids, answer = ids[front:][: self.max_length], answer[front:][: self.max_length]
            counted = answer if self.recipe.answer_only else [True] * len(ids)
            yield row, ids, [token if keep else IGNORED for token, keep in zip(ids, counted, strict=True)]

    def _conversation(self, row: Mapping[str, Any], end: list[int]) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether it belongs to an answer."""
        if "messages" in self.columns:
            return tokens_of_answers(self.processor, as_messages(row[self.columns["messages"]]))
        prompt, completion = row[self.columns["prompt"]], row[self.columns["completion"]]
        if getattr(self.processor, "chat_template", None):
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return tokens_of_answers(self.processor, turns)
        before = self.processor(prompt)["input_ids"]
        if before[-1:] == end:
            before = before[:-1]
        after = self.processor(completion, add_special_tokens=False)["input_ids"] + end
        return before + after, [False] * len(before) + [True] * len(after)

    def _prompts(self, data: Dataset) -> Iterator[tuple[int, list[int], list[int]]]:
        room = max(self.max_length - self.recipe.max_new_tokens, 1)
        for row in range(len(data)):
            ids = self.prompt_ids(data[row])[-room:]
            yield row, ids, [IGNORED] * len(ids)

    def prompt_ids(self, row: Mapping[str, Any]) -> list[int]:
        """The tokens after which the model is to continue: the conversation up to the last answer, or the text."""
        if "messages" in self.columns:
            turns = as_messages(row[self.columns["messages"]])
            turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
            text = render(self.processor, turns, add_generation_prompt=True)
            return self.processor(text, add_special_tokens=False)["input_ids"]
        prompt = row[self.columns.get("prompt", self.columns.get("text"))]
        if "prompt" in self.columns and getattr(self.processor, "chat_template", None):
            text = render(self.processor, [{"role": "user", "content": prompt}], add_generation_prompt=True)
            return self.processor(text, add_special_tokens=False)["input_ids"]
        ids = self.processor(prompt)["input_ids"]
        return ids[:-1] if ids[-1:] == [self.processor.eos_token_id] else ids

    def training_features(self, features: Features) -> Features:
        return packing.pack(features, self.max_length) if self.recipe.training.packing else features

    def collate_training(self, features: Features) -> dict[str, torch.Tensor]:
        if self.recipe.training.packing:
            return packing.collate(features, self.processor.pad_token_id or 0)
        return self.collate(features)

    def collate(self, features: Features, side: str = "right") -> dict[str, torch.Tensor]:
        batch = pad_inputs(features, self.processor, side)
        batch["labels"] = pad([feature["labels"] for feature in features], IGNORED, side)
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[tuple[float, int]]:
        """Negative log-likelihood (nats, summed) and number of counted tokens of each example."""
        labels = batch.pop("labels")
        rows, length = labels.shape
        at_once = max(LOGITS_AT_ONCE // (length * model.config.get_text_config().vocab_size), 1)
        found = []
        for start in range(0, rows, at_once):
            part = {key: value[start : start + at_once] for key, value in batch.items()}
            logits = model(**part, use_cache=False).logits[:, :-1]
            target = labels[start : start + at_once, 1:]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORED, reduction="none"
            )
            sums = loss.view(target.shape).double().sum(-1).tolist()
            found += zip(sums, (target != IGNORED).sum(-1).tolist(), strict=True)
        return found

    def score(self, results: Sequence[tuple[float, int]], features: Features) -> dict[str, float]:
        tokens = sum(count for _, count in results)
        loss = sum(nll for nll, _ in results) / max(tokens, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "eval_tokens": tokens}

    def predict(self, model: nn.Module, data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        features = self.encode(data, answers=False)
        results = self.run(model, features, batch_size, self.generate, lambda f: self.collate(f, side="left"))
        shown = []
        for feature, text in zip(features, results, strict=True):
            row = data[feature["row"]]
            given = "messages" if "messages" in self.columns else "prompt" if "prompt" in self.columns else "text"
            shown.append({given: row[self.columns[given]], "answer": text})
        return shown

    def generate(self, model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> list[str]:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        out = model.generate(
            **inputs,
            max_new_tokens=self.recipe.max_new_tokens,
            do_sample=False,
            pad_token_id=self.processor.pad_token_id,
            **options,
        )
        new = out[:, batch["input_ids"].shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True)
