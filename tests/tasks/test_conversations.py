"""The shapes in which people keep conversations, what is cut of long ones, and where answers stop."""

import json

import pytest
from datasets import Dataset

import adapters_kit as ak
from adapters_kit.errors import DataError
from adapters_kit.tasks.base import IGNORED
from adapters_kit.tasks.conversation import conversation
from adapters_kit.tasks.template import ChatTemplate
from adapters_kit.training import data as reading
from tests.support import small
from tests.tasks.test_templates import causal, learned_runs, tokenizer

CHATML = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<|call|>{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED, TOLD = "what is it", "an otter"
SCHEMA = {"name": "count", "parameters": {"type": "object"}}


def seen(row: dict, columns: dict | None = None, template: str = CHATML) -> str:
    """The one sample that a row gives, as text, through recognising its columns."""
    rows = Dataset.from_list([row])
    from adapters_kit.tasks.causal_lm import CausalLM

    columns = reading.recognise(rows, columns or {}, CausalLM.needs, CausalLM.optional)
    tokens = tokenizer(template)
    (feature,) = causal(tokens, columns).encode(rows)
    return tokens.decode(feature["input_ids"].tolist())


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>"


USER, ASSISTANT = turn("user", ASKED), turn("assistant", TOLD)


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": TOLD}]}, [USER, ASSISTANT]),
        ({"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": TOLD}]}, [USER, ASSISTANT]),
        (
            {
                "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": TOLD}],
                "system": "be brief",
            },
            [turn("system", "be brief"), USER, ASSISTANT],
        ),
        (
            {"instruction": ASKED, "input": "a picture", "output": TOLD},
            [turn("user", f"{ASKED}\n\na picture"), ASSISTANT],
        ),
        ({"instruction": ASKED, "input": "", "output": TOLD}, [USER, ASSISTANT]),
        (
            {"instruction": ASKED, "input": "", "output": TOLD, "history": [["hello", "good day"]]},
            [turn("user", "hello"), turn("assistant", "good day"), USER, ASSISTANT],
        ),
        (
            {"instruction": ASKED, "context": "a pond", "response": TOLD},
            [turn("user", f"{ASKED}\n\na pond"), ASSISTANT],
        ),
        ({"prompt": ASKED, "completion": TOLD}, [USER, ASSISTANT]),
        (
            {"prompt": [{"role": "user", "content": ASKED}], "completion": [{"role": "assistant", "content": TOLD}]},
            [USER, ASSISTANT],
        ),
        (
            {"messages": json.dumps([{"role": "user", "content": ASKED}, {"from": "bot", "value": TOLD}])},
            [USER, ASSISTANT],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": ASKED}]},
                    {"from": "gpt", "value": TOLD},
                ]
            },
            [USER, ASSISTANT],
        ),
    ],
)
def test_shapes_load_without_a_mapping(row, shown):
    assert seen(row) == "\n".join(shown)


def call(arguments) -> dict:
    return {"type": "function", "function": {"name": "count", "arguments": arguments}}


@pytest.mark.parametrize(
    "asks_for",
    [
        {"role": "assistant", "content": None, "tool_calls": [call('{"animal": "otter"}')]},
        {"role": "assistant", "content": "", "tool_calls": [call({"animal": "otter", "place": None})]},
        {"role": "assistant", "function_call": {"name": "count", "arguments": '{"animal": "otter"}'}},
        {"from": "function_call", "value": '{"name": "count", "arguments": {"animal": "otter"}}'},
    ],
)
@pytest.mark.parametrize("tools", [[{"type": "function", "function": SCHEMA}], json.dumps([SCHEMA])])
def test_tool_calls_in_their_spellings(asks_for, tools):
    result = {"from": "observation", "value": "7"} if "from" in asks_for else {"role": "tool", "content": "7"}
    talk = [{"role": "user", "content": ASKED}, asks_for, result, {"role": "assistant", "content": TOLD}]
    text = seen({"messages": json.dumps(talk), "tools": tools})
    asked_for = '<|call|>{"name": "count", "arguments": {"animal": "otter"}}'
    assert turn("assistant", asked_for) in text
    assert turn("tool", "7") in text and text.endswith(ASSISTANT)
    assert json.dumps([{"type": "function", "function": SCHEMA}]) in text


def test_arguments_of_other_rows_do_not_appear():
    """Arrow gives each row the keys of all rows, empty."""
    talks = [
        {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "tool_calls": [call({key: "x"})]}]}
        for key in ("city", "film")
    ]
    tokens = tokenizer(CHATML)
    texts = [tokens.decode(f["input_ids"].tolist()) for f in causal(tokens).encode(Dataset.from_list(talks))]
    assert '{"city": "x"}' in texts[0] and "film" not in texts[0] and "None" not in texts[0] and "null" not in texts[0]


