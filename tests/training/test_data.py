"""Reading data: every kind of file gives the same rows; what cannot be used is refused with the way out."""

import json

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

import adapters_kit as ak
from adapters_kit.errors import DataError
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_sections import DataSpec
from adapters_kit.training import data
from adapters_kit.training.resolve import prepare
from adapters_kit.training.sampling import OrderedByEpoch
from tests.support import small

ROWS = [{"text": 'a "quoted", text', "label": "x"}, {"text": "two\nlines", "label": "y"}, {"text": "NA", "label": "x"}]


def spec(path, **more):
    return DataSpec(train=str(path), **more)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    frame = Dataset.from_list(ROWS)
    if suffix == "parquet":
        frame.to_parquet(path)
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    elif suffix == "jsonl":
        small.write_jsonl(path, ROWS)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    assert data.read(spec(path)).train.to_list() == ROWS


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1), min_size=1))
def test_csv_text_comes_back_as_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["text", "label"])
        writer.writerows([f"t{row}", "a"] for row in rows)
    assert data.read(spec(path)).train["text"][:] == [f"t{row}" for row in rows]


def test_folders_and_saved_data_sets(tmp_path):
    frame = Dataset.from_list(ROWS)
    (tmp_path / "files").mkdir()
    frame.to_csv(tmp_path / "files" / "train.csv", index=False)
    frame.select([0]).to_csv(tmp_path / "files" / "validation.csv", index=False)
    frame.save_to_disk(tmp_path / "one")
    DatasetDict(train=frame, test=frame.select([1])).save_to_disk(tmp_path / "two")
    for folder, held_out in (("files", 1), ("one", None), ("two", 1)):
        found = data.read(spec(tmp_path / folder))
        assert len(found.train) == 3
        assert (found.test and len(found.test)) == held_out
    both = data.read(spec(tmp_path / "one", test=str(tmp_path / "two")))
    assert both.test["text"][:] == ["two\nlines"]


