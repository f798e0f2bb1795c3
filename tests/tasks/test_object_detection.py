"""Boxes in pictures: read as they are meant or refused by their row; found by four families, scored by COCO's rules."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image, List, Value

import adapters_kit as ak
from adapters_kit import tasks
from adapters_kit.anatomy import probe_inputs
from adapters_kit.errors import DataError, MissingPackageError, ModelError, RecipeError
from adapters_kit.loading import load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.boxes import FORMATS, average_precision, corners, format_of, marked, written
from adapters_kit.training import data
from adapters_kit.training.propose import propose
from adapters_kit.training.resolve import prepare
from tests.support import shapes, small

pytest.importorskip("pycocotools", reason="boxes need pycocotools: pip install 'adapters-kit[vision]'")
TASK = "object-detection"
FAMILIES = ["detr", "conditional-detr", "rt-detr", "yolos"]


def recipe(path, **keys):
    return Recipe(**{"model": "m", "task": TASK, "data": str(path), **keys})


def table(folder, rows, name="rows.jsonl"):
    return small.write_jsonl(folder / name, rows)


def bound(name, rows, **keys):
    columns = {role: role for role in ("image", "objects") if role in rows[0]}
    folder = shapes.detector(name)
    task = tasks.get(TASK)(Recipe(**{"model": str(folder), "task": TASK, "data": "x", **keys}), columns)
    made = Dataset.from_list(rows)
    task.fit(made, None)
    model = ak.load(folder, TASK, labels=task.labels)
    task.bind(load_processor(folder), model)
    return task, made, model


PIXELS = np.array([[8.0, 4.0, 24.0, 12.0], [40.0, 20.0, 10.0, 30.0]])


def in_format(form, width=80, height=60):
    return written(corners(PIXELS, "xywh", width, height), form, width, height)


@pytest.mark.parametrize("form", FORMATS)
def test_every_way_to_write_boxes_is_the_same(form):
    np.testing.assert_allclose(corners(in_format(form), form, 80, 60), corners(PIXELS, "xywh", 80, 60), atol=1e-12)
    assert format_of([(in_format(form), 80, 60), (np.zeros((0, 4)), 5, 5)]) == form


def test_boxes_that_can_be_read_in_several_ways_are_asked_about():
    with pytest.raises(DataError, match=r"several ways.*data\.box_format: xywh is .*data\.box_format: xyxy is"):
        format_of([(np.array([[1.0, 1.0, 20.0, 20.0]]), 80, 60)])
    with pytest.raises(DataError, match=r"as xywh, 1 pictures .*\(row 2: \[70\.0, 10\.0, 20\.0, 5\.0\] in 80 × 60"):
        format_of([(PIXELS, 80, 60), (np.array([[70.0, 10.0, 20.0, 5.0]]), 80, 60)])
    assert format_of([(np.array([[60.0, 10.0, 21.0, 5.0]]), 80, 60)]) == "xywh", "a pixel over the edge is no other way"


def test_objects_as_lists_or_as_a_list_or_as_text():
    one = [{"bbox": [1, 2, 3, 4], "category": "a", "iscrowd": 0}, {"bbox": [5, 6, 7, 8], "category": "b", "iscrowd": 1}]
    lists = {key: [item[key] for item in one] for key in one[0]}
    for cell in (one, lists, json.dumps(one), json.dumps(lists)):
        found = marked(cell, 0)
        assert found.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
        assert found.names == ["a", "b"]
        assert found.crowd.tolist() == [False, True]
    assert marked([], 0).boxes.shape == (0, 4)
    assert marked({"bbox": [], "category": []}, 0).boxes.shape == (0, 4)
    assert marked(None, 0) is None


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (7, "the objects of a picture are a list"),
        ([{"category": "a"}], "have no boxes: their keys are 'category'"),
        ([{"bbox": [1, 2, 3, 4]}], "have no classes: their keys are 'bbox'"),
        ([{"bbox": [1, 2, 3], "category": "a"}], r"box 1: a box is four numbers, this is \[1, 2, 3\]"),
        ([{"bbox": [1, 2, 3, float("nan")], "category": "a"}], "a box is four numbers"),
        ({"bbox": [[1, 2, 3, 4]], "category": ["a", "b"]}, "has 1 boxes and 2 classes"),
    ],
)
def test_what_is_no_object(cell, message):
    with pytest.raises(DataError, match=f"Row 3.*{message}"):
        marked(cell, 2)


def test_average_precision_is_cocos():
    box, none = np.array([[0.1, 0.1, 0.5, 0.5]]), np.zeros(0, dtype=bool)
    truth = [(box, np.array([0]), np.array([False])), (np.zeros((0, 4)), none.astype(int), none)]
    perfect = [(box, np.array([0]), np.array([0.9])), (np.zeros((0, 4)), none.astype(int), none)]
    assert average_precision(truth, perfect) == pytest.approx(dict.fromkeys(("map", "map_50", "map_75", "mar_100"), 1))
    shifted = box + np.array([0, 0, 0.25, 0])  # intersection over union 0.4 / 0.65 = 0.615
    found = average_precision(truth, [(shifted, np.array([0]), np.array([0.9])), perfect[1]])
    assert found == pytest.approx({"map": 0.3, "map_50": 1, "map_75": 0, "mar_100": 0.3})
    other = average_precision(truth, [(box, np.array([1]), np.array([0.9])), perfect[1]])
    assert other["map"] == 0, "another class"
    crowd = [(box, np.array([0]), np.array([True])), (box, np.array([0]), np.array([False]))]
    both = [(box, np.array([0]), np.array([0.9])), (box, np.array([0]), np.array([0.8]))]
    assert average_precision(crowd, both)["map"] == pytest.approx(1), "what lies in a crowd is not wrong"
    assert average_precision(truth, [perfect[1]] * 2)["map"] == 0


def test_bad_rows_are_refused_before_anything_is_loaded(tmp_path):
    good = shapes.boxes(3, tmp_path / "pics")

    def refused(change, message, error=DataError, **keys):
        rows = [good[0], {**good[1], **change}, good[2]]
        with pytest.raises(error, match=message):
            prepare(recipe(table(tmp_path, rows), **keys))

    whole = {"data": {"train": str(tmp_path / "rows.jsonl"), "box_format": "xywh"}}
    box = {"bbox": [[0, 0, 9, 9]], "category": ["disc"]}
    refused({"image": "gone.png"}, r"Row 2: no image file 'gone\.png'")
    refused({"objects": None}, "1 of 3 training rows have no label in column 'objects': row 2")
    refused({"objects": {**box, "category": [""]}}, "Row 2, box 1 of column 'objects' has no class", **whole)
    refused(
        {"objects": {**box, "bbox": [[5, 5, -2, 3]]}}, r"Row 2: the box \[5.0, 5.0, -2.0, 3.0\] ends before", **whole
    )
    size = {"data": {**whole["data"], "columns": {"width": "w", "height": "h"}}}
    refused(
        {"w": 128, "h": 64}, "Row 2: the data says that the picture has 128 × 64 pixels, the file has 64 × 64", **size
    )
    refused({}, r"training\.max_length counts tokens", RecipeError, **whole, training={"max_length": 9})
    refused({}, r"labels: \['x'\] leaves out classes of column 'objects'", **whole, labels=["x"])
    with pytest.raises(DataError, match="No picture of the training rows has a box"):
        prepare(recipe(table(tmp_path, [{**row, "objects": {"bbox": [], "category": []}} for row in good])))
    with pytest.raises(RecipeError, match="only object-detection has this key"):
        Recipe(model="m", task="image-classification", data={"train": "x", "box_format": "xyxy"})


def test_without_pycocotools_it_is_said_before_work_starts(tmp_path, monkeypatch):
    path = table(tmp_path, shapes.boxes(3, tmp_path / "pics"))
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.coco", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'adapters-kit\[vision\]'"):
        prepare(recipe(path))


def test_what_was_done_to_boxes_is_said(tmp_path):
    rows = shapes.boxes(3, tmp_path)
    rows[0]["objects"] = {"bbox": [[50, 50, 40, 10], [3, 3, 0, 9]], "category": ["disc", "square"]}
    task, made, _ = bound("yolos", rows, data={"train": "x", "box_format": "xywh"})
    assert task.notes.counts == {"boxes_cut": 1, "boxes_left_out": 1}
    first = task.encode(made)[0]
    np.testing.assert_allclose(first["boxes"], [[50 / 64, 50 / 64, 1, 60 / 64]])
    assert [task.labels[kind] for kind in first["classes"]] == ["disc"]
    told = bound("yolos", shapes.boxes(6, tmp_path))[0].notes.sentences
    assert any("Boxes are read as xywh" in sentence for sentence in told)


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_is_that_of_transformers_own_processor(name, tmp_path):
    """Pictures of one size, with none, one and two shapes in them."""
    rows = shapes.boxes(3, tmp_path)
    rows[2]["objects"] = {"bbox": [], "category": []}
    task, made, model = bound(name, rows, data={"train": "x", "box_format": "xywh"})
    marks = [
        {
            "image_id": row,
            "annotations": [
                {"bbox": box, "category_id": task.labels.index(kind), "area": box[2] * box[3], "iscrowd": 0}
                for box, kind in zip(one["objects"]["bbox"], one["objects"]["category"], strict=True)
            ],
        }
        for row, one in enumerate(rows)
    ]
    from PIL import Image as pillow

    pictures = [pillow.open(row["image"]) for row in rows]
    theirs = task.processor(images=pictures, annotations=marks, return_tensors="pt")
    inputs = {"pixel_values": theirs["pixel_values"], "labels": theirs["labels"]}
    batch = task.collate(task.encode(made)[0:3])
    with torch.no_grad():
        expected, got = model(**inputs).loss, task.loss(model, batch)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_does_not_depend_on_the_others_in_the_batch(name, tmp_path):
    rows = shapes.boxes(2, tmp_path)
    wide = tmp_path / "wide.png"
    shapes.drawn([("disc", [70, 10, 20, 30])], (100, 64)).save(wide)
    rows.append({"image": str(wide), "objects": {"bbox": [[70, 10, 20, 30]], "category": ["disc"]}})
    task, made, model = bound(name, rows, data={"train": "x", "box_format": "xywh"})
    features = task.encode(made)
    together, alone = task.run(model, features, 3), [task.run(model, [one], 1)[0] for one in features]
    for one, other in zip(together, alone, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-5)
    assert alone[2].size == (100, 64)
    batch = task.collate(features[0:3])
    pixels = batch["pixel_values"].shape[-1]
    if name == "rt-detr":
        assert pixels == 64, "it sees squares"
    elif task.masked:  # places are counted from the picture's own edges
        assert batch["pixel_mask"].sum((1, 2)).tolist() == [64 * 64, 64 * 64, 64 * pixels]
        np.testing.assert_allclose(batch["boxes"][-1], [0.8, 25 / 64, 0.2, 30 / 64], atol=1e-5)
        assert batch["boxes"][0, 2] == pytest.approx(rows[0]["objects"]["bbox"][0][2] / 64)
    else:  # from those of the padded one
        assert batch["boxes"][0, 2] == pytest.approx(rows[0]["objects"]["bbox"][0][2] / pixels)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "houlsby", "prefix"])
def test_methods_fit_and_models_run_for_real_afterwards(name, method):
    """A look at shapes alone must leave nothing behind, such as RT-DETR's anchors."""
    model = ak.load(shapes.detector(name), TASK, labels=["a", "b", "c"])
    inputs = probe_inputs(model)
    wrapped = ak.wrap(model, method)
    with torch.no_grad():
        assert torch.isfinite(wrapped(**inputs).logits).all()
    trained = [key for key, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert any("class" in key or "score" in key for key in trained), "the new head is trained"


def test_one_head_in_several_places_is_refused():
    model = transformers.AutoModelForObjectDetection.from_pretrained(shapes.detector("deformable-detr"))
    with pytest.raises(ModelError, match=r"has one head in several places .*class_embed.*Take a model with one head"):
        ak.wrap(model, "lora")


def test_columns_and_folders_of_every_kind(tmp_path):
    rows = shapes.boxes(6, tmp_path / "pics")
    kinds = ["disc", "square"]
    nested = Features(
        {"image": Image(), "objects": {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=kinds))}}
    )
    numbered = [
        {**row, "objects": {**row["objects"], "category": [kinds.index(kind) for kind in row["objects"]["category"]]}}
        for row in rows
    ]
    Dataset.from_list(numbered, features=nested).save_to_disk(tmp_path / "saved")
    folder = tmp_path / "listed"
    folder.mkdir()
    for row in rows:
        shutil.copy(row["image"], folder)
    small.write_jsonl(
        folder / "metadata.jsonl",
        [{"file_name": row["image"].rpartition("/")[2], "objects": row["objects"]} for row in rows],
    )
    flat = [{"image": r["image"], "boxes": r["objects"]["bbox"], "classes": r["objects"]["category"]} for r in rows]
    coco = {
        "images": [{"id": i, "file_name": row["image"]} for i, row in enumerate(rows)],
        "annotations": [
            {"image_id": i, "bbox": box, "category_id": kinds.index(kind)}
            for i, row in enumerate(rows)
            for box, kind in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True)
        ],
        "categories": [{"id": i, "name": kind} for i, kind in enumerate(kinds)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    for part in ("train", "valid"):
        (tmp_path / "parted" / part).mkdir(parents=True)
        (tmp_path / "parted" / part / "_annotations.coco.json").write_text(json.dumps(coco))
        (tmp_path / "parted" / part / "other.png").write_bytes(b"")
    sources = [tmp_path / "saved", folder, table(tmp_path, flat), tmp_path / "coco.json", tmp_path / "parted"]
    found = []
    for source in sources:
        task, splits = prepare(recipe(source, data={"train": str(source), "test_size": 1, "box_format": "xywh"}))
        assert task.labels == kinds, source
        task.bind(load_processor(shapes.detector("yolos")), ak.load(shapes.detector("yolos"), TASK, labels=kinds))
        features = task.encode(splits.train)
        found.append(sorted(np.round(one["boxes"], 4).tolist() + one["classes"].tolist() for one in features))
    assert found[0] == found[1] == found[2] == found[3]
    assert len(found[4]) == 6, "with a held-out part of its own"
    assert propose(tmp_path / "coco.json").fields["task"] == TASK


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("detr", "houlsby"), ("yolos", "lora"), ("rt-detr", "lora")])
def test_a_run_learns_ships_and_answers_files(name, method, tmp_path):
    rows = shapes.boxes(32, tmp_path / "pics")
    path = table(tmp_path, rows)
    training = {"epochs": 5, "batch_size": 8, "learning_rate": 2e-3, "head_learning_rate": 2e-3, "keep_best": False}
    rows_of_both = {"train": str(path), "test": str(path)}  # learned by heart: a few steps are enough to see it
    keys = {"model": str(shapes.detector(name)), "task": TASK, "data": rows_of_both, "method": method}
    keys["training"] = training
    if name == "yolos":
        keys["quantize"] = "nf4"
    assert ak.plan(keys).trainable > 0
    run = ak.train(keys, tmp_path / "run", quiet=True)
    assert run.metrics["loss"] < 0.97 * run.metrics["base_loss"]
    assert ak.evaluate(run.path)["loss"] == pytest.approx(run.metrics["loss"], rel=1e-4)
    assert Recipe.read(run.path).data.box_format == "xywh"
    told = ak.predict(run.path, rows[0]["image"], **{"data.min_score": 0.0})[0]
    assert told["image"] == rows[0]["image"]
    assert {"label", "score", "box"} == set(told["found"][0])
    left, top, width, height = told["found"][0]["box"]
    assert 0 <= left <= left + width <= 64.2
    assert 0 <= top <= top + height <= 64.2
    assert ak.predict(run.path, rows[0]["image"], **{"data.min_score": 1.0})[0]["found"] == []
    assert "pipeline_tag: object-detection" in (run.path / "README.md").read_text()
    if method == "lora":
        ak.merge(run.adapter, tmp_path / "merged")
        merged = ak.evaluate(tmp_path / "merged", str(path), **{"data.box_format": "xywh"})
        assert merged["loss"] == pytest.approx(ak.evaluate(run.path, str(path))["loss"], rel=0.02)
    from adapters_kit.inference.answer_file import predict_file

    predict_file(run, path, tmp_path / "out.jsonl")
    assert "predicted_found" in json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    with pytest.raises(DataError, match="n_best=2"):
        ak.predict(run.path, rows[0]["image"], n_best=2)
    assert data.read_rows(path).num_rows == 32
