"""One turn of a conversation, in the spellings that people and services use, as chat templates take it.

{"role": "user", "content": …}                        text, or parts of text; OpenAI, TRL
{"from": "human", "value": …}                         ShareGPT, with `observation` and `function_call`
{"role": "model", "parts": [{"text": …}]}             Google
{"role": "assistant", "content": [{"type": "tool_use", …}, {"type": "thinking", …}]}      Anthropic
{"input": …, "output": …}                             two turns: Capybara
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

from adapters_kit.errors import DataError, did_you_mean

Turn = dict[str, Any]
"""One turn: "role", "content" (text, or None beside "tool_calls"), "reasoning_content" where there was thinking, and
whatever else the template may read."""

# Who speaks, in the words of the public data sets, and the role that chat templates know it by.
ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter", "customer", "client"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "ai", "model", "bard", "bing"), "assistant"),
    **dict.fromkeys(("agent", "support"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("tool_result", "tool_results", "function_result", "tool_output"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
LEADING = ("system", "developer")
_CONTENT = ("content", "value", "text", "parts", "refusal")
_THINKING = ("reasoning_content", "reasoning", "thinking")
_LEARNED = (
    "weight",
    "train",
    "training",
    "loss",
)  # keys that say whether a turn is learned: OpenAI's, axolotl's, ms-swift's
# Keys under which an object holds two turns, a question and its answer.
_PAIRS = (
    *((asked, told) for asked in ("input", "instruction", "prompt", "query") for told in ("output", "response")),
    *(
        ("question", "answer"),
        ("prompt", "completion"),
        ("user", "assistant"),
        ("human", "assistant"),
        ("human", "bot"),
    ),
)
_NUMPY = re.compile(r"\barray\((\[[^\[\]]*\])(?:, dtype=\w+)?\)")  # a list, as pandas writes out one of numpy's
BEGUN = "begun"
"""Key of an assistant turn of which that many characters were there before the model writes on."""


def as_turns(value: Any, where: str) -> list[Turn]:
    """A list of turns in any of the known spellings, or the JSON text of one.

    Raises:
        DataError: anything else.
    """
    value = written_out(value)
    if isinstance(value, Mapping) and isinstance(value.get("messages"), Sequence):
        value = value["messages"]
    if isinstance(value, Mapping) and isinstance(value.get("role", value.get("from")), str):
        value = [value]  # one turn
    if isinstance(value, Mapping) and value and all(isinstance(part, list | tuple) for part in value.values()):
        # `datasets` gives some lists of structs as a struct of lists.
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        as_text = " To train on texts as they stand: data.columns: {text: NAME}." if isinstance(value, str) else ""
        raise DataError(f"{where}: a conversation is a list of {{role, content}}, not {shortened(value)}.{as_text}")
    return [made for number, turn in enumerate(value, 1) for made in _turns(turn, f"{where}, turn {number}")]


def _turns(value: Any, where: str) -> list[Turn]:
    """One turn; several, where results of tools stand among the parts of a user's."""
    value = _parsed(value)
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: a turn is {{role, content}}, not {shortened(value)}.")
    given = {key: item for key, item in value.items() if item is not None}
    if pair := pair_in(given):
        asked, told = pair
        question = _turns({"role": "user", "content": given[asked]}, where)
        return question + _turns({"role": "assistant", "content": given[told]}, where)
    speaker = given.get("role", given.get("from"))
    role = ROLES.get(speaker.lower().strip()) if isinstance(speaker, str) else None
    if role is None:
        told = f" {did_you_mean(speaker, ROLES)}" if isinstance(speaker, str) else ""
        what = f"unknown role {speaker!r}" if speaker is not None else "no role"
        raise DataError(
            f"{where}: {what} in {shortened(given)}.{told} A turn is {{role, content}}, of the role system, user, "
            "assistant or tool: rename it in the data."
        )
    content = _plain(next((given[key] for key in _CONTENT if key in given), None))
    read = _call(content, where) if role == "call" else _Content(role, content, where)
    role = "assistant" if role == "call" else role
    turn: Turn = {"role": role, "content": read.text}
    known = ("role", "from", "function_call", "tool_calls", BEGUN, *_CONTENT, *_THINKING, *_LEARNED)
    turn |= {key: _plain(item) for key, item in given.items() if key not in known and _is_plain(item)}
    thinking = next((given[key] for key in _THINKING if isinstance(given.get(key), str)), "") or read.thinking
    if thinking.strip():
        turn["reasoning_content"] = thinking
    if detail := next((key for key in ("train_detail", "training_detail") if given.get(key)), None):
        raise DataError(f"{where}: {detail}. Which characters of a turn are learned cannot be told: take it out.")
    said = {key: given[key] for key in _LEARNED if key in given}
    for key, weight in said.items():
        if weight not in (0, 1) or weight != next(iter(said.values())):
            raise DataError(f"{where}: {key} {weight!r}. A turn is learned (1) or only seen (0).")
        turn["weight"] = int(weight)
    calls = _parsed(given.get("tool_calls")) or ([given["function_call"]] if given.get("function_call") else read.calls)
    if calls:
        turn["tool_calls"] = [_one_call(call, where) for call in calls]
    elif turn["content"] is None and role == "assistant":
        turn["content"] = ""  # said nothing, which nobody is to learn
    elif turn["content"] is None and not read.results:
        raise DataError(
            f"{where}: neither content nor tool_calls in {shortened(given)}. Give it a text or leave it out."
        )
    return read.results + [turn] * (turn["content"] is not None or bool(calls))


