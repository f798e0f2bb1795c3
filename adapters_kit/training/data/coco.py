"""COCO's documents (images, annotations, categories) as rows: one a picture, with all that was marked in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes

Row = Mapping[str, Any]
_USED = ("images", "annotations", "categories")
_ABOUT = ("info", "licenses", "type")


def is_coco(value: Mapping[str, Any]) -> bool:
    """Whether a document lists pictures, and beside them what was marked in which."""
    parts = [value.get(key) for key in _USED[:2]]
    if not all(isinstance(part, list) and all(isinstance(item, Mapping) for item in part) for part in parts):
        return False
    images, marks = parts
    named = bool(images) and all({"id", "file_name"} <= set(image) for image in images or ())
    return named and all("image_id" in mark for mark in marks or ())


def coco_rows(value: Mapping[str, Any], path: Path, notes: Notes) -> list[Row]:
    """A row a picture: `image`, `width`, `height`, and `objects`, each with `bbox_xywh`, `category` and `iscrowd`.

    Raises:
        DataError: an annotation of no picture or of no category, or without a box; a name for two pictures.
    """
    names: dict[Any, str] = {}
    for category in value.get("categories") or ():
        if not isinstance(category, Mapping) or not {"id", "name"} <= set(category):
            raise DataError(f"{path}: a category has an id and a name, this is {category!r:.80}.")
        names[category["id"]] = str(category["name"])
    if len(set(names.values())) != len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise DataError(f"{path}: two categories are called {twice!r}. Give each a name of its own, or join them.")
    rows: dict[Any, dict[str, Any]] = {}
    folder = _folder_of([str(image["file_name"]) for image in value["images"]], path)
    for image in value["images"]:
        if image["id"] in rows:
            raise DataError(f"{path}: two images have the id {image['id']!r}.")
        file = folder / str(image["file_name"])
        rows[image["id"]] = {
            "image": str(file) if file.is_file() else str(image["file_name"]),
            "width": image.get("width"),
            "height": image.get("height"),
            "objects": [],
        }
    for number, mark in enumerate(value["annotations"], 1):
        place = f"{path}, annotation {number} (id {mark.get('id')!r})"
        if mark["image_id"] not in rows:
            raise DataError(f"{place}: there is no image with the id {mark['image_id']!r}.")
        if mark.get("category_id") not in names:
            raise DataError(f"{place}: there is no category with the id {mark.get('category_id')!r}.")
        if "bbox" not in mark:
            raise DataError(f"{place} has no bbox. Boxes are read from there; outlines alone (segmentation) are not.")
        rows[mark["image_id"]]["objects"].append(
            {
                "bbox_xywh": mark["bbox"],
                "category": names[mark["category_id"]],
                "iscrowd": int(bool(mark.get("iscrowd", 0))),
            }
        )
    left = [key for key in value if key not in (*_USED, *_ABOUT)]
    notes.say(
        f"{path.name} has COCO's form: {len(rows):,} pictures, {len(value['annotations']):,} boxes of "
        f"{len(names):,} categories." + (f" Not used: {', '.join(map(repr, left[:10]))}." if left else "")
    )
    return list(rows.values())


def _folder_of(files: Sequence[str], path: Path) -> Path:
    """Where the pictures lie: beside the document, in `images/`, or in a folder named as the end of its name says."""
    here, above = path.parent, path.parent.parent
    part = path.stem.rpartition("_")[2]
    ways = [here, here / "images", here / part, above, above / "images", above / part, above / "images" / part]
    return next((way for way in ways if (way / files[0]).is_file()), here)
