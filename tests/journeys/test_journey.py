"""One user's whole way on a real model and real reviews, through the command line: train, score, predict, merge."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adapters_kit import cli

pytestmark = [pytest.mark.slow, pytest.mark.pictures]
SENTENCES = ["A warm, funny film that I would gladly see again.", "Two hours of my life that nobody will give back."]


@pytest.fixture(scope="module")
def run(real, tmp_path_factory):
    """The folder of a finished run on 128 reviews: long enough to move the weights, short enough for a test."""
    out = tmp_path_factory.mktemp("journey") / "run"
    recipe = Path(__file__).parents[2] / "examples" / "recipes" / "text_classification.yaml"
    words = ["train", str(recipe), "--model", str(real("minilm")), "--data.train", str(real("reviews"))]
    words += ["--data.limit", "128", "--data.test_limit", "64", "--training.epochs", "1", "--out", str(out)]
    assert cli.main(words) == 0
    return out


def logits(model, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).logits


def test_the_run_folder(run):
    metrics = json.loads((run / "metrics.json").read_text())
    wanted = "base_accuracy accuracy f1 trainable_params total_params train_seconds peak_memory_bytes"
    assert set(wanted.split()) <= set(metrics)
    assert 0 < metrics["trainable_params"] < metrics["total_params"] / 10
    for name in ("recipe.yaml", "metrics.jsonl", "README.md", "environment.json", "report.html", "curves.png"):
        assert (run / name).stat().st_size > 0
    assert (run / "adapter" / "adapter_config.json").is_file()


def test_merged_equals_the_adapter_in_plain_transformers_and_peft(run, real, tmp_path, capsys):
    assert cli.main(["merge", str(run / "adapter"), str(tmp_path / "merged")]) == 0
    assert "largest difference" in capsys.readouterr().out
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "negative", 1: "positive"}
    base = AutoModelForSequenceClassification.from_pretrained(real("minilm"), num_labels=2)
    by_peft = PeftModel.from_pretrained(base, run / "adapter")
    by_auto = AutoModelForSequenceClassification.from_pretrained(real("minilm"), num_labels=2)
    by_auto.load_adapter(str(run / "adapter"))
    with pytest.raises(OSError):  # the folder tells nobody where the base lies on this disk
        AutoModelForSequenceClassification.from_pretrained(run / "adapter", num_labels=2)
    expected = logits(by_peft, run / "adapter")
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(logits(by_auto, run / "adapter"), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(merged, tmp_path / "merged"), expected, rtol=0, atol=1e-5)
    assert cli.main(["predict", str(tmp_path / "merged"), *SENTENCES, "--task", "text-classification"]) == 0
    labels = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    assert labels == [merged.config.id2label[index] for index in expected.argmax(-1).tolist()]


def test_scores_again_as_the_run_did(run, capsys):
    assert cli.main(["eval", str(run)]) == 0
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    accuracy = json.loads((run / "metrics.json").read_text())["accuracy"]
    assert float(shown["accuracy"]) == pytest.approx(accuracy, abs=1e-4)


def test_predictions_and_their_file(run, tmp_path, capsys):
    assert cli.main(["predict", str(run), *SENTENCES]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(row) >= {"label", "score"} for row in printed] == [True, True]
    rows = tmp_path / "rows.csv"
    rows.write_text("text\n" + "\n".join(f'"{sentence}"' for sentence in SENTENCES) + "\n")
    out = tmp_path / "answers.jsonl"
    assert cli.main(["predict", str(run), "--data", str(rows), "--out", str(out)]) == 0
    told = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["predicted_label"] for row in told] == [row["label"] for row in printed]
    assert [row["text"] for row in told] == SENTENCES
    capsys.readouterr()
    assert cli.main(["predict", str(run), "again", "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
