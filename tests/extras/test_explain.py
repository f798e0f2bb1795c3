"""predict(explain=True): scores that sum to what the answer gains, for every task, method and base; and the page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.errors import DataError
from adapters_kit.inference.explain import explain
from adapters_kit.inference.subject import describe, load_subject, make_task
from adapters_kit.training.resolve import rows_of
from tests.support import small

HEADS = {
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
}
FAMILIES = {"bert": "Bert", "modernbert": "ModernBert", "roberta": "Roberta", "bart": "Bart", "llama": "Llama"}
pytestmark = pytest.mark.pictures  # captum imports matplotlib


def subject_of(folder, rows, method=None, quantize=None, **keys):
    """Ready to be asked, its adapter's numbers drawn."""
    recipe, _ = describe(folder, **keys)
    if quantize:
        recipe = recipe.changed(quantize=quantize)
    data = rows_of(rows)
    made = load_subject(recipe, make_task(recipe, data, answers=False), None)
    if method is not None:
        made.model = ak.wrap(made.model, method).eval()
        torch.manual_seed(1)
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made, data


def classifier(family, **more):
    return small.model(family, model_class=f"{FAMILIES[family]}ForSequenceClassification", num_labels=3, **more)


def sums(one, share=0.03):
    scores = [score for _, score in one.tokens] or list(np.ravel(one.regions))
    assert np.isfinite(scores).all()
    assert sum(scores) == pytest.approx(one.value - one.nothing + one.error, abs=1e-4)
    assert abs(one.error) <= share * max(1, abs(one.value - one.nothing))
    return scores


