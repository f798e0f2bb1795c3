"""Conversations: the shapes in which people keep them, read into the one shape that chat templates take.

{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}], "tools": […]}   OpenAI, TRL
{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}], "system": …}         ShareGPT
{"instruction": …, "input": …, "output": …, "history": [[question, answer], …]}                      Alpaca
{"instruction": …, "context": …, "response": …}                                                      Dolly
{"prompt": …, "completion": …}                     text, or lists of turns as TRL has them
{"questions": [q, q], "answers": [a, a]}           CoQA
{"conversation": [{"input": q, "output": a}]}      Capybara
{"data": [q, a, q, a]}                             UltraChat
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters_kit.errors import DataError
from adapters_kit.tasks.turns import (
    BEGUN,
    LEADING,
    Turn,
    as_tools,
    as_turns,
    by_turns,
    shortened,
    spelled_parts,
    spelled_turns,
    texts_of,
    written_out,
)


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
        return next((n for n, turn in enumerate(self.turns) if turn["role"] not in LEADING), len(self.turns))

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

    def text(role: str) -> str:
        return as_text(cell(role), f"{where}, column {columns[role]!r}") if role in columns else ""

    if "messages" in columns:
        turns = as_turns(by_turns(cell("messages")), f"{where}, column {columns['messages']!r}")
    elif (questions := texts_of(cell("prompt"))) is not None:
        turns = past_turns(cell("history"), where) + _pairs(questions, texts_of(cell("completion")), where)
        turns[0]["content"] = with_input(turns[0]["content"], text("input"))
        turns = turns if answer or turns[-1]["role"] == "user" else turns[:-1]
    else:
        asked = spelled_turns(cell("prompt"))
        turns = past_turns(cell("history"), where)
        if isinstance(asked, str):
            turns.append({"role": "user", "content": with_input(asked, text("input"))})
        else:
            turns += as_turns(asked, f"{where}, column {columns['prompt']!r}")
            if turns[-1]["role"] == "assistant" and turns[-1]["content"] and "tool_calls" not in turns[-1]:
                turns[-1][BEGUN] = len(turns[-1]["content"])
            for turn in turns:
                turn["weight"] = 0  # what is to be learned is the completion
        if answer:
            told = spelled_turns(cell("completion"))
            if cell("tools") and _are_calls(told, where):
                told = [{"role": "function_call", "content": told}]  # xLAM writes the calls out as JSON
            turns = _answered(turns, told, f"{where}, column {columns['completion']!r}")
    within = [tools for turn in turns for name in ("tools", "functions") if (tools := turn.pop(name, None))]
    tools = as_tools(cell("tools") or next(iter(within), None), where)
    system = system_text(cell("system"), f"{where}, column {columns.get('system')!r}")
    if system.strip() and turns[0]["role"] not in LEADING:
        turns.insert(0, {"role": "system", "content": system})
    return Conversation(turns, tools)


def how_read(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """Sentences on columns whose cells are taken for what they do not say that they are."""
    told = []
    for role in set(columns) & {"messages", "prompt", "completion"}:
        cell, column = row[columns[role]], f"Column {columns[role]!r}"
        if role == "messages" and by_turns(cell) is not cell:
            told.append(f"{column}: the texts of a list are turns, the user's and the assistant's by turns.")
        elif role != "messages" and spelled_turns(cell) is not cell:
            told.append(f"{column}: texts that are written as lists of turns are read as turns.")
        elif role == "completion" and row.get(columns.get("tools", "")) and _are_calls(cell, column):
            told.append(f"{column}: texts that are the JSON of calls are calls of the tools beside them.")
    return sorted(told)


def _are_calls(told: Any, where: str) -> bool:
    text = isinstance(told, str) and told.lstrip()[:1] in ("[", "{")
    return text and "tool_calls" in as_turns([{"role": "function_call", "content": told}], where)[0]


def system_beside(row: Mapping[str, Any], columns: Mapping[str, str], talk: Conversation) -> bool:
    """Whether the column of the system says something that the conversation's own system turn stands in for."""
    given = system_text(row.get(columns.get("system", "")), "The system").strip()
    return given not in ("", (talk.turns[0]["content"] or "").strip())


