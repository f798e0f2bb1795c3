"""Of two answers the better one: DPO. The reference is the model before training, asked once for every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError
from adapters_kit.kernels.token_scores import lazy_logits, log_probabilities
from adapters_kit.names import is_adapter_folder
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import IGNORED, Features, compact, pad, pad_inputs
from adapters_kit.tasks.causal_lm import CausalLM
from adapters_kit.tasks.conversation import Conversation
from adapters_kit.tasks.encoded import AT_ONCE, Encoded
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.objectives import trl_losses
from adapters_kit.tasks.objectives.pairs import Said, read
from adapters_kit.tasks.rows import each_row
from adapters_kit.tasks.template import Answer
from adapters_kit.tasks.windows import Cuts, Sample, fitted, prompt, samples

_SMALL = ("input_ids", "rejected_ids")


class Preference(CausalLM):
    """Pairs of a chosen and a rejected answer. Predicting writes an answer, as for any causal model."""

    asks_base = True
    needs: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
    asks: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt",), ("messages",), ("chosen",), ("text",))
    optional: ClassVar[tuple[str, ...]] = ("input", "history", "system", "tools", "score_chosen", "score_rejected")
    targets: ClassVar[tuple[str, ...]] = ("rejected",)
    own_loss = True
    unplanned: tuple[str, ...] = ("reference",)

    def __init__(
        self, recipe: Recipe, columns: Mapping[str, str], labels: list[str] | None = None, notes: Notes | None = None
    ) -> None:
        super().__init__(recipe, columns, labels, notes)
        self.spec = recipe.objective
        trl_losses.quiet_trl()

    @classmethod
    def refuse(cls, data: Dataset, given: Mapping[str, str]) -> None:
        """Nothing: pairs are what is wanted here."""

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Reads every row, so that one that is no pair is refused before the model loads. Raises DataError."""
        _ = self.trl_loss  # which refuses options
        self.tell_reference()
        for data in (train, test) if test is not None else (train,):
            plain: tuple[int, tuple[str, str]] | None = None  # the first; every row is read
            for row, (chosen, _) in self.pairs(data):
                if chosen.running and chosen.text is not None and plain is None:
                    plain = row, chosen.text
            if plain is not None:
                self.notes.say(
                    f"No column is a prompt: what {self.columns['chosen']!r} and {self.columns['rejected']!r} "
                    f"begin with alike is taken for it (row {plain[0] + 1}: {plain[1][0][-80:]!r})."
                )

    def tell_reference(self) -> None:
        """Says what rewards are measured from, if from anything, where that may not be what is meant."""
        if not self.asks_base:
            return
        name = self.recipe.method.name
        if any(is_adapter_folder(one) for one in ([name] if isinstance(name, str) else name)):
            self.notes.say(
                "The reference is the base model without any adapter, not with the adapter that goes on: what that has "
                "learned already counts as a reward. To measure from it, merge it first and name the merged model."
            )

    def _pair(self, row: Mapping[str, Any], number: int) -> tuple[Said, Said]:
        chosen = read(row, self.columns, number, "chosen", ["rejected"])
        return chosen, read(row, self.columns, number, "rejected", ["chosen"])

    def pairs(self, data: Dataset) -> Iterator[tuple[int, tuple[Said, Said]]]:
        """(number, both answers) of every row. Raises DataError."""
        for number, row in each_row(data):
            yield number, self._pair(row, number)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """`input_ids` and `labels` of the chosen answer, `rejected_ids` and `rejected_labels` of the other.

        Raises:
            DataError: no row has two different answers.
        """
        if not answers:
            return self._prompts(data)
        cuts, features, left = Cuts(), Encoded(small=_SMALL), Left(len(data))
        for number, row in each_row(data):
            chosen, rejected = self._pair(row, number)
            if chosen.answer == rejected.answer and chosen.prompt == rejected.prompt:
                left.out("have the same text as chosen and rejected", number)
            elif not self._ranked(row):
                left.out("have a chosen answer whose score is not above that of the rejected one", number)
            elif (one := self.sample(chosen, number, cuts)) is None or (
                other := self.sample(rejected, number, cuts)
            ) is None:
                left.out("have an empty answer", number)
            elif one[0] == other[0]:
                left.out("have two answers that are alike up to max_length", number)
            else:
                features.append({"row": number, **labelled(one), **labelled(other, "rejected_", "rejected_ids")})
        left.tell(self.notes)
        if not len(features):
            raise DataError(f"None of the {len(data):,} rows has two answers to compare: {left.told()}")
        cuts.tell(self.notes, self.max_length)
        return features

    def _ranked(self, row: Mapping[str, Any]) -> bool:
        """Whether the scores beside the answers say what their columns say; true where there are none."""
        scores = [row.get(self.columns.get(role, "")) for role in ("score_chosen", "score_rejected")]
        better, worse = scores
        return not all(isinstance(one, int | float) for one in scores) or better > worse  # type: ignore[operator]

    def sample(self, said: Said, number: int, cuts: Cuts) -> Sample | None:
        """Tokens of prompt and answer, of which the answer's are learned; None where the answer is empty."""
        if said.running or self.template is None:
            prompt_text, answer = self._text(said, number)
            if not answer.strip():
                return None
            told = list(self.processor(answer, add_special_tokens=False)["input_ids"])
            context = self._prompt_ids(prompt_text, cuts)
            found = fitted(Answer(context, self._ended(told)), self.max_length, cuts)
            cuts["prompts_cut"] += len(found.context) < len(context)
            return found.ids, [False] * len(found.context) + [True] * len(found.answer)
        turns = [{**turn, "weight": 0} for turn in said.prompt] + [{**said.talk.turns[-1], "weight": 1}]
        made = samples(self.template, Conversation(turns, said.talk.tools), self.max_length, number, cuts)
        return made[-1] if made and any(made[-1][1][1:]) else None

    def _text(self, said: Said, number: int) -> tuple[str, str]:
        """Prompt and answer as text, for a tokenizer without a chat template."""
        if said.text is None:
            raise DataError(
                f"Row {number + 1} is a conversation, and the tokenizer of {self.recipe.model} has no chat template to "
                "write it with. Give prompt, chosen and rejected as texts, or take an instruct model."
            )
        return said.text

    def _prompts(self, data: Dataset) -> Features:
        """What the model is to answer; without a column for it, what stands before the chosen answer."""
        if "prompt" in self.columns or "chosen" not in self.columns:
            return super()._prompts(data)
        cuts, features = Cuts(), Encoded(small=_SMALL)
        for number, row in each_row(data):
            said = read(row, self.columns, number, "chosen", ["rejected"])
            if said.running or self.template is None:
                ids = self._prompt_ids(self._text(said, number)[0], cuts)
                cuts["prompts_cut"] += len(ids) > self.limits.prompt
                ids = ids[-self.limits.prompt :]
            else:
                talk = Conversation(said.prompt, said.talk.tools)
                ids = prompt(self.template, talk, self.limits.prompt, number, cuts)
            features.append({"row": number, "input_ids": compact(ids), "labels": compact([IGNORED] * len(ids))})
        with self.notes.about("prompts to answer"):
            cuts.tell(self.notes, self.max_length)
        return features

    def asked(self, data: Dataset) -> list[Any]:
        """The prompt of every row without a column for it: a text, or turns."""
        found = [read(row, self.columns, number, "chosen", ["rejected"]) for number, row in each_row(data)]
        return [said.text[0] if said.running and said.text else said.prompt for said in found]

    def length(self, feature: Mapping[str, Any]) -> int:
        """Tokens of the longer answer with its prompt."""
        return max(len(feature["input_ids"]), len(feature.get("rejected_ids", ())))

    def collate(self, features: Features, side: str = "right") -> dict[str, torch.Tensor]:
        """All chosen answers, then all rejected ones: input_ids, attention_mask, labels (2 pairs, longest), and the
        reference's log-likelihoods (2 pairs,) where it was asked; prompts alone as for any causal model."""
        if "rejected_ids" not in features[0]:
            return super().collate(features, side)
        both = [{"input_ids": f["input_ids"]} for f in features] + [{"input_ids": f["rejected_ids"]} for f in features]
        batch = pad_inputs(both, self.processor, side)
        labels = [f["labels"] for f in features] + [f["rejected_labels"] for f in features]
        batch["labels"] = pad(labels, IGNORED, side)
        if "reference" in features[0]:
            reference = np.stack([feature["reference"] for feature in features], axis=1)
            batch["reference"] = torch.from_numpy(reference.reshape(-1))
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def refer(self, model: nn.Module, features: Features, batch_size: int) -> None:
        """Writes into every feature what the model, as it is now, says of its answers: the reference, if any."""
        if not self.asks_base:
            return
        assert isinstance(features, Encoded)
        features.drop("reference")
        found = ([-nll for nll, _ in one] for one in self.run(model, features, batch_size))
        while some := list(islice(found, AT_ONCE)):
            features.add({"reference": [np.asarray(one, dtype=np.float64) for one in some]})

    @cached_property
    def trl_loss(self) -> trl_losses.Loss:
        """TRL's loss."""
        assert self.spec is not None
        return trl_losses.dpo(self.spec)

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """TRL's loss of the pairs, from log-probabilities of the answers' tokens."""
        labels, reference = batch["labels"], batch["reference"]
        with lazy_logits(model):
            logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}, use_cache=False).logits
        return self.trl_loss.of(log_probabilities(logits, labels), labels[:, 1:] != IGNORED, reference)

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """Of each pair the summed negative log-likelihood and the tokens, of the chosen and of the rejected answer."""
        batch.pop("reference", None)
        found = super().step(model, batch)
        half = len(found) // 2
        return list(zip(found[:half], found[half:], strict=True))

    def score(self, results: Sequence[Any], features: Features) -> dict[str, float]:
        """The loss; how often and by how much the chosen answer's reward is above the other's (a tie is half an
        answer right); and the mean log-likelihood of a token of either.

        Of each pair `results` has two times the negative log-likelihood (nats, summed) and the number of tokens. A
        reward is beta times how much likelier the answer became than it is to the reference.
        """
        nll = torch.tensor([[-one[0] for one in pair] for pair in results], dtype=torch.float64)
        tokens = torch.tensor([[one[1] for one in pair] for pair in results])
        reference = torch.from_numpy(np.stack([feature["reference"] for feature in features]))
        rewards = self.trl_loss.beta * (nll - reference)
        mask = torch.arange(int(tokens.max())) < tokens.T.reshape(-1, 1)
        # TRL sums an answer's tokens itself: all of it stands on the first.
        log_probs = torch.zeros(mask.shape, dtype=torch.float64)
        log_probs[:, 0] = nll.T.reshape(-1)
        per_token = nll / tokens.clamp(min=1)
        return {
            "loss": float(self.trl_loss.of(log_probs, mask, reference.T.reshape(-1))),
            **of_pairs(rewards),
            "chosen_nll": -float(per_token[:, 0].mean()),
            "rejected_nll": -float(per_token[:, 1].mean()),
        }