def pair_in(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keys of the question and of the answer in an object that holds both and no role; None for any other."""
    if {"role", "from"} & set(turn):
        return None
    found = [pair for pair in _PAIRS if all(isinstance(turn.get(key), str) for key in pair)]
    return found[0] if len(found) == 1 else None


def by_turns(value: Any) -> Any:
    """A list of texts as what a user and an assistant say by turns (UltraChat); everything else as it is."""
    parsed = written_out(value)
    if not isinstance(parsed, list) or len(parsed) < 2 or not all(isinstance(text, str) for text in parsed):
        return value
    if any(isinstance(_parsed(text), Mapping) for text in parsed):
        return value  # turns, each written out
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(parsed)]


def spelled_turns(value: Any) -> Any:
    """The turns that a text is JSON's or Python's way to write; everything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:2] != "[{":
        return value
    turns = written_out(value)
    said = ("content", "tool_calls")
    fits = isinstance(turns, list) and all(
        isinstance(turn, Mapping) and "role" in turn and any(key in turn for key in said) for turn in turns
    )
    return turns if fits else value


def spelled_parts(value: Any) -> Any:
    """The parts that a text is JSON's way to write, {"parts": [...]} or [{"text": ...}]; everything else as it is."""
    parsed = _parsed(value)
    fits = isinstance(parsed, Mapping) and isinstance(parsed.get("parts"), list)
    return parsed if fits or _are_parts(parsed) else value


def texts_of(value: Any) -> list[str] | None:
    """The texts of a list of questions or of answers, as CoQA has them; None for what is no such list."""
    if isinstance(value, Mapping):
        value = value.get("input_text")
    if not isinstance(value, list | tuple) or not value:
        return None
    found = (item.get("input_text") if isinstance(item, Mapping) else item for item in value)
    texts = [text for text in found if isinstance(text, str)]
    return texts if len(texts) == len(value) else None


class _Content:
    """What the content of a turn holds, whichever way it is written.

    Attributes:
        text: None for none.
        thinking: "" for none.
        calls: of tools.
        results: turns of tools.
    """

    def __init__(self, role: str, content: Any, where: str) -> None:
        self.text: str | None = None
        self.thinking = ""
        self.calls: list[Any] = []
        self.results: list[Turn] = []
        if isinstance(content, Mapping) and isinstance(content.get("parts"), list):
            content = content["parts"]
        elif isinstance(content, Mapping) and isinstance(content.get("text"), str):
            content = [content]
        structured = isinstance(content, Mapping) or (
            role == "tool" and content is not None and not isinstance(content, str) and not _are_parts(content)
        )
        if content is None or isinstance(content, str):
            self.text = content
        elif structured:
            self.text = json.dumps(content, ensure_ascii=False)
        elif isinstance(content, Sequence):
            for part in content:
                self._take(part, where)
        else:
            raise DataError(f"{where}: content is text or a list of parts, not {shortened(content)}. Write it as text.")

    def _take(self, part: Any, where: str) -> None:
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            self.text = (self.text or "") + part["text"]
        elif kind == "thinking" and isinstance(part.get("thinking"), str):
            self.thinking += part["thinking"]
        elif kind == "tool_use":
            self.calls.append({"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input", {})})
        elif kind == "tool_result":
            result = _Content("tool", part.get("content", ""), where).text or ""
            self.results.append({"role": "tool", "content": result, "tool_call_id": part.get("tool_use_id", "")})
        elif isinstance(part, Mapping) and kind == "text":
            raise DataError(f"{where}: a part without a text: {shortened(part)}.")
        else:
            raise DataError(
                f"{where}: a part of kind {kind!r}. This task reads text alone: leave out the rows with images, audio "
                "or video, or the parts."
            )


