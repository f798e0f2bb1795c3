"""Conversations that are cut, answers that end, and what is counted of them."""

import json
from datetime import date
from decimal import Decimal

import pytest
from datasets import Dataset

from adapters_kit.errors import DataError
from adapters_kit.tasks.base import IGNORED
from adapters_kit.tasks.causal_lm import CausalLM
from adapters_kit.tasks.template import ChatTemplate
from adapters_kit.tasks.turns import as_turns
from adapters_kit.training import data as reading
from adapters_kit.training.inputs import rows_from
from tests.support import small
from tests.tasks.test_conversations import ASKED, ASSISTANT, CHATML, PAIR, TOLD, USER, call, seen, turn
from tests.tasks.test_templates import causal, learned_runs, tokenizer


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


MIXED = [
    [{"role": "user", "content": [{"type": "text", "text": ASKED}]}, PAIR[1]],
    [PAIR[0], {"role": "assistant", "tool_calls": [call({"n": 1})]}, {"role": "tool", "content": [7, "x"]}, PAIR[1]],
]


def test_turns_that_no_column_of_arrow_s_can_hold_are_read(tmp_path):
    """Text in one turn and a list in another, from a file as from Python."""
    rows = [{"messages": talk} for talk in MIXED]
    for data in (reading.read_table(small.write_jsonl(tmp_path / "talk.jsonl", rows)), rows_from(rows)):
        tokens = tokenizer(CHATML)
        learned = [tokens.decode(ids) for _, ids in learned_runs(causal(tokens).encode(data))]
        asks = '<|call|>{"name": "count", "arguments": {"n": 1}}<|im_end|>'
        assert learned == [f"{TOLD}<|im_end|>", asks, f"{TOLD}<|im_end|>"]
    with pytest.raises(DataError, match="row 2"):
        reading.recognise(rows_from([{"text": "a"}, {"text": ["b"]}]), {}, CausalLM.needs)


def test_a_question_goes_before_the_sentence_that_may_answer_it():
    rows = Dataset.from_list([{"question": "q", "sentence": "s", "label": "yes"}])
    found = reading.recognise(rows, {}, [("text", "label")], ["text_pair"])
    assert found == {"text": "question", "text_pair": "sentence", "label": "label"}


def test_a_later_system_turn_stays_when_the_turns_around_it_are_cut():
    talk = [{"role": "system", "content": "RULES"}]
    for number in range(8):
        talk += [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"reply {number}"}]
        if number == 1:
            talk.append({"role": "system", "content": "BE BRIEF"})
    tokens = tokenizer(CHATML)
    features = causal(tokens, training={"max_length": 300}).encode(Dataset.from_list([{"messages": talk}]))
    for before, learned in learned_runs(features):
        later = tokens.decode(learned)[6] > "1"
        assert ("BE BRIEF" in tokens.decode(before)) == later


def test_dates_within_results_and_arguments_reach_the_model():
    day = {"day": date(2024, 5, 1), "cost": Decimal("2.5")}
    asks = {"role": "assistant", "tool_calls": [{"function": {"name": "count", "arguments": day}}]}
    talk = [PAIR[0], asks, {"role": "tool", "content": [day]}, PAIR[1]]
    made = as_turns(talk, "Row 1")
    assert made[1]["tool_calls"][0]["function"]["arguments"] == {"day": "2024-05-01", "cost": 2.5}
    assert json.loads(made[2]["content"]) == [{"day": "2024-05-01", "cost": 2.5}]


def test_who_serves_whom_is_told_from_the_words_of_call_centres():
    talk = [{"role": "Customer", "content": ASKED}, {"role": "Agent", "content": TOLD}]
    assert seen({"messages": talk}) == f"{USER}\n{ASSISTANT}"


def test_deep_arguments_are_read_once_a_level():
    """Twice a level would be a billion times at thirty."""
    deep = {"day": date(2024, 5, 1)}
    for _ in range(40):
        deep = {"in": [deep, None]}
    asks = {"role": "assistant", "tool_calls": [{"function": {"name": "count", "arguments": {"deep": deep}}}]}
    (call,) = as_turns([PAIR[0], asks, PAIR[1]], "Row 1")[1]["tool_calls"]
    assert json.dumps(call["function"]["arguments"]).count('"in"') == 40


def test_what_a_template_reads_otherwise_than_it_is_meant_is_counted():
    marked = {"role": "user", "content": "say <|im_end|>"}
    rows = [{"messages": [{**PAIR[0], "name": "anna"}, PAIR[1]]}, {"messages": [marked, PAIR[1], *PAIR]}]
    task = causal(tokenizer(CHATML))
    task.encode(rows_from(rows))
    assert task.notes.counts == {"names_not_shown": 1, "marks_in_turns": 1}
    assert "the first is <|im_end|>" in task.notes.sentences[-1]
    named = causal(tokenizer(CHATML.replace("{{ m.role }}", "{{ m.role }} {{ m.name or '' }}")))
    named.encode(rows_from(rows))
    assert named.notes.counts == {"marks_in_turns": 1}


def test_a_refusal_is_an_answer_and_characters_are_not_chosen():
    refused = {"role": "assistant", "content": None, "refusal": "I will not"}
    assert turn("assistant", "I will not") in seen({"messages": json.dumps([PAIR[0], refused])})
    detail = {**PAIR[1], "train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}
    with pytest.raises(DataError, match=r"turn 2: train_detail"):
        as_turns([PAIR[0], detail], "here")


def test_columns_that_nobody_knows_are_asked_for_in_every_shape():
    with pytest.raises(DataError, match=r"\{messages: NAME\}, or \{prompt: NAME, completion: NAME\}, or \{text:"):
        reading.recognise(Dataset.from_dict({"x": ["a"]}), {}, CausalLM.needs, CausalLM.optional)


def test_single_messages_of_a_tree_are_no_texts_to_learn():
    rows = Dataset.from_list([{"message_id": "a", "parent_id": "", "role": "prompter", "text": "hello"}])
    with pytest.raises(DataError, match="every path from a root to a leaf"):
        CausalLM.refuse(rows, {})
    CausalLM.refuse(rows, {"text": "text"})
