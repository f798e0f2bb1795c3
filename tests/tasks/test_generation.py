"""Writing answers: alone as among others, up to the end of the turn, within the positions that a model has."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

import adapters_kit as ak
from adapters_kit.loading import load_processor
from adapters_kit.tasks.causal_lm import CausalLM
from adapters_kit.tasks.generation import without_empty_thinking
from adapters_kit.tasks.streaming import answer
from tests.support import small, tiny

DECODERS = list(tiny.names("decoder"))


def bound(model, columns=None, **keys):
    task = CausalLM(ak.Recipe(model=str(model), task="causal-lm", data="x", **keys), columns or {"prompt": "prompt"})
    loaded = ak.load(str(model), task="causal-lm").eval()
    task.bind(load_processor(str(model)), loaded)
    return task, loaded


def prompts(*sizes: int) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset.from_list([{"prompt": " ".join(rng.choice(small.WORDS, size=size))} for size in sizes])


def answers(task, model, rows, batch_size) -> list[str]:
    return [row["answer"] for row in task.predict(model, rows, batch_size)]


@pytest.mark.parametrize("family", DECODERS)
def test_a_row_gets_the_same_answer_alone_and_among_others(family):
    task, model = bound(small.model(family), max_new_tokens=6)
    rows = prompts(1, 3, 9, 14, 2)
    assert answers(task, model, rows, 5) == answers(task, model, rows, 1)


@pytest.mark.parametrize("pad", ["none", "eos", "other than the config's"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_the_padding_token_changes_no_answer_and_no_loss(family, pad):
    task, model = bound(small.model(family), {"prompt": "prompt", "completion": "completion"}, max_new_tokens=6)
    rows = prompts(1, 3, 9, 14, 2)
    rows = rows.add_column("completion", ["fine", "a dull film", "great", "oslo oslo", "the end"])
    expected = answers(task, model, rows, 1)
    tokens = task.processor
    tokens.pad_token = {"none": None, "eos": tokens.eos_token, "other than the config's": "film"}[pad]
    task.bind(tokens, model)
    assert answers(task, model, rows, 5) == expected
    features = task.encode(rows)
    together, alone = (task.run(model, features, size) for size in (5, 1))
    assert np.allclose([loss for loss, _ in together], [loss for loss, _ in alone], atol=1e-4)


@pytest.mark.parametrize("wanted", [8, 100])
def test_answers_fit_into_the_positions(wanted):
    """A table of 32 positions: prompts and answers share it, by the same rule for every row, and it is said."""
    task, model = bound(small.model("gpt2", n_positions=32), max_new_tokens=wanted)
    model.generation_config.eos_token_id = None
    rows = prompts(50, 3)
    together = answers(task, model, rows, 2)
    assert together == answers(task, model, rows, 1)
    assert task.limits.prompt + task.limits.answer <= 32 and task.limits.prompt >= 16
    assert task.notes.counts["prompts_cut"] == 1
    assert any("32 positions" in note for note in task.notes.sentences) == (wanted == 100)


def test_an_empty_prompt_is_answered():
    task, model = bound(small.model("llama"), max_new_tokens=3)
    assert len(task.predict(model, Dataset.from_list([{"prompt": ""}, {"prompt": "a film"}]), 2)) == 2


CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} [MASK] {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.mark.slow
def test_answers_stop_at_the_template_s_end_of_turn(tmp_path):
    """Learned until sure, an answer ends with its turn, in predict, samples and stream; the saved config says so."""
    folder = tmp_path / "model"
    tokens = small.tokenizer(encoder=False)
    tokens.chat_template = CHAT
    tiny.build("llama").save_pretrained(folder)
    tokens.save_pretrained(folder)
    pairs = [("where is anna", "in rome"), ("where is ben", "in oslo")]
    rows = [{"prompt": ask, "completion": tell} for ask, tell in pairs * 20]
    recipe = ak.Recipe(
        model=str(folder),
        task="causal-lm",
        data=str(small.write_jsonl(tmp_path / "rows.jsonl", rows)),
        max_new_tokens=12,
        training={"epochs": 12, "learning_rate": 1e-2, "batch_size": 8, "evals_per_epoch": 0, "samples": 2},
        method={"name": "lora", "r": 16},
    )
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    asked = [ask for ask, _ in pairs]
    given = [row["answer"].strip() for row in ak.predict(run.path, asked)]
    assert given == [tell for _, tell in pairs]
    streamed = ["".join(pieces).strip() for pieces in ak.stream(run.path, asked)]
    assert streamed == given
    samples = [json.loads(line)["tuned"]["answer"].strip() for line in (run.path / "samples.jsonl").open()]
    assert set(samples) <= set(given)
    saved = json.loads((run.adapter / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [tokens.eos_token_id, tokens.mask_token_id]


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["<think>", "\n\n</th", "ink>\n\n", "fine ", "thanks"], "fine thanks"),
        (["\n</think>\n\nfine"], "fine"),
        (["<think>\nso\n", "</think>\n\nfine"], "<think>\nso\n</think>\n\nfine"),
        (["fine ", "</think>"], "fine </think>"),
        (["<", "b>fine"], "<b>fine"),
        (["<think>\n\n"], "<think>\n\n"),
        ([], ""),
    ],
)
def test_an_empty_block_of_thinking_is_not_part_of_an_answer(pieces, text):
    assert "".join(answer(iter(pieces))) == text == without_empty_thinking("".join(pieces))


@torch.no_grad()
def test_a_batch_of_every_length_has_the_loss_of_its_rows():
    task, model = bound(small.model("gpt2"), {"text": "text"})
    rows = Dataset.from_list([{"text": row["prompt"]} for row in prompts(2, 30, 7)])
    features = task.encode(rows)
    assert task.run(model, features, 3) == [
        (pytest.approx(loss, abs=1e-4), count) for loss, count in task.run(model, features, 1)
    ]