class DPO(Preference):
    """Direct preference optimisation (arXiv 2305.18290), with TRL's other losses of the kind."""


def of_pairs(rewards: torch.Tensor) -> dict[str, float]:
    """How often and by how much the first of two rewards `(pairs, 2)` is above the second; a tie is half right."""
    margin = rewards[:, 0] - rewards[:, 1]
    right = (margin > 0).double() + (margin == 0).double() / 2
    return {"rewards_accuracy": float(right.mean()), "rewards_margin": float(margin.mean())}


class Left:
    """Rows that are left out, by the reason, said once each."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.found: Counter[str] = Counter()
        self.first: dict[str, list[int]] = {}

    def out(self, reason: str, number: int) -> None:
        """Notes a row."""
        self.found[reason] += 1
        if self.found[reason] <= 5:
            self.first.setdefault(reason, []).append(number + 1)

    def told(self) -> str:
        """All reasons in one sentence."""
        return "; ".join(f"{count:,} {reason}" for reason, count in self.found.items()) + "."

    def tell(self, notes: Notes) -> None:
        """A sentence each."""
        for reason, count in self.found.items():
            first = ", ".join(map(str, self.first[reason])) + (", …" if count > 5 else "")
            notes.say(
                f"{count:,} of {self.rows:,} rows {reason}, and were left out (rows {first}).",
                rows_left_out=count,
            )


def labelled(sample: Sample, prefix: str = "", ids_name: str = "input_ids") -> dict[str, np.ndarray]:
    """A sample's ids and its labels, -100 where nothing is learned."""
    ids, learned = sample
    labels = [token if keep else IGNORED for token, keep in zip(ids, learned, strict=True)]
    return {ids_name: compact(ids), f"{prefix}labels": compact(labels)}
