"""Sequence to sequence: languages of translation models, prefixes, cuts that are said, scores in every script."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from rouge_score import rouge_scorer

import adapters_kit as ak
from adapters_kit.errors import DataError, ModelError, RecipeError
from adapters_kit.loading import load_processor
from adapters_kit.tasks.seq2seq import Seq2Seq
from adapters_kit.tasks.text_scores import Units, how_counted, script_without_spaces, text_scores
from adapters_kit.training.resolve import prepare
from tests.support import small

WORDS = ["the", "cat", "is", "good", "chat", "est", "bon", "le"]


@cache
def multilingual(kind: str, root: str, **saved: str) -> Path:
    """A tiny model of a kind that is told languages by codes, with a real tokenizer class."""
    folder = Path(root) / f"{kind}{len(saved)}"
    vocab = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS))]
    if kind == "nllb":
        made = transformers.NllbTokenizer(vocab={token: n for n, (token, _) in enumerate(vocab)}, merges=[], **saved)
    else:
        made = getattr(transformers, {"mbart50": "MBart50Tokenizer", "mbart": "MBartTokenizer"}[kind])(
            vocab=vocab, **saved
        )
    made.save_pretrained(folder)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    name = "M2M100" if kind == "nllb" else "MBart"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(made), pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, **sizes
    )
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForConditionalGeneration")(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("languages"))


def bound(model: Path, data: dict | None = None, **keys) -> tuple[Seq2Seq, torch.nn.Module]:
    recipe = ak.Recipe(model=str(model), task="seq2seq", data={"train": "x", **(data or {})}, **keys)
    task = Seq2Seq(recipe, {"source": "source", "target": "target"})
    loaded = ak.load(str(model), task="seq2seq").eval()
    task.bind(load_processor(str(model)), loaded)
    return task, loaded


ROWS = Dataset.from_list([{"source": "the cat is good", "target": "le chat est bon"}])


@pytest.mark.parametrize(
    ("kind", "source", "target"), [("nllb", "eng_Latn", "fra_Latn"), ("mbart50", "en_XX", "fr_XX")]
)
def test_codes_stand_before_both_texts_and_before_the_answer(root, kind, source, target):
    task, model = bound(multilingual(kind, root), {"source_lang": source, "target_lang": target}, max_new_tokens=4)
    (feature,) = task.encode(ROWS)
    names = task.processor.convert_ids_to_tokens
    assert names(feature["input_ids"].tolist())[0] == source
    assert names(feature["labels"].tolist())[0] == target
    out = model.generate(input_ids=torch.tensor([feature["input_ids"].tolist()]), max_new_tokens=3)
    assert names(out[0].tolist())[1] == target
    assert task.codes == {"data.source_lang": source, "data.target_lang": target}


def test_mbart_25_begins_with_the_code_itself(root):
    task, model = bound(multilingual("mbart", root), {"source_lang": "en_XX", "target_lang": "ro_RO"})
    (feature,) = task.encode(ROWS)
    code = task.processor.convert_tokens_to_ids("ro_RO")
    assert feature["labels"][-1] == code
    assert model.generation_config.decoder_start_token_id == code


def test_languages_that_nobody_named_are_asked_for(root):
    with pytest.raises(ModelError, match=r"set data\.target_lang\. It knows ace_Arab"):
        bound(multilingual("nllb", root))
    with pytest.raises(ModelError, match=r"data\.target_lang: .* no language 'fra_Lat'. Did you mean fra_Latn"):
        bound(multilingual("nllb", root), {"source_lang": "eng_Latn", "target_lang": "fra_Lat"})
    with pytest.raises(ModelError, match=r"no codes of languages: leave data\.target_lang out"):
        bound(small.model("t5"), {"target_lang": "fr"})
    with pytest.raises(RecipeError, match="target_lang"):
        ak.Recipe(model="m", task="masked-lm", data={"train": "x", "target_lang": "fr"})
    saved = multilingual("nllb", root, src_lang="eng_Latn", tgt_lang="deu_Latn")
    task, _ = bound(saved)
    assert task.found()["data.target_lang"] == "deu_Latn"
    assert "data.target_lang: deu_Latn" in task.notes.sentences[0]


def test_a_run_keeps_its_languages(root, tmp_path):
    rows = small.write_jsonl(tmp_path / "rows.jsonl", list(ROWS) * 12)
    data = {"train": str(rows), "target_lang": "fra_Latn"}
    recipe = ak.Recipe(
        model=str(multilingual("nllb", root)), task="seq2seq", data=data, training={"max_steps": 1}, max_new_tokens=4
    )
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    assert run.recipe.data.source_lang == "eng_Latn"
    saved = json.loads((run.adapter / "generation_config.json").read_text())
    assert load_processor(str(run.adapter)).convert_ids_to_tokens(saved["forced_bos_token_id"]) == "fra_Latn"
    assert ak.predict(run.path, ["the cat"])[0]["source"] == "the cat"


def test_a_prefix_stands_before_every_source():
    with_prefix, _ = bound(small.model("t5"), {"source_prefix": "say upper "})
    without, _ = bound(small.model("t5"))
    rows = Dataset.from_list([{"source": "a fine film", "target": "fine"}])
    longer = Dataset.from_list([{"source": "say upper a fine film", "target": "fine"}])
    ids = [task.encode(data)[0]["input_ids"].tolist() for task, data in ((with_prefix, rows), (without, longer))]
    assert ids[0] == ids[1]


def test_what_is_cut_is_counted():
    task, _ = bound(small.model("t5"), training={"max_length": 8})
    rows = [{"source": "a fine film " * length, "target": "fine " * length} for length in (1, 4, 9)]
    features = task.encode(Dataset.from_list(rows))
    assert max(len(feature["input_ids"]) for feature in features) == 8
    assert task.notes.counts == {"sources_cut": 2, "targets_cut": 1}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_row_gets_the_same_answer_alone_and_among_others(family):
    task, model = bound(small.model(family), max_new_tokens=8)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(small.WORDS, size=size)) for size in (1, 3, 9, 14, 2)]
    rows = Dataset.from_list([{"source": text, "target": "fine"} for text in texts])
    together = [row["answer"] for row in task.predict(model, rows, batch_size=5)]
    alone = [row["answer"] for row in task.predict(model, rows, batch_size=1)]
    assert together == alone


def test_answers_fit_into_the_positions():
    task, model = bound(small.model("bart", max_position_embeddings=16), max_new_tokens=200)
    model.generation_config.eos_token_id = None
    rows = Dataset.from_list([{"source": "a fine film", "target": "fine"}])
    assert task.new_tokens == 15
    task.predict(model, rows)


@pytest.mark.parametrize(
    ("text", "script", "units"),
    [
        ("It's a fine-looking Film, 2 of 3.", None, ["it", "s", "a", "fine", "looking", "film", "2", "of", "3"]),
        ("Это хороший фильм", None, ["это", "хороший", "фильм"]),
        ("यह अच्छी फ़िल्म है", None, ["यह", "अच्छी", "फ़िल्म", "है"]),
        ("这部电影 OK", "CJK", ["这", "部", "电", "影", "ok"]),
        ("映画がすき", "HIRAGANA", ["映", "画", "が", "す", "き"]),
        ("ที่นี่", "THAI", ["ที่", "นี่"]),
    ],
)
def test_units_of_every_script(text, script, units):
    from unicodedata import normalize

    assert Units().tokenize(text) == [normalize("NFC", unit) for unit in units]
    assert script_without_spaces([text]) == script
    assert (how_counted([text]) is not None) == (script is not None)


def test_english_scores_are_the_package_s_own():
    truth = ["The cat sat on the mat.", "A fine-looking film, isn't it?"]
    guesses = ["The cat is on a mat", "a fine film it isn't"]
    theirs = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    ours = text_scores(guesses, truth)
    for kind in ("rouge1", "rouge2", "rougeL"):
        each = [theirs.score(text, guess)[kind].fmeasure for text, guess in zip(truth, guesses, strict=True)]
        assert ours[kind] == pytest.approx(np.mean(each))


@pytest.mark.parametrize(
    "text", ["这部电影很好看", "ภาพยนตร์เรื่องนี้ดีมาก", "この映画はとても良い", "Это очень хороший фильм"]
)
def test_half_of_a_text_scores_about_half_in_any_script(text):
    whole, half = text_scores([text], [text]), text_scores([text[: len(text) // 2]], [text])
    assert whole["rouge1"] == whole["rougeL"] == 1 and whole["bleu"] == pytest.approx(100)
    assert 0.3 < half["rouge1"] < 0.9


def test_what_the_base_s_generation_config_asks_for_is_told(tmp_path):
    """As summarisers are saved: a shortest length, beams, no phrase twice. Only the last holds for other answers."""
    model = ak.load(str(small.model("bart")), task="seq2seq")
    settings = {"min_length": 20, "max_length": 40, "num_beams": 4, "no_repeat_ngram_size": 3}
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(tmp_path)
    load_processor(str(small.model("bart"))).save_pretrained(tmp_path)
    task, loaded = bound(tmp_path, max_new_tokens=8)
    assert len(task.notes.sentences) == 3
    told = " ".join(task.notes.sentences)
    assert "min_length 20" in told and "no_repeat_ngram_size 3" in told and "4 beams" in told
    loaded.generation_config.eos_token_id = [*range(2, loaded.config.vocab_size)]  # whatever is written first ends it
    assert task.predict(loaded, ROWS)[0]["answer"] == ""
    plain, _ = bound(small.model("bart"))
    assert plain.notes.sentences == []


def test_translations_as_they_are_published(tmp_path):
    rows = [{"translation": {"de": f"ein Film {i}", "en": f"a film {i}"}} for i in range(12)]
    path = small.write_jsonl(tmp_path / "wmt.jsonl", rows)
    recipe = ak.Recipe(model="m", task="seq2seq", data=str(path))
    with pytest.raises(DataError, match=r"source: translation\.de, target: translation\.en") as told:
        prepare(recipe)
    columns = yaml.safe_load(str(told.value).split("data.columns: ")[1].split("}")[0] + "}")
    _, splits = prepare(recipe.changed(**{"data.columns": columns}))
    assert splits.test.column_names == ["translation.de", "translation.en"] and len(splits.train) > 8
    assert splits.train[0]["translation.en"].startswith("a film")


def test_a_target_ends_although_its_tokenizer_ends_no_text():
    """T5Gemma's tokenizer is that of a decoder."""
    task, model = bound(small.model("t5"), training={"max_length": 4})
    task.bind(small.tokenizer(encoder=False), model)
    rows = [{"source": "a film", "target": target} for target in ("fine cast", "a fine fine fine film", "")]
    words = [task.processor.convert_ids_to_tokens(f["labels"].tolist()) for f in task.encode(Dataset.from_list(rows))]
    assert words == [["fine", "cast", "[EOS]"], ["a", "fine", "fine", "[EOS]"], ["[EOS]"]]
    assert task.notes.counts == {"empty_targets": 1, "targets_cut": 1}
    task.processor.eos_token = None
    with pytest.raises(DataError, match=r"Row 3: the target is empty, and .* has no token for the end"):
        task.encode(Dataset.from_list(rows))
