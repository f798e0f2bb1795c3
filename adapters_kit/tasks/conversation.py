"""Conversations: the shapes in which people keep them, read into the one shape that chat templates take.

{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}], "tools": […]}   OpenAI, TRL
{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}], "system": …}         ShareGPT
{"instruction": …, "input": …, "output": …, "history": [[question, answer], …]}                      Alpaca
{"instruction": …, "context": …, "response": …}                                                      Dolly
{"prompt": …, "completion": …}                     text, or lists of turns as TRL has them
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters_kit.errors import DataError, did_you_mean

Turn = dict[str, Any]
"""One turn: "role", "content" (text, or None beside "tool_calls"), and whatever else the template may read."""

# Who speaks, in the words of the public data sets, and the role that chat templates know it by.
ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "ai", "model", "bard", "bing"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
_LEADING = ("system", "developer")


@dataclass(frozen=True)
class Conversation:
    """One conversation as chat templates take it.

    Attributes:
        turns: in order; roles are system, developer, user, assistant and tool.
        tools: JSON schemas of the functions that the model may call; None for none.
    """

    turns: list[Turn]
    tools: list[dict[str, Any]] | None = None

    @property
    def leading(self) -> int:
        """How many turns at the beginning are the system's: they stay when older turns are cut."""
        return next((n for n, turn in enumerate(self.turns) if turn["role"] not in _LEADING), len(self.turns))

    def without_answer(self) -> Conversation:
        """The conversation up to its last answer, if that is its last turn: what the model is asked."""
        answered = len(self.turns) > 1 and self.turns[-1]["role"] == "assistant"
        return Conversation(self.turns[:-1], self.tools) if answered else self


def conversation(row: Mapping[str, Any], columns: Mapping[str, str], number: int, *, answer: bool) -> Conversation:
    """The conversation that a row holds.

    Args:
        columns: role to column name: messages, or prompt and completion; and input, history, system, tools.
        number: the row's place in the data, for messages.
        answer: whether the completion belongs to it.

    Raises:
        DataError: with the row and what is wrong in it.
    """
    where = f"Row {number + 1}"

    def cell(role: str) -> Any:
        return row.get(columns[role]) if role in columns else None

    if "messages" in columns:
        turns = as_turns(cell("messages"), f"{where}, column {columns['messages']!r}")
    else:
        asked = cell("prompt")
        turns = past_turns(cell("history"), where)
        if isinstance(asked, str):
            turns.append({"role": "user", "content": with_input(asked, cell("input"))})
        else:
            turns += as_turns(asked, f"{where}, column {columns['prompt']!r}")
        if answer:
            turns = _answered(turns, cell("completion"), f"{where}, column {columns['completion']!r}")
    system = cell("system")
    if isinstance(system, str) and system.strip() and turns[0]["role"] not in _LEADING:
        turns.insert(0, {"role": "system", "content": system})
    return Conversation(turns, as_tools(cell("tools"), where))


def _answered(asked: list[Turn], told: Any, where: str) -> list[Turn]:
    """The turns with the answer: a text, or turns; turns that begin with a question are the whole conversation."""
    if isinstance(told, str):
        return [*asked, {"role": "assistant", "content": told}]
    turns = as_turns(told, where)
    return turns if turns[0]["role"] in ("user", *_LEADING) else asked + turns


def with_input(prompt: str, given: Any) -> str:
    """A prompt and the text that it is about, as Alpaca's `input` and Dolly's `context` have it."""
    return f"{prompt}\n\n{given}" if isinstance(given, str) and given.strip() else prompt


