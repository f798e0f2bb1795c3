"""Files of rows that no table can hold: refused in one sentence, soon."""

import gzip
import json
import os

import pandas as pd
import pytest

from adapters_kit.errors import DataError
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_sections import DataSpec
from adapters_kit.tasks.images import open_image
from adapters_kit.tasks.notes import Notes
from adapters_kit.training.data import read, read_rows
from adapters_kit.training.inputs import recipe_from
from adapters_kit.training.resolve import prepare
from tests.support import small


def test_far_too_many_columns_of_a_table(tmp_path):
    names = [f"c{number}" for number in range(20_000)]
    (tmp_path / "wide.csv").write_text(",".join(names) + "\n" + ",".join("1" for _ in names) + "\n")
    with pytest.raises(DataError, match=r"20,000 columns, and 5,000 are the most\. Keep those that are used"):
        read_rows(tmp_path / "wide.csv")


def test_far_too_many_keys_of_objects(tmp_path):
    lines = (json.dumps({f"k{number}_{one}": 1 for one in range(20)}) for number in range(3000))
    (tmp_path / "keys.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"line 251: the rows have more than 5,000 keys"):
        read_rows(tmp_path / "keys.jsonl")


def test_a_zero_byte_in_a_name(tmp_path):
    (tmp_path / "zero.csv").write_bytes(b"te\x00xt,label\na,x\n")
    with pytest.raises(DataError, match="zero byte"):
        read_rows(tmp_path / "zero.csv")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    "value", [{"bytes": "abc"}, {"bytes": 7}, {"bytes": None, "path": None}, {}, 5, b"", b"GIF89a"]
)
def test_what_is_no_picture(value):
    with pytest.raises(DataError, match=r"Row 3:? .*no image"):
        open_image(value, 2)


def test_a_packed_bomb(tmp_path):
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        for _ in range(100):
            file.write(b" " * (1 << 20))
    with pytest.raises(DataError, match="unpacks to more than 300 times its size"):
        read_rows(tmp_path / "rows.jsonl.gz")


MIXED = [1, "x", {"a": 1}, [2], None, True, 10**30, {}]


@pytest.mark.parametrize("form", ["a.jsonl", "a.json", "rows", "frame", "shards"])
@pytest.mark.parametrize("used", [False, True])
def test_a_column_of_several_kinds_is_refused_only_where_it_is_used(tmp_path, form, used):
    rows = [{"text": f"film {i}", "label": "ab"[i % 2], "more": MIXED[i % len(MIXED)]} for i in range(16)]
    data = rows if form == "rows" else pd.DataFrame(rows) if form == "frame" else tmp_path / form
    if form == "shards":
        for part in range(2):  # each of one kind
            kinds = [{**row, "more": ("x", 1)[part]} for row in rows]
            small.write_jsonl(data / f"train-{part}.jsonl", kinds)
    elif form.startswith("a."):
        data.write_text(json.dumps(rows) if form == "a.json" else "\n".join(map(json.dumps, rows)))
    source = {"train": data, "columns": {"text": "more"} if used else {}}
    recipe = recipe_from({"model": "m", "task": "text-classification", "data": source}, tmp_path / "cache")
    if used:
        where = "in one part" if form == "shards" else "row 2" if form != "a.jsonl" else "line 2"
        with pytest.raises(DataError, match=rf"{where}.*'more'|'more' holds .*{where}"):
            prepare(recipe)
        return
    task, parts = prepare(recipe)
    assert task.columns == {"text": "text", "label": "label"} and sum(map(len, parts)) == 16 * (1 + (form == "shards"))
    assert any("not used: more" in sentence for sentence in task.notes.sentences)


def test_objects_without_a_field_are_kept(tmp_path):
    rows = [{"text": "a", "label": "ab"[i % 2], "more": {}, "deep": [{"of": {}}]} for i in range(8)]
    recipe = recipe_from({"model": "m", "task": "text-classification", "data": rows}, tmp_path)
    assert prepare(recipe)[0].labels == ["a", "b"]


def test_a_column_that_one_shard_lacks_is_empty_there(tmp_path):
    for part in range(2):
        rows = [{"text": f"t{i}", "label": "ab"[i % 2], **({"note": "x"} if part else {})} for i in range(4)]
        small.write_jsonl(tmp_path / f"train-{part}.jsonl", rows)
    notes = Notes()
    found = read(DataSpec(train=str(tmp_path)), notes).train
    assert found["note"][:] == [None] * 4 + ["x"] * 4
    assert any("1 of 2 files have no column 'note'" in sentence for sentence in notes.sentences)


def test_categories_stay_classes_beside_a_column_of_several_kinds(tmp_path):
    for part in range(2):
        frame = pd.DataFrame({"text": ["t"] * 4, "label": list("abab"), "more": ["x", 1][part]})
        frame["label"] = pd.Categorical(frame["label"], categories=["b", "a"])
        frame.to_parquet(tmp_path / f"train-{part}.parquet")
    assert prepare(Recipe(model="m", task="text-classification", data=str(tmp_path)))[0].labels == ["b", "a"]
