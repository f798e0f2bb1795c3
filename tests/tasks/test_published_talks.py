"""Conversations as public data sets publish them: read without a mapping, or refused with what to do."""

import json

import pytest
from datasets import Dataset

from adapters_kit.errors import DataError
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.conversation import conversation, how_read
from adapters_kit.training.resolve import prepare
from tests.support import small

ASKED, TOLD, MORE, LAST = "who came", "a fox", "where to", "the hen house"
TALK = [ASKED, TOLD, MORE, LAST]
ABOUT = "A fox came to the hen house."
CALLS = [{"name": "hens", "arguments": {"of": 3}}, {"name": "hens", "arguments": {"of": "all"}}]
BARE = {"name": "hens", "parameters": {"of": {"type": "str", "description": "whose"}}}


def read(tmp_path, row: dict) -> tuple[list[tuple], list[str], list]:
    """(role, content) of each turn of the row, the sentences on how it was read, and the tools."""
    path = small.write_jsonl(tmp_path / "rows.jsonl", [{"id": number, **row} for number in range(3)])
    task, parts = prepare(Recipe(model="m", task="causal-lm", data=str(path)))
    found = conversation(parts.train[0], task.columns, 0, answer=True)
    assert all(sentence in task.notes.sentences for sentence in how_read(parts.train[0], task.columns))
    asked = conversation(parts.train[0], task.columns, 0, answer=False).without_answer().turns
    assert asked == found.turns[:-1]
    shown = [(turn["role"], turn["content"] or turn["tool_calls"]) for turn in found.turns]
    return shown, how_read(parts.train[0], task.columns), found.tools


BY_TURNS = list(zip(("user", "assistant") * 2, TALK, strict=True))
BEHIND = [("user", f"{ASKED}\n\n{ABOUT}"), *BY_TURNS[1:]]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"data": TALK}, BY_TURNS),
        ({"conversations": TALK, "source": "x"}, BY_TURNS),
        ({"conversation": [{"input": ASKED, "output": TOLD}, {"input": MORE, "output": LAST}]}, BY_TURNS),
        ({"talk": [{"question": ASKED, "answer": TOLD}, {"question": MORE, "answer": LAST}]}, BY_TURNS),
        (
            {
                "story": ABOUT,
                "questions": [ASKED, MORE],
                "answers": {"input_text": [TOLD, LAST], "answer_start": [0, 9]},
            },
            BEHIND,
        ),
        (
            {
                "story": ABOUT,
                "questions": [{"input_text": ASKED, "turn_id": 1}, {"input_text": MORE, "turn_id": 2}],
                "answers": [{"input_text": TOLD, "span_start": 2}, {"input_text": LAST, "span_start": 12}],
            },
            BEHIND,
        ),
        ({"inputs": ASKED, "targets": TOLD, "language": "en"}, BY_TURNS[:2]),
        (
            {"input": [{"role": "user", "content": ASKED}], "output": {"role": "assistant", "content": TOLD}},
            BY_TURNS[:2],
        ),
        (
            {
                "systemInstruction": {"role": "system", "parts": [{"text": ABOUT}]},
                "contents": [
                    {"role": "user", "parts": [{"text": ASKED}]},
                    {"role": "model", "parts": [{"text": TOLD}]},
                ],
            },
            [("system", ABOUT), *BY_TURNS[:2]],
        ),
        (
            {
                "system": [{"text": ABOUT}],
                "messages": [{"role": role, "content": [{"text": said}]} for role, said in BY_TURNS],
            },
            [("system", ABOUT), *BY_TURNS],
        ),
        ({"problem": ASKED, "solution": TOLD, "level": 3}, BY_TURNS[:2]),
        ({"question": ASKED, "passage": ABOUT, "answer": TOLD}, [BEHIND[0], BY_TURNS[1]]),
    ],
)
def test_talks_without_a_mapping(tmp_path, row, turns):
    shown, told, _ = read(tmp_path, row)
    assert shown == turns
    assert bool(told) == any(cell == TALK for cell in row.values())


def test_calls_that_stand_as_text_beside_their_tools(tmp_path):
    row = {"query": ASKED, "answers": json.dumps(CALLS), "tools": json.dumps([BARE])}
    shown, told, tools = read(tmp_path, row)
    assert [call["function"] for call in shown[1][1]] == CALLS
    assert tools[0]["function"]["parameters"] == {"type": "object", "properties": BARE["parameters"]}
    assert told == ["Column 'answers': texts that are the JSON of calls are calls of the tools beside them."]
    assert read(tmp_path, row | {"tools": ""})[0][1] == ("assistant", row["answers"])  # no tools, no calls


@pytest.mark.parametrize("write", [json.dumps, str])
def test_turns_that_a_table_holds_as_text(tmp_path, write):
    pair = [[{"role": "user", "content": ASKED}], [{"role": "assistant", "content": TOLD}]]
    shown, told, _ = read(tmp_path, dict(zip(("prompt", "completion"), map(write, pair), strict=True)))
    assert shown == BY_TURNS[:2] and len(told) == 2


def test_turns_beside_prompts_that_differ_from_row_to_row(tmp_path):
    """A call whose argument is a number here and a text there."""
    path = small.write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {
                "prompt": [{"role": "user", "content": ASKED}],
                "completion": [{"role": "assistant", "content": None, "tool_calls": [{"function": call}]}],
            }
            for call in CALLS * 2
        ],
    )
    task, parts = prepare(Recipe(model="m", task="causal-lm", data={"train": str(path), "test_size": 1}))
    calls = [
        conversation(row, task.columns, 0, answer=True).turns[-1]["tool_calls"][0]["function"]
        for part in parts
        for row in part
    ]
    assert sorted(map(str, calls)) == sorted(map(str, CALLS * 2))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"questions": [ASKED, MORE], "answers": [TOLD]}, "Row 1: 2 questions and 1 answers"),
        ({"question": ASKED, "answer": [TOLD, LAST]}, "Row 1, column 'answer': several texts.*keep the one"),
        ({"chat": f"USER: {ASKED} ASSISTANT: {TOLD}"}, r"To train on texts as they stand: data\.columns: {text: NAME}"),
    ],
)
def test_what_is_no_talk_is_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, row)


def test_a_question_alone_is_asked():
    columns = {"prompt": "questions", "completion": "answers"}
    (row,) = Dataset.from_list([{"questions": [ASKED]}])
    assert conversation(row, columns, 0, answer=False).turns == [{"role": "user", "content": ASKED}]
