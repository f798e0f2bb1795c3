"""Labels: what is none is none, names stay spelled as they are, several in a text come apart; splits."""

import json
import random
import re
from collections import Counter

import numpy as np
import pandas
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from pyarrow import parquet

import adapters_kit as ak
from adapters_kit import tasks
from adapters_kit.errors import DataError
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.numbers import numbers_of
from adapters_kit.training.resolve import prepare
from tests.support import small


def prepared(tmp_path, values, held_out=None, **more):
    """Task and parts for texts with these labels."""
    folder = tmp_path / "data"
    for part, given in (("train", values), ("test", held_out)):
        if given is None:
            continue
        rows = [{"text": f"t{i}", "label": value} for i, value in enumerate(given)]
        small.write_jsonl(folder / f"{part}.jsonl", rows)
    return prepare(Recipe(model="m", task="text-classification", data=str(folder), **more))


@pytest.mark.parametrize("missing", [None, "", "  ", "-", -1, float("nan")])
def test_rows_without_a_label(tmp_path, missing):
    """Refused where they would teach; kept out where they would be scored."""
    words = ["a", "b"] if isinstance(missing, str | None) else [1, 2]
    with pytest.raises(DataError, match=r"2 of 12 training rows have no label in column 'label': rows 4, 11\."):
        prepared(tmp_path, [*words, words[0], missing, *words * 3, missing, words[0]])
    task, parts = prepared(tmp_path, words * 6, [missing, *words * 2, missing])
    assert task.labels == [str(word) for word in words]
    assert len(parts.test) == 4
    assert task.notes.counts["rows_without_label"] == 2
    with pytest.raises(DataError, match=r"No row of 'test' has a label"):
        prepared(tmp_path, words * 6, [missing] * 4)


def test_a_dash_is_a_class_beside_a_plus_or_where_the_recipe_says_so(tmp_path):
    assert prepared(tmp_path, ["-", "+"] * 10)[0].labels == ["+", "-"]
    with pytest.raises(DataError, match=r"- means \"no label\"") as told:
        prepared(tmp_path, ["-", "yes"] * 10)
    advice = json.loads(str(told.value).rpartition("labels: ")[2].rstrip(".").replace("'", '"'))
    assert prepared(tmp_path, ["-", "yes"] * 10, labels=advice)[0].labels == ["-", "yes"]


def test_minus_one_is_a_class_where_the_recipe_says_so(tmp_path):
    with pytest.raises(DataError, match=r"labels: \['-1', '1'\]") as told:
        prepared(tmp_path, [-1, 1] * 10)
    advice = json.loads(str(told.value).partition("labels: ")[2].rstrip(".").replace("'", '"'))
    assert prepared(tmp_path, [-1, 1] * 10, labels=advice)[0].labels == ["-1", "1"]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([True, False] * 10, ["false", "true"]),
        ([1.0, 0.0] * 10, ["0", "1"]),
        ([10, 9, 2, 33] * 5, ["2", "9", "10", "33"]),
        (["007", "7", "07"] * 7, ["007", "07", "7"]),
        (["NA", "None", "x"] * 7, ["NA", "None", "x"]),
        (["b", "a", " a"] * 7, [" a", "a", "b"]),
    ],
)
def test_names_stay_as_they_are_spelled(tmp_path, labels, names):
    task, _ = prepared(tmp_path, labels)
    assert sorted(task.labels) == sorted(names)
    alike = {" a", "007"} & set(names)
    assert any("differ in blanks" in note for note in task.notes.sentences) == bool(alike)


def test_a_benchmark_whose_test_part_has_no_labels(tmp_path):
    """The next held-out part is taken, and it is said."""
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    for part, labels in (("train", [0, 1] * 10), ("test", [-1] * 6), ("validation", [1, 0])):
        rows = {"text": ["t"] * len(labels), "label": labels}
        Dataset.from_dict(rows, kinds).to_parquet(tmp_path / f"{part}.parquet")
    task, parts = prepare(Recipe(model="m", task="text-classification", data=str(tmp_path)))
    assert len(parts.test) == 2
    assert task.labels == ["neg", "pos"]
    assert any("'test' cannot be used" in note for note in task.notes.sentences)


