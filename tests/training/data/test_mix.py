"""Several sets as one: shares, numbers, everything; what is drawn hangs on the recipe and its seed alone."""

from collections import Counter
from fractions import Fraction

import pytest
from datasets import ClassLabel, Dataset, Features, Value

import adapters_kit as ak
from adapters_kit.errors import DataError, RecipeError
from adapters_kit.recipe_changes import without_paths
from adapters_kit.training.data.mix import shares
from adapters_kit.training.resolve import prepare
from tests.support import small


def asked(count, start=0):
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(start, start + count)]


@pytest.fixture
def mixing(tmp_path):
    """prepare() of a mixture of files: name=rows, the first of which is the main one."""

    def prepared(mix, task="causal-lm", spec=None, **files):
        paths = {name: str(small.write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in files.items()}
        data = {"train": next(iter(paths.values())), "test_size": 4, **(spec or {})}
        named = {paths.get(name, name): one for name, one in mix.items()} if isinstance(mix, dict) else mix
        return prepare(ak.Recipe(model="m", task=task, data={**data, "mix": named}))

    return prepared


def test_a_share_is_what_it_says_and_the_main_rows_are_all_there(mixing):
    task, parts = mixing({"b": 0.3}, a=asked(24), b=asked(90, 1000))
    rows = parts.train["prompt"][:]
    main = [row for row in rows if int(row.split()[1]) < 1000]
    held_out = parts.test["prompt"][:]
    assert sorted([*main, *held_out]) == sorted(row["prompt"] for row in asked(24))
    assert (len(main), len(rows) - len(main)) == (20, 9)  # 9 of 29 is the whole number nearest to 0.3
    assert len(set(rows)) == len(rows)
    told = "29 training rows, in this order: 20 rows of a.jsonl (69.0%); 9 rows of b.jsonl of its 90 (31.0%)."
    assert told in task.notes.sentences and task.notes.counts["rows_mixed_in"] == 9


def test_the_seed_decides_and_nothing_else(mixing):
    draws = [
        mixing({"b": 0.3}, a=asked(24), b=asked(90, 1000), spec={"test_size": 4})[1].train["prompt"][:]
        for _ in range(2)
    ]
    assert draws[0] == draws[1]


def test_too_few_rows_for_a_share_are_repeated_aloud(mixing):
    task, parts = mixing({"b": 0.5}, a=asked(24), b=asked(8, 1000))
    times = Counter(row for row in parts.train["prompt"] if int(row.split()[1]) >= 1000)
    assert sum(times.values()) == 20 and set(times.values()) == {2, 3} and len(times) == 8
    assert any("20 rows of b.jsonl, its 8 rows 2.5 times (50.0%)" in line for line in task.notes.sentences)


def test_numbers_and_all_and_a_limit(mixing):
    files = {"a": asked(24), "b": asked(30, 1000), "c": asked(7, 2000)}
    _, parts = mixing({"b": 12, "c": "all"}, **files)
    assert [len(parts.train), len(parts.test)] == [20 + 12 + 7, 4]
    _, parts = mixing({"b": 12, "c": 0.25}, spec={"limit": 40}, **files)
    kinds = Counter(int(row.split()[1]) // 1000 for row in parts.train["prompt"])
    assert kinds == {0: 18, 1: 12, 2: 10}
    with pytest.raises(DataError, match=r"31 rows of b.jsonl are asked for, and it has 30.*a share"):
        mixing({"b": 31}, **files)
    with pytest.raises(DataError, match=r"data.limit: 10 rows are fewer than data.mix takes \(12 by number\)"):
        mixing({"b": 12}, spec={"limit": 10}, **files)


@pytest.mark.parametrize("seed", range(20))
def test_shares_hold_for_any_sizes(seed):
    import random

    draw = random.Random(seed)
    sizes = [draw.randint(50, 5000) for _ in range(draw.randint(2, 5))]
    weights = [round(draw.uniform(0.01, 0.9 / len(sizes)), 3) for _ in sizes[1:]]
    counts = shares(sizes, weights, None, list("abcdef")[: len(sizes)])
    assert counts[0] == sizes[0]
    for count, weight in zip(counts[1:], weights, strict=True):
        assert abs(Fraction(count, sum(counts)) - Fraction(weight)) < Fraction(len(sizes), sum(counts))


def test_other_names_are_read_by_their_roles(mixing):
    other = [{"instruction": f"do {i}", "output": f"done {i}"} for i in range(6)]
    task, parts = mixing({"b": "all"}, a=asked(24), b=other)
    assert "do 3" in parts.train["prompt"][:] and "done 3" in parts.train["completion"][:]
    assert any("instruction as prompt, output as completion" in line for line in task.notes.sentences)
    odd = [{"q": f"do {i}", "a": f"done {i}"} for i in range(6)]
    named = {"weight": "all", "columns": {"prompt": "q", "completion": "a"}}
    assert "done 5" in mixing({"b": named}, a=asked(24), b=odd)[1].train["completion"][:]
    with pytest.raises(DataError, match=r"data.mix, b.jsonl: Cannot tell which column.*q, a.*b.jsonl: columns: {"):
        mixing({"b": "all"}, a=asked(24), b=odd)


def test_rows_that_say_something_else_are_refused_with_what_to_do(mixing):
    with pytest.raises(DataError, match=r"text \(text\), against prompt \(prompt\).*columns for prompt and completion"):
        mixing({"b": "all"}, a=asked(24), b=[{"text": "a b c"}])
    with_context = [{**row, "input": "a context"} for row in asked(6)]
    with pytest.raises(DataError, match=r"Give the rows of a.jsonl a column 'input' too"):
        mixing({"b": "all"}, a=asked(24), b=with_context)
    # The other way round nothing of the rows is lost: the column is empty.
    task, parts = mixing({"b": "all"}, a=[{**row, "input": "a context"} for row in asked(24)], b=asked(6, 50))
    assert parts.train["input"][:].count(None) == 6
    assert any("have no column 'input', which is empty" in line for line in task.notes.sentences)
    with pytest.raises(DataError, match="No data file"):
        mixing({"nowhere.jsonl": 0.2}, a=asked(24))


def test_classes_are_names_whatever_the_files_hold(mixing, tmp_path):
    """A file of numbered classes beside one of words; a class that only the other has is told."""
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(10)]
    Dataset.from_list(rows, features=kinds).to_parquet(tmp_path / "numbered.parquet")
    words = [{"text": f"word {i}", "label": ["bad", "odd"][i % 2]} for i in range(6)]
    task, parts = mixing(
        {"b": "all", str(tmp_path / "numbered.parquet"): "all"},
        task="text-classification",
        a=small.sentiment(24),
        b=words,
    )
    labels = dict(zip(parts.train["text"], parts.train["label"], strict=True))
    assert (labels["text 0"], labels["text 1"], labels["word 1"]) == ("good", "bad", "odd")
    assert task.labels == ["bad", "good", "odd"]
    assert any("no row of 1 class that data.mix brings" in line for line in task.notes.sentences)
    with pytest.raises(DataError, match="2 of 6 training rows have no label"):
        unlabelled = [{**row, "label": None if i < 2 else row["label"]} for i, row in enumerate(words)]
        mixing({"b": 0.5}, "text-classification", a=small.sentiment(24), b=unlabelled)


def test_held_out_rows_that_another_set_holds_are_counted(mixing):
    task, _ = mixing({"b": "all"}, a=asked(24), b=asked(24))
    assert task.notes.counts["rows_in_both"] == 4


@pytest.mark.parametrize(
    ("mix", "told"),
    [
        ({"b.csv": 0}, "share of the training rows between 0 and 1"),
        ({"b.csv": -0.2}, "whole number of rows"),
        ({"b.csv": 1.5}, "whole number of rows"),
        ({"b.csv": True}, "or all"),
        ({"b.csv": "most"}, "or all"),
        ({"b.csv": float("nan")}, "between 0 and 1"),
        ({"b.csv": 0.5, "c.csv": 0.5}, "add up to 1, which leaves none"),
        ({"b.csv": {"wieght": 0.3}}, "Did you mean weight"),
    ],
)
def test_weights_that_are_none(mix, told):
    with pytest.raises(RecipeError, match=told):
        ak.Recipe(model="m", task="causal-lm", data={"train": "a.csv", "mix": mix})


def test_spellings_and_what_travels(tmp_path):
    plain = ak.Recipe(model="m", task="causal-lm", data={"train": "a.csv", "mix": ["x/b.csv", "y/b.csv"]})
    assert {name: one.weight for name, one in plain.data.mix.items()} == {"x/b.csv": "all", "y/b.csv": "all"}
    assert list(without_paths(plain).data.mix) == ["b.csv", "b.csv (2)"]
    (tmp_path / "r.yaml").write_text(plain.to_yaml())
    flags = ["--data.mix", "{b.csv: 0.25}"]
    assert ak.Recipe.read(tmp_path / "r.yaml", flags).data.mix["b.csv"].weight == 0.25
    assert ak.Recipe.read(tmp_path / "r.yaml") == plain
