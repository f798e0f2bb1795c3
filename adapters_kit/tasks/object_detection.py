"""Object detection: boxes with a class each in pictures, by models that find them as a set (DETR, its kin, YOLOS)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from datasets import Features as Schema
from torch import nn

from adapters_kit.errors import DataError, ModelError, RecipeError
from adapters_kit.tasks.base import Features, Task, outputs_of
from adapters_kit.tasks.boxes import (
    FORMATS,
    Marked,
    average_precision,
    corners,
    format_of,
    marked,
    pycocotools,
    together,
    written,
)
from adapters_kit.tasks.images import check_image, open_image, size_of
from adapters_kit.tasks.labels import class_names, label_reader
from adapters_kit.tasks.opened import Opened, undecoded

_PIECE = 32  # pixels: of so many a side, models of this kind make one position


@dataclass(frozen=True)
class Found:
    """What the model finds in one picture.

    Attributes:
        loss: the model's own; 0 where nothing is known of the picture.
        size: width and height of the picture.
        boxes: (found, 4) as parts of the picture: left, top, right, bottom.
        classes, scores: (found,); likeliest first.
    """

    loss: float
    size: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray


class ObjectDetection(Task):
    """Boxes with a class each.

    Attributes:
        form: how the data writes boxes: one of `boxes.FORMATS`.
    """

    name = "object-detection"
    needs = (("image", "objects"), ("image", "boxes", "classes"))
    optional = ("width", "height")
    targets = ("objects", "boxes", "classes")
    metric = "map"
    higher_is_better = True
    own_loss = True
    unplanned = ("boxes", "classes", "owner", "size", "pixel_mask")

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Looks at the head of every picture and at every box; learns the classes and how boxes are written.

        Raises:
            DataError: a picture or a box that cannot be used, by row; boxes that can be read in several ways.
            MissingPackageError: pycocotools is not installed.
        """
        pycocotools()
        if self.recipe.training.max_length is not None:
            raise RecipeError(["training.max_length counts tokens, and pictures have none"])
        parts = [train] if test is None else [train, test]
        sizes = [self._sizes(data) for data in parts]
        found = [self._marked(data) for data in parts]
        self.form = self._format(found, sizes)
        seen = [[name for names in self._names(data) for name in names] for data in parts]
        if not seen[0]:
            raise DataError(f"No picture of the training rows has a box in column {self.target!r}.")
        given, declared = self.recipe.labels, self._declared(train)
        self.labels = class_names(
            seen[0], [name for part in seen[1:] for name in part], given, self.target, self.notes, declared, least=1
        )
        for one, size in zip(found, sizes, strict=True):
            self._whole(one, size, tell=True)

    def unlabelled(self, data: Dataset) -> list[int]:
        """Rows of which nobody says what is in the picture; an empty list says that nothing is."""
        return [row for row, value in enumerate(data[self.target][:]) if value is None]

    def found(self) -> dict[str, Any]:
        """As every task, and how boxes are written."""
        return {**super().found(), "training.max_length": None, "data.box_format": self.form}

    def bind(self, processor: Any, model: nn.Module) -> None:
        """Takes the image processor; a checkpoint with heads for these very classes keeps its own order of them.

        Raises:
            ModelError: no processor of pictures, or one that finds no boxes in a model's outputs.
        """
        self.processor = getattr(processor, "image_processor", processor)
        if not hasattr(self.processor, "post_process_object_detection"):
            raise ModelError(
                f"The processor of {self.recipe.model} is {type(self.processor).__name__}, which reads no boxes from a "
                "model's outputs. Copy preprocessor_config.json from the model that this one was made from."
            )
        self.max_length = self.longest = 1  # no tokens
        self.form = getattr(self, "form", None) or self.recipe.data.box_format or "xywh"
        self.labels = outputs_of(model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.masked = "pixel_mask" in inspect.signature(base.forward).parameters

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """Rows whose pictures are opened when their batch is made, with `boxes` (boxes, 4) as parts of the picture
        (left, top, right, bottom), `classes` and `crowd` (boxes,) where there are answers."""
        sizes = self._sizes(data)
        more: dict[str, list[Any]] = {"positions": [self._positions(*size) for size in sizes]}
        if answers:
            number = {name: index for index, name in enumerate(self.labels or [])}
            names = list(self._names(data))
            if strange := sorted({name for row in names for name in row} - number.keys()):
                raise DataError(
                    f"Column {self.target!r} has classes that the model does not know: {strange[:10]}; it knows "
                    f"{list(number)}."
                )
            whole = self._whole(self._marked(data), sizes)
            more["boxes"] = [boxes[kept] for boxes, kept, _ in whole]
            more["crowd"] = [crowd[kept] for _, kept, crowd in whole]
            more["classes"] = [
                np.array([number[name] for name in row], dtype=np.int64)[kept]
                for row, (_, kept, _) in zip(names, whole, strict=True)
            ]
        return Opened(data, {"image": self.columns["image"]}, range(len(data)), more)

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """`pixel_values` (rows, channels, height, width), padded with zeros behind, with `pixel_mask` where the model
        reads one; `size` (rows, 2): width and height of the files. Where known, of all boxes one after the other:
        `boxes` (boxes, 4) as centre and size, as parts of the picture; `classes`, and the row in the batch: `owner`.

        A model that is told what is padding counts from the picture's own edges, others from those of what they see.
        """
        pictures = [open_image(feature["image"], feature["row"]) for feature in features]
        pixels = [
            self.processor(images=[one], do_pad=False, return_tensors="pt")["pixel_values"][0] for one in pictures
        ]
        height, width = (max(one.shape[side] for one in pixels) for side in (1, 2))
        batch = {
            "pixel_values": torch.stack(
                [nn.functional.pad(one, (0, width - one.shape[2], 0, height - one.shape[1])) for one in pixels]
            ),
            "size": torch.tensor([one.size for one in pictures]),
            "row": torch.tensor([feature["row"] for feature in features]),
        }
        if self.masked:
            masks = torch.zeros(len(pixels), height, width, dtype=torch.long)
            for mask, one in zip(masks, pixels, strict=True):
                mask[: one.shape[1], : one.shape[2]] = 1
            batch["pixel_mask"] = masks
        if "boxes" not in features[0]:
            return batch
        boxes, classes, owner = [], [], []
        for place, (feature, one) in enumerate(zip(features, pixels, strict=True)):
            alone = ~feature["crowd"]
            part = [1.0, 1.0] if self.masked else [one.shape[2] / width, one.shape[1] / height]
            boxes.append(written(feature["boxes"][alone], "cxcywh-normalized", 1, 1) * np.array([*part, *part]))
            classes.append(feature["classes"][alone])
            owner.append(np.full(int(alone.sum()), place))
        batch["boxes"] = torch.from_numpy(np.concatenate(boxes)).float()
        batch["classes"] = torch.from_numpy(np.concatenate(classes))
        batch["owner"] = torch.from_numpy(np.concatenate(owner))
        return batch

    def _outputs(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        inputs: dict[str, Any] = {key: batch[key] for key in ("pixel_values", "pixel_mask") if key in batch}
        if "boxes" in batch:
            mine = [batch["owner"] == row for row in range(len(batch["pixel_values"]))]
            inputs["labels"] = [{"class_labels": batch["classes"][one], "boxes": batch["boxes"][one]} for one in mine]
        return model(**inputs)

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The model's own: boxes found and boxes marked are paired as they fit best, then compared."""
        loss: torch.Tensor = self._outputs(model, batch).loss
        return loss

    def run(self, model: nn.Module, features: Features, batch_size: int, *how: Any, **more: Any) -> list[Any]:
        """One picture after the other: what is found in one must not depend on the padding that others bring, and the
        loss of a picture is its own."""
        return super().run(model, features, 1, *how, **more)

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Found]:
        """What is found in each picture, the likeliest 100."""
        out = self._outputs(model, batch)
        plain = SimpleNamespace(logits=out.logits.float(), pred_boxes=out.pred_boxes.float())
        sizes = batch["size"].tolist()
        parts = self.processor.post_process_object_detection(plain, threshold=0.0, target_sizes=[(1, 1)] * len(sizes))
        loss, made = float(out.loss) if "boxes" in batch else 0.0, []
        for part, (width, height) in zip(parts, sizes, strict=True):
            order = part["scores"].argsort(descending=True, stable=True)[:100].cpu()
            boxes, classes, scores = (part[key].cpu()[order].numpy() for key in ("boxes", "labels", "scores"))
            made.append(Found(loss, (width, height), boxes.clip(0, 1), classes, scores))
        return made

    def score(self, results: Sequence[Found], features: Features) -> dict[str, float]:
        """The mean loss of a picture, and `boxes.average_precision`."""
        assert isinstance(features, Opened)
        loss = sum(one.loss for one in results) / max(len(results), 1)
        truth = list(zip(*(features.more[key] for key in ("boxes", "classes", "crowd")), strict=True))
        found = [(one.boxes, one.classes, one.scores) for one in results]
        return {"loss": loss, **average_precision(truth, found)}

    def show(self, result: Found, row: Mapping[str, Any]) -> dict[str, Any]:
        """`found`: each box that is likely enough, written as the data writes boxes, and the file's path."""
        value = row[self.columns["image"]]
        sure = result.scores >= self.recipe.data.min_score
        boxes = written(result.boxes[sure], self.form, *result.size)
        digits = 5 if self.form.endswith("normalized") else 1
        found = [
            {
                "label": (self.labels or [])[kind],
                "score": round(float(score), 6),
                "box": [round(x, digits) for x in box],
            }
            for kind, score, box in zip(result.classes[sure], result.scores[sure], boxes.tolist(), strict=True)
        ]
        return {**({"image": value} if isinstance(value, str) else {}), "found": found}

    def length(self, feature: Mapping[str, Any]) -> int:
        """Pieces of 32 × 32 pixels that the model sees."""
        return int(feature["positions"])

    def _positions(self, width: int, height: int) -> int:
        size = dict(self.processor.size)
        if size.get("height") and size.get("width"):
            return max(size["height"] * size["width"] // _PIECE**2, 1)
        short, long = size.get("shortest_edge") or 800, size.get("longest_edge") or 10**9
        scale = min(short / min(width, height), long / max(width, height))
        return max(round(scale * width) * round(scale * height) // _PIECE**2, 1)

    def _sizes(self, data: Dataset) -> list[tuple[int, int]]:
        """Width and height of every picture as it is seen, from its head.

        Raises:
            DataError: no picture, or one of another size than the data says; by row.
        """
        image, told = self.columns["image"], [self.columns.get(role) for role in ("width", "height")]
        names = [image, *(name for name in told if name)]
        sizes = []
        for row, cells in enumerate(undecoded(data, image).select_columns(names)):
            check_image(cells[image], row)
            sizes.append(size := size_of(cells[image], row))
            wanted = tuple(cells[name] if name else None for name in told)
            if None not in wanted and wanted != size:
                raise DataError(
                    f"Row {row + 1}: the data says that the picture has {wanted[0]} × {wanted[1]} pixels, the file has "
                    f"{size[0]} × {size[1]}: boxes would lie elsewhere. Take the file that was marked, or another row."
                )
        return sizes

    def _marked(self, data: Dataset) -> list[Marked]:
        """What the data says of every picture. Raises DataError, by row."""
        if "objects" in self.columns:
            cells = (marked(value, row) for row, value in enumerate(data[self.columns["objects"]][:]))
        else:
            both = zip(*(data[self.columns[role]][:] for role in ("boxes", "classes")), strict=True)
            cells = (None if boxes is None else together(boxes, names, row) for row, (boxes, names) in enumerate(both))
        return [cell if cell is not None else together([], [], 0) for cell in cells]

    def _kind(self, data: Dataset) -> Any:
        """The type of the column of classes, inside whatever holds it."""
        if "objects" not in self.columns:
            kind = data.features[self.columns["classes"]]
            return getattr(kind, "feature", kind)
        kind = data.features[self.columns["objects"]]
        kind = getattr(kind, "feature", kind)
        key = next((one.key for one in self._marked(data) if one.key), None)
        kind = kind.get(key) if isinstance(kind, Mapping) else None
        return getattr(kind, "feature", kind)

    def _declared(self, data: Dataset) -> list[str] | None:
        kind = self._kind(data)
        return list(kind.names) if isinstance(kind, ClassLabel) else None

    def _names(self, data: Dataset) -> Iterator[list[str]]:
        """The class of every box, by its name."""
        rows = [one.names for one in self._marked(data)]
        kind, column = self._kind(data), self.target
        schema = Schema({column: kind}) if isinstance(kind, ClassLabel) else None
        try:
            flat = Dataset.from_dict({column: [name for names in rows for name in names]}, features=schema)
        except (TypeError, ValueError) as error:  # pyarrow's, for names of several kinds
            raise DataError(f"Column {column!r}: the classes are not all of one kind ({error}).") from None
        read = label_reader(flat, column, self.recipe.labels) if len(flat) else None
        for row, names in enumerate(rows):
            found = [read(name, row) if read else None for name in names]
            if None in found:
                raise DataError(f"Row {row + 1}, box {found.index(None) + 1} of column {column!r} has no class.")
            yield [name for name in found if name is not None]

    def _format(self, found: Sequence[Sequence[Marked]], sizes: Sequence[Sequence[tuple[int, int]]]) -> str:
        """How boxes are written: as the recipe or the data says, else as they fit."""
        rows = [
            (one.boxes, *size)
            for part, of in zip(found, sizes, strict=True)
            for one, size in zip(part, of, strict=True)
        ]
        told = {one.told for part in found for one in part if one.told}
        form: str | None = self.recipe.data.box_format
        if form is None and len(told) == 1:
            form = told.pop()
        if form is None and any(len(boxes) for boxes, *_ in rows):
            form = format_of(rows)
            self.notes.say(f"Boxes are read as {form}, {FORMATS[form]}: no other way lets all lie in their pictures.")
        return form or "xywh"

    def _whole(
        self, found: Sequence[Marked], sizes: Sequence[tuple[int, int]], *, tell: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each picture: all boxes cut at its edges (`corners`), which of them are kept, and which are crowds."""
        cut, empty, made = 0, [], []
        for row, (one, size) in enumerate(zip(found, sizes, strict=True)):
            boxes = corners(one.boxes, self.form, *size)
            if (turned := (boxes[:, 2:] < boxes[:, :2]).any(1)).any():
                box = one.boxes[int(turned.argmax())].tolist()
                raise DataError(f"Row {row + 1}: the box {box} ends before it begins, read as {FORMATS[self.form]}.")
            inside = boxes.clip(0, 1)
            kept = np.asarray((inside[:, 2:] > inside[:, :2]).all(1))
            cut += int((np.abs(inside - boxes).max(1, initial=0) * max(size) > 1).sum())
            empty += [row] * int((~kept).sum())
            made.append((inside, kept, one.crowd))
        if tell and cut:
            self.notes.say(f"{cut:,} boxes reach over an edge of their picture: they are cut there.", boxes_cut=cut)
        if tell and empty:
            rows = ", ".join(str(row + 1) for row in dict.fromkeys(empty[:10]))
            self.notes.say(
                f"{len(empty):,} boxes have no area inside their picture and are left out (rows {rows}).",
                boxes_left_out=len(empty),
            )
        return made
