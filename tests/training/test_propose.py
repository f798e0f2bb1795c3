"""A recipe that is proposed from what the rows hold."""

import pytest
import yaml

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.training.propose import propose
from tests.support import small

PROPOSED = {
    "sentiment": (lambda: small.sentiment(40), "text-classification", {"text": "text", "label": "label"}),
    "odd names": (
        lambda: [{"body": row["text"], "verdict": row["label"], "n": i} for i, row in enumerate(small.sentiment(40))],
        "text-classification",
        {"text": "body", "label": "verdict"},
    ),
    "prompts": (
        lambda: [{"prompt": row["question"], "completion": row["answer"]} for row in small.questions(20)],
        "causal-lm",
        {"prompt": "prompt", "completion": "completion"},
    ),
    "texts": (lambda: [{"text": row["context"]} for row in small.questions(20)], "causal-lm", {"text": "text"}),
}


@pytest.mark.parametrize("case", PROPOSED)
def test_a_recipe_is_proposed_from_what_the_rows_hold(case, tmp_path, capsys):
    rows, task, columns = PROPOSED[case]
    path = small.write_jsonl(tmp_path / "my rows.jsonl", rows())
    out = tmp_path / "made.yaml"
    assert cli.main(["init", str(path), "--out", str(out)]) == 0
    made = ak.Recipe.read(out)
    assert made.task == task and made.data.columns == columns and made.data.train == str(path)
    assert cli.main(["init", str(path), "--out", str(out)]) == 2  # nothing of the user's is overwritten


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([f"{2 + i / 7:.2f}" for i in range(60)], "regression"),
        ([f"{i * i}" for i in range(60)], "regression"),
        ([f"{i}" for i in range(60)] * 3, None),
        (["1.0", "0.0"] * 30, None),
        (["1.5", "good"] * 30, None),
    ],
)
def test_a_column_of_measured_numbers_is_proposed_as_a_regression(values, problem, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("review,label\n" + "".join(f"a film of some kind number {i},{v}\n" for i, v in enumerate(values)))
    made = propose(path)
    assert made.fields["task"] == "text-classification" and made.fields.get("problem") == problem


def test_a_label_that_is_another_in_every_row_is_asked_about(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"a film number {i},name {i}\n" for i in range(60)))
    assert any("is it the label?" in reason for reason in propose(path).reasons)


def test_a_proposed_recipe_trains(tmp_path):
    path = small.write_jsonl(tmp_path / "rows.jsonl", small.sentiment(40))
    made = propose(path, model=str(small.model("bert")))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(made.text)
    fields = yaml.safe_load(made.text)
    assert fields == made.fields
    run = ak.train(ak.Recipe.read(recipe, ["--training.max_steps", "1"]), tmp_path / "run", quiet=True)
    assert run.metrics["steps"] == 1