def test_a_turn_of_weight_0_is_seen_and_not_learned():
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "wrong", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "right", "weight": 1},
    ]
    tokens = tokenizer(CHATML)
    ((before, learned),) = learned_runs(causal(tokens).encode(Dataset.from_list([{"messages": talk}])))
    assert tokens.decode(learned) == "right<|im_end|>" and "wrong" in tokens.decode(before)


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            "Row 1, column 'messages', turn 1: unknown role 'narrator'",
        ),
        ({"messages": [{"role": "user"}]}, "neither content nor tool_calls"),
        ({"messages": []}, "a conversation is a list of"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of kind 'image_url'"),
        ({"prompt": ASKED, "completion": TOLD, "history": [["one"]]}, "a history is a list of"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"wether": 1}]}, "a tool is"),
    ],
)
def test_a_bad_row_is_named(row, wrong):
    with pytest.raises(DataError, match=wrong):
        conversation(row, {name: name for name in row}, 0, answer=True)


def test_a_template_that_refuses_names_row_and_rule():
    strict = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    good = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": TOLD}]
    for bad, rule in (
        (
            [{"role": "system", "content": "x"}, *good],
            "row 2.*No system role.*before that of the first user",
        ),
        ([good[0], good[0], good[1]], "row 2.*Roles must alternate.*Join turns"),
    ):
        with pytest.raises(DataError, match=rule):
            causal(tokenizer(strict)).encode(Dataset.from_list([{"messages": good}, {"messages": bad}]))


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "prompt", "completion": "chosen"}),
        (
            {
                "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
            },
            {"messages": "chosen"},
        ),
    ],
)
def test_preference_pairs_are_refused_with_advice_that_works(tmp_path, row, advice):
    rows = small.write_jsonl(tmp_path / "rows.jsonl", [row] * 12)
    keys = {
        "model": str(small.model("llama", chat=True)),
        "task": "causal-lm",
        "training": {"max_steps": 1, "samples": 0},
    }
    told = ", ".join(f"{role}: {column}" for role, column in advice.items())
    with pytest.raises(DataError, match=f"data.columns: {{{told}}}"):
        ak.train(ak.Recipe(data=str(rows), **keys), tmp_path / "run")
    ak.train(ak.Recipe(data={"train": str(rows), "columns": advice}, **keys), tmp_path / "run", quiet=True)


def test_long_conversations_lose_their_oldest_turns_and_say_so():
    talk = [{"role": "system", "content": "RULES"}]
    for number in range(8):
        talk += [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"reply {number}"}]
    tokens = tokenizer(CHATML)
    task = causal(tokens, training={"max_length": 300})
    features = task.encode(Dataset.from_list([{"messages": talk}]))
    texts = [tokens.decode(feature["input_ids"].tolist()) for feature in features]
    assert len(texts) > 1
    assert all(
        len(feature["input_ids"]) <= 300 and "RULES" in text for feature, text in zip(features, texts, strict=True)
    )
    learned = [tokens.decode(run) for _, run in learned_runs(features)]
    assert learned == [f"reply {number}<|im_end|>" for number in range(8)]
    assert task.notes.counts["answers_without_oldest_turns"] > 0
    assert "oldest turns" in task.notes.sentences[0]


def test_rows_without_an_answer_are_left_out_and_counted():
    talks = [
        [{"role": "user", "content": "only a question"}],
        [{"role": "user", "content": ASKED}, {"role": "assistant", "content": TOLD}],
        [{"role": "user", "content": "x " * 500}],
    ]
    tokens = tokenizer(CHATML)
    rows = Dataset.from_list([{"messages": talk} for talk in talks])
    task = causal(tokens, training={"max_length": 200})
    assert [feature["row"] for feature in task.encode(rows)] == [1]
    assert task.notes.counts["rows_left_out"] == 2
    assert "rows 1, 3" in task.notes.sentences[0]
    everything = causal(tokens, answer_only=False, training={"max_length": 200})
    features = everything.encode(rows)
    assert [feature["row"] for feature in features] == [0, 1, 2]
    assert all((feature["labels"] != IGNORED).all() and len(feature["labels"]) <= 200 for feature in features)


def test_an_answer_or_a_question_too_long_is_cut_and_counted():
    tokens = tokenizer(CHATML)
    for question, answer, count in (("short", "y " * 400, "answers_cut"), ("x " * 400, "short", "prompts_cut")):
        talk = [
            {"role": "system", "content": "RULES"},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        task = causal(tokens, training={"max_length": 200})
        (feature,) = task.encode(Dataset.from_list([{"messages": talk}]))
        assert len(feature["input_ids"]) <= 200
        assert "RULES" in tokens.decode(feature["input_ids"].tolist()) or count == "answers_cut"
        assert task.notes.counts[count] == 1
        labels = feature["labels"]
        assert (labels != IGNORED).sum() > 5


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        (CHATML, "<|im_end|>"),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}",
            None,
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}<|user|>{% else %}<|assistant|>{% endif %}{{ m.content }}"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
            "<|user|>",
        ),
    ],
)
def test_where_an_answer_ends(template, stop):
    """At the template's mark; at what begins the next turn; with the end of text where a template has no mark."""
    tokens = tokenizer(template)
    assert ChatTemplate(tokens, "m").stops == ([tokens.convert_tokens_to_ids(stop)] if stop else [])
    talk = [{"role": role, "content": word} for role, word in zip(("user", "assistant") * 2, "abcd", strict=True)]
    runs = learned_runs(causal(tokens).encode(Dataset.from_list([{"messages": talk}])))
    assert [tokens.decode(learned) for _, learned in runs] == [f"{word}{stop or '</s>'}" for word in "bd"]