def test_plain_text_is_cut_at_blank_lines_or_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    assert data.read(spec(tmp_path / "a.txt")).train["text"][:] == ["one\ntwo", "three"]
    assert data.read(spec(tmp_path / "b.txt")).train["text"][:] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.jsonl", '{"text": "x"}\n{oops\n', "line 2: not JSON"),
        ("a.jsonl", '["x"]\n', "line 1: each line is one"),
        ("a.xlsx", "x", r"is none of \.csv"),
        ("a.parquet", "not parquet", "Cannot read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        data.read(spec(path))


def test_missing_files_and_folders_name_what_is_there(tmp_path):
    small.write_jsonl(tmp_path / "reviews.jsonl", ROWS)
    with pytest.raises(DataError, match=r"Did you mean reviews\.jsonl"):
        data.read(spec(tmp_path / "review.jsonl"))
    with pytest.raises(DataError, match=r"It holds: reviews\.jsonl"):
        data.read(spec(tmp_path))


def recipe(path, **more) -> Recipe:
    return Recipe(**{"model": "m", "task": "text-classification", "data": {"train": str(path)}, **more})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": 3, "label": "a"}, {"text": 4, "label": "b"}], "'text' should be the text, but row 1 holds 3"),
        ([{"text": "x", "label": "a"}, {"text": None, "label": "b"}], "row 2 holds None"),
        (
            [{"text": "x", "label": 0.5}, {"text": "y", "label": 1.5}],
            "Labels are strings or integers.*problem: regress",
        ),
        ([{"text": "x", "label": "a"}, {"text": "y", "label": None}], "no label in column 'label': row 2"),
        ([{"text": "x", "label": {"k": 1}}, {"text": "y", "label": {"k": 2}}], "Labels are strings or integers"),
        ([{"text": "x", "label": "a"}, {"text": "y", "label": "a"}], "one class only"),
        ([{"body": "x", "kind": "a"}, {"body": "y", "kind": "b"}], "has the columns body, kind"),
    ],
)
def test_rows_that_cannot_be_learned_from(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        prepare(recipe(small.write_jsonl(tmp_path / "a.jsonl", rows)))


def test_a_class_of_the_held_out_part_only(tmp_path):
    rows = [{"text": "x", "label": label} for label in "ab" * 3]
    small.write_jsonl(tmp_path / "train.jsonl", rows)
    small.write_jsonl(tmp_path / "test.jsonl", [*rows, {"text": "z", "label": "c"}])
    task, splits = prepare(recipe(tmp_path))
    assert task.labels == ["a", "b", "c"]
    assert len(splits.test) == 7
    assert any("never shows: c." in note for note in task.notes.sentences)


def test_columns_by_name_and_by_hand(tmp_path):
    rows = [{"Review": "x", "stars": 1, "id": 7}, {"Review": "y", "stars": 2, "id": 8}] * 10
    path = small.write_jsonl(tmp_path / "a.jsonl", rows)
    task, _ = prepare(recipe(path))
    assert task.columns == {"text": "Review", "label": "stars"}
    assert task.labels == ["1", "2"]
    by_hand = recipe(path, data={"train": str(path), "columns": {"label": "id"}})
    assert prepare(by_hand)[0].labels == ["7", "8"]
    wrong = recipe(path, data={"train": str(path), "columns": {"label": "star"}})
    with pytest.raises(DataError, match=r"'star'\. Did you mean stars"):
        prepare(wrong)


def test_integer_labels_sort_by_value(tmp_path):
    rows = [{"text": "x", "label": label} for label in [10, 9, 100, 2] * 5]
    assert prepare(recipe(small.write_jsonl(tmp_path / "a.jsonl", rows)))[0].labels == ["2", "9", "10", "100"]


def test_split_is_seeded_and_keeps_the_mixture(tmp_path):
    rows = [{"text": f"t{i}", "label": "rare" if i % 10 == 0 else "often"} for i in range(200)]
    path = small.write_jsonl(tmp_path / "a.jsonl", rows)
    _, first = prepare(recipe(path))
    _, again = prepare(recipe(path))
    _, other = prepare(recipe(path, training={"seed": 1}))
    assert len(first.test) == 20
    assert first.test["label"][:].count("rare") == 2
    assert first.test["text"][:] == again.test["text"][:] != other.test["text"][:]
    assert not set(first.test["text"][:]) & set(first.train["text"][:])
    with pytest.raises(DataError, match="Cannot set 500 of 200"):
        prepare(recipe(path, data={"train": str(path), "test_size": 500}))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300),
    batch=st.integers(1, 17),
    group=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_example_once_an_epoch_and_the_same_after_a_restart(lengths, batch, group, epoch):
    order = OrderedByEpoch(lengths, batch, seed=3, group=group, window=4)
    order.epoch = epoch
    seen = list(order)
    assert sorted(seen) == list(range(len(lengths)))
    assert list(order) == seen
    if group:
        full = [seen[i : i + batch] for i in range(0, len(seen) - batch + 1, batch)]
        assert not full or max(lengths[i] for i in full[0]) == max(lengths[i] for rows in full for i in rows)


def test_grouping_saves_padding():
    import random

    draw = random.Random(0)
    lengths = [draw.randint(1, 200) for _ in range(2000)]

    def padding(group: bool) -> float:
        seen = list(OrderedByEpoch(lengths, 16, seed=0, group=group))
        batches = [[lengths[i] for i in seen[k : k + 16]] for k in range(0, len(seen), 16)]
        return 1 - sum(lengths) / sum(max(rows) * len(rows) for rows in batches)

    assert padding(True) < 0.1 < 0.3 < padding(False)


def test_rows_that_stand_in_both_parts_are_counted(tmp_path):
    rows = small.sentiment(30)
    path = small.write_jsonl(tmp_path / "train.jsonl", rows)
    small.write_jsonl(tmp_path / "test.jsonl", [*rows[:3], {"text": "another one", "label": "good"}])
    task, _ = prepare(Recipe(model="m", task="text-classification", data=str(tmp_path)))
    assert task.notes.counts["rows_in_both"] == 3
    task, _ = prepare(Recipe(model="m", task="text-classification", data=str(path)))
    assert "rows_in_both" not in task.notes.counts


def test_what_is_wrong_with_the_held_out_rows_is_said_of_them(tmp_path):
    rows = {"train": [{"text": "a film"}] * 4, "test": [{"text": ""}] * 2}
    recipe = {"model": str(small.model("llama")), "task": "causal-lm", "data": rows, "training": {"max_steps": 1}}
    with pytest.raises(DataError, match=r"held-out data: None of the rows has anything to learn: no text"):
        ak.train(recipe, tmp_path / "run", quiet=True)
