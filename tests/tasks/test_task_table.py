"""The table of tasks: one row and one file make a task. What a text looks like: a path, a hub id, an adapter folder."""

from pathlib import Path

import peft
import pytest
import transformers
import yaml

import adapters_kit as ak
from adapters_kit import names, tasks
from adapters_kit.errors import DataError, RecipeError
from adapters_kit.recipe import Recipe
from adapters_kit.task_table import TASKS, Row
from adapters_kit.training.propose import propose
from tests.support import small


@pytest.mark.slow
def test_a_task_is_one_row_and_one_file(tmp_path, monkeypatch):
    """A toy task trains, is evaluated, predicts and ships; nothing but the table knows of it."""
    row = Row(
        "tests.tasks.toy:Counting", ("words", "count"), "AutoModelForSequenceClassification", "SEQ_CLS", "toy-pipe"
    )
    monkeypatch.setitem(TASKS, "counting", Row(**{**vars(row), "own_head": True, "labelled": True}))
    rows = [{"words": r["text"], "count": int(r["label"] == "good")} for r in small.sentiment(160)]
    data = small.write_jsonl(tmp_path / "rows.jsonl", rows)
    training = {"epochs": 4, "learning_rate": 5e-3, "batch_size": 16}
    recipe = Recipe(model=str(small.model("bert")), task="counting", data=str(data), training=training)
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    assert run.metrics["loss"] < 0.98 * run.metrics["base_loss"]
    assert ak.evaluate(run.path)["loss"] == pytest.approx(run.metrics["loss"], rel=1e-5)
    assert ak.predict(run.path, [{"words": "a superb film"}]) in ([{"count": "0"}], [{"count": "1"}])
    assert peft.PeftConfig.from_pretrained(str(run.adapter)).task_type == "SEQ_CLS"
    card = (run.path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "toy-pipe"
    assert "AutoModelForSequenceClassification" in card
    assert ak.plan(recipe, length=16).memory.total > 0
    with pytest.raises(DataError, match="Nobody has named a model to begin with for counting: say one with --model"):
        propose(data, task="counting")
    assert propose(data, task="counting", model="m").fields["data"]["columns"] == {"words": "words", "count": "count"}
    with pytest.raises(RecipeError, match=r"'countin' is not one of .*Did you mean counting"):
        Recipe(model="m", task="countin", data="x")
    with pytest.raises(RecipeError, match=r"only text-classification has this key; the task is counting"):
        Recipe(model="m", task="counting", data="x", problem="regression")


@pytest.mark.parametrize("name", TASKS)
def test_rows_name_things_that_exist(name):
    row = TASKS[name]
    kind = tasks.get(name)
    assert kind.name == name
    assert {role for roles in kind.needs for role in roles} | set(kind.optional) == set(row.roles)
    assert hasattr(transformers, row.auto_class)
    assert row.task_type is None or peft.TaskType(row.task_type)


def test_what_a_text_looks_like(tmp_path):
    ids = ["bert-base-uncased", "org/model", "org/model-v1.5", "a_b/c.d"]
    paths = ["./x", "../x", "/x/y", "~/x", "a/b/c", "a\\b", "C:\\models", "my model", "", Path("org/model")]
    assert not any(names.looks_like_path(name) for name in ids)
    assert all(names.looks_like_path(name) for name in paths)
    assert [names.looks_like_folder(name) for name in ("lora", "runs/lora", "./lora")] == [False, True, True]
    assert [names.looks_like_file(name) for name in ("imdb", "org/imdb", "a.csv", "data/a.JSONL")] == [0, 0, 1, 1]
    assert not names.is_adapter_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert names.is_adapter_folder(tmp_path)
