"""The models behind a server: one base with its adapters, by name, asked one answer at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from adapters_kit.errors import ModelError
from adapters_kit.inference.session import Sampling, Writer, open_writing
from adapters_kit.inference.subject import Subject, describe
from adapters_kit.tasks.generation import positions
from adapters_kit.wrapping import wrap


class Served:
    """A base with its adapters, by name. `base` stands for the model without any.

    Attributes:
        names: what a request's `model` may be: the adapters in the order given, then the base.
        writer: the model.
        positions: how many tokens a prompt and its answer may have.
    """

    def __init__(self, adapters: Mapping[str, str | os.PathLike[str]], **recipe_keys: Any) -> None:
        """Loads the base once and every adapter on it.

        Args:
            adapters: name to run folder, adapter folder or, alone, plain model.

        Raises:
            ModelError: they do not share one base.
            DataError: one of them writes no text.
        """
        found = {name: describe(path, **recipe_keys) for name, path in adapters.items()}
        (first, (recipe, folder)), *others = found.items()
        for name, (other, where) in others:
            if where is None or folder is None:
                raise ModelError(f"Several are served on one base; {name!r} or {first!r} is a whole model.")
            if (other.model, other.quantize) != (recipe.model, recipe.quantize):
                raise ModelError(
                    f"{first!r} sits on {_base(recipe)} and {name!r} on {_base(other)}: adapters of one base are "
                    "served together, others by another server."
                )
        subject = open_writing(recipe, folder)
        self._adapters = {first: "default"} if folder is not None else {}
        model = subject.model
        for name, (_, where) in others:
            assert where is not None
            model = wrap(model, str(where), adapter_name=name)
            self._adapters[name] = name
        self.writer = Writer(Subject(recipe, folder, subject.task, model.eval()))
        self.positions = positions(model)
        base = Path(recipe.model).name or recipe.model
        self.names = [*self._adapters, *([base] if base not in self._adapters else [])]
        self.base = base
        self._lock = Lock()
        self.begun = int(time.time())

    def _choose(self, name: str) -> bool:
        """Activates the adapter called `name`; whether it is the base that was asked for."""
        if name in self._adapters:
            if hasattr(self.writer.model, "set_adapter"):
                self.writer.model.set_adapter(self._adapters[name])
            return False
        return bool(self._adapters)

    def write(self, name: str, ids: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """The answer, piece by piece; other requests wait until it is read or dropped."""
        with self._lock:
            base = self._choose(name)
            pieces = self.writer.write(ids, sampling, base=base)
            try:
                yield from pieces
            finally:
                pieces.close()  # type: ignore[attr-defined]

    def tokens(self, name: str, ids: Sequence[int], sampling: Sampling, top: int) -> tuple[list[int], list[Any]]:
        """The answer's tokens, and for each its log-probability with the `top` likeliest ones."""
        with self._lock:
            base = self._choose(name)
            if sampling.max_new_tokens < 1:
                return [], []
            out = self.writer.generate(ids, sampling, base=base, output_logits=True, return_dict_in_generate=True)
        new = out.sequences[0, len(ids) :].tolist()
        return new, [_likeliest(logits[0], token, top) for logits, token in zip(out.logits, new, strict=True)]

    def prompt_logprobs(self, name: str, ids: Sequence[int], top: int) -> list[Any]:
        """For each token of a prompt but the first, its log-probability after those before it."""
        with self._lock:
            base = self._choose(name)
            model = self.writer.model
            inputs = torch.tensor([list(ids)], device=next(model.parameters()).device)
            with torch.no_grad():
                if base:
                    with model.disable_adapter():
                        logits = model(input_ids=inputs, use_cache=False).logits[0]
                else:
                    logits = model(input_ids=inputs, use_cache=False).logits[0]
        return [None, *(_likeliest(row, token, top) for row, token in zip(logits[:-1], ids[1:], strict=True))]


def _base(recipe: Any) -> str:
    return f"{recipe.model}{f' at {recipe.quantize}' if recipe.quantize else ''}"


def _likeliest(logits: torch.Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    logs = logits.float().log_softmax(-1)
    values, indices = logs.topk(min(top, len(logs))) if top else (logs[:0], logs[:0].long())
    return float(logs[token]), list(zip(indices.tolist(), values.tolist(), strict=True))
