"""What a chat template is probed with: small conversations of words that occur nowhere else, and what is looked for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from adapters_kit.artifacts.chat import render
from adapters_kit.errors import ModelError
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


class Probed:
    """What is found out about a chat template by rendering probes.

    Attributes:
        tokenizer: with a `chat_template`.
        model: its name, for messages.
    """

    def __init__(self, tokenizer: Any, model: str) -> None:
        self.tokenizer = tokenizer
        self.model = model

    def _try(self, turns: list[Turn], tools: Any = None, prompt: bool = False) -> str | None:
        """A probe as the template writes it, or None if it raises."""
        try:
            return render(self.tokenizer, turns, tools=tools, prompt=prompt)
        except ModelError:  # it would not end
            raise
        except Exception:  # whatever the template's code raises
            return None

    @cached_property
    def _source(self) -> str:
        return str(self.tokenizer.chat_template)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether content has to be a list of parts: templates of models that see and hear."""

        def shows(content: Any) -> bool:
            said = {"user": ASKED, "assistant": TOLD}
            text = self._try([{"role": role, "content": content(word)} for role, word in said.items()]) or ""
            return all(word in text for word in said.values()) and not re.search(r"""['"]text['"]""", text)

        return not shows(str) and shows(lambda word: [{"type": "text", "text": word}])

    @cached_property
    def _knows_developers(self) -> bool:
        text = self._try([{"role": "developer", "content": TOLD}, user(ASKED)])
        return text is not None and TOLD in text

    @cached_property
    def knows_names(self) -> bool:
        """Whether the template writes who a user is, from the field `name` of the turn."""
        content = [{"type": "text", "text": ASKED}] if self._wants_parts else ASKED
        return NAME in (self._try([{"role": "user", "name": NAME, "content": content}]) or "")

    @cached_property
    def _thinking_field(self) -> str | None:
        """The field of a turn from which the template writes its thinking; None if there is none."""
        content = [{"type": "text", "text": TOLD}] if self._wants_parts else TOLD
        for field in ("reasoning_content", "thinking", "reasoning"):
            text = self._try([user(ASKED), {"role": "assistant", "content": content, field: NAME}])
            if text is not None and NAME in text:
                return field
        return None

    @property
    def knows_thinking(self) -> bool:
        """Whether the template writes thinking that stands in a field of its own, or has a place for it."""
        return self._thinking_field is not None or "</think>" in self._source

    @cached_property
    def _call_spelling(self) -> tuple[bool, str | None, bool] | None:
        """Whether arguments are text, what an empty content is, and whether the arguments are written, so that the
        template shows a tool call; None if it shows none."""
        shown = None
        for as_text, empty in product((False, True), ("", None)):
            call = CALL if not as_text else with_text_arguments(CALL)
            content: Any = [] if self._wants_parts else empty
            text = self._try([user(ASKED), {"role": "assistant", "content": content, "tool_calls": [call]}], TOOLS)
            if text is not None and NAME in text.partition(ASKED)[2]:
                if TOLD in text and '\\"' + KEY not in text:
                    return as_text, empty, True
                shown = shown or (as_text, empty, False)
        return shown
