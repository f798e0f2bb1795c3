"""JSON: the rows that a document means, whatever stands around them; damage is told with its place."""

import json
import random

import pytest

from adapters_kit.errors import DataError
from adapters_kit.recipe_sections import DataSpec
from adapters_kit.tasks.notes import Notes
from adapters_kit.training import data
from adapters_kit.training.data import json_rows, json_tables, row_file
from adapters_kit.training.data.row_file import Format

ROWS = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(6)]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TABLE = {key: [row[key] for row in ROWS] for key in ("text", "label")}


def read(path, value, dumped=True):
    path.write_text(json.dumps(value) if dumped else value, encoding="utf-8")
    notes = Notes()
    return data.read_table(path, Format(notes=notes)), notes.sentences


@pytest.mark.parametrize(
    "value",
    [
        ROWS,
        {"data": ROWS},
        {"version": "1", "authors": [{"name": "x"}], "data": ROWS},
        {"meta": {"a": 1}, "reviews": ROWS},
        TABLE,
        {key: {str(i): value for i, value in enumerate(column)} for key, column in TABLE.items()},
        {"columns": ["text", "label"], "index": list(range(6)), "data": [list(row.values()) for row in ROWS]},
        {"rows": [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(ROWS)]},
        {"train": ROWS},
    ],
)
def test_the_same_rows_in_many_shapes(tmp_path, value):
    assert read(tmp_path / "a.json", value)[0].to_list() == ROWS


@pytest.mark.parametrize("held_out", ["test", "validation", "val", "dev"])
def test_a_dict_of_parts(tmp_path, held_out):
    path = tmp_path / "a.json"
    for value in ({"train": ROWS, held_out: ROWS[:2], "about": "x"}, {held_out: ROWS[:2], "train": TABLE}):
        path.write_text(json.dumps(value))
        notes = Notes()
        found = data.read(DataSpec(train=str(path)), notes)
        assert (found.train.to_list(), found.test.to_list()) == (ROWS, ROWS[:2])
        assert any("'about'" in note for note in notes.sentences) == ("about" in value)


def test_objects_that_are_one_row(tmp_path):
    for value in (
        {"messages": TURNS},
        {"id": 1, "messages": TURNS, "tools": [{"name": "f"}]},
        {"text": "x", "label": "a"},
    ):
        assert read(tmp_path / "a.json", value)[0].to_list() == [value]
    assert read(tmp_path / "a.json", [TURNS, TURNS])[0].to_list() == [{"messages": TURNS}] * 2
    assert read(tmp_path / "a.json", {"tokens": ["a"], "tags": ["O"]})[0].to_list() == [
        {"tokens": ["a"], "tags": ["O"]}
    ]
    assert read(tmp_path / "a.json", {"k1": ROWS[0], "k2": ROWS[1]})[0][1] == {"key": "k2", **ROWS[1]}


