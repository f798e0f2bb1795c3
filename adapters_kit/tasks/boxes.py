"""Boxes in pictures: read as data sets write them, in which of several ways, and scored by COCO's average precision."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters_kit.errors import DataError, MissingPackageError
from adapters_kit.tasks.turns import written_out

FORMATS = {
    "xywh": "[left, top, width, height] in pixels",
    "xyxy": "[left, top, right, bottom] in pixels",
    "xyxy-normalized": "[left, top, right, bottom] as parts of the picture",
    "cxcywh-normalized": "[centre x, centre y, width, height] as parts of the picture",
}
# Names that a box's key goes by; the last ones tell the format.
_BOX: dict[str, str | None] = {"bbox": None, "bboxes": None, "boxes": None, "box": None}
_BOX |= {"bbox_xywh": "xywh", "bbox_xyxy": "xyxy"}
_CLASS = (
    *("category", "categories", "label", "labels", "class", "classes", "class_labels", "class_label", "name"),
    *("category_id", "class_id"),
)
_CROWD = ("iscrowd", "is_crowd", "crowd")
_EDGE = 1.5  # pixels that a box may reach over the edge and still be meant as it stands


@dataclass(frozen=True)
class Marked:
    """What is marked in one picture.

    Attributes:
        boxes: (boxes, 4) float64, as the data has them.
        names: the class of each, as the data has it.
        crowd: which boxes stand for many things that were not marked one by one, (boxes,) bool.
        told: the format of `FORMATS` that the data names; None where it names none.
        key: under which the classes stand; "" where they are a column.
    """

    boxes: np.ndarray
    names: list[Any]
    crowd: np.ndarray
    told: str | None = None
    key: str = ""


def marked(cell: Any, row: int) -> Marked | None:
    """The objects of a cell: a list of objects, or an object of lists, as such or as JSON's text; None for no cell.

    Raises:
        DataError: it is neither, has no boxes or no classes, or they are not as many; by its row.
    """
    value = written_out(cell) if isinstance(cell, str) else cell
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        if not value:
            return Marked(np.zeros((0, 4)), [], np.zeros(0, dtype=bool))
        keys = list(dict.fromkeys(key for item in value for key in item))
        value = {key: [item.get(key) for item in value] for key in keys}
    if not isinstance(value, Mapping):
        raise DataError(
            f"Row {row + 1}: the objects of a picture are a list of {{bbox, category}}, or {{bbox: [...], category: "
            f"[...]}}; this is {value!r:.80} ({type(value).__name__})."
        )
    lower = {str(key).lower(): key for key in value}
    box = next((key for key in _BOX if key in lower), None)
    name = next((key for key in _CLASS if key in lower), None)
    if box is None or name is None:
        kind, known = ("boxes", _BOX) if box is None else ("classes", _CLASS)
        raise DataError(
            f"Row {row + 1}: the objects have no {kind}: their keys are {', '.join(map(repr, value))}, and none is "
            f"{', '.join(known)}."
        )
    crowd = next((value[lower[key]] for key in _CROWD if key in lower), None)
    made = together(value[lower[box]], value[lower[name]], row)
    flags = np.array([bool(flag) for flag in crowd], dtype=bool) if crowd is not None else made.crowd
    return Marked(made.boxes, made.names, flags, _BOX[box], lower[name])


def together(boxes: Any, names: Any, row: int) -> Marked:
    """Boxes and their classes from two lists. Raises DataError, by the row."""
    boxes, names = (written_out(part) if isinstance(part, str) else part for part in (boxes, names))
    boxes, names = ([] if part is None else part for part in (boxes, names))
    if not isinstance(names, list | tuple):
        names = [names]
        boxes = [boxes] if np.ndim(boxes) == 1 else boxes  # one thing a picture, without a list around it
    for number, box in enumerate(boxes, 1):
        numbers = isinstance(box, list | tuple | np.ndarray) and len(box) == 4
        if not numbers or not all(isinstance(x, int | float | np.number) and np.isfinite(x) for x in box):
            raise DataError(f"Row {row + 1}, box {number}: a box is four numbers, this is {box!r:.80}.")
    if len(boxes) != len(names):
        raise DataError(f"Row {row + 1} has {len(boxes)} boxes and {len(names)} classes. Each box has one.")
    return Marked(np.array(boxes, dtype=np.float64).reshape(-1, 4), list(names), np.zeros(len(names), dtype=bool))


def corners(boxes: np.ndarray, form: str, width: int, height: int) -> np.ndarray:
    """Boxes of a format as parts of the picture, (boxes, 4): left, top, right, bottom; not cut at its edges."""
    whole = boxes if form.endswith("normalized") else boxes / np.array([width, height, width, height])
    first, second = whole[:, :2], whole[:, 2:]
    if form.startswith("xywh"):
        return np.concatenate([first, first + second], 1)
    if form.startswith("cxcywh"):
        return np.concatenate([first - second / 2, first + second / 2], 1)
    return whole


def written(found: np.ndarray, form: str, width: int, height: int) -> np.ndarray:
    """Of what `corners` gives, the boxes in a format."""
    first, second = found[:, :2], found[:, 2:]
    if form.startswith("xywh"):
        found = np.concatenate([first, second - first], 1)
    elif form.startswith("cxcywh"):
        found = np.concatenate([(first + second) / 2, second - first], 1)
    return found if form.endswith("normalized") else found * np.array([width, height, width, height])


def _fits(boxes: np.ndarray, form: str, width: int, height: int) -> bool:
    """Whether all boxes lie in the picture if they are read so."""
    found, over = corners(boxes, form, width, height), np.array([_EDGE / width, _EDGE / height])
    ordered = bool((found[:, 2:] >= found[:, :2]).all())
    return ordered and bool((found[:, :2] >= -over).all() and (found[:, 2:] <= 1 + over).all())


def format_of(rows: Sequence[tuple[np.ndarray, int, int]]) -> str:
    """The one format by which every box lies in its picture.

    Args:
        rows: boxes, width and height of each picture.

    Raises:
        DataError: there are several such formats, or none: it is for the user to say which is meant.
    """
    filled = [(row, *one) for row, one in enumerate(rows) if len(one[0])]
    parts = all(float(boxes.max()) <= 1 for _, boxes, _, _ in filled)  # nobody marks things of one pixel only
    known = [form for form in FORMATS if form.endswith("normalized") == parts]
    misfits = {form: [one for one in filled if not _fits(one[1], form, *one[2:])] for form in known}
    fitting = [form for form in known if not misfits[form]]
    if len(fitting) == 1:
        return fitting[0]
    choice = "; ".join(f"data.box_format: {form} is {FORMATS[form]}" for form in known)
    if fitting:
        raise DataError(f"The boxes can be read in several ways, and all lie in their pictures. Say which: {choice}.")
    told = []
    for form in known:
        row, boxes, width, height = misfits[form][0]
        place = next(box for box in boxes if not _fits(box[None], form, width, height))
        told.append(
            f"as {form}, {len(misfits[form]):,} pictures have a box that is not inside (row {row + 1}: "
            f"{[float(x) for x in place]} in {width} × {height} pixels)"
        )
    raise DataError(
        f"The boxes do not lie in their pictures: {'; '.join(told)}. Mend them, or say how they are meant, and what "
        f"reaches over an edge is cut: {choice}."
    )


Truth = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of one picture: boxes (boxes, 4) as left, top, right, bottom; classes (boxes,); crowd (boxes,) bool."""


