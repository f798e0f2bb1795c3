"""A tokenizer's chat template: what the model sees before each answer, and the tokens of that answer.

Each answer is looked at by itself, as the model will meet it: its context is the conversation before it, rendered with
`add_generation_prompt=True`, and the answer is what the template writes after that. So templates that change earlier
turns when later ones are added (thinking that is stripped, another end mark for the last turn) need no care of their
own. Where the next context begins with all that came before, as with most templates, the answers share one sample.

A template is known by a few probes: small conversations of words that occur nowhere else.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from adapters_kit.artifacts.chat import limited, render
from adapters_kit.errors import DataError, ModelError
from adapters_kit.tasks.conversation import Conversation
from adapters_kit.tasks.probes import (
    AGAIN,
    ASKED,
    CALL,
    KEY,
    NAME,
    RESULT,
    TOLD,
    TOOLS,
    Ending,
    Probed,
    advice,
    alike,
    shown,
    user,
    with_text_arguments,
)
from adapters_kit.tasks.turns import BEGUN, Turn, shortened

_THINKING = re.compile(r"\A\s*(?:<(\w+)>)?(.*?)</(\w+)>", re.DOTALL)
_OPEN = re.compile(r"<(\w+)>\s*\Z")


class Answer(NamedTuple):
    """Token ids of one assistant turn, and of all that the model sees before it."""

    context: list[int]
    """Of all that the model sees before the turn."""
    answer: list[int]
    """Of the turn, with the tokens that end it."""

    @property
    def ids(self) -> list[int]:
        """Both, one after the other."""
        return self.context + self.answer


class ChatTemplate(Probed):
    """The chat template of a tokenizer.

    Args:
        tokenizer: with a `chat_template`.
        model: its name, for messages.
    """

    # Rendering

    def render(self, talk: Conversation, *, prompt: bool = False, row: int | None = None) -> str:
        """The conversation as the template writes it; with `prompt`, up to where the assistant's answer begins.

        Raises:
            DataError: the template refuses it, with its own words.
        """
        try:
            return self._rendered(talk, prompt)
        except ModelError:  # it would not end
            raise
        except Exception as error:  # whatever the template's code raises
            where = "this conversation" if row is None else f"the conversation in row {row + 1}"
            roles = ", ".join(turn["role"] for turn in talk.turns)
            reason = str(error).strip() or type(error).__name__
            raise DataError(
                f"The chat template of {self.model} refuses {where} (roles: {roles}): {reason} {advice(reason)}"
            ) from error

    def _rendered(self, talk: Conversation, prompt: bool) -> str:
        if prompt and talk.turns and BEGUN in talk.turns[-1]:
            context, text, start = self._texts(talk, len(talk.turns) - 1, None)
            begun = talk.turns[-1]["content"]
            spaces = begun[len(begun.rstrip()) :]  # which some templates take off
            return context + text[:start] + ("" if text[:start].endswith(begun.lstrip()) else spaces)
        turns = [self._fitted(turn) for turn in talk.turns]
        return render(self.tokenizer, turns, tools=talk.tools, prompt=prompt)

    def _fitted(self, turn: Turn) -> Turn:
        """The turn in the spelling that the template reads: text or parts, arguments as objects or as text."""
        turn = {key: value for key, value in turn.items() if key != BEGUN}
        if turn["role"] == "developer" and not self._knows_developers:
            turn["role"] = "system"
        thought = _THINKING.match(turn["content"] or "")
        if turn["role"] == "assistant" and thought and thought[1] in ("think", None) and self._thinking_field:
            turn |= {
                "reasoning_content": thought[2].strip("\n"),
                "content": turn["content"][thought.end() :].lstrip("\n"),
            }
        if self._thinking_field and "reasoning_content" in turn:
            turn[self._thinking_field] = turn.pop("reasoning_content")
        if "tool_calls" in turn:
            as_text, empty, _ = self._call_spelling or (False, "", False)
            if as_text:
                turn["tool_calls"] = [with_text_arguments(call) for call in turn["tool_calls"]]
            turn["content"] = turn["content"] or empty
        if self._wants_parts:
            text = turn["content"]
            turn["content"] = [{"type": "text", "text": text}] if text else []
        return turn

    def check(self, talk: Conversation, row: int) -> int:
        """How many turns of a conversation the template leaves out.

        Raises:
            DataError: it leaves out a tool, a call or a result: the model would learn to call what it cannot see.
        """
        called = [call["function"]["name"] for turn in talk.turns for call in turn.get("tool_calls", ())]
        offered = [tool["function"].get("name", "") for tool in talk.tools or ()]
        text = self.render(talk, row=row) if not called or self._call_spelling is not None else ""
        for kind, names in (("tool calls", called), ("tools", offered)):
            unseen = [name for name in names if name not in text]
            if unseen:
                raise DataError(
                    f"Row {row + 1} has {kind} ({unseen[0]}), and the chat template of {self.model} does not write "
                    f"{kind}. Take a model whose template does, or leave out "
                    f"{'these rows' if kind == 'tool calls' else 'the column of tools'}."
                )
        as_text, _, written = self._call_spelling or (False, "", False)
        for call in (call["function"] for turn in talk.turns for call in turn.get("tool_calls", ())):
            given, fault = call["arguments"], None
            if isinstance(given, str) and not as_text:
                fault = f"are no JSON: {shortened(given)}. Mend them"
            elif given and not written:
                fault = (
                    f"{shortened(str(given))} are not written by the chat template of {self.model}. Take another model"
                )
            if fault:
                raise DataError(
                    f"Row {row + 1}: the arguments of the call of {call['name']} {fault}, or leave the row out."
                )
        unseen_turns = [turn for turn in talk.turns if turn["role"] != "assistant" and not shown(turn["content"], text)]
        if any(turn["role"] == "tool" for turn in unseen_turns):
            raise DataError(
                f"Row {row + 1} has a turn of the role tool, and the chat template of {self.model} does not write it. "
                "Take a model whose template does, or leave these rows out."
            )
        return len(unseen_turns)

    def _probe(self, turns: list[Turn], tools: Any = None, prompt: bool = False) -> str | None:
        return self._try([self._fitted(turn) for turn in turns], tools, prompt)

    # Ends of turns

    @cached_property
    def _plain_ending(self) -> Ending:
        asked, told = user(ASKED), {"role": "assistant", "content": TOLD}
        return self._ending(self._probe([asked, told]), self._probe([asked, told, user(AGAIN)]), TOLD)

    @cached_property
    def _call_ending(self) -> Ending:
        asked, told = user(ASKED), {"role": "assistant", "content": None, "tool_calls": [CALL]}
        result = {"role": "tool", "name": NAME, "content": RESULT, "tool_call_id": CALL["id"]}
        last = self._probe([asked, told], TOOLS)
        found = self._ending(last, self._probe([asked, told, result], TOOLS), TOLD)
        for arguments in ({}, {KEY: 7}):  # what closes a text is no part of how a call ends
            call = {**CALL, "function": {"name": NAME, "arguments": arguments}}
            other = self._probe([asked, {**told, "tool_calls": [call]}], TOOLS)
            shared = alike((last or "")[::-1], (other or last or "")[::-1])
            cut = max(len(found.tail) - shared, 0)
            if cut <= len(found.end):
                found = found._replace(tail=found.tail[cut:], end=found.end[cut:])
        return found if found.stop is not None else self._plain_ending._replace(tail=found.tail, end=found.end)

    def _ending(self, last: str | None, followed: str | None, word: str) -> Ending:
        """The ending, from a probe whose last turn ends in `word` and the same with a turn behind it.

        The mark is the last special token that both have behind the word. Without one, it is what begins the last
        turn's tail, or what begins the next turn (GLM, whose turns end where another's mark begins).
        """
        if last is None or word not in last:
            return Ending("", "", None)
        tail = last.rpartition(word)[2]
        after = followed.partition(ASKED)[2].partition(word)[2] if followed is not None else tail
        shared = tail[: alike(tail, after)]
        marks = self._marks(shared)
        if marks:
            start, token, index = marks[-1]
            return Ending(tail, shared[: start + len(token)], index)
        if after.startswith(tail):
            next_marks = self._marks(after[len(tail) :])[:1] if followed is not None else []
            if next_marks and not after[len(tail) :][: next_marks[0][0]].strip():
                start, token, index = next_marks[0]
                return Ending(tail, tail + after[len(tail) :][:start] + token, index)
        elif marks := self._marks(tail):
            start, token, index = marks[0]
            return Ending(tail, tail[: start + len(token)], index)
        return Ending(tail, shared.rstrip(), None)

    def mark_in(self, turn: Turn) -> str | None:
        """The first special token in a turn's text: the tokenizer makes one of it, whoever wrote it."""
        return next((mark for _, mark, _ in self._marks(turn["content"] or "")), None)

    def _marks(self, text: str) -> list[tuple[int, str, int]]:
        """(place, token, id) of every special token in a text."""
        return [(match.start(), match[0], self._special[match[0]]) for match in self._special_pattern.finditer(text)]

    @cached_property
    def _special(self) -> dict[str, int]:
        added = self.tokenizer.added_tokens_decoder
        found = {token.content: index for index, token in added.items() if token.special and token.content}
        return found | dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")

    @cached_property
    def stops(self) -> list[int]:
        """Ids at which an answer ends: the template's marks, for answers and for tool calls."""
        marks = [self._plain_ending.stop]
        if "tool_calls" in str(self.tokenizer.chat_template):
            marks.append(self._call_ending.stop)
        return sorted({mark for mark in marks if mark is not None})

    # Answers

    def answer(self, talk: Conversation, at: int, row: int | None = None) -> Answer:
        """The assistant's turn number `at` of a conversation, and what the model sees before it.

        Raises:
            DataError: the template refuses the conversation.
        """
        turn = talk.turns[at]
        context, text, start = self._texts(talk, at, row)
        ending = self._call_ending if "tool_calls" in turn else self._plain_ending
        if text.endswith(ending.tail):
            text = text[: len(text) - len(ending.tail)] + ending.end
        found = self._continued(context + text[:start], text[start:])
        eos = self.tokenizer.eos_token_id
        if ending.stop is None and eos is not None and found.answer[-1:] != [eos]:
            return found._replace(answer=[*found.answer, eos])  # else the model would never learn to stop
        return found

    def _texts(self, talk: Conversation, at: int, row: int | None) -> tuple[str, str, int]:
        """What stands before the assistant's turn number `at`, the turn, and how much of the turn is not learned."""
        before = Conversation(talk.turns[:at], talk.tools)
        turn = talk.turns[at]
        full = self.render(Conversation(talk.turns[: at + 1], talk.tools), row=row)
        context = self._context(before, full, turn, row)
        text = full[len(context) :] if full.startswith(context) else self._behind(context, full, turn)
        text = self._with_thinking(text, context, turn)
        start = self._first_generated(talk, at, full, len(context)) if full.startswith(context) else 0
        if BEGUN in turn:
            begun = turn["content"][: turn[BEGUN]].lstrip()
            begun = begun if begun in text else begun.rstrip()
            start = max(text.find(begun) + len(begun), start) if begun in text else start
        return context, text, start

    def _context(self, before: Conversation, full: str, turn: Turn, row: int | None) -> str:
        """What the model sees before its answer."""
        try:
            return self._rendered(before, True)
        except ModelError:
            raise
        except Exception:
            # A conversation that the assistant begins: nothing to render, for some templates.
            words = turn["content"] or ""
            if before.turns or words not in full:
                return self.render(before, prompt=True, row=row)
            return full[: full.index(words)]

    def _behind(self, context: str, full: str, turn: Turn) -> str:
        """The answer in a rendering that does not begin with the context: what stands where the two part."""
        opened = self._opened
        if opened and context.endswith(opened) and full.startswith(context[: -len(opened)]):
            return full[len(context) - len(opened) :]
        shared = alike(context, full)
        found = full.rfind(turn["content"]) if turn["content"] else -1
        return full[min(shared, found) if found >= 0 else shared :]

    @cached_property
    def _opened(self) -> str:
        """What the template writes to begin an answer and leaves out when it writes the answer itself."""
        turns = [user(ASKED)]
        prompt, bare = self._probe(turns, prompt=True), self._probe(turns)
        full = self._probe([*turns, {"role": "assistant", "content": TOLD}])
        if prompt is None or bare is None or full is None or not (prompt.startswith(bare) and full.startswith(bare)):
            return ""
        head = full[len(bare) :].partition(TOLD)[0]
        return prompt[len(bare) + alike(prompt[len(bare) :], head) :]

    def _with_thinking(self, text: str, context: str, turn: Turn) -> str:
        """The answer with the thinking that belongs to it.

        Some templates leave a turn's thinking out even while it is the last one, though the model is to write it; and
        some open a block of thinking that an answer without any does not close.
        """
        content = turn["content"] or ""
        thought = _THINKING.match(content)
        apart = turn.get("reasoning_content")
        if thought and thought[2].strip() and thought[2].strip() not in text:
            said = content[thought.end() :].strip()
        elif isinstance(apart, str) and apart.strip() and apart.strip() not in text and "</think>" in self._source:
            said, content = content.strip(), f"<think>\n{apart.strip()}\n</think>\n\n{content}"
        else:
            opened = _OPEN.search(context)
            closing = f"</{opened[1]}>" if opened else ""
            if opened and closing in self._source and closing not in text:
                return f"\n{closing}\n\n{text}"
            return text
        place = text.rfind(said)
        if place < 0:
            return text
        opened = _OPEN.search(context)
        if opened and content.lstrip().startswith(f"<{opened[1]}>"):
            content = content.lstrip()[len(opened[1]) + 2 :]
            content = content.lstrip("\n") if context.endswith("\n") else content
        return content.rstrip() + text[place + len(said) :]

    def _first_generated(self, talk: Conversation, at: int, full: str, context: int) -> int:
        """Characters of the answer that the template's own `{% generation %}` leaves out, at its beginning."""
        if "generation" not in self._source or not re.search(r"\{%-?\s*generation\s*-?%\}", self._source):
            return 0
        turns = [self._fitted(turn) for turn in talk.turns[: at + 1]]
        with limited(self.tokenizer):
            rendered, marked = render_jinja_template(
                [turns],
                tools=talk.tools,
                chat_template=self.tokenizer.get_chat_template(None, talk.tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        starts = [start for start, end in marked[0] if end > context]
        return max(starts[0] - context, 0) if rendered[0] == full and starts else 0

    def _continued(self, context: str, answer: str) -> Answer:
        """Tokens of a context as the model will be given it, and of the answer as it would go on from there."""
        before, whole = self.ids(context), self.ids(context + answer)
        if whole[: len(before)] == before:
            return Answer(before, whole[len(before) :])
        after = self.ids(answer)
        if self.tokenizer.decode(before + after) == self.tokenizer.decode(whole):
            return Answer(before, after)
        shared = alike(before, whole)  # a token that reaches over the border
        return Answer(whole[:shared], whole[shared:])

    def ids(self, text: str) -> list[int]:
        """Token ids of text that the template wrote: it has put the special tokens in already."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
