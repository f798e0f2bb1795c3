"""Writing answers: where they stop, how long they and their prompts may be, and which part of them is text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapters_kit.tasks.notes import Notes

_NO_THINKING = re.compile(r"\A\s*(?:<think>)?\s*</think>\s*")


class Limits:
    """How many tokens a prompt and an answer may have.

    They are the same for every row, so that a row gets the same answer alone and among others. An answer may go beyond
    `max_length`, which is about training, but never beyond the positions that a model has.

    Attributes:
        prompt: longest prompt; longer ones lose their beginning.
        answer: longest answer.
    """

    def __init__(self, max_new_tokens: int, max_length: int, positions: int = 10**9) -> None:
        self.prompt = max(max_length - max_new_tokens, max_length // 2, 1)
        self.answer = max(min(max_new_tokens, positions - self.prompt), 1)


def positions(model: nn.Module) -> int:
    """How many tokens a model has positions for; huge where nothing limits them.

    A table of positions is a limit; a number in the config of a model without one (RoPE) is what it was trained on.
    """
    told = [getattr(model.config, name, None) for name in ("max_position_embeddings", "n_positions")]
    sizes = [size for size in told if isinstance(size, int) and size > 0]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]:
            # RoBERTa's kind counts positions from behind the padding index.
            sizes.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min(sizes, default=10**9)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor for text and images, with the processor's chat template; a tokenizer as it is."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not getattr(tokenizer, "chat_template", None) and getattr(processor, "chat_template", None):
        tokenizer.chat_template = processor.chat_template
    return tokenizer


def set_stops(model: nn.Module, tokenizer: Any, marks: Sequence[int] = ()) -> None:
    """Lets `model.generate` stop at the tokenizer's end of text and at the template's ends of turns as well.

    The generation config says so, which is saved with the adapter.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    known = config.eos_token_id
    ids = [*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id, *marks]
    stops = list(dict.fromkeys(index for index in ids if index is not None and index >= 0))
    config.eos_token_id = stops if len(stops) > 1 else stops[0] if stops else None
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0)


_FLOORS = ("min_length", "min_new_tokens")
_BENDS = (
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "repetition_penalty", "encoder_repetition_penalty"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty", "sequence_bias"),
)


def tell_endless(tokenizer: Any, name: str, notes: Notes) -> None:
    """Says so where the tokenizer of the model `name` has no token that ends a text."""
    if tokenizer.eos_token_id is None:
        notes.say(
            f"The tokenizer of {name} has no token for the end of a text: nothing teaches where an answer ends. "
            "eos_token in its tokenizer_config.json names one."
        )


def tell_settings(model: nn.Module, name: str, notes: Notes) -> None:
    """Takes back the shortest length that a base's generation config asks for; says what else in it shapes answers.

    A length floor was set for the base's own texts: shorter answers than it could not be given, nor learned.

    Args:
        name: the model's.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    usual = type(config)().to_dict()
    own = {key: value for key, value in config.to_dict().items() if value and value != usual.get(key)}
    if floors := {key: own[key] for key in _FLOORS if key in own}:
        for key in floors:
            setattr(config, key, usual.get(key))
        notes.say(f"{name} asks for answers of a shortest length ({_told(floors)}), which is taken back.")
    kept = {key: own[key] for key in _BENDS if key in own and own[key] != 1}
    if kept:
        notes.say(f"Answers follow the generation config of {name}: {_told(kept)}.")
    if own.get("num_beams", 1) > 1:
        notes.say(f"Answers are scored as they are written greedily, without the {own['num_beams']} beams of {name}.")


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value!s:.40}" for key, value in settings.items())


def n_best(
    model: nn.Module, tokenizer: Any, inputs: Mapping[str, torch.Tensor], count: int, start: int, **limits: Any
) -> list[list[dict[str, Any]]]:
    """The likeliest answers that a beam search of width `count` finds for each row, best first, each with its score.

    Args:
        start: where the answer begins in what `model.generate` returns.
        **limits: for `model.generate`.

    Returns:
        {"answer": text, "score": mean log-probability of its tokens, in nats}, `count` a row.
    """
    width = {"num_beams": count, "num_return_sequences": count, "do_sample": False, "length_penalty": 1.0}
    generating: Any = model.generate
    out = generating(**inputs, **limits, **width, return_dict_in_generate=True, output_scores=True)
    texts = [written(tokenizer, ids, model) for ids in out.sequences[:, start:].tolist()]
    found = [
        {"answer": text, "score": round(score, 6)}
        for text, score in zip(texts, out.sequences_scores.tolist(), strict=True)
    ]
    return [found[row : row + count] for row in range(0, len(found), count)]


def without_empty_thinking(text: str) -> str:
    """The text without a block of thinking at its beginning that holds nothing."""
    return _NO_THINKING.sub("", text)


def written(tokenizer: Any, ids: Sequence[int], model: nn.Module) -> str:
    """What was written, as text: up to where it stopped, without special tokens and an empty block of thinking."""
    stop = getattr(model.generation_config, "eos_token_id", None)
    stops = set(stop if isinstance(stop, list) else [stop])
    end = next((place for place, index in enumerate(ids) if index in stops), len(ids))
    return without_empty_thinking(tokenizer.decode(ids[:end], skip_special_tokens=True))