def test_squad_as_published(tmp_path):
    asked = [
        {"id": "1", "question": "who?", "answers": [{"text": "Ann", "answer_start": 0}], "is_impossible": False},
        {
            "id": "2",
            "question": "when?",
            "answers": [],
            "plausible_answers": [{"text": "x", "answer_start": 1}],
            "is_impossible": True,
        },
    ]
    value = {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": "Ann sat.", "qas": asked}]}]}
    found, notes = read(tmp_path / "a.json", value)
    assert found["answers"][:] == [{"text": ["Ann"], "answer_start": [0]}, {"text": [], "answer_start": []}]
    assert found["context"][:] == ["Ann sat."] * 2
    assert any("SQuAD" in note for note in notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n{"text": "b", "text": "c"}\n', r"line 2: the key 'text' stands twice"),
        ('{"text": "a"}\n' + '{"text": ' + "[" * 100_000 + "\n", r"line 2: .*nested too deep"),
        ('{"text": "a"}\n{"text": "b"\n', r"line 2: not JSON"),
        ('{"text": ' + "9" * 5000 + "}\n", r"(line 1|the file): "),
        ('{"a": [{"x": 1}], "b": [{"x": 2}]}', r"line 1|several lists of objects, 'a', 'b'"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_damage_is_told_with_its_place(tmp_path, text, message, suffix):
    if "several" in message and suffix == "jsonl":
        return  # there it is a row
    with pytest.raises(DataError, match=message):
        read(tmp_path / f"a.{suffix}", text, dumped=False)


def test_annotations_beside_what_they_are_of_are_no_rows(tmp_path):
    """Like COCO's document, but without the names of files that make it one."""
    value = {"images": [{"id": 1}], "annotations": [{"image_id": 1}], "categories": [{"id": 1}]}
    with pytest.raises(DataError, match="several lists of objects, 'images', 'annotations', 'categories'"):
        read(tmp_path / "a.json", value)


def test_coco_documents_are_a_row_a_picture(tmp_path):
    image = {"width": 8, "height": 4}
    value = {
        "info": {},
        "images": [{"id": 7, "file_name": "a.png", **image}, {"id": 9, "file_name": "gone.png", **image}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 3, "bbox": [0, 0, 2, 2], "iscrowd": 1, "segmentation": []},
            {"id": 2, "image_id": 9, "category_id": 1, "bbox": [1, 1, 2.5, 2]},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog", "supercategory": "pet"}],
    }
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    found, notes = read(tmp_path / "a.json", value)
    assert found[0] == {"image": str(tmp_path / "images" / "a.png"), "width": 8, "height": 4, "objects": []}
    marks = [
        {"bbox_xywh": [0.0, 0.0, 2.0, 2.0], "category": "dog", "iscrowd": 1},
        {"bbox_xywh": [1.0, 1.0, 2.5, 2.0], "category": "cat", "iscrowd": 0},
    ]
    assert found[1] == {"image": "gone.png", "width": 8, "height": 4, "objects": marks}
    assert any("COCO's form: 2 pictures, 2 boxes of 2 categories" in note for note in notes)
    for change, message in [
        ({"image_id": 8}, r"annotation 1 \(id 1\): there is no image with the id 8"),
        ({"category_id": 2}, "there is no category with the id 2"),
        ({"bbox": None}, "annotation 1 .* has no bbox"),
    ]:
        mark = {key: part for key, part in (value["annotations"][0] | change).items() if part is not None}
        with pytest.raises(DataError, match=message):
            read(tmp_path / "b.json", {**value, "annotations": [mark]})


def test_half_a_character_is_replaced_and_counted(tmp_path):
    text = '{"text": "good \\ud83d"}\n{"text": "fine \\ud83d\\ude00"}\n'
    found, notes = read(tmp_path / "a.jsonl", text, dumped=False)
    assert found["text"][:] == ["good \ufffd", "fine \U0001f600"]
    assert any("1 values hold half a character" in note and "line 1" in note for note in notes)
    nested = '{"messages": [{"role": "user", "content": "x\\udc00"}]}\n'
    assert read(tmp_path / "b.jsonl", nested, dumped=False)[0][0]["messages"][0]["content"] == "x\ufffd"


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_large_files_are_read_in_parts(tmp_path, monkeypatch, suffix):
    """The parts have columns that come late, numbers that turn out to have fractions, and rows across a part's edge."""
    monkeypatch.setattr(json_tables, "_AT_ONCE", 500)
    monkeypatch.setattr(json_rows, "_WHOLE", 700)
    monkeypatch.setattr(row_file, "_IN_MEMORY", 100)
    draw = random.Random(0)
    rows = [{"text": "x" * draw.randint(0, 90), "n": i if i < 40 else i + 0.5, "note": None} for i in range(80)]
    rows += [{"text": "last", "n": 1, "note": "late", "more": ["a", "b"]}]
    text = json.dumps(rows, indent=1) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    found, _ = read(tmp_path / f"a.{suffix}", text, dumped=False)
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    assert found["n"][:] == [float(row["n"]) for row in rows]
    assert found[80] == rows[80]
    assert found[0]["more"] is None
    with pytest.raises(DataError, match=r"not JSON|kind"):
        read(tmp_path / f"b.{suffix}", text[:-20], dumped=False)


@pytest.mark.parametrize(
    ("name", "text", "place", "hint"),
    [
        ("a.json", '[{"text": "a"},\n {"text": "b",}]', "line 2", "No comma stands behind the last value"),
        ("a.json", '[{"text": "a"},\n {"text": "b"},\n]', "line 2|line 3", "No comma stands behind the last value"),
        ("a.json", "[{'text': 'a'}]", "line 1", "JSON's quotes are double ones"),
        ("a.json", '[\n// the rows\n{"text": "a"}]', "line 2", "Comments are not part of JSON"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"},\n', "line 2", "No comma stands behind an object"),
        ("a.jsonl", '{\n "text": "a"\n}\n', "line 1", "stands on one line"),
    ],
)
def test_the_usual_slips_are_told_with_their_place(tmp_path, name, text, place, hint):
    with pytest.raises(DataError, match=f"{name}, ({place}): not JSON .*{hint}"):
        read(tmp_path / name, text, dumped=False)
