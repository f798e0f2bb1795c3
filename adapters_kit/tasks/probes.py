"""What a chat template is probed with: small conversations of words that occur nowhere else, and what is looked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from adapters_kit.tasks.turns import Turn

ASKED, TOLD, AGAIN, NAME, KEY, RESULT = "qaxzu", "tovyk", "wejru", "fimzo", "keluq", "rezop"


class Ending(NamedTuple):
    """How a template ends an assistant turn.

    Attributes:
        tail: what it writes after the last word of a turn that nothing follows.
        end: the part of it that the model is to write: up to the mark at which generation stops.
        stop: id of that mark; None where the template has none.
    """

    tail: str
    end: str
    stop: int | None


def user(text: str) -> Turn:
    """A turn of the user's."""
    return {"role": "user", "content": text}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": NAME,
            "description": NAME,
            "parameters": {"type": "object", "properties": {KEY: {"type": "string"}}, "required": [KEY]},
        },
    }
]
CALL: dict[str, Any] = {"id": "abcdef123", "type": "function", "function": {"name": NAME, "arguments": {KEY: TOLD}}}


def with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are the text of a JSON object."""
    inner = call["function"]
    arguments = inner["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**inner, "arguments": arguments}}


def shown(content: str | None, text: str) -> bool:
    """Whether the beginning of a turn's text stands in a rendering, as it is or written as JSON."""
    begin = (content or "").strip()[:40].strip()
    return begin in text or json.dumps(begin, ensure_ascii=False)[1:-1] in text


def advice(reason: str) -> str:
    """What to do about the usual refusals."""
    reason = reason.lower()
    if "system" in reason and "alternate" not in reason:
        return "Put the text of the system turn before that of the first user turn."
    if "alternate" in reason or "after" in reason:
        return "Join turns of one speaker that follow each other, and begin with the user's."
    return "Change the row, or leave it out."


def alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters or tokens two sequences begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
