"""Every chat template that TRL ships: each answer is learned once, behind what the model sees when it answers."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from adapters_kit.errors import DataError
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import IGNORED
from adapters_kit.tasks.causal_lm import CausalLM
from adapters_kit.tasks.template import ChatTemplate

_TRL = find_spec("trl")
TEMPLATES = sorted((Path(_TRL.origin).parent / "chat_templates").glob("*.jinja")) if _TRL else []
# What real tokenizers leave among the ordinary tokens, though it looks special.
ORDINARY = re.compile(r"tool_call>|tool_response>|think>|function|parameter|arg_|tools>|invoke")


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens that a template writes."""
    marks = set(re.findall(r"<[|｜/]?[A-Za-z_][^<>\s{}']*>|<[|][^<>\s]*[|]>", template))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    special = sorted(mark for mark in marks if not ORDINARY.search(mark))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special,
    )
    fast.chat_template = template
    return fast


def causal(tokens: PreTrainedTokenizerFast, columns: dict | None = None, **keys) -> CausalLM:
    """The task as if bound to a model with this tokenizer."""
    task = CausalLM(Recipe(model="m", task="causal-lm", data="x", **keys), columns or {"messages": "messages"})
    task.processor, task.template = tokens, ChatTemplate(tokens, "m")
    task.max_length = keys.get("training", {}).get("max_length", 100_000)
    return task


def learned_runs(features) -> list[tuple[list[int], list[int]]]:
    """(all tokens before, tokens) of every stretch of learned tokens."""
    found = []
    for feature in features:
        ids, labels = feature["input_ids"].tolist(), feature["labels"].tolist()
        start = None
        for place, label in enumerate([*labels, IGNORED]):
            if label != IGNORED and start is None:
                start = place
            elif label == IGNORED and start is not None:
                found.append((ids[:start], ids[start:place]))
                start = None
    return found


def as_the_template_takes_it(tokens, turns):
    """Text, or parts where the template shows text in parts only."""
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    for given in (turns, parts):
        try:
            text = tokens.apply_chat_template(given, tokenize=False)
        except Exception:  # the template's own
            continue
        if all(turn["content"] in text for turn in turns):
            return given
    raise AssertionError("the template shows the turns in neither form")


TALK = [
    {"role": "user", "content": "how many otters are there"},
    {"role": "assistant", "content": "seven of them in the upper pond"},
    {"role": "user", "content": "and beavers"},
    {"role": "assistant", "content": "none since last winter"},
]


@pytest.mark.skipif(not TEMPLATES, reason="TRL, whose chat templates these are, is not installed")
@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_each_answer_is_learned_once_as_it_will_be_asked_for(path):
    tokens = tokenizer(path.read_text())
    features = causal(tokens).encode(Dataset.from_list([{"messages": TALK}]))
    given = as_the_template_takes_it(tokens, TALK)
    heads = set()
    for (before, learned), at in zip(learned_runs(features), (1, 3), strict=True):
        asked = tokens.apply_chat_template(given[:at], add_generation_prompt=True, tokenize=False)
        assert tokens.decode(before) == asked
        assert before == tokens(asked, add_special_tokens=False)["input_ids"]
        head, answer, end = tokens.decode(learned).partition(TALK[at]["content"])
        assert answer
        assert len(tokens(end.strip(), add_special_tokens=False)["input_ids"]) in (1, 2), end  # special tokens alone
        heads.add(head)
    assert len(heads) == 1  # what the template writes before an answer, and nothing of the conversation
    assert not any(turn["content"] in head for turn in TALK for head in heads)
    assert causal(tokens).template.stops


FOR_TRAINING = [(path, other) for other in TEMPLATES if (path := Path(str(other).replace("_training", ""))) != other]


def _plain(text: str) -> str:
    """Without empty thinking, which some templates write before an answer and others before asking for it."""
    return re.sub(r"<think>\s*</think>\s*", "", text)


@pytest.mark.skipif(not TEMPLATES, reason="TRL, whose chat templates these are, is not installed")
@pytest.mark.parametrize(("path", "other"), FOR_TRAINING, ids=[path.stem for path, _ in FOR_TRAINING])
def test_the_tokens_are_those_of_trl_s_training_template(path, other):
    """An answer by itself needs no template of another's: the same words in the same place, with the same end.

    TRL's may mark more: what the prompt already ends in, and blanks behind the end mark, which no model writes.
    """
    tokens = tokenizer(path.read_text() + other.read_text())
    tokens.chat_template = path.read_text()
    given = as_the_template_takes_it(tokens, TALK)
    runs = learned_runs(causal(tokens).encode(Dataset.from_list([{"messages": TALK}])))
    (text,), (marked,) = render_jinja_template(
        [given], chat_template=other.read_text(), return_assistant_tokens_mask=True, **tokens.special_tokens_map
    )
    for (before, learned), at in zip(runs, (1, 3), strict=True):
        answer = TALK[at]["content"]
        head, _, end = tokens.decode(before + learned).partition(answer)
        start = text.index(answer)
        assert _plain(head) == _plain(text[:start])
        assert any(first <= start and start + len(answer) <= last for first, last in marked)
        last = at == 3 or path.stem != "gptoss"  # whose earlier answers end otherwise; the model is to end them alike
        assert text[start + len(answer) :].startswith(end) or not last


THOUGHTS = [
    TALK[0],
    {"role": "assistant", "content": "<think>\nfirst I count\n</think>\n\nseven"},
    TALK[2],
    {"role": "assistant", "content": "<think>\nthen I recall\n</think>\n\nnone"},
]


@pytest.mark.skipif(not TEMPLATES, reason="TRL, whose chat templates these are, is not installed")
@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_thinking_is_learned_where_the_model_will_think(path):
    """Also where the template strips it from earlier turns, or from all; and it is opened once."""
    tokens = tokenizer(path.read_text())
    runs = learned_runs(causal(tokens).encode(Dataset.from_list([{"messages": THOUGHTS}])))
    said = [(tokens.decode(before), tokens.decode(learned)) for before, learned in runs]
    assert len(said) == 2
    assert "first I count" in said[0][1] and "then I recall" in said[1][1]
    for (before, learned), answer in zip(said, ("seven", "none"), strict=True):
        assert learned.count(answer) == 1
        opened = before[-12:].count("<think>") + learned.count("<think>")
        assert opened == learned.count("</think>") or "<think></think>" in learned


CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "count", "arguments": '{"animal": "otter"}'}}
TOOLS = [{"type": "function", "function": {"name": "count", "description": "c", "parameters": {"type": "object"}}}]
CALLING = [
    TALK[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "count", "tool_call_id": "a1b2c3d4e", "content": "7 in all"},
    TALK[1],
]


@pytest.mark.skipif(not TEMPLATES, reason="TRL, whose chat templates these are, is not installed")
@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_tool_calls_are_learned_or_refused(path):
    """A template that writes no calls is refused by row; another's calls and final answers are both learned."""
    tokens = tokenizer(path.read_text())
    task = causal(tokens, {"messages": "messages", "tools": "tools"})
    data = Dataset.from_list([{"messages": CALLING, "tools": TOOLS}])
    try:
        runs = learned_runs(task.encode(data))
    except DataError as error:
        assert re.search(r"Row 1 has tool|refuses the conversation in row 1", str(error)), error
        return
    call, final = (tokens.decode(learned) for _, learned in runs)
    assert "count" in call and "otter" in call and "7 in all" not in call
    assert '\\"' not in call  # arguments are not quoted twice
    assert TALK[1]["content"] in final and "7 in all" in tokens.decode(runs[1][0])