def _answered(asked: list[Turn], told: Any, where: str) -> list[Turn]:
    """The turns with the answer: a text, or turns; turns that begin with a question are the whole conversation.

    A question that ends in the beginning of an answer is answered with the rest of that turn.
    """
    if isinstance(told, list) and all(isinstance(text, str) for text in told):
        raise DataError(f"{where}: several texts, {shortened(told)}. A completion is one: keep the one to be learned.")
    turns = [{"role": "assistant", "content": told}] if isinstance(told, str) else as_turns(told, where)
    if turns[0]["role"] in ("user", *LEADING):
        return turns
    if BEGUN in asked[-1] and turns[0]["role"] == "assistant" and turns[0]["content"]:
        joined = {**asked[-1], "weight": 1, **turns[0], "content": asked[-1]["content"] + turns[0]["content"]}
        return [*asked[:-1], joined, *turns[1:]]
    return asked + turns


def _pairs(questions: Sequence[str], answers: Sequence[str] | None, where: str) -> list[Turn]:
    """Lists of questions and of answers as turns; without answers there is one question."""
    if answers is None and len(questions) == 1:
        return [{"role": "user", "content": questions[0]}]
    if answers is None or len(questions) != len(answers):
        count = "none" if answers is None else f"{len(answers):,}"
        raise DataError(f"{where}: {len(questions):,} questions and {count} answers. Give each question its answer.")
    both = zip(questions, answers, strict=True)
    roles = ("user", "assistant")
    return [{"role": role, "content": said} for pair in both for role, said in zip(roles, pair, strict=True)]


def system_text(value: Any, where: str) -> str:
    """What stands in a column of the system: text, or parts of it as Gemini and Bedrock have them.

    Raises:
        DataError: anything else.
    """
    value = spelled_parts(value)
    if isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(part, Mapping) for part in value)):
        return str(as_turns([{"role": "system", "content": value}], where)[0]["content"])
    return as_text(value, where)


def with_input(prompt: str, given: str) -> str:
    """A prompt and the text that it is about, as Alpaca's `input` and Dolly's `context` have it."""
    return f"{prompt}\n\n{given}" if given.strip() else prompt


def as_text(value: Any, where: str) -> str:
    """What stands in a column of text that may be empty: text, a number, or several texts, a paragraph each.

    Raises:
        DataError: anything else.
    """
    if value is None or value != value:  # NaN, as pandas writes an empty cell
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        return "\n\n".join(value)
    raise DataError(f"{where}: it belongs to the prompt and is no text: {shortened(value)}. Write it out or rename it.")


def past_turns(value: Any, where: str) -> list[Turn]:
    """Alpaca's `history`: pairs of question and answer, or turns."""
    value = written_out(value)
    if not value:
        return []
    turns: list[Turn] = []
    for item in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        if isinstance(item, Mapping):
            turns += as_turns([item], f"{where}, the history")
        elif isinstance(item, Sequence) and len(item) == 2 and all(isinstance(text, str) for text in item):
            turns += [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
        else:
            raise DataError(f"{where}: a history is a list of [question, answer] pairs, not {shortened(item)}.")
    return turns


def refuse_preferences(
    columns: Sequence[str], given: Mapping[str, str], *, booleans: Sequence[str] = (), texts: Sequence[str] = ()
) -> None:
    """Refuses data of preference tuning, of which supervised fine-tuning would use one half without a word.

    Args:
        columns: all columns of the data.
        given: role to column name, as the user named them: who names `chosen` has chosen.
        booleans: the columns that hold true and false.
        texts: the columns that hold running text, and no turns.

    Raises:
        DataError: with the mapping that trains on the preferred answers.
    """
    names = {name.lower(): name for name in columns}
    if "chosen" in names and "rejected" in names and names["chosen"] not in given.values():
        prompt = next((names[name] for name in ("prompt", "question", "instruction") if name in names), None)
        role = "text" if names["chosen"] in texts else "messages"
        keys = f"{{prompt: {prompt}, completion: {names['chosen']}}}" if prompt else f"{{{role}: {names['chosen']}}}"
        raise DataError(
            f"The columns {names['chosen']!r} and {names['rejected']!r} are preference pairs, which DPO and its like "
            f"train on (objective: dpo). To train on the chosen answers alone: data.columns: {keys}"
        )
    if {"message_id", "parent_id", "role", "text"} <= set(names) and not given:
        raise DataError(
            f"The columns {names['message_id']!r} and {names['parent_id']!r} make trees of messages, which are no "
            "conversations yet. Give every path from a root to a leaf a row: a column messages, the list of its turns "
            "{role, content}."
        )
    if {"prompt", "completion"} <= set(names) and names.get("label") in booleans and not given:
        raise DataError(
            f"The columns {names['prompt']!r}, {names['completion']!r} and a {names['label']!r} of true and false are "
            "judged answers, which KTO trains on (objective: kto). To train on the good answers, keep the rows whose "
            f"{names['label']!r} is true and set data.columns: {{prompt: {names['prompt']}, completion: "
            f"{names['completion']}}}"
        )
