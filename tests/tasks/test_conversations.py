"""The shapes in which people keep conversations, what is cut of long ones, and where answers stop."""

import json
from datetime import datetime

import pytest
from datasets import Dataset

import adapters_kit as ak
from adapters_kit.errors import DataError
from adapters_kit.tasks.causal_lm import CausalLM
from adapters_kit.tasks.conversation import conversation
from adapters_kit.tasks.turns import as_turns
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


PAIR = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": TOLD}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": repr(PAIR)},  # as pandas writes lists into CSV
        {"messages": json.dumps(json.dumps(PAIR))},
        {"messages": [{"role": "USER ", "text": ASKED}, {"role": "Model", "text": TOLD}]},
        {"messages": [{"role": "user", "parts": [{"text": ASKED}]}, {"role": "model", "parts": [{"text": TOLD}]}]},
        {"messages": [{**turn, "seen": {"at": datetime(2024, 1, 1), "raw": b"x"}} for turn in PAIR]},
        {"messages": json.dumps([{"role": "user", "content": {"text": ASKED}}, PAIR[1]])},
    ],
)
def test_turns_in_the_spellings_of_files_and_services(row):
    assert seen(row) == f"{USER}\n{ASSISTANT}"


def notes_of(row: dict, template: str = CHATML) -> tuple[dict[str, int], list[str]]:
    """What is counted, and what is learned of a row."""
    rows = Dataset.from_list([row])
    tokens = tokenizer(template)
    task = causal(tokens, reading.recognise(rows, {}, CausalLM.needs, CausalLM.optional))
    learned = [tokens.decode(ids) for _, ids in learned_runs(task.encode(rows))]
    return task.notes.counts, learned


def test_parts_of_calls_results_and_thinking():
    talk = [
        PAIR[0],
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I count"},
                {"type": "text", "text": "wait"},
                {"type": "tool_use", "id": "t1", "name": "count", "input": {"animal": "otter"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "7"}]},
        PAIR[1],
    ]
    tools = [{"name": "count", "input_schema": {"type": "object"}}]
    counts, learned = notes_of({"messages": json.dumps(talk), "tools": json.dumps(tools)})
    assert learned == ['wait<|call|>{"name": "count", "arguments": {"animal": "otter"}}<|im_end|>', f"{TOLD}<|im_end|>"]
    assert counts == {"thinking_not_shown": 1}
    text = seen({"messages": json.dumps(talk), "tools": json.dumps(tools)})
    assert turn("tool", "7") in text and '"parameters": {"type": "object"}' in text


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        ([{"city": "Riga"}, {"city": "Oslo"}], '[{"city": "Riga"}, {"city": "Oslo"}]'),
        (["a", "b"], '["a", "b"]'),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ({"city": "Riga"}, '{"city": "Riga"}'),
        ([], "[]"),
        (7, "7"),
        (False, "false"),
    ],
)
def test_results_of_tools_are_any_json(result, shown):
    asks = {"role": "assistant", "tool_calls": [call("")]}
    talk = [PAIR[0], asks, {"role": "tool", "content": result}, PAIR[1]]
    assert turn("tool", shown) in seen({"messages": json.dumps(talk)})


def test_tools_in_a_turn_are_tools():
    talk = [{"role": "system", "content": "x", "tools": [SCHEMA]}, *PAIR]
    assert "<|tools|>" in seen({"messages": json.dumps(talk)})


@pytest.mark.parametrize("given", [5, 2.5, ["a pond", "a lake"]])
def test_an_input_that_is_no_text_reaches_the_model(given):
    text = seen({"instruction": ASKED, "input": given, "output": TOLD})
    assert all(str(part) in text for part in (given if isinstance(given, list) else [given]))


@pytest.mark.parametrize(
    ("talk", "count", "learned"),
    [
        ([PAIR[0], {"role": "assistant", "content": " "}, *PAIR], "empty_answers", 1),
        ([PAIR[0], {"role": "assistant", "content": None}, *PAIR], "empty_answers", 1),
        ([PAIR[0], {**PAIR[1], "reasoning_content": "I think"}], "thinking_not_shown", 1),
        ([*PAIR, PAIR[0]], "turns_after_last_answer", 1),
    ],
)
def test_what_is_not_learned_of_a_conversation_is_counted(talk, count, learned):
    counts, said = notes_of({"messages": talk})
    assert counts == {count: 1} and said == [f"{TOLD}<|im_end|>"] * learned


def test_a_column_of_the_system_beside_a_system_turn_is_counted():
    talk = [{"role": "system", "content": "one"}, *PAIR]
    assert notes_of({"messages": talk, "system": "two"})[0] == {"systems_not_used": 1}
    assert notes_of({"messages": talk, "system": "one"})[0] == {}


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_thinking_goes_into_the_field_that_the_template_reads(field, read):
    template = CHATML.replace("{{ m.content or '' }}", "{{ '[' ~ m.FIELD ~ ']' if m.FIELD else '' }}{{ m.content }}")
    talk = [PAIR[0], {**PAIR[1], field: "I think"}]
    counts, learned = notes_of({"messages": talk}, template.replace("FIELD", read))
    assert learned == [f"[I think]{TOLD}<|im_end|>"] and not counts