@pytest.mark.parametrize(
    "write",
    ["|".join, ",".join, "; ".join, json.dumps, str, " ".join, lambda names: str(np.array(names))],
    ids=["bar", "comma", "semicolon", "json", "python", "blank", "numpy"],
)
def test_several_labels_in_a_text(tmp_path, write):
    draw = random.Random(0)
    rows = [draw.sample(["anger", "joy", "fear"], draw.randint(1, 3)) for _ in range(60)]
    task, parts = prepared(tmp_path, [write(row) for row in rows], problem="multi-label")
    assert task.labels == ["anger", "fear", "joy"]
    numbers = [int(text[1:]) for text in parts.train["text"][:]]
    found = task._targets(parts.train)
    assert [{task.labels[i] for i in np.flatnonzero(row)} for row in found] == [set(rows[i]) for i in numbers]
    assert any(" read from lists" in note or "separated by" in note for note in task.notes.sentences)


def test_names_of_several_words_are_not_taken_apart(tmp_path):
    assert prepared(tmp_path, ["very good", "bad"] * 10, problem="multi-label")[0].labels == ["bad", "very good"]


@pytest.mark.parametrize("first", [["a", "b"], []])
def test_lists_are_several_labels_or_refused(tmp_path, first):
    labels = [first, ["b"], ["a"], []] * 6
    assert prepared(tmp_path, labels)[0].problem == "multi-label"
    with pytest.raises(DataError, match=r"row 1 holds a list of labels.*set problem: multi-label"):
        prepared(tmp_path, labels, problem="single-label")
    with pytest.raises(DataError, match=r"1 of 24 training rows have no label in column 'label': row 6"):
        prepared(tmp_path, [*labels[:5], None, *labels[6:]])


def test_pictures_take_one_label(tmp_path):
    rows = Dataset.from_dict(
        {"image": ["x.png"] * 4, "label": [["a"], ["b"]] * 2},
        Features({"image": Value("string"), "label": List(Value("string"))}),
    )
    made = tasks.get("image-classification")(
        Recipe(model="m", task="image-classification", data="x"), {"image": "image", "label": "label"}
    )
    with pytest.raises(DataError, match="a list of labels"):
        made.fit(rows, None)


@pytest.mark.parametrize("seed", range(6))
def test_rare_classes_are_split_as_well_as_possible(tmp_path, seed):
    """Classes of one row stay in training; the others keep their share; no class is held out whole."""
    draw = random.Random(seed)
    sizes = {"many": 180, "some": 40, "few": 3, "two": 2, "one": 1, "other": 1}
    labels = [name for name, size in sizes.items() for _ in range(size)]
    draw.shuffle(labels)
    task, parts = prepared(tmp_path, labels, training={"seed": seed})
    held, kept = Counter(parts.test["label"][:]), Counter(parts.train["label"][:])
    assert set(kept) == set(sizes)
    assert held["one"] == held["other"] == 0
    assert held["many"] >= 15
    assert held["some"] >= 3
    assert sum(held.values()) == 23
    assert any("are not in the held-out part of 23 rows" in note for note in task.notes.sentences)
    many = [f"c{i % 40}" for i in range(100)]  # fewer held-out rows than classes
    _, parts = prepared(tmp_path, many, training={"seed": seed})
    assert len(parts.test) == 10
    assert set(parts.train["label"][:]) == set(many)


def test_too_little_to_split(tmp_path):
    for labels in (["a", "b"], list("abcde")):
        task, parts = prepared(tmp_path, labels)
        assert parts.train["label"][:] == parts.test["label"][:] == labels
        assert task.notes.counts["rows_in_both"] == len(labels) and "learned by heart" in task.notes.sentences[-1]
    assert len(prepared(tmp_path, ["a", "b"], ["a", "b"])[1].train) == 2