def average_precision(truth: Sequence[Truth], found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Any:
    """COCO's scores by pycocotools: mean average precision, and recall, over the classes that the truth has.

    Args:
        found: of each picture boxes (as in the truth), classes, scores.

    Returns:
        `map` (intersection over union from 0.5 to 0.95), `map_50`, `map_75`, and `mar_100`: recall with 100 boxes.
    """
    coco, evaluation = pycocotools()
    marks: list[dict[str, Any]] = []
    for picture, (boxes, classes, crowd) in enumerate(truth):
        marks += [_mark(picture, *one) for one in zip(boxes, classes, crowd, strict=True)]
    answers = [
        {**_mark(picture, box, kind), "score": float(score)}
        for picture, (boxes, classes, scores) in enumerate(found)
        for box, kind, score in zip(boxes, classes, scores, strict=True)
    ]
    categories = sorted({mark["category_id"] for mark in marks})
    if not answers or not categories:
        return dict.fromkeys(("map", "map_50", "map_75", "mar_100"), 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        known, asked = coco(), coco()
        images = [{"id": picture} for picture in range(len(truth))]
        for one, held in ((known, marks), (asked, answers)):
            one.dataset = {"images": images, "annotations": held, "categories": [{"id": id_} for id_ in categories]}
            for number, mark in enumerate(held, 1):
                mark["id"] = number
            one.createIndex()
        run = evaluation(known, asked, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: float(run.stats[at]) for name, at in (("map", 0), ("map_50", 1), ("map_75", 2), ("mar_100", 8))}


def _mark(picture: int, box: np.ndarray, kind: int, crowd: bool = False) -> dict[str, Any]:
    left, top, right, bottom = map(float, box)
    size = [left, top, right - left, bottom - top]
    return {
        "image_id": picture,
        "category_id": int(kind),
        "bbox": size,
        "area": size[2] * size[3],
        "iscrowd": int(crowd),
    }


def pycocotools() -> tuple[Any, Any]:
    """Its two classes. Raises MissingPackageError."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingPackageError("The scores of boxes need pycocotools: pip install 'adapters-kit[vision]'") from error
    return COCO, COCOeval