def past_turns(value: Any, where: str) -> list[Turn]:
    """Alpaca's `history`: pairs of question and answer, or turns."""
    value = _parsed(value)
    if not value:
        return []
    turns: list[Turn] = []
    for item in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        if isinstance(item, Mapping):
            turns += as_turns([item], f"{where}, the history")
        elif isinstance(item, Sequence) and len(item) == 2 and all(isinstance(text, str) for text in item):
            turns += [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
        else:
            raise DataError(f"{where}: a history is a list of [question, answer] pairs, not {_short(item)}.")
    return turns


def as_turns(value: Any, where: str) -> list[Turn]:
    """A list of turns in any of the known spellings, or the JSON text of one.

    Raises:
        DataError: anything else.
    """
    value = _parsed(value)
    if isinstance(value, Mapping) and isinstance(value.get("messages"), Sequence):
        value = value["messages"]
    if isinstance(value, Mapping) and value and all(isinstance(part, Sequence) for part in value.values()):
        # `datasets` gives some lists of structs as a struct of lists.
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: a conversation is a list of {{role, content}}, not {_short(value)}.")
    return [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(value, 1)]


def _turn(value: Any, where: str) -> Turn:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: a turn is {{role, content}}, not {_short(value)}.")
    given = {key: item for key, item in value.items() if item is not None}
    speaker = given.get("role", given.get("from"))
    role = ROLES.get(speaker.lower().strip()) if isinstance(speaker, str) else None
    if role is None:
        told = did_you_mean(speaker, ROLES) if isinstance(speaker, str) else "A turn is {role, content}."
        what = f"unknown role {speaker!r}" if speaker is not None else "no role"
        raise DataError(f"{where}: {what} in {_short(given)}. {told}")
    content = given.get("content", given.get("value"))
    if role == "call":
        return _call(content, where)
    known = ("role", "from", "content", "value", "function_call", "tool_calls")
    turn: Turn = {"role": role, "content": _text(content, where)}
    turn |= {key: _plain(item) for key, item in given.items() if key not in known and _is_plain(item)}
    calls = _parsed(given.get("tool_calls")) or ([given["function_call"]] if given.get("function_call") else [])
    if calls:
        turn["tool_calls"] = [_one_call(call, where) for call in calls]
    if turn["content"] is None and "tool_calls" not in turn:
        raise DataError(f"{where}: neither content nor tool_calls in {_short(given)}.")
    return turn


def _text(content: Any, where: str) -> str | None:
    """Text, or a list of parts of text; None for nothing."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content] if "type" in content else json.dumps(_plain(content), ensure_ascii=False)
        if isinstance(content, str):
            return content
    if not isinstance(content, Sequence):
        raise DataError(f"{where}: content is text or a list of parts, not {_short(content)}.")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
            raise DataError(
                f"{where}: a part of kind {kind!r}. This task reads text alone: leave out the rows with images, audio "
                "or video, or the parts."
            )
        texts.append(text)
    return "".join(texts)


def _call(content: Any, where: str) -> Turn:
    """ShareGPT's function_call: the JSON of one call or of several; text that is no call stays text."""
    calls = _parsed(content)
    calls = calls if isinstance(calls, list) else [calls]
    if calls and all(isinstance(call, Mapping) and "name" in call.get("function", call) for call in calls):
        return {"role": "assistant", "content": None, "tool_calls": [_one_call(call, where) for call in calls]}
    return {"role": "assistant", "content": _text(content, where)}


def _one_call(value: Any, where: str) -> dict[str, Any]:
    call = _plain(_parsed(value))
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise DataError(f"{where}: a tool call is {{function: {{name, arguments}}}}, not {_short(value)}.")
    # Templates write arguments out as JSON themselves; a text of JSON would be quoted twice.
    arguments = _parsed(inner.get("arguments", inner.get("parameters", {})))
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
    for item in [value] if isinstance(value, Mapping) else value:
        tool = _plain(_parsed(item))
        if isinstance(tool, dict) and isinstance(tool.get("name"), str):
            tool = {"type": "function", "function": tool}
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
            raise DataError(f"{where}: a tool is {{type: function, function: {{name, …}}}}, not {_short(item)}.")
        tools.append(tool)
    return tools


def _parsed(value: Any) -> Any:
    """What a text of JSON says, if it is an object or a list; everything else as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _plain(value: Any) -> Any:
    """Without the empty fields that Arrow gives every row for the keys of all other rows."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value


def _is_plain(value: Any) -> bool:
    """Whether a template may see it: text, numbers, truth, and lists and objects; no dates and no bytes."""
    return isinstance(value, str | int | float | bool | Mapping | list | tuple)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def refuse_preferences(columns: Sequence[str], given: Mapping[str, str], *, booleans: Sequence[str] = ()) -> None:
    """Refuses data of preference tuning, of which supervised fine-tuning would use one half without a word.

    Args:
        columns: all columns of the data.
        given: role to column name, as the user named them: who names `chosen` has chosen.
        booleans: the columns that hold true and false.

    Raises:
        DataError: with the mapping that trains on the preferred answers.
    """
    names = {name.lower(): name for name in columns}
    if "chosen" in names and "rejected" in names and names["chosen"] not in given.values():
        prompt = next((names[name] for name in ("prompt", "question", "instruction") if name in names), None)
        keys = f"{{prompt: {prompt}, completion: {names['chosen']}}}" if prompt else f"{{messages: {names['chosen']}}}"
        raise DataError(
            f"The columns {names['chosen']!r} and {names['rejected']!r} are preference pairs, which DPO and its like "
            f"train on (TRL's DPOTrainer). To train on the chosen answers alone: data.columns: {keys}"
        )
    if {"prompt", "completion"} <= set(names) and names.get("label") in booleans and not given:
        raise DataError(
            f"The columns {names['prompt']!r}, {names['completion']!r} and a {names['label']!r} of true and false are "
            "judged answers, which KTO trains on (TRL's KTOTrainer). To train on the good answers, keep the rows whose "
            f"{names['label']!r} is true and set data.columns: {{prompt: {names['prompt']}, completion: "
            f"{names['completion']}}}"
        )
