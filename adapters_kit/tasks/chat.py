"""Conversations: what a row may look like, and which tokens of the rendered text are the assistant's."""

from collections.abc import Mapping, Sequence
from typing import Any

from adapters_kit.errors import DataError

_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def as_messages(value: Any, row: int | None = None) -> list[dict[str, Any]]:
    """A conversation as a list of {"role", "content"}; ShareGPT's {"from", "value"} is understood.

    Raises:
        DataError: anything else.
    """
    where = "" if row is None else f" (row {row + 1})"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"A conversation is a list of {{role, content}}, not {value!r}{where}.")
    turns = []
    for turn in value:
        if isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str):
            turns.append({key: item for key, item in turn.items() if item is not None})
        elif isinstance(turn, Mapping) and turn.get("from") in _SHAREGPT and isinstance(turn.get("value"), str):
            turns.append({"role": _SHAREGPT[turn["from"]], "content": turn["value"]})
        else:
            raise DataError(f"A turn of a conversation is {{role, content}}, not {turn!r}{where}.")
    return turns


def render(tokenizer: Any, turns: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """The conversation as the model's template writes it."""
    return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=add_generation_prompt)


def tokens_of_answers(tokenizer: Any, turns: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each token whether the assistant wrote it (its end-of-turn mark included).

    The answers are found by rendering the conversation up to each assistant turn: what comes after that text and before
    the next turn's is the answer. Works for every template that only ever appends.
    """
    whole = render(tokenizer, turns)
    spans = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = render(tokenizer, turns[:index], add_generation_prompt=True) if index else ""
        after = render(tokenizer, turns[: index + 1])
        if not (whole.startswith(before) and whole.startswith(after.rstrip("\n"))):
            raise DataError(
                "The model's chat template rewrites earlier turns when later ones are added, so the answers cannot be "
                "told apart. Set answer_only: false, or split the conversation into prompt and completion columns."
            )
        spans.append((len(before), len(after.rstrip("\n"))))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    answer = [any(start < high and end > low for low, high in spans) for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], answer
