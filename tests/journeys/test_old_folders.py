"""Run folders and adapters of commit 225c49d still load, score, predict and merge; tests/fixtures/old holds them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import adapters_kit as ak
from adapters_kit.errors import ShippingError

OLD = Path(__file__).parents[1] / "fixtures" / "old"
EXPECTED = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the folder, and the working directory in it: its paths are relative."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return Path()


def test_the_run_opens_scores_and_predicts_as_then(old):
    run = ak.Run.open(old / "run")
    assert run.metrics == EXPECTED["metrics"]
    assert run.recipe.method.options["r"] == 2
    again = ak.evaluate(run)
    for name in ("loss", "accuracy", "f1"):
        assert again[name] == pytest.approx(EXPECTED["metrics"][name], abs=1e-5)
    for found, then in zip(ak.predict(run, EXPECTED["texts"]), EXPECTED["answers"], strict=True):
        assert found["label"] == then["label"]
        assert found["score"] == pytest.approx(then["score"], abs=1e-4)


def test_the_run_merges_and_the_merged_model_answers_as_then(old):
    report = ak.merge(old / "run" / "adapter", old / "merged")
    assert report.check is not None and report.check.largest <= 8 * report.check.floor_largest
    model = AutoModelForSequenceClassification.from_pretrained(old / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(old / "merged")
    with torch.no_grad():
        batch = tokenizer(EXPECTED["texts"], padding=True, return_tensors="pt")
        scores, classes = model(**batch).logits.softmax(-1).max(-1)
    assert [model.config.id2label[index] for index in classes.tolist()] == [row["label"] for row in EXPECTED["answers"]]
    assert scores.tolist() == pytest.approx([row["score"] for row in EXPECTED["answers"]], abs=1e-4)


@pytest.mark.slow
def test_the_run_can_be_trained_further(old):
    recipe = ak.Run.open(old / "run").recipe.changed(method={"name": "run/adapter"}, **{"training.max_steps": 1})
    assert ak.train(recipe, old / "further", quiet=True).metrics["steps"] == 1


def test_an_adapter_of_two_methods_computes_as_then(old):
    model = ak.wrap(ak.load(old / "decoder", "causal-lm"), old / "pfeiffer+lora").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(EXPECTED["ids"])).logits[0, -1, :8]
    assert logits.tolist() == pytest.approx(EXPECTED["logits"], abs=1e-5)
    with pytest.raises(ShippingError):  # a bottleneck is no linear map: it does not fold into the weights
        ak.merge(old / "pfeiffer+lora", old / "merged")