@pytest.mark.parametrize("trimming", [False, True])
@pytest.mark.parametrize("rest", ["here it is", [{"role": "assistant", "content": "here it is"}]])
def test_a_begun_answer_is_continued_and_only_the_rest_learned(rest, trimming):
    template = CHATML.replace("m.content or ''", "(m.content or '') | trim") if trimming else CHATML
    rows = Dataset.from_list([{"prompt": [PAIR[0], {"role": "assistant", "content": "Sure, "}], "completion": rest}])
    tokens = tokenizer(template)
    task = causal(tokens, {"prompt": "prompt", "completion": "completion"})
    ((before, learned),) = learned_runs(task.encode(rows))
    assert tokens.decode(learned) == "here it is<|im_end|>"
    (asked,) = task.encode(rows, answers=False)
    assert asked["input_ids"].tolist() == before
    assert tokens.decode(before).endswith("<|im_start|>assistant\nSure, ")


def test_answers_within_a_prompt_are_seen_and_not_learned():
    counts, learned = notes_of({"prompt": [*PAIR, PAIR[0]], "completion": [{"role": "assistant", "content": "last"}]})
    assert learned == ["last<|im_end|>"] and not counts


def test_conversations_under_another_name_are_found_or_named_with_a_mapping_that_works():
    row = {"talk": PAIR, "id": 1}
    assert seen(row) == f"{USER}\n{ASSISTANT}"
    with pytest.raises(DataError, match=r"'talk', 'other' hold conversations.*data\.columns: {messages: talk}"):
        seen(row | {"other": PAIR})
    assert seen(row | {"other": PAIR}, {"messages": "talk"}) == f"{USER}\n{ASSISTANT}"
    beside = reading.unused(Dataset.from_list([{**row, "text": "x"}]), {"text": "text"}, ["text", "prompt", "messages"])
    assert "{messages: talk}" in beside


def test_without_a_template_turns_and_tools_are_refused_by_row():
    for row, wrong in (
        ({"prompt": [PAIR[0]], "completion": TOLD}, "Row 1, column 'prompt'.*no chat template"),
        ({"prompt": ASKED, "completion": [PAIR[1]]}, "Row 1, column 'completion'.*no chat template"),
        ({"prompt": ASKED, "completion": TOLD, "tools": json.dumps([SCHEMA])}, "Row 1 has tools"),
    ):
        task = causal(tokenizer(CHATML), {name: name for name in row})
        task.template = None
        with pytest.raises(DataError, match=wrong):
            task.encode(Dataset.from_list([row]))


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


CALLED = '{"name": "look_up", "arguments": {"word": "otter"}}'


@pytest.mark.parametrize(("key", "no", "yes"), [("weight", 0, 1), ("train", False, True), ("loss", 0, 1)])
@pytest.mark.parametrize("role", ["assistant", "function_call"])
def test_a_turn_of_weight_0_is_seen_and_not_learned(role, key, no, yes):
    talk = [
        {"role": "user", "content": "a"},
        {"role": role, "content": CALLED, key: no},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "right", key: yes},
    ]
    tokens = tokenizer(CHATML)
    ((before, learned),) = learned_runs(causal(tokens).encode(Dataset.from_list([{"messages": talk}])))
    assert tokens.decode(learned) == "right<|im_end|>" and "look_up" in tokens.decode(before)


def test_a_call_behind_thinking_is_a_call():
    made = as_turns([{"from": "function_call", "value": f"<think>\nhm\n</think>\n\n{CALLED}"}], "here")
    assert made[0]["reasoning_content"] == "hm" and made[0]["tool_calls"][0]["function"]["name"] == "look_up"
    (said,) = as_turns([{"from": "function_call", "value": "I call nobody", "train": False}], "here")
    assert said == {"role": "assistant", "content": "I call nobody", "weight": 0}


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            "Row 1, column 'messages', turn 1: unknown role 'narrator'",
        ),
        ({"messages": [{"role": "user"}]}, "neither content nor tool_calls"),
        ({"messages": []}, "a conversation is a list of"),
        ({"messages": ["hello"]}, "a turn is {role, content}"),
        ({"messages": [{"role": "user", "content": "x", "weight": 0.5}]}, "weight 0.5"),
        ({"prompt": ASKED, "completion": TOLD, "input": {"a": 1}}, "column 'input': it belongs to the prompt"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "call count"}, "a tool is .* not 'call count'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of kind 'image_url'"),
        ({"prompt": ASKED, "completion": TOLD, "history": [["one"]]}, "a history is a list of"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"wether": 1}]}, "a tool is"),
    ],
)
def test_a_bad_row_is_named(row, wrong):
    with pytest.raises(DataError, match=wrong):
        conversation(row, {name: name for name in row}, 0, answer=True)


def test_arguments_that_are_no_json_are_refused():
    talk = [PAIR[0], {"role": "assistant", "tool_calls": [call('{"animal": ')]}, {"role": "tool", "content": "7"}]
    with pytest.raises(DataError, match="Row 1: the arguments of the call of count are no JSON"):
        seen({"messages": json.dumps([*talk, PAIR[1]])})


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
        ({"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"}, {"text": "chosen"}),
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
