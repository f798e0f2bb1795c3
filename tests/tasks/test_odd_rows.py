"""Rows that a tokenizer or a head takes in its own way: nothing, the end of a text inside one, signs dropped."""

import json
import shutil
import warnings

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

import adapters_kit as ak
from adapters_kit.errors import ModelError
from adapters_kit.inference.answer_file import predict_file
from adapters_kit.recipe import Recipe
from adapters_kit.training.preparing import load_base, prepare
from tests.support import small


def run_of(tmp_path, rows, task="text-classification", family="bert", model=None, **training):
    recipe = {"model": str(model or small.model(family)), "task": task, "data": rows}
    training = {"max_steps": 2, "samples": 0, "learning_rate": 0.1, **training}
    return ak.train({**recipe, "training": training}, tmp_path / "run", quiet=True)


def scores(run, texts, size):
    found = ak.predict(run, [{"text": text} for text in texts], batch_size=size)
    return torch.tensor([row["score"] if row["label"] == "good" else 1 - row["score"] for row in found])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["xlnet", "t5", "bart", "llama", "gpt2"])
def test_a_row_is_answered_as_alone_whatever_it_holds(tmp_path, family):
    """XLNet reads the last token, T5 and BART the end of the text, a decoder needs one token at least."""
    run = run_of(tmp_path, small.sentiment(24), family=family)
    texts = ["fine", "a the was is with and very quite one two three dull", "", "grim [EOS] cast", "[EOS] [EOS]", " "]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        together = scores(run, texts, 6)
    assert any("2 of 6 texts hold" in str(note.message) for note in told) == (family in ("t5", "bart"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        alone = torch.cat([scores(run, [text], 1) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_padding_is_no_end_of_a_text(tmp_path, family):
    """A tokenizer without a padding token pads with the end's, of which the head finds as many as there are."""
    folder = shutil.copytree(small.model(family), tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": None}))
    run = run_of(tmp_path, small.sentiment(24), model=folder)
    texts = ["fine", "a the was is with and very quite one two three dull"]
    alone = torch.cat([scores(run, [text], 1) for text in texts])
    torch.testing.assert_close(scores(run, texts, 2), alone, rtol=0, atol=3e-6)


def with_more_words(tmp_path, family, **special):
    """A model whose tokenizer has words behind its embeddings, as when tokens were added and the model not resized."""
    folder = shutil.copytree(small.model(family), tmp_path / "model")
    tokens = AutoTokenizer.from_pretrained(folder)
    tokens.add_tokens([f"new{i}" for i in range(128)])
    tokens.add_special_tokens(special)
    tokens.save_pretrained(folder)
    return folder


ROWS = {
    "bert": ("token-classification", {"tokens": ["new127", "film"], "tags": ["X", "O"]}),
    "t5": ("seq2seq", {"source": "a film", "target": "new127"}),
    "llama": ("causal-lm", {"prompt": "a film", "completion": "new127"}),
    "roberta": ("masked-lm", {"text": "a film new127 is fine"}),
}


@pytest.mark.parametrize("family", ROWS)
def test_a_token_behind_the_embeddings_is_refused_by_name(tmp_path, family):
    task, row = ROWS[family]
    folder = with_more_words(tmp_path, family)
    plain = {key: ["a"] * len(value) if isinstance(value, list) else "a film" for key, value in row.items()}
    with pytest.raises(ModelError, match=r"'new127'.* has embeddings for 128\. .*resize_token_embeddings"):
        run_of(tmp_path, {"train": [row] * 8, "test": [plain] * 2}, task, model=folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert", "bart"])
def test_a_padding_token_behind_the_embeddings_is_replaced_and_told(tmp_path, family):
    folder = with_more_words(tmp_path, family, pad_token="<pad>")
    run = run_of(tmp_path, small.sentiment(24), model=folder)
    assert any("'<pad>'" in note and "pads instead" in note for note in run.metrics["notes"])
    texts = ["fine", "a the was is with and very quite one two three dull"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        alone = torch.cat([scores(run, [text], 1) for text in texts])
        torch.testing.assert_close(scores(run, texts, 2), alone, rtol=0, atol=3e-6)


def test_a_tokenizer_without_an_end_is_told(tmp_path):
    folder = shutil.copytree(small.model("llama"), tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    run = run_of(tmp_path, [{"prompt": "a film", "completion": "fine"}] * 12, "causal-lm", model=folder)
    assert any("no token for the end of a text" in note for note in run.metrics["notes"])


def test_the_start_of_a_text_stands_there_once(tmp_path):
    """Rows that were rendered with a chat template begin with the token that the tokenizer adds."""
    folder = shutil.copytree(small.model("llama"), tmp_path / "model")
    tokenizer = small.tokenizer(encoder=False)
    start = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    tokenizer.backend_tokenizer.post_processor = start
    tokenizer.bos_token = "[CLS]"
    tokenizer.save_pretrained(folder)
    for role, rest in (("text", {}), ("prompt", {"completion": "fine"})):
        rows = [{role: "[CLS] a film", **rest}, {role: "a film", **rest}]
        path = str(small.write_jsonl(tmp_path / f"{role}.jsonl", rows))
        recipe = Recipe(model=str(folder), task="causal-lm", data={"train": path, "test": path})
        task, splits = prepare(recipe)
        load_base(recipe, task)
        one, other = task.encode(splits.train)
        assert one["input_ids"].tolist() == other["input_ids"].tolist() and one["input_ids"][:2].tolist() != [1, 1]
        assert task.notes.counts["starts_written_twice"] == 1


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_a_batch_of_such_rows_is_trained_on_and_told(tmp_path, family):
    odd = "fine [EOS] film" if family == "bart" else ""
    rows = [{"text": odd if i % 3 == 0 else "a dull film", "label": "ab"[i % 2]} for i in range(24)]
    run = run_of(tmp_path, {"train": rows, "test": rows[:6]}, family=family, batch_size=1, max_steps=6)
    assert run.metrics["counts"] == {"ends_left_out" if family == "bart" else "empty_texts": 8 + 2, "rows_in_both": 6}


def test_what_is_found_in_rows_that_are_set_aside_is_counted_once(tmp_path):
    rows = [{"text": "" if i % 3 == 0 else "a dull film", "label": "ab"[i % 2]} for i in range(24)]
    assert run_of(tmp_path, rows).metrics["counts"]["empty_texts"] == 8


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_words_that_give_no_token_are_no_words_behind_the_end(tmp_path, family):
    rows = [{"tokens": ["a", " ", "fine", ""], "tags": ["X", "O", "O", "X"]}] * 24
    rows = [*rows, *([{"tokens": [], "tags": []}] * 6)]
    run = run_of(tmp_path, {"train": rows, "test": rows}, "token-classification", family, batch_size=1)
    assert run.metrics["counts"] == {"rows_left_out": 12, "words_not_read": 2 * 2 * 24, "rows_in_both": 30}
    asked = [{"tokens": ["a", " ", "film"]}, {"tokens": []}, {"tokens": ["a"] * 80}]
    with pytest.warns(UserWarning) as told:
        found = ak.predict(run, asked)
    assert [[bool(tag) for tag in row["tags"]] for row in found[:2]] == [[True, False, True], []]
    behind = found[2]["tags"].count("")
    assert behind == (80 - 62 if family == "bert" else 80 - 64)
    said = "\n".join(str(note.message) for note in told)
    assert "1 of 3 rows are longer than max_length" in said and "1 words are empty to the tokenizer" in said


def test_the_masks_of_a_text_in_several_pieces_are_one_answer(tmp_path):
    run = run_of(tmp_path, [{"text": "a fine film " * 9}] * 24, "masked-lm", max_length=16)
    asked = [{"text": "[MASK] film " + "a fine film " * 9 + "[MASK]"}, {"text": "a fine film"}, {"text": "a [MASK]"}]
    assert [len(row["masks"]) for row in ak.predict(run, asked)] == [2, 0, 1]
    source = small.write_jsonl(tmp_path / "asked.jsonl", asked)
    assert predict_file(run.path, source, tmp_path / "out.jsonl").rows == 3
