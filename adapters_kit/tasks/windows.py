"""Conversations and prompts that have to fit into so many tokens: what is cut, in which order, and how much it was.

The oldest turns go first; the system's stay. Every answer is learned once, each behind as much of what led to it as
fits. Where the last question alone is too long, its beginning is cut, and an answer that does not fit loses its end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

from adapters_kit.tasks.conversation import Conversation
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.template import Answer, ChatTemplate
from adapters_kit.tasks.turns import BEGUN, LEADING, Turn

Sample = tuple[list[int], list[bool]]
"""Token ids, and for each whether it is learned."""


class Cuts(Counter[str]):
    """How much was cut, or is read in a way that may not be meant, by what it was: the keys of `SENTENCES`.

    Attributes:
        first: by key, the token that the first of them is about.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, str] = {}

    SENTENCES: ClassVar[dict[str, str]] = {
        "answers_without_oldest_turns": "{n} answers stand in conversations longer than max_length {limit}: they are "
        "learned without the oldest turns, which were cut.",
        "texts_without_oldest_turns": "{n} conversations are longer than max_length {limit}: "
        "their oldest turns were cut.",
        "prompts_without_oldest_turns": "{n} conversations are longer than the {limit} tokens that a prompt may have: "
        "their oldest turns were cut.",
        "prompts_cut": "{n} prompts are longer than max_length {limit} leaves room for: their beginning was cut.",
        "turns_not_shown": "{n} turns (system, user) are left out by the model's chat template.",
        "empty_answers": "{n} assistant turns are empty: nothing is learned from them.",
        "thinking_not_shown": "{n} answers have thinking in a field of its own (reasoning_content), which the model's "
        "chat template does not write: they are learned without it. Written into the content, as <think>…</think> "
        "before the answer, it is learned.",
        "systems_not_used": "{n} conversations have a system turn of their own: the column of the system beside it is "
        "not used.",
        "turns_after_last_answer": "{n} conversations do not end with an assistant turn: what follows their last "
        "answer is not learned.",
        "names_not_shown": "{n} turns say who speaks (name), which the model's chat template does not write.",
        "marks_in_turns": "{n} turns hold special tokens of the model in their text (the first is {first}), which it "
        "reads as such: as the end of a turn, for example. Where a prompt is written out for the model already, give "
        "the whole as a column text, or the bare words.",
        "starts_written_twice": "{n} texts begin with {first}, which the tokenizer puts before every text: it stands "
        "there once.",
        "answers_cut": "{n} answers are longer than max_length {limit}: their end was cut.",
    }

    def tell(self, notes: Notes, limit: int) -> None:
        """Says what was cut, with the remedy."""
        for key, sentence in self.SENTENCES.items():
            if self[key]:
                text = sentence.format(n=f"{self[key]:,}", limit=limit, first=self.first.get(key))
                remedy = " A higher training.max_length keeps more." if "{limit}" in sentence else ""
                notes.say(text + remedy, **{key: self[key]})