def test_one_class_only(tmp_path):
    with pytest.raises(DataError, match=r"one class only, \['a'\].*Name another column.*labels: \[a, OTHER\]"):
        prepared(tmp_path, ["a"] * 10)
    assert prepared(tmp_path, ["a"] * 10, labels=["a", "b"])[0].labels == ["a", "b"]
    with pytest.raises(DataError, match="one class only"):
        prepared(tmp_path, [["a"]] * 10)
    assert prepared(tmp_path, [["a"], []] * 5, problem="multi-label")[0].labels == ["a"]


def test_regression_takes_numbers_as_tables_write_them(tmp_path):
    _, parts = prepared(tmp_path, ["1.5", "-2", "3e-1", "4"] * 5, problem="regression")
    assert sorted(set(numbers_of(parts.train, "label", "Regression"))) == [-2, 0.3, 1.5, 4]
    with pytest.raises(DataError, match=r"row 2 holds '2,5'. Write numbers as 1234.5"):
        prepared(tmp_path, ["1.5", "2,5"] * 5, problem="regression")
    with pytest.raises(DataError, match="1 of 4 training rows have no label"):
        prepared(tmp_path, [1.5, None, 2.0, 3.0], problem="regression")


def test_columns_of_any_type_that_nobody_uses(tmp_path):
    """Dates, bytes, decimals and structures are named with the mapping that would use them, and disturb nothing."""
    import datetime as dt
    from decimal import Decimal

    count = 20
    table = pa.table(
        {
            "text": [f"t{i}" for i in range(count)],
            "label": ["a", "b"] * (count // 2),
            "when": [dt.datetime(2024, 1, 1, 12)] * count,
            "raw": [b"\x00\xff"] * count,
            "price": [Decimal("1.10")] * count,
            "title": ["x"] * count,
            "more": [{"k": [1, None]}] * count,
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    task, parts = prepare(Recipe(model="m", task="text-classification", data=str(tmp_path / "a.parquet")))
    assert parts.train.column_names == ["text", "label"]
    told = next(note for note in task.notes.sentences if "not used" in note)
    for name in ("when", "raw", "price", "more"):
        assert f"{name} (data.columns: {{text_pair: {name}}} would use it)" in told
    again = prepare(
        Recipe(
            model="m",
            task="text-classification",
            data={"train": str(tmp_path / "a.parquet"), "columns": {"text_pair": "title"}},
        )
    )
    assert again[0].columns["text_pair"] == "title"


@pytest.mark.parametrize("kind", [int, float, bool])
def test_zeros_and_ones_of_each_class_are_no_class_names(tmp_path, kind):
    values = [[kind(i % 2), kind(i // 2 % 2), kind(1)] for i in range(16)]
    task, parts = prepared(tmp_path, values, problem="multi-label")
    assert task.labels == ["0", "1", "2"]
    for row, target in zip(parts.train, task._targets(parts.train), strict=True):
        assert target.tolist() == [float(mark) for mark in row["label"]]
    assert prepared(tmp_path, values, problem="multi-label", labels=["x", "y", "z"])[0].labels == ["x", "y", "z"]
    # Numbers of classes stay so where the held-out rows alone could be read otherwise.
    numbers, parts = prepared(tmp_path, [[0, 1], [1], [0, 2], [1, 2]] * 4, [[0, 1], [1, 0]], problem="multi-label")
    assert numbers.labels == ["0", "1", "2"]
    assert [target.tolist() for target in numbers._targets(parts.test)] == [[1, 1, 0]] * 2


def test_a_column_a_class_says_how_to_make_one_of_them(tmp_path):
    frame = pandas.DataFrame({"body": [f"t{i}" for i in range(16)]})
    for place, name in enumerate(("rude", "loud")):
        frame[name] = [i >> place & 1 for i in range(16)]
    frame.to_csv(tmp_path / "rows.csv", index=False)
    columns = {"text": "body"}
    with pytest.raises(DataError, match="rude, loud say 0 or 1") as told:
        prepare(Recipe(model="m", task="text-classification", data=str(tmp_path / "rows.csv")))
    advice = str(told.value).split("classes: ")[1].split(". Then data:")[0]
    exec(advice.replace("FILE", repr(str(tmp_path / "rows.csv"))).replace("labelled.parquet", f"{tmp_path}/l.parquet"))
    found = {"train": str(tmp_path / "l.parquet"), "columns": columns}
    task, parts = prepare(Recipe(model="m", task="text-classification", data=found, problem="multi-label"))
    assert task.labels == ["loud", "rude"] and len(parts.train) + len(parts.test) == 16


def test_lists_of_one_label_and_shares_of_classes_are_told(tmp_path):
    task, _ = prepared(tmp_path, [["a"], ["b"]] * 8)
    assert task.problem == "multi-label" and any("each of one label" in note for note in task.notes.sentences)
    for shares in ([0.2, 0.8], {"a": 0.2, "b": 0.8}):
        with pytest.raises(DataError, match="shares of several classes are not read"):
            prepared(tmp_path, [shares] * 8)
    with pytest.raises(DataError, match="problem: regression"):
        prepared(tmp_path, [0.5, 1.5] * 8)


def test_labels_that_may_be_meant_as_one_are_told(tmp_path):
    for values in (["Yes", "yes", "no"], ["1", "1.0", "2"], ["a", "a ", "b"]):
        task, _ = prepared(tmp_path, values * 6)
        assert len(task.labels) == 3 and any(repr(sorted(values[:2])) in note for note in task.notes.sentences)
    task, _ = prepared(tmp_path, ["a", "b", "10"] * 6)
    assert not any("differ in" in note for note in task.notes.sentences)


@pytest.mark.parametrize("number", ["1,5", "1.234,5", "1 234", "5%"])
def test_numbers_in_other_spellings_are_refused_with_the_right_one(tmp_path, number):
    with pytest.raises(DataError, match=r"Write numbers as 1234\.5"):
        prepared(tmp_path, [number] * 12, problem="regression")


def test_numbers_on_a_scale_are_no_classes_unless_it_is_said(tmp_path):
    """As texts of a CSV file too, where they have no type."""
    scale = [f"{number / 8:.3f}" for number in range(1, 41)]
    with pytest.raises(DataError, match=r"holds 40 different numbers, such as 0\.125\. .*problem: regression"):
        prepared(tmp_path, scale)
    task, _ = prepared(tmp_path, ["0.5", "1.0", "1.5"] * 6)
    assert task.labels == ["0.5", "1.0", "1.5"]
    assert "3 different numbers, such as 0.5: each is a class of its own" in " ".join(task.notes.sentences)
    whole, _ = prepared(tmp_path, ["1", "2", "30"] * 6)
    assert "class of its own" not in " ".join(whole.notes.sentences)


@pytest.mark.parametrize(
    ("names", "told", "learned"),
    [
        (["Pos", "NEG"], None, ["pos", "neg"]),
        (["sad", "glad"], r"is kept and its outputs renamed: sad → neg, glad → pos\. ", ["neg", "pos"]),
        (["LABEL_0", "LABEL_1"], "LABEL_0 → neg", ["neg", "pos"]),
        (
            ["one", "two", "three"],
            r"The head is new, as .* names 3 classes that are other ones \(one, two, three\)",
            ["neg", "pos"],
        ),
    ],
    ids=["same", "other", "unnamed", "more"],
)
def test_what_becomes_of_a_head_that_the_base_has(names, told, learned, tmp_path):
    base = ak.load(small.model("bert"), "text-classification", labels=names)
    base.save_pretrained(tmp_path / "base")
    small.tokenizer(encoder=True).save_pretrained(tmp_path / "base")
    rows = [{"text": f"a {word} film", "label": label} for word, label in (("dull", "neg"), ("fine", "pos"))] * 6
    recipe = {"model": str(tmp_path / "base"), "task": "text-classification", "data": rows}
    run = ak.train({**recipe, "training": {"max_steps": 1, "samples": 0}}, tmp_path / "run", quiet=True)
    said = [note for note in run.metrics["notes"] if "head" in note]
    assert bool(said) == bool(told) and all(re.search(told, note) for note in said)
    assert run.recipe.labels == learned
