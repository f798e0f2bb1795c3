"""Rows in parts, features in few arrays, long texts: the same as all at once, in less memory."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import adapters_kit as ak
from adapters_kit.errors import DataError
from adapters_kit.loading import load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.tasks import rows
from adapters_kit.tasks.encoded import Encoded
from adapters_kit.tasks.rows import check_text, in_parts, truncated_ids
from tests.support import small, tiny


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=400))
def test_parts_are_all_rows_in_order(lengths):
    data = Dataset.from_dict({"text": ["x" * length for length in lengths], "n": list(range(len(lengths)))})
    seen = [(start + i, n) for start, part in in_parts(data, ["text", "n"]) for i, n in enumerate(part["n"])]
    assert seen == [(n, n) for n in range(len(lengths))]


def test_long_rows_come_few_at_a_time():
    data = Dataset.from_dict({"text": ["x" * 200_000] * 150 + ["y"] * 3000})
    sizes = [len(part["text"]) for _, part in in_parts(data, ["text"])]
    assert max(sizes[1:4]) <= 20
    assert max(sizes) == 1000


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 60))
def test_features_come_back_as_they_were_put(seed, count):
    draw = np.random.default_rng(seed)
    features = [
        {
            "row": i,
            "input_ids": draw.integers(0, 60_000, n).astype(np.int32),
            "labels": draw.integers(-100, 2**31 - 1, n).astype(np.int32),
            "inside": draw.random(n) < 0.5,
            "offsets": draw.integers(0, 9, (n, 2)).astype(np.int32),
            "target": draw.random(3).astype(np.float32),
            "score": float(draw.random()),
            "text": "é" * n,
        }
        for i, n in enumerate(draw.integers(0, 9, count))
    ]
    found = Encoded(small=("input_ids",))
    for feature in features:
        found.append(feature)
    assert len(found) == count
    for one, other in zip(found, features, strict=True):
        assert list(one) == list(other)
        for key, value in other.items():
            np.testing.assert_array_equal(one[key], value)
            assert np.shape(one[key]) == np.shape(value)
    assert found[0].keys() == found[-1].keys() == found[:1][0].keys()
    assert found.lengths("input_ids").tolist() == [len(feature["input_ids"]) for feature in features]
    with pytest.raises(IndexError):
        found[count]


@pytest.mark.parametrize("name", ["bert", "gpt2", "slow"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_what_is_cut_off_need_not_be_tokenized(name, side, monkeypatch):
    """Ids as of the whole text, whatever its words and blanks are; only rows that are not full are looked at again."""
    processor = transformers.ByT5Tokenizer() if name == "slow" else load_processor(small.model(name))
    processor.truncation_side = side
    monkeypatch.setattr(rows, "_FAR", 2)
    draw = random.Random(0)
    words = [*small.WORDS, "x" * 700, "", " ", "\n"]
    texts = [" ".join(draw.choices(words, k=draw.choice([3, 300, 900]))) for _ in range(40)] + ["y " + " " * 5000]
    for length in (4, 16, 64):
        expected = processor(texts, truncation=True, max_length=length)["input_ids"]
        assert truncated_ids(processor, texts, length) == list(expected)


def test_a_value_that_is_no_text_is_told_by_its_row():
    with pytest.raises(DataError, match=r"row 12 holds 7 .int., not a string.*There are: a, b"):
        check_text(["x", 7], 10, "a", "text", ["a", "b"])


@pytest.mark.slow
def test_rows_with_nothing_to_learn_do_not_stop_a_run(tmp_path):
    """Empty texts of a corpus, sentences without words: left out and counted."""
    texts = [{"text": "" if i % 4 == 0 else row["context"]} for i, row in enumerate(small.questions(60))]
    tagged = [
        {"tokens": r["words"], "tags": ["B-X" if w in small.NAMES else "O" for w in r["words"]]}
        for r in small.questions(60)
    ]
    tagged = [{"tokens": [], "tags": []} if i % 4 == 0 else row for i, row in enumerate(tagged)]
    for task, head, made in (
        ("masked-lm", "BertForMaskedLM", texts),
        ("token-classification", "BertForTokenClassification", tagged),
    ):
        path = small.write_jsonl(tmp_path / f"{task}.jsonl", made)
        recipe = Recipe(
            model=str(small.model("bert", model_class=head)),
            task=task,
            data=str(path),
            training={"max_steps": 20, "batch_size": 1, "samples": 2},
        )
        run = ak.train(recipe, tmp_path / task, quiet=True)
        assert np.isfinite(run.metrics["loss"])
        assert run.metrics["counts"]["rows_left_out"] == 15
        assert len(ak.predict(run.path, str(path))) == 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "pads"),
    [("llama", "own"), ("gpt2", "eos"), ("llama", "another in the config"), ("gpt2", "none in the tokenizer"),
     ("qwen3", "none in the tokenizer")],
)  # fmt: skip
def test_a_decoder_answers_each_row_of_a_batch_as_it_does_alone(tmp_path, family, pads):
    """Whatever the padding token of tokenizer and config are."""
    folder = tmp_path / "model"
    model_class = {"llama": "LlamaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}.get(
        family, "Qwen3ForSequenceClassification"
    )
    model = tiny.build(family, model_class=model_class)
    model.config.pad_token_id = {"another in the config": 7, "none in the tokenizer": 0}.get(pads)
    model.save_pretrained(folder)
    tokenizer = small.tokenizer(encoder=False)
    if pads != "own" and pads != "another in the config":
        tokenizer.pad_token = tokenizer.eos_token if pads == "eos" else None
    tokenizer.save_pretrained(folder)
    data = small.sentiment(40)
    path = small.write_jsonl(tmp_path / "rows.jsonl", data)
    training = {"max_steps": 2, "samples": 0, "learning_rate": 1e-2, "head_learning_rate": 1e-2}
    run = ak.train(
        Recipe(model=str(folder), task="text-classification", data=str(path), training=training),
        tmp_path / "run",
        quiet=True,
    )
    texts = [row["text"] for row in data]
    together, alone = (ak.predict(run.path, texts, batch_size=size) for size in (40, 1))
    assert [row["label"] for row in together] == [row["label"] for row in alone]
    scores = [torch.tensor([row["score"] for row in found]) for found in (together, alone)]
    torch.testing.assert_close(*scores, rtol=0, atol=2e-6)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pairs", [False, True])
def test_texts_that_are_cut_are_counted(tmp_path, side, pairs):
    """Exactly those that are longer than max_length, in both parts of the data."""
    folder = shutil.copytree(small.model("bert", model_class="BertForSequenceClassification"), tmp_path / "model")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "truncation_side": side}))
    draw = random.Random(0)
    made = [
        {
            "text": " ".join(draw.choices(small.WORDS, k=draw.choice([4, 8, 9, 10, 11, 12, 900]))),
            **({"text_pair": "a film"} if pairs else {}),
            "label": "ab"[i % 2],
        }
        for i in range(80)
    ]
    room = 12 - (5 if pairs else 2)
    run = ak.train(
        Recipe(
            model=str(folder),
            task="text-classification",
            data=str(small.write_jsonl(tmp_path / "rows.jsonl", made)),
            training={"max_steps": 1, "samples": 0, "max_length": 12},
        ),
        tmp_path / "run",
        quiet=True,
    )
    expected = sum(len(row["text"].split()) > room for row in made)
    assert run.metrics["counts"]["texts_cut"] == expected
    cut = [note for note in run.metrics["notes"] if "longer than max_length 12" in note]
    assert len(cut) == 2 and all(("end" if side == "right" else "beginning") in note for note in cut)