def samples(template: ChatTemplate, talk: Conversation, limit: int, row: int, cuts: Cuts) -> list[Sample]:
    """What a conversation is learned from: samples of at most `limit` tokens that hold each answer once.

    A turn with `weight: 0` (OpenAI's way of saying so) is seen and not learned.
    """
    cuts["turns_not_shown"] += template.check(talk, row)
    _count_what_is_read_otherwise(template, talk, cuts)
    cuts["turns_after_last_answer"] += talk.turns[-1]["role"] != "assistant"
    answers = []
    start = talk.leading
    for at, turn in enumerate(talk.turns):
        if turn["role"] != "assistant" or turn.get("weight") == 0:
            continue
        if not says_something(turn):
            cuts["empty_answers"] += 1
            continue
        cuts["thinking_not_shown"] += "reasoning_content" in turn and not template.knows_thinking
        seen = _from(talk, start, at + 1)
        found = _answer(template, seen, row)
        if len(found.ids) > limit:
            # To half the limit, so that the answers that follow may share the sample.
            places = _starts(talk, start, at)
            size = partial(_answer_size, template, talk, at + 1, row)
            start = _first_short(places, (limit // 2, limit), size, start)
            cuts["answers_without_oldest_turns"] += bool(places)
            found = _answer(template, _from(talk, start, at + 1), row)
        if len(found.ids) > limit:
            found = _with_shorter_question(template, _from(talk, start, at + 1), limit, row)
            cuts["prompts_cut"] += 1
        answers.append(fitted(found, limit, cuts))
    return joined(answers, limit)


def _count_what_is_read_otherwise(template: ChatTemplate, talk: Conversation, cuts: Cuts) -> None:
    marks = [mark for turn in talk.turns if (mark := template.mark_in(turn)) is not None]
    if marks:
        cuts["marks_in_turns"] += len(marks)
        cuts.first.setdefault("marks_in_turns", marks[0])
    named = sum("name" in turn and turn["role"] in ("user", "assistant") for turn in talk.turns)
    cuts["names_not_shown"] += named if named and not template.knows_names else 0


def says_something(turn: Turn) -> bool:
    """Whether an assistant's turn has words, thinking or calls that the model is to write."""
    rest = (turn["content"] or "")[turn.get(BEGUN, 0) :]
    return bool(rest.strip() or turn.get("reasoning_content") or turn.get("tool_calls"))


def prompt(template: ChatTemplate, talk: Conversation, limit: int, row: int, cuts: Cuts) -> list[int]:
    """Token ids of at most `limit` tokens, after which the model is to answer."""
    return _rendered(template, talk, limit, row, cuts, asking=True)


def whole(template: ChatTemplate, talk: Conversation, limit: int, row: int, cuts: Cuts) -> Sample:
    """A conversation of which all is learned, the user's turns too, in at most `limit` tokens."""
    cuts["turns_not_shown"] += template.check(talk, row)
    _count_what_is_read_otherwise(template, talk, cuts)
    ids = _rendered(template, talk, limit, row, cuts, asking=False)
    return ids, [True] * len(ids)


def _rendered(
    template: ChatTemplate, talk: Conversation, limit: int, row: int, cuts: Cuts, *, asking: bool
) -> list[int]:
    def ids(seen: Conversation) -> list[int]:
        return template.ids(template.render(seen, prompt=asking, row=row))

    found = ids(talk)
    if len(found) > limit:
        end = len(talk.turns)
        places = _starts(talk, talk.leading, end)
        start = _first_short(places, (limit,), lambda place: len(ids(_from(talk, place, end))), talk.leading)
        cuts["prompts_without_oldest_turns" if asking else "texts_without_oldest_turns"] += bool(places)
        talk = _from(talk, start, end)
        found = ids(talk)
    if len(found) > limit:
        found = ids(_with_room(talk, len(talk.turns), lambda seen: len(ids(seen)) <= limit))[-limit:]
        cuts["prompts_cut"] += 1
    return found


def joined(answers: Sequence[Answer], limit: int) -> list[Sample]:
    """Answers in as few samples as the property allows that each is seen behind its own context and nothing else.

    They share a sample where the next context begins with all of the one before.
    """
    found: list[Sample] = []
    for context, answer in answers:
        ids, learned = found[-1] if found else ([], [])
        if ids and len(context) + len(answer) <= limit and context[: len(ids)] == ids:
            more = context[len(ids) :]
            ids += more + answer
            learned += [False] * len(more) + [True] * len(answer)
        else:
            found.append((context + answer, [False] * len(context) + [True] * len(answer)))
    return found


def fitted(found: Answer, limit: int, cuts: Cuts) -> Answer:
    """The answer in at most `limit` tokens: the context loses its beginning; an answer that fits in no way its end.

    At least one token of the context stays, as the first token of a sample is predicted from nothing; and beside an
    answer that is cut anyway, up to half the limit.
    """
    if len(found.ids) <= limit:
        return found
    fits = len(found.answer) < limit
    room = limit - len(found.answer) if fits else min(len(found.context), max(limit // 2, 1))
    cuts["answers_cut"] += len(found.answer) > limit - room
    return Answer(found.context[-room:], found.answer[: limit - room])


def _answer(template: ChatTemplate, seen: Conversation, row: int) -> Answer:
    return template.answer(seen, len(seen.turns) - 1, row)


def _answer_size(template: ChatTemplate, talk: Conversation, end: int, row: int, start: int) -> int:
    return len(_answer(template, _from(talk, start, end), row).ids)


def _from(talk: Conversation, start: int, end: int) -> Conversation:
    """The system's turns, later ones too, and all from `start` to before `end`."""
    start = max(start, talk.leading)
    system = [turn for turn in talk.turns[:start] if turn["role"] in LEADING]
    return Conversation(system + talk.turns[start:end], talk.tools)


def _starts(talk: Conversation, start: int, end: int) -> list[int]:
    """Where a conversation may begin instead: at each later question of the user's."""
    return [place for place in range(start + 1, end) if talk.turns[place]["role"] == "user"]


def _first_short(places: Sequence[int], limits: Sequence[int], size: Callable[[int], int], otherwise: int) -> int:
    """The earliest of `places` from which the size is within the first limit that any of them keeps, else the last;
    `otherwise` if there are no places."""
    for limit in limits:
        index = bisect_left(places, True, key=lambda place: size(place) <= limit)
        if index < len(places):
            return places[index]
    return places[-1] if places else otherwise


def _with_shorter_question(template: ChatTemplate, seen: Conversation, limit: int, row: int) -> Answer:
    """The last answer behind a question whose beginning was cut so that both fit, if that is possible at all."""
    short = _with_room(seen, len(seen.turns) - 1, lambda talk: len(_answer(template, talk, row).ids) <= limit)
    return _answer(template, short, row)


def _with_room(talk: Conversation, end: int, fits: Callable[[Conversation], bool]) -> Conversation:
    """The conversation with the longest text before `end`, not the system's, cut at its beginning until all fits."""
    able = [n for n in range(talk.leading, end) if talk.turns[n]["role"] != "assistant" and talk.turns[n]["content"]]
    if not able:
        return talk
    at = max(able, key=lambda n: len(talk.turns[n]["content"]))
    words = talk.turns[at]["content"]

    def without(count: int) -> Conversation:
        turns = list(talk.turns)
        turns[at] = {**turns[at], "content": words[count:]}
        return Conversation(turns, talk.tools)

    return without(bisect_left(range(len(words)), True, key=lambda count: fits(without(count))))