TEXTS = [{"text": row["text"]} for row in small.sentiment(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_of_a_text(family):
    made, rows = subject_of(classifier(family), TEXTS)
    answers = made.task.predict(made.model, rows)
    for (one,), answer, row in zip(explain(made, rows), answers, rows, strict=True):
        assert any(sums(one))
        assert one.of == answer["label"]
        assert np.exp(one.value) == pytest.approx(answer["score"], rel=1e-3)
        assert " ".join(text for text, _ in one.tokens if not text.startswith("[")) == row["text"]
        assert all(score == 0 for text, score in one.tokens if text.startswith("["))


METHODS = ["lora", "dora", "houlsby", "pfeiffer", "prefix", "ia3", "prompt", ["houlsby", "lora"]]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method(method):
    made, rows = subject_of(classifier("llama"), TEXTS, method)
    plain, _ = subject_of(classifier("llama"), TEXTS)
    for (one,), (other,) in zip(explain(made, rows), explain(plain, rows), strict=True):
        assert sums(one) != sums(other)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantized_bases(quantize):
    pytest.importorskip("bitsandbytes")
    folder = classifier("llama", hidden_size=64, intermediate_size=128)
    made, rows = subject_of(folder, TEXTS, "lora", quantize)
    for (one,) in explain(made, rows):
        assert any(sums(one, 0.2))


def test_pairs_several_labels_and_numbers():
    pair = [{"text": "anna lives in rome", "text_pair": "where does anna live ?"}]
    made, rows = subject_of(classifier("bert"), pair)
    ((one,),) = explain(made, rows)
    assert len([text for text, _ in one.tokens if not text.startswith("[")]) == 9
    sums(one)
    made, rows = subject_of(classifier("bert"), TEXTS, problem="multi-label")
    answers = made.task.predict(made.model, rows)
    for found, answer in zip(explain(made, rows), answers, strict=True):
        best = [max(answer["scores"], key=answer["scores"].get)]
        assert [one.of for one in found] == (answer["labels"] or best)
        for one in found:
            sums(one)
            assert np.exp(one.value) == pytest.approx(answer["scores"][one.of], rel=1e-3)
    made, rows = subject_of(classifier("bert"), TEXTS, problem="regression")
    for (one,), answer in zip(explain(made, rows), made.task.predict(made.model, rows), strict=True):
        assert (one.of, one.unit) == ("value", "output")
        assert one.value == pytest.approx(answer["value"], abs=1e-5)
        sums(one)


def test_spans_of_several_windows_and_tags():
    folder = small.model("bert", model_class="BertForQuestionAnswering")
    long = " ".join(row["context"] for row in small.questions(20))
    asked = [{"question": "where does anna live ?", "context": text} for text in (long, "anna lives in rome .")]
    made, rows = subject_of(folder, asked, "lora")
    answers = made.task.predict(made.model, rows)
    for (one,), answer in zip(explain(made, rows), answers, strict=True):
        assert one.of == answer["answer"]
        assert any(sums(one))
    folder = small.model("bert", model_class="BertForTokenClassification", num_labels=2)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {0: "O", 1: "B-X"}, "label2id": {"O": 0, "B-X": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    made, rows = subject_of(folder, [{"tokens": row["text"].split()} for row in TEXTS])
    tagged = 0
    for found, answer in zip(explain(made, rows), made.task.predict(made.model, rows), strict=True):
        wanted = [f"{word}: {tag}" for word, tag in zip(answer["tokens"], answer["tags"], strict=True) if tag != "O"]
        assert [one.of for one in found] == wanted
        tagged += sum(any(sums(one)) for one in found)
    assert tagged


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "t5"])
@pytest.mark.parametrize("method", [None, "prefix", "houlsby"])
def test_written_answers(family, method):
    both = family in ("bart", "t5")
    role = "source" if both else "prompt"
    keys = {"task": "seq2seq" if both else "causal-lm", "max_new_tokens": 4}
    made, rows = subject_of(small.model(family), [{role: "anna lives in"}, {role: "bert lives"}], method, **keys)
    answers = made.task.predict(made.model, rows)
    for found, answer, row in zip(explain(made, rows), answers, rows, strict=True):
        for one in found:
            assert one.of == answer["answer"].strip()
            assert len(one.tokens) >= len(row[role].split())
            sums(one)
    assert any(any(sums(one)) for found in explain(made, rows) for one in found)


def test_regions_of_a_picture(tmp_path):
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    folder = small.model("vit", model_class="ViTForImageClassification", num_labels=3)
    found = ak.predict(folder, [{"image": str(tmp_path / "a.png")}], explain=tmp_path / "page.html")
    (one,) = found[0]["explained"]
    assert np.shape(one["regions"]) == (7, 7)
    assert np.sum(one["regions"]) == pytest.approx(one["value"] - one["nothing"] + one["error"], abs=1e-4)
    assert "data:image/png;base64," in (tmp_path / "page.html").read_text()


def test_a_trained_run_points_at_the_word(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = small.write_jsonl(tmp_path / "rows.jsonl", small.sentiment(320))
    training = {"epochs": 12.0, "batch_size": 16, "learning_rate": 4e-3, "samples": 0}
    recipe = ak.Recipe(
        model=str(small.model("bert")), task="text-classification", data=str(data), method="lora", training=training
    )
    run = ak.train(recipe, "runs/reviews", quiet=True)
    assert run.metrics["accuracy"] > 0.9
    rows = [{"text": row["text"]} for row in small.sentiment(20, seed=5)]
    answers = ak.predict(run, rows, explain=True)
    best = [max(answer["explained"][0]["tokens"], key=lambda token: token["score"])["token"] for answer in answers]
    assert sum(token in (*small.GOOD, *small.BAD) for token in best) >= 12  # by chance 2 or 3
    assert cli.main(["predict", "runs/reviews", "a fine film", "--explain", "--page", "page.html"]) == 0
    assert json.loads(capsys.readouterr().out)["explained"][0]["unit"] == "log-probability"
    assert "<h2>Row 1</h2>" in Path("page.html").read_text()
    assert cli.main(["predict", "runs/reviews", "a fine film", "--page", "page.html"]) == 2
    page = (Path(__file__).parents[2] / "docs" / "howto" / "explain.md").read_text()
    exec(re.search(r"^```python\n(.*?)^```", page, re.M | re.DOTALL)[1])
    assert Path("why.html").is_file()


def test_what_is_not_explained(tmp_path):
    with pytest.raises(DataError, match="masked-lm are not explained"):
        ak.predict(small.model("bert"), ["anna [MASK] in rome"], explain=True, task="masked-lm")
    with pytest.raises(DataError, match="leave one of them out"):
        ak.predict(classifier("bert"), TEXTS, explain=True, n_best=2)
    with pytest.raises(DataError, match=r"an \.html file"):
        ak.predict(classifier("bert"), TEXTS, explain=tmp_path / "x.txt")
    with pytest.raises(DataError, match="no folder"):
        ak.predict(classifier("bert"), TEXTS, explain=tmp_path / "none" / "x.html")