def _are_parts(content: Any) -> bool:
    """Whether a tool's result is a list of parts of text, not a list of values."""
    return (
        isinstance(content, list | tuple)
        and bool(content)
        and all(
            isinstance(part, Mapping)
            and isinstance(part.get("text"), str)
            and part.get("type", "text").endswith("text")
            for part in content
        )
    )


def _call(content: Any, where: str) -> _Content:
    """ShareGPT's function_call: the JSON of one call or of several, behind thinking or not; other text stays text."""
    thought, _, rest = content.rpartition("</think>") if isinstance(content, str) else ("", "", content)
    calls = _parsed(rest)
    calls = calls if isinstance(calls, list) else [calls]
    inner = [call.get("function", call) if isinstance(call, Mapping) else None for call in calls]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in inner):
        return _Content("assistant", content, where)
    read = _Content("assistant", None, where)
    read.calls, read.thinking = calls, thought.strip().removeprefix("<think>").strip()
    return read


def _one_call(value: Any, where: str) -> dict[str, Any]:
    call = _plain(_parsed(value))
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise DataError(f"{where}: a tool call is {{function: {{name, arguments}}}}, not {shortened(value)}.")
    # Templates write arguments out as JSON themselves; a text of JSON would be quoted twice.
    arguments = _parsed(inner.get("arguments", inner.get("parameters", {})))
    arguments = {} if isinstance(arguments, str) and not arguments.strip() else arguments
    extra = {key: item for key, item in call.items() if key == "id"}
    return {"type": "function", **extra, "function": {"name": inner["name"], "arguments": arguments}}


def as_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """The functions that a model may call, as JSON schemas; also the JSON text of the list, and bare functions.

    Raises:
        DataError: something that names no function.
    """
    value = _parsed(value)
    if not value:
        return None
    tools = []
    for item in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        tool = _plain(_parsed(item))
        if isinstance(tool, dict) and isinstance(tool.get("name"), str):
            tool = {key: part for key, part in tool.items() if key != "type"}
            if "input_schema" in tool:  # Anthropic's word
                tool = {"parameters" if key == "input_schema" else key: part for key, part in tool.items()}
            tool = {"type": "function", "function": tool}
        if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
            tool = {**tool, "function": _with_schema(tool["function"])}
        else:
            raise DataError(f"{where}: a tool is {{type: function, function: {{name, …}}}}, not {shortened(item)}.")
        tools.append(tool)
    return tools


def _with_schema(function: dict[str, Any]) -> dict[str, Any]:
    """A function whose parameters stand there by name alone, as xLAM has them, with JSON's schema around them."""
    given = function.get("parameters")
    if not isinstance(given, dict) or not given or "properties" in given:
        return function
    if not all(isinstance(item, dict) for item in given.values()):
        return function
    return {**function, "parameters": {"type": "object", "properties": given}}


def _parsed(value: Any) -> Any:
    """What a text of JSON says, if it is an object or a list; everything else as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def written_out(value: Any) -> Any:
    """A conversation that stands in a cell as text: JSON, JSON in JSON, or Python's way, as pandas writes lists."""
    value = _parsed(value)
    if isinstance(value, str) and value.strip()[:2] in ('"[', '"{'):
        try:
            return _parsed(json.loads(value))
        except ValueError:
            return value
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return ast.literal_eval(_NUMPY.sub(r"\1", value.strip()))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
    return value


def _plain(value: Any) -> Any:
    """As JSON has it: dates as text, without bytes and the empty fields that Arrow gives every row for all others."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, Mapping):
        made = ((key, _plain(item)) for key, item in value.items())
        return {key: item for key, item in made if _is_plain(item)}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [item for item in map(_plain, value) if item is None or _is_plain(item)]
    return value


def _is_plain(value: Any) -> bool:
    """Whether a template may see it: text, numbers, truth, and lists and objects; no dates and no bytes."""
    return isinstance(value, str | int | float | bool | Mapping | list | tuple)


def shortened(value: Any) -> str:
    """A value as Python writes it, in 200 characters at most: for messages."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
