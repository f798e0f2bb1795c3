"""Rows of two answers, a better and a worse one, in the shapes in which they are published; read into conversations.

{"prompt": …, "chosen": …, "rejected": …}            texts, or lists of turns: answers, or whole conversations
{"chosen": [turns], "rejected": [turns]}             the prompt is what both begin with
{"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", …}        the same, written out as HH-RLHF has it
{"question": …, "response_j": …, "response_k": …}    other names: see ALIASES of training/data/columns.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters_kit.errors import DataError
from adapters_kit.tasks.conversation import Conversation, conversation
from adapters_kit.tasks.probes import alike
from adapters_kit.tasks.turns import Turn, shortened, spelled_turns

_SPEAKER = re.compile(r"\A\s*(Human|User|H): |\n\n(Human|User|H|Assistant|A):(?:\s|$)")


@dataclass(frozen=True)
class Said:
    """One answer and what it answers.

    Attributes:
        talk: the conversation, whose last turn is the answer.
        text: prompt and answer as text, for a tokenizer without a chat template; None where only turns are known.
        running: whether it is running text, which no chat template is put around.
    """

    talk: Conversation
    text: tuple[str, str] | None = None
    running: bool = False

    @property
    def answer(self) -> Any:
        """What is said last, comparable."""
        last = self.talk.turns[-1]
        return {key: last.get(key) for key in ("content", "tool_calls", "reasoning_content") if last.get(key)}

    @property
    def prompt(self) -> list[Turn]:
        """All turns before the answer."""
        return self.talk.turns[:-1]


def read(row: Mapping[str, Any], columns: Mapping[str, str], number: int, role: str, others: Sequence[str]) -> Said:
    """The answer of a role (`chosen`) with its prompt.

    Args:
        columns: role to column name.
        number: the row's place in the data.
        others: roles of the other answers, whose beginnings tell the prompt where no column does.

    Raises:
        DataError: with the row, and what is wrong in it.
    """
    cell = spelled_turns(row.get(columns[role]))
    where = f"Row {number + 1}, column {columns[role]!r}"
    if cell is None or isinstance(cell, bool | int | float):
        raise DataError(f"{where}: an answer is a text or a list of turns, not {shortened(cell)}.")
    if isinstance(cell, str) and "prompt" not in columns:
        return _written_out(row, columns, cell, role, others, where)
    if "prompt" in columns and (isinstance(cell, str) or _begins_with_the_answer(cell)):
        named = {key: name for key, name in columns.items() if key in ("prompt", "input", "history", "system", "tools")}
        said = _checked(conversation(row, {**named, "completion": columns[role]}, number, answer=True), where)
        texts = [turn["content"] for turn in said.talk.turns]
        if isinstance(cell, str) and isinstance(row[columns["prompt"]], str) and not said.talk.tools:
            return Said(said.talk, ("\n\n".join(text or "" for text in texts[:-1]), texts[-1] or ""))
        return said
    named = {key: columns[key] for key in ("system", "tools") if key in columns}
    return _checked(conversation(row, {**named, "messages": columns[role]}, number, answer=False), where)


def _begins_with_the_answer(cell: Any) -> bool:
    first = cell[0] if isinstance(cell, Sequence) and cell else cell
    speaker = first.get("role", first.get("from")) if isinstance(first, Mapping) else None
    return str(speaker).lower() in ("assistant", "gpt", "model", "bot", "chatbot")


def _checked(talk: Conversation, where: str) -> Said:
    if talk.turns[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the conversation ends with a turn of the role {talk.turns[-1]['role']}, and what is compared "
            "are answers of the assistant's. Take out what follows the answer."
        )
    return Said(talk)


def _written_out(
    row: Mapping[str, Any], columns: Mapping[str, str], cell: str, role: str, others: Sequence[str], where: str
) -> Said:
    """A text that holds the prompt too: the turns that it names, or what all answers begin with, up to a whole word."""
    if turns := spoken(cell):
        answer = turns[-1]["content"]
        return Said(_checked(Conversation(turns), where).talk, (cell[: len(cell.rstrip()) - len(answer)], answer))
    cells = [row.get(columns[other]) for other in others if other in columns]
    texts = [cell, *(text for text in cells if isinstance(text, str))]
    shared = cell[: min(alike(cell, text) for text in texts)]
    if len(texts) == 1 or shared == cell:
        shared = ""
    prompt = shared[: max(shared.rfind(" "), shared.rfind("\n")) + 1].rstrip()
    answer = cell[len(prompt) :]
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Said(Conversation(turns), (prompt, answer), running=True)


def spoken(text: str) -> list[Turn]:
    """The turns of a text that is written as a dialogue, `Human: …` and `Assistant: …`; empty for any other."""
    marks = list(_SPEAKER.finditer(text))
    if not marks or text[: marks[0].start()].strip() or not any("A" in mark[0] for mark in marks):
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    roles = ["assistant" if (mark[1] or mark[2]).startswith("A") else "user" for mark in marks]
    return [
        {"role": role, "content": text[mark.end() : end].strip()}
        for role, mark, end in zip(roles, marks, ends, strict=True)
    ]
