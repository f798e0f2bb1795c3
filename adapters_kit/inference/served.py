"""The models behind a server: one base with its adapters, by name.

Requests that wait while an answer is computed are answered together, in one batch, where they take the likeliest tokens
and are not streamed: those for one adapter always, those for several where all are plain LoRA, which peft can mix.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from adapters_kit.errors import ModelError
from adapters_kit.inference.session import Sampling, Writer, open_writing
from adapters_kit.inference.subject import Subject, describe
from adapters_kit.tasks.generation import positions
from adapters_kit.wrapping import wrap

_MOST = 16  # answers computed at once
_LOGITS = 2**26  # numbers that the logits of a batch may have, 256 MiB
Answer = tuple[list[int], list[Any]]


@dataclass(eq=False)
class _Asked:
    """One request that waits for its answer."""

    name: str
    ids: Sequence[int]
    sampling: Sampling
    top: int
    answer: Answer | None = None
    error: Exception | None = None


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
        self._waiting: list[_Asked] = []
        self._words = int(model.get_input_embeddings().weight.shape[0])
        kinds = [config.to_dict() for config in getattr(model, "peft_config", {}).values()]
        self._mixes = all(map(_can_mix, kinds))
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
        if sampling.max_new_tokens < 1:
            return [], []
        asked = _Asked(name, ids, sampling, top)
        self._waiting.append(asked)
        with self._lock:  # whoever comes first answers all that wait meanwhile
            if asked.answer is None and asked.error is None:
                self._answer(self._together(asked))
        if asked.error is not None:
            raise asked.error
        assert asked.answer is not None
        return asked.answer

    def _together(self, first: _Asked) -> list[_Asked]:
        """`first` and the others that can be answered with it; they wait no longer."""
        found = [first]
        longest = first.sampling.max_new_tokens
        for other in [one for one in self._waiting if one is not first]:
            longest = max(longest, other.sampling.max_new_tokens)
            fits = len(found) < _MOST and (len(found) + 1) * longest * self._words <= _LOGITS
            greedy = first.sampling.temperature <= 0 and other.sampling.temperature <= 0
            if fits and greedy and (self._mixes or other.name == first.name):
                found.append(other)
        for one in found:
            self._waiting.remove(one)
        return found

    def _answer(self, asked: list[_Asked]) -> None:
        """Answers them; one by one if that fails together, so that each has its own error."""
        before = {module: set(module._forward_pre_hooks) for module in self.writer.model.modules()}
        try:
            for one, answer in zip(asked, self._computed(asked), strict=True):
                one.answer = answer
        except Exception as error:
            for module, hooks in before.items():  # peft leaves those of a mixed batch where it was broken off
                for key in set(module._forward_pre_hooks) - hooks:
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
            if len(asked) == 1:
                asked[0].error = error
                return
            for one in asked:
                self._answer([one])

    def _computed(self, asked: list[_Asked]) -> list[Answer]:
        sampling = replace(asked[0].sampling, max_new_tokens=max(one.sampling.max_new_tokens for one in asked))
        options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
        base = False
        if len({one.name for one in asked}) > 1:
            options["adapter_names"] = [self._adapters.get(one.name, "__base__") for one in asked]
        else:
            base = self._choose(asked[0].name)
        out = self.writer.generate_batch([one.ids for one in asked], sampling, base=base, **options)
        start = max(len(one.ids) for one in asked)
        found = []
        for row, one in enumerate(asked):
            new = self._own(out.sequences[row, start:].tolist(), one.sampling.max_new_tokens)
            logits = [step[row] for step in out.logits[: len(new)]]
            found.append((new, [_likeliest(step, token, one.top) for step, token in zip(logits, new, strict=True)]))
        return found

    def _own(self, tokens: list[int], most: int) -> list[int]:
        """A row's tokens up to its end, without those that pad it to the length of the others."""
        ends = getattr(self.writer.model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        return tokens[: min(end + 1, most)]

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


# What peft's LoRA cannot mix within a batch, or what goes beside its matrices.
_UNMIXED = (
    *("use_dora", "use_bdlora", "lora_bias", "alora_invocation_tokens"),
    *("modules_to_save", "trainable_token_indices", "target_parameters"),
)


def _can_mix(config: Mapping[str, Any]) -> bool:
    plain = config["peft_type"] == "LORA" and config.get("bias", "none") == "none"
    return plain and not any(config.get(option) for option in _UNMIXED)


def _base(recipe: Any) -> str:
    return f"{recipe.model}{f' at {recipe.quantize}' if recipe.quantize else ''}"


def _likeliest(logits: torch.Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    logs = logits.float().log_softmax(-1)
    values, indices = logs.topk(min(top, len(logs))) if top else (logs[:0], logs[:0].long())
    return float(logs[token]), list(zip(indices.tolist(), values.tolist(), strict=True))
