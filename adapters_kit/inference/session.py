"""A conversation with a run, an adapter or a plain model, and text made with it for `chat` and `serve`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters_kit.artifacts.chat import render
from adapters_kit.errors import DataError
from adapters_kit.inference.answers import Name
from adapters_kit.inference.subject import Subject, describe, load_subject
from adapters_kit.recipe import Recipe
from adapters_kit.tasks import get
from adapters_kit.tasks.base import autocast
from adapters_kit.tasks.streaming import pieces

Turn = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token each time, as `predict` does.
        top_p: draw among the likeliest tokens that hold this much probability.
        seed: of the draws; None draws anew each time.
        stop: texts at which an answer ends; they are not part of it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """Arguments of `model.generate`."""
        made: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature <= 0:
            return {**made, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {**made, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass
class Writer:
    """A model that writes, and the tokenizer that goes with it.

    Attributes:
        subject: what it is.
        has_template: whether conversations can be put to it; else only texts to go on from.
    """

    subject: Subject
    has_template: bool = field(init=False)

    def __post_init__(self) -> None:
        self.has_template = bool(getattr(self.tokenizer, "chat_template", None))

    @classmethod
    def open(cls, name: Name, **recipe_keys: Any) -> Writer:
        """Loads what `name` stands for.

        Raises:
            DataError: it writes no text.
        """
        recipe, adapter = describe(name, **recipe_keys)
        return cls(open_writing(recipe, adapter))

    @property
    def model(self) -> nn.Module:
        """The model, with its adapters."""
        return self.subject.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.subject.task.processor

    def ids_of_turns(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens of a conversation, up to where the assistant is to speak."""
        if self.has_template:
            made = render(self.tokenizer, list(turns), prompt=True)
            return list(self.tokenizer(made, add_special_tokens=False)["input_ids"])
        return self.ids_of_text(str(turns[-1]["content"]))

    def ids_of_text(self, text: str) -> list[int]:
        """The tokens of a text to go on from."""
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def write(self, ids: Sequence[int], sampling: Sampling, *, base: bool = False) -> Iterator[str]:
        """The answer, piece by piece.

        Args:
            base: of the model without its adapter.
        """

        def generate(**options: Any) -> None:
            self.generate_batch([ids], sampling, base=base, **options)

        return _until(pieces(self.tokenizer, generate), sampling.stop)

    def generate_batch(
        self, rows: Sequence[Sequence[int]], sampling: Sampling, *, base: bool = False, **options: Any
    ) -> Any:
        """What `model.generate` returns for several prompts, padded on the left; `options` go there."""
        device = next(self.model.parameters()).device
        longest, padding = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        inputs = torch.tensor([[padding] * (longest - len(ids)) + list(ids) for ids in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=device)
        without = self.model.disable_adapter() if base and hasattr(self.model, "disable_adapter") else None
        with contextlib.ExitStack() as around:
            for context in (
                without or contextlib.nullcontext(),
                torch.no_grad(),
                autocast(self.model, device),
                torch.random.fork_rng(enabled=sampling.seed is not None),
            ):
                around.enter_context(context)
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            return self.model.generate(
                input_ids=inputs,
                attention_mask=mask,
                pad_token_id=self.tokenizer.pad_token_id,
                **sampling.options(),
                **options,
            )


def open_writing(recipe: Recipe, adapter: Path | None) -> Subject:
    """A subject that writes text on from a text, whatever columns it was trained on.

    Raises:
        DataError: its task writes none.
    """
    kind = get(recipe.task)
    if recipe.task != "causal-lm":
        instead = "predict" if kind.generates else "predict or eval"
        raise DataError(f"{adapter or recipe.model} is for {recipe.task}, not for conversations: use {instead}.")
    plain = recipe.changed(**{"data.columns": {"text": "text"}, "training.packing": False})
    return load_subject(plain, kind(plain, {"text": "text"}), adapter)


def _until(found: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Pieces up to the first of `stops`; what may be the beginning of one is held back."""
    if not stops:
        yield from found
        return
    waiting = ""
    longest = max(map(len, stops))
    for piece in found:
        waiting += piece
        ends = [place for stop in stops if (place := waiting.find(stop)) >= 0]
        if ends:
            if waiting[: min(ends)]:
                yield waiting[: min(ends)]
            return
        sure = len(waiting) - longest + 1
        if sure > 0:
            yield waiting[:sure]
            waiting = waiting[sure:]
    if waiting:
        yield waiting


@dataclass
class Chat:
    """A conversation that remembers.

    Attributes:
        writer: the model.
        sampling: how it answers.
        turns: what was said, the system's words first.
    """

    writer: Writer
    sampling: Sampling = Sampling()
    turns: list[Turn] = field(default_factory=list)

    def system(self, text: str) -> None:
        """Sets what the assistant is told before everything, or takes it away; the conversation begins anew."""
        self.turns = [{"role": "system", "content": text}] if text else []

    def forget(self) -> None:
        """Begins anew; the system's words stay."""
        self.turns = [turn for turn in self.turns if turn["role"] == "system"]

    def ask(self, text: str, *, base: bool = False) -> Iterator[str]:
        """The answer, piece by piece; question and answer are remembered once it is read to its end.

        Args:
            base: asks the model without its adapter, and remembers nothing: the same question can be asked of both.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        said = []
        for piece in self.writer.write(self.writer.ids_of_turns(turns), self.sampling, base=base):
            said.append(piece)
            yield piece
        if not base:
            self.turns = [*turns, {"role": "assistant", "content": "".join(said).strip()}]
