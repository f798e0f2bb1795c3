"""Causal language modelling: plain text, prompt and completion, or conversations; the loss on the answer only."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, Value
from torch import nn

from adapters_kit.errors import DataError
from adapters_kit.kernels.token_scores import lazy_head, log_probabilities
from adapters_kit.recipe import Recipe
from adapters_kit.tasks import packing
from adapters_kit.tasks.base import IGNORED, Features, Task, compact, first_token, pad, pad_inputs
from adapters_kit.tasks.conversation import (
    Conversation,
    as_text,
    conversation,
    how_read,
    past_turns,
    refuse_preferences,
    system_beside,
    system_text,
    with_input,
)
from adapters_kit.tasks.encoded import Encoded
from adapters_kit.tasks.generation import (
    Limits,
    n_best,
    positions,
    set_stops,
    tell_endless,
    tell_settings,
    tokenizer_of,
    written,
)
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.rows import each_row, texts_in_parts
from adapters_kit.tasks.template import Answer, ChatTemplate
from adapters_kit.tasks.turns import shortened, spelled_turns, written_out
from adapters_kit.tasks.windows import Cuts, Sample, fitted, prompt, samples, whole

LOGITS_AT_ONCE = 2**26  # 256 MiB of fp32 logits in an evaluation step


class CausalLM(Task):
    """Writing on: of texts as they are, or of answers to prompts and in conversations.

    Attributes:
        template: how the model's tokenizer writes conversations; None where it has no chat template.
        limits: how long a prompt and an answer may be.
    """

    name = "causal-lm"
    needs: ClassVar[tuple[tuple[str, ...], ...]] = (("messages",), ("prompt", "completion"), ("text",))
    optional: ClassVar[tuple[str, ...]] = ("input", "history", "system", "tools")
    targets: ClassVar[tuple[str, ...]] = ("completion",)
    metric = "loss"
    generates = True

    def __init__(
        self, recipe: Recipe, columns: Mapping[str, str], labels: list[str] | None = None, notes: Notes | None = None
    ) -> None:
        if "text" in columns:  # beside a text, `input` or `system` is just another column
            columns = {"text": columns["text"]}
        elif "messages" in columns:
            columns = {role: name for role, name in columns.items() if role in ("messages", "system", "tools")}
        super().__init__(recipe, columns, labels, notes)
        self.template: ChatTemplate | None = None
        self.limits = Limits(recipe.max_new_tokens, self.max_length)

    @classmethod
    def refuse(cls, data: Dataset, given: Mapping[str, str]) -> None:
        """Refuses preference pairs, before any column is taken for another. Raises DataError."""
        kinds = data.features.items()
        booleans = [name for name, kind in kinds if isinstance(kind, Value) and kind.dtype == "bool"]
        strings = [name for name, kind in kinds if isinstance(kind, Value) and kind.dtype == "string"]
        first = data[0]
        texts = [name for name in strings if not isinstance(written_out(first[name]), list)]
        refuse_preferences(data.column_names, given, booleans=booleans, texts=texts)

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Reads every row, so that one that is no conversation is refused before the model loads. Raises DataError."""
        for data in (train, test) if test is not None else (train,):
            if "text" in self.columns:
                deque(self.texts(data, "text"), maxlen=0)
                continue
            # One column of numbers is told from the whole of it, before any row is looked at.
            for role in ("prompt", "completion"):
                if role in self.columns and isinstance(data.features[self.columns[role]], Value):
                    deque(self.texts(data, role), maxlen=0)
            for index, row in each_row(data):
                conversation(row, self.columns, index, answer="completion" in self.columns)
            for sentence in how_read(data[0], self.columns):
                self.notes.say(sentence)

    def bind(self, processor: Any, model: nn.Module) -> None:
        """Takes the tokenizer, its chat template and the model's positions; answers stop where the template ends turns.

        Raises:
            DataError: conversations for a tokenizer without a chat template.
            ModelError: packing for a model whose packed examples see each other.
        """
        super().bind(tokenizer_of(processor), model)
        self.limits = Limits(self.recipe.max_new_tokens, self.max_length, positions(model))
        if self.limits.answer < self.recipe.max_new_tokens:
            self.notes.say(
                f"Answers end after {self.limits.answer} tokens, not after max_new_tokens "
                f"{self.recipe.max_new_tokens}: {self.recipe.model} has {positions(model)} positions, of which a "
                f"prompt takes up to {self.limits.prompt}."
            )
        if getattr(self.processor, "chat_template", None):
            self.template = ChatTemplate(self.processor, self.recipe.model)
        elif "messages" in self.columns:
            raise DataError(
                f"The tokenizer of {self.recipe.model} has no chat template, which the column "
                f"{self.columns['messages']!r} needs. Give prompt and completion columns, or an instruct model."
            )
        if self.template is None:
            tell_endless(self.processor, self.recipe.model, self.notes)
        set_stops(model, self.processor, self.template.stops if self.template is not None else [])
        tell_settings(model, self.recipe.model, self.notes)
        if self.recipe.training.packing and next(model.parameters()).device.type != "meta":
            packing.check(model, self.recipe.model)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """One or more samples a row, with `labels` that are -100 where nothing is learned; without `answers`, prompts.

        Raises:
            DataError: no row has anything to learn, or the template refuses one.
        """
        if not answers:
            return self._prompts(data)
        cuts, features, useless = Cuts(), Encoded(small=("input_ids",)), np.ones(len(data), dtype=bool)
        for number, (ids, learned) in self._samples(data, cuts):
            if any(learned[1:]):
                labels = [token if counts else IGNORED for token, counts in zip(ids, learned, strict=True)]
                features.append({"row": number, "input_ids": ids, "labels": labels})
                useless[number] = False
        if not len(features):
            raise DataError(
                "None of the rows has anything to learn: no text, assistant turn or completion, or nothing left of it "
                f"within max_length {self.max_length} (training.max_length raises that)."
            )
        self._tell(cuts, np.flatnonzero(useless).tolist(), len(data))
        return features

    def _tell(self, cuts: Cuts, left_out: list[int], rows: int) -> None:
        if left_out:
            first = ", ".join(str(row + 1) for row in left_out[:5])
            self.notes.say(
                f"{len(left_out):,} of {rows:,} rows have no answer to learn from and were left out (rows {first}"
                f"{', …' if left_out[5:] else ''}).",
                rows_left_out=len(left_out),
            )
        cuts.tell(self.notes, self.max_length)

    def _samples(self, data: Dataset, cuts: Cuts) -> Iterator[tuple[int, Sample]]:
        """(row, sample); a long text gives several pieces, a conversation as many samples as its template asks for."""
        if "text" in self.columns:
            for start, texts in texts_in_parts(data, self.columns["text"], "text"):
                for number, ids in enumerate(self.processor(texts)["input_ids"], start):
                    ids = self._ended(self._begun(ids, cuts))
                    for first in range(0, len(ids), self.max_length):
                        piece = ids[first : first + self.max_length]
                        yield number, (piece, [True] * len(piece))
            return
        for index, row in each_row(data):
            if self.template is None:
                if not self._said(row, "completion", index).strip():
                    cuts["empty_answers"] += 1
                    continue
                found = fitted(self._plain(row, index, cuts), self.max_length, cuts)
                made = [(found.ids, [False] * len(found.context) + [True] * len(found.answer))]
            else:
                talk = conversation(row, self.columns, index, answer=True)
                cuts["systems_not_used"] += system_beside(row, self.columns, talk)
                made = (
                    samples(self.template, talk, self.max_length, index, cuts)
                    if self.recipe.answer_only
                    else [whole(self.template, talk, self.max_length, index, cuts)]
                )
            for ids, learned in made:
                yield index, (ids, learned if self.recipe.answer_only else [True] * len(ids))

    def _begun(self, ids: Sequence[int], cuts: Cuts) -> list[int]:
        """Ids of a text, with one token for its start where the text has written that out too."""
        ids, start = list(ids), self.processor.bos_token_id
        if start is not None and ids[:2] == [start, start]:
            cuts["starts_written_twice"] += 1
            cuts.first["starts_written_twice"] = self.processor.bos_token
            return ids[1:]
        return ids

    def _plain(self, row: Mapping[str, Any], index: int, cuts: Cuts) -> Answer:
        """Prompt and completion as text, for a tokenizer without a chat template."""
        prompt_ids = self._plain_prompt(row, index, cuts)
        completion = self.processor(self._said(row, "completion", index), add_special_tokens=False)["input_ids"]
        return Answer(prompt_ids, self._ended(list(completion)))

    def _said(self, row: Mapping[str, Any], role: str, index: int) -> str:
        text = spelled_turns(row[self.columns[role]])
        if not isinstance(text, str):
            raise DataError(
                f"Row {index + 1}, column {self.columns[role]!r}: {shortened(text)} is no text, and the tokenizer of "
                f"{self.recipe.model} has no chat template to write turns with. Give text, or take an instruct model."
            )
        return text

    def _plain_prompt(self, row: Mapping[str, Any], index: int, cuts: Cuts) -> list[int]:
        where = f"Row {index + 1}"
        if row.get(self.columns.get("tools", "")):
            raise DataError(
                f"{where} has tools, and the tokenizer of {self.recipe.model} has no chat template to write them with. "
                f"Take an instruct model, or leave out the column {self.columns['tools']!r}."
            )
        text = self._said(row, "prompt" if "prompt" in self.columns else "text", index)
        text = with_input(text, as_text(row.get(self.columns.get("input", "")), where))
        past = past_turns(row.get(self.columns.get("history", "")), f"{where}, the history")
        before = [turn["content"] or "" for turn in past]
        system = system_text(row.get(self.columns.get("system", "")), where)
        if system.strip():
            before.insert(0, system)
        return self._prompt_ids("\n\n".join([*before, text]), cuts)

    def _prompt_ids(self, text: str, cuts: Cuts) -> list[int]:
        """Ids of a text that the model is to write on from."""
        ids = self._begun(self.processor(text)["input_ids"], cuts)
        ids = ids[:-1] if ids[-1:] == [self.processor.eos_token_id] else ids
        return ids or [first_token(self.processor)]  # a model continues something

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.processor.eos_token_id
        return list(ids) if end is None or ids[-1:] == [end] else [*ids, end]

    def _prompts(self, data: Dataset) -> Features:
        cuts, features = Cuts(), Encoded(small=("input_ids",))
        for index, row in each_row(data):
            if self.template is not None and "text" not in self.columns:
                talk = self._asked(row, index)
                ids = prompt(self.template, talk, self.limits.prompt, index, cuts)
            else:
                ids = self._plain_prompt(row, index, cuts)
                cuts["prompts_cut"] += len(ids) > self.limits.prompt
                ids = ids[-self.limits.prompt :]
            features.append({"row": index, "input_ids": compact(ids), "labels": compact([IGNORED] * len(ids))})
        with self.notes.about("prompts to answer"):
            cuts.tell(self.notes, self.max_length)
        return features

    def _asked(self, row: Mapping[str, Any], index: int) -> Conversation:
        """The conversation up to the last answer."""
        talk = conversation(row, self.columns, index, answer=False)
        return talk.without_answer() if "messages" in self.columns else talk

    def training_features(self, features: Features) -> Features:
        """The samples, packed to rows of `max_length` tokens where the recipe asks for it."""
        features = super().training_features(features)
        return packing.pack(features, self.max_length) if self.recipe.training.packing else features

    def collate_training(self, features: Features) -> dict[str, torch.Tensor]:
        """A batch to train on, of packed rows or of samples."""
        if self.recipe.training.packing:
            return packing.collate(features, self.processor.pad_token_id or 0)
        return self.collate(features)

    def collate(self, features: Features, side: str = "right") -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, labels, each (rows, longest) int64, and row (rows,); padded on `side`."""
        batch = pad_inputs(features, self.processor, side)
        batch["labels"] = pad([feature["labels"] for feature in features], IGNORED, side)
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[tuple[float, int]]:
        """Negative log-likelihood (nats, summed) and number of counted tokens of each example."""
        labels = batch.pop("labels")
        rows, length = labels.shape
        found: list[tuple[float, int]] = []
        with lazy_head(model) as lazy:
            at_once = rows if lazy else max(LOGITS_AT_ONCE // (length * model.config.get_text_config().vocab_size), 1)
            for start in range(0, rows, at_once):
                part = {key: value[start : start + at_once] for key, value in batch.items()}
                target = labels[start : start + at_once]
                scores = log_probabilities(model(**part, use_cache=False).logits, target)
                sums = (-scores).double().sum(-1).tolist()
                found += zip(sums, (target[:, 1:] != IGNORED).sum(-1).tolist(), strict=True)
        return found

    def score(self, results: Sequence[tuple[float, int]], features: Features) -> dict[str, float]:
        """Mean loss of a token (nats), perplexity, and how many tokens were counted."""
        tokens = sum(count for _, count in results)
        loss = sum(nll for nll, _ in results) / max(tokens, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "eval_tokens": tokens}

    def predict(self, model: nn.Module, data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        """Of each row what was asked (`messages`, `prompt` or `text`) and the `answer` that the model writes."""
        features = self.encode(data, answers=False)
        results = self.run(model, features, batch_size, self._write, lambda f: self.collate(f, side="left"))
        given = next(role for role in ("messages", "prompt", "text", "chosen") if role in self.columns)
        asked = [row[self.columns[given]] for row in data] if given != "chosen" else self.asked(data)
        given = "prompt" if given == "chosen" else given
        if given == "messages":  # without what no template sees, such as the time of a turn
            asked = [conversation(row, self.columns, index, answer=False).turns for index, row in enumerate(data)]
        return [{given: asked[f["row"]], **self.answered(r)} for f, r in zip(features, results, strict=True)]

    def asked(self, data: Dataset) -> list[Any]:
        """What was asked, where it has no column of its own: the turns before the last answer."""
        return [self._asked(row, index).turns for index, row in enumerate(data)]

    def _write(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        if self.n_best == 1:
            return self.generate(model, batch)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        start, limits = batch["input_ids"].shape[1], {"max_new_tokens": self.limits.answer}
        return n_best(model, self.processor, inputs, self.n_best, start, **limits)

    def generate(self, model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> list[str]:
        """The answers to a batch of prompts padded on the left; greedy; `options` go to `model.generate`."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        out = model.generate(**inputs, max_new_tokens=self.limits.answer, do_sample=False, **options)
        return [written(self.processor, ids, model) for ids in out[:, batch["input_ids"].shape[1] :].tolist()]
