"""Rows and recipes as Python has them: frames, tables, dicts and data sets where the command line takes files."""

import json
import re
from pathlib import Path

import pandas
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from huggingface_hub import constants
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.artifacts import hub_ping
from adapters_kit.errors import DataError, ModelError, RecipeError, TrainingError, UnknownNameError
from adapters_kit.recipe import Recipe
from adapters_kit.training.data import sources
from adapters_kit.training.inputs import recipe_from, rows_from
from adapters_kit.training.resolve import prepare, rows_of
from tests.support import small

ROWS = small.sentiment(24)
KINDS = {
    "pandas with a column as index": lambda: pandas.DataFrame(ROWS).set_index("text"),
    "pandas": lambda: pandas.DataFrame(ROWS, index=range(100, 124)),
    "arrow": lambda: pa.Table.from_pylist(ROWS),
    "dataset": lambda: Dataset.from_list(ROWS),
    "dicts": lambda: ROWS,
    "generator": lambda: (row for row in ROWS),
    "columns": lambda: {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "columns of other kinds": lambda: {"text": [row["text"] for row in ROWS], "label": pandas.DataFrame(ROWS)["label"]},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = {
        "model": str(small.model("bert")),
        "task": "text-classification",
        "data": pandas.DataFrame(ROWS),
        "training.max_steps": 1,
    }
    return ak.train(recipe, tmp_path_factory.mktemp("runs") / "frame", quiet=True)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_memory_are_rows(kind):
    assert rows_from(KINDS[kind]()).to_list() == ROWS


@pytest.mark.parametrize(
    "row",
    [
        {"tokens": ["Ada", "sleeps"], "tags": ["B-PER", "O"]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"text": "fine", "label": ["a", "b"]},
    ],
)
def test_a_dict_with_lists_inside_one_row_is_one_row(row):
    assert rows_from(row).to_list() == [row]
    assert rows_from({name: [value, value] for name, value in row.items()}).to_list() == [row, row]


def test_a_dict_that_is_neither_rows_nor_places_of_rows_is_refused_by_its_keys(tmp_path):
    with pytest.raises(RecipeError, match=r"data\.tran"):
        recipe_from({"model": "m", "task": "text-classification", "data": {"tran": "x.csv"}}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_names_the_rows_that_it_was_given(kind, tmp_path):
    recipe = recipe_from({"model": "m", "task": "text-classification", "data": KINDS[kind]()}, tmp_path)
    again = recipe_from({"model": "m", "task": "text-classification", "data": KINDS[kind]()}, tmp_path)
    assert again == recipe, "the same rows are the same file, or no run could go on"
    assert pandas.read_parquet(recipe.data.train).to_dict("records") == ROWS
    assert len(list(tmp_path.iterdir())) == 1


def test_both_parts_of_a_dataset_dict_are_kept_with_their_classes(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    data = Dataset.from_list([{**row, "label": int(row["label"] == "good")} for row in ROWS], features=features)
    recipe = recipe_from(
        {
            "model": str(small.model("bert")),
            "task": "text-classification",
            "data": DatasetDict(train=data, validation=data.select(range(8))),
            "training": {"max_steps": 1, "samples": 0},
        },
        tmp_path,
    )
    done = ak.train(recipe, tmp_path / "run", quiet=True)
    assert done.metrics["test_examples"] == 8 and done.recipe.labels == ["bad", "good"]


@pytest.mark.slow
def test_a_run_of_rows_in_memory_is_scored_asked_and_merged_like_any_other(run, tmp_path):
    assert ak.evaluate(run)["accuracy"] == run.metrics["accuracy"]
    texts = [row["text"] for row in ROWS[:3]]
    answers = ak.predict(run, texts)
    assert ak.predict(run.path, pandas.DataFrame({"text": texts})) == answers
    assert [ak.predict(run, text)[0]["label"] for text in texts] == [row["label"] for row in answers]
    ak.merge(run, tmp_path / "merged")
    ours = ak.predict(tmp_path / "merged", texts)
    assert [row["label"] for row in ours] == [row["label"] for row in answers]
    assert ak.check(run, "peft")


@pytest.mark.slow
def test_a_run_goes_on_from_the_path_of_its_yaml_file(run, tmp_path):
    assert ak.train(str(run.path / "recipe.yaml"), tmp_path / "again", quiet=True).metrics["steps"] == 1
    assert ak.plan(run.path / "recipe.yaml").trainable == run.metrics["trainable_params"]


def body():
    """A model without a head."""
    return small.model("bert", model_class="BertModel")


WRONG = {
    "no file": (lambda run: ak.train("nofile.yaml", "x"), RecipeError, r"No file 'nofile.yaml'"),
    "data as recipe": (lambda run: ak.plan(__file__.replace(".py", ".csv")), RecipeError, "No file"),
    "no task": (lambda run: ak.train({"model": "m", "data": ROWS}, "x"), RecipeError, r"causal-lm, text-class"),
    "number": (lambda run: ak.train(7, "x"), DataError, r"7 \(int\)"),
    "rows of texts": (lambda run: ak.evaluate(run, ["a", "b"]), DataError, r"row 1 is 'a' \(str\)"),
    "no rows": (lambda run: ak.predict(run, []), DataError, "no rows"),
    "missing file": (lambda run: ak.predict(run, "new.csv"), DataError, "No data file 'new.csv'"),
    "missing run": (lambda run: ak.predict(str(run.path) + "s", "a"), UnknownNameError, "Did you mean frame"),
    "wrap of a name": (lambda run: ak.wrap("folder", "lora"), ModelError, r"ak\.load\('folder'"),
    "no task of a body": (lambda run: ak.predict(body(), "a"), ModelError, "give task=TASK. There are: caus"),
    "no head": (lambda run: ak.predict(body(), "a", task="text-classification"), ModelError, "at random"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_meant_is_refused_with_what_can(case, run):
    call, kind, words = WRONG[case]
    with pytest.raises(kind, match=words):
        call(run)


def test_names_of_other_libraries_lead_to_ours():
    model = ak.load(small.model("bert"), task="text-classification", labels=["a", "b"])
    with pytest.raises(UnknownNameError, match=r"'rank': Did you mean r\?"):
        ak.wrap(model, "lora", rank=8)
    with pytest.raises(RecipeError, match="Did you mean learning_rate"):
        ak.Recipe(model="m", task="causal-lm", data="d.csv", training={"lr": 1})
    with pytest.raises(RecipeError, match="Did you mean epochs"):
        ak.Recipe(model="m", task="causal-lm", data="d.csv", training={"num_train_epochs": 1})


@pytest.mark.slow
def test_a_multi_label_run_answers_with_labels(tmp_path):
    """Also one that was made before its recipe said which kind of target it has."""
    rows = [{"text": row["text"], "label": [row["label"], "all"]} for row in ROWS]
    recipe = {"model": str(small.model("bert")), "task": "text-classification", "data": rows, "training.max_steps": 1}
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    answer = ak.predict(run, "a fine film")
    assert set(answer[0]["scores"]) == {"all", "bad", "good"}
    for path in (run.path / "recipe.yaml", run.adapter / "recipe.yaml"):
        path.write_text(path.read_text().replace("problem: multi-label", "problem: null"))
    assert ak.predict(run, "a fine film") == answer


ONE_BY_ONE = {
    "series": lambda texts: pandas.Series(texts, index=range(7, 7 + len(texts))),
    "array": lambda texts: pandas.Series(texts).to_numpy(),
    "iterator": iter,
    "tuple": tuple,
    "column of a dataset": lambda texts: Dataset.from_dict({"text": texts})["text"],
    "arrow": pa.array,
    "columns": lambda texts: {"text": list(texts)},
    "columns with another": lambda texts: {"text": list(texts), "number": list(range(len(texts)))},
}


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_a_column_of_texts_is_so_many_texts(kind, run):
    texts = ["a fine film", "a dull film", "five"]
    assert ak.predict(run, ONE_BY_ONE[kind](texts)) == ak.predict(run, texts)


def test_a_run_folder_is_its_recipe_and_goes_on(run, tmp_path, monkeypatch):
    assert recipe_from(run.path) == recipe_from(run.path / "recipe.yaml") == run.recipe
    again = ak.train(run.path, resume=True, quiet=True)
    assert again.path == run.path and again.metrics == run.metrics
    with pytest.raises(ak.AdapterError, match="finished run"):
        ak.train(str(run.path), quiet=True)


@pytest.mark.slow
def test_a_run_without_a_folder_goes_where_the_command_line_puts_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small.write_jsonl(tmp_path / "reviews.jsonl", ROWS)
    recipe = {"model": str(small.model("bert")), "task": "text-classification", "data": "reviews.jsonl"}
    assert ak.train({**recipe, "training.max_steps": 1}, quiet=True).path.resolve() == tmp_path / "runs" / "reviews"
    with pytest.raises(RecipeError, match=r"nofile\.yaml"):
        ak.train("nofile.yaml")


@pytest.mark.parametrize(
    ("method", "option", "meant"),
    [("lora", "rank", "r"), ("houlsby", "rank", "bottleneck_dim"), ("houlsby", "r", "bottleneck_dim"),
     ("lora", "alpha", "lora_alpha"), ("lora", "targets", "target_modules")],
)  # fmt: skip
def test_what_other_libraries_call_it_leads_to_our_name(method, option, meant):
    with pytest.raises(UnknownNameError, match=rf"Did you mean {meant}\?"):
        ak.wrap(ak.load(small.model("bert")), method, **{option: 8})


def test_peft_s_own_route_keeps_the_names_of_the_classes(run, monkeypatch):
    plain = {"num_labels": 2, "ignore_mismatched_sizes": True}
    base = AutoModelForSequenceClassification.from_pretrained(run.recipe.model, **plain)
    assert PeftModel.from_pretrained(base, run.adapter).config.id2label == {0: "bad", 1: "good"}
    named = AutoModelForSequenceClassification.from_pretrained(
        run.recipe.model, id2label={0: "x", 1: "y"}, ignore_mismatched_sizes=True
    )
    assert PeftModel.from_pretrained(named, run.adapter).config.id2label == {0: "x", 1: "y"}, "names given are kept"

    snippet = re.search(r"```python\n(.*?)```", (run.adapter / "README.md").read_text(), re.DOTALL)[1]
    there = {"model": None}
    exec(snippet.replace(f'"{Path(run.recipe.model).name}"', f'"{run.recipe.model}"').replace(
        '"adapter"', f'"{run.adapter}"'), there)  # fmt: skip
    assert there["model"].config.id2label == {0: "bad", 1: "good"}
    assert there["model"].config.label2id == {"bad": 0, "good": 1}


def test_inspect_takes_a_run_for_its_base(run, capsys):
    assert cli.main(["inspect", str(run.path), "--methods", "lora", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["method"] for one in found["methods"]] == ["lora"]


def test_paths_and_runs_stand_wherever_a_name_does(run, tmp_path):
    recipe = Recipe(model=Path(run.recipe.model), task="text-classification", data=Path("a.csv"), method=run.adapter)
    assert (recipe.model, recipe.data.train, recipe.method.name) == (run.recipe.model, "a.csv", str(run.adapter))
    assert recipe_from(run) == run.recipe and ak.train(run, resume=True, quiet=True).path == run.path
    with pytest.raises(TrainingError, match="two runs or more"):
        ak.compare_runs(str(run.path))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model": torch.nn.Sequential(torch.nn.Linear(2, 2))}, "a model in memory is for ak.wrap"),
        ({"method": LoraConfig(r=4)}, "an object of the kind LoraConfig does not fit.*ak.wrap takes a peft config"),
        (
            {"data": pandas.DataFrame(ROWS)},
            "of the kind DataFrame does not fit.*ak.train takes rows in memory",
        ),
    ],
    ids=["model", "method", "data"],
)
def test_objects_that_no_recipe_can_hold_are_told_where_they_may_go(fields, told):
    given = {"model": "m", "task": "text-classification", "data": "d.csv", **fields}
    with pytest.raises(RecipeError, match=told) as error:
        Recipe(**given)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("given", [["fine", None], pandas.Series(["fine", float("nan")]), iter(["fine", 3])])
def test_what_is_no_text_among_texts_is_named_by_its_place(given, run):
    with pytest.raises(DataError, match="Texts are strings; number 2 of 2"):
        ak.predict(run, given)


def test_a_data_set_of_the_hub_is_not_waited_for_where_the_hub_does_not_answer(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub_ping.reachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []
    monkeypatch.setattr(sources, "load_dataset", lambda *_: asked.append(constants.HF_HUB_OFFLINE) or 1 / 0)
    try:
        with pytest.raises(DataError, match=r"127\.0\.0\.1:9\) does not answer"):
            rows_of("owner/rows")
    finally:
        hub_ping.reachable.cache_clear()
    assert asked == [True] and not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(("told", "silent"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_offline_is_what_the_hub_s_libraries_take_for_it(told, silent, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", told)
    assert hub_ping.not_asked() is silent


def test_a_sweep_of_one_run_has_the_columns_of_several(run, tmp_path):
    recipe = {"model": run.recipe.model, "task": "text-classification", "data": ROWS, "training.max_steps": 1}
    table = ak.sweep(recipe, tmp_path, learning_rates=[1e-3], quiet=True)
    assert next(iter(table[0])) == "run" and {"accuracy", "base_accuracy", "trainable_params"} <= set(table[0])
    assert not {"notes", "advice", "counts"} & set(table[0])


def test_a_part_without_labels_is_passed_over_for_the_next(tmp_path):
    """As the hub's benchmarks are: their test part says -1, their validation part has labels."""
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    texts = [row["text"] for row in small.sentiment(24)]
    data = Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(24)]}, kinds)
    parts = DatasetDict(
        train=data,
        test=Dataset.from_dict({"text": texts[:4], "label": [-1] * 4}, kinds),
        validation=Dataset.from_dict({"text": ["a film", "fine"], "label": [0, 1]}, kinds),
    )
    recipe = recipe_from({"model": "m", "task": "text-classification", "data": parts}, tmp_path)
    task, splits = prepare(recipe)
    assert len(splits.test) == 2 and task.labels == ["bad", "good"]
    assert any("'test' cannot be used" in note for note in task.notes.sentences)
    again = recipe_from({"model": "m", "task": "text-classification", "data": parts}, tmp_path)
    assert again == recipe and len(list(tmp_path.iterdir())) == 1


def test_a_run_folder_is_gone_on_from_as_its_adapter_is(run, tmp_path):
    recipe = {"model": run.recipe.model, "task": "text-classification", "data": ROWS, "training.max_steps": 1}
    again = ak.train({**recipe, "method": str(run.path)}, tmp_path / "again", quiet=True)
    assert again.recipe.method.name == str(run.adapter)
    assert again.metrics["base_loss"] != again.metrics["loss"]
    given = Recipe(model="m", task="text-classification", data="d.csv", method=run)
    assert given.method.name == str(run.adapter)
