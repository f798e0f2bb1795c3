"""Folders of images or recordings: a class a folder, or beside a table that names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from adapters_kit.errors import DataError
from adapters_kit.training.data.row_file import Format, read_file

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
RECORDINGS = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au"}
MEDIA = {"image": IMAGES, "audio": RECORDINGS}


def medium(path: Path) -> str | None:
    """The role of a file that is one picture or one recording."""
    return next((role for role, suffixes in MEDIA.items() if path.suffix.lower() in suffixes), None)


def media(folder: Path) -> Dataset | None:
    """One row an image or a recording, its folder's name its class; or, without a class, those of the folder itself."""
    for pattern, classed in (("*/*", True), ("*", False)):
        found = [(path, medium(path)) for path in sorted(folder.glob(pattern)) if path.is_file()]
        kinds = {role for _, role in found if role}
        if len(kinds) > 1:
            raise DataError(f"The folder {folder} holds images and recordings: keep each kind in a folder of its own.")
        rows = [{role: str(path), **({"label": path.parent.name} if classed else {})} for path, role in found if role]
        if rows:
            return Dataset.from_list(rows)
    return None


def media_with_list(folder: Path, files: Sequence[Path], form: Format) -> Dataset | None:
    """Images or recordings beside a table `metadata` or `labels` that names them, as `datasets` lays them out."""
    lists = [path for path in files if path.stem.lower() in ("metadata", "labels", "annotations")]
    if len(lists) != 1 or not any(medium(path) for path in folder.rglob("*")):
        return None
    (rows,) = read_file(lists[0], form).values()
    names = ("file_name", "image", "audio", "file", "filename", "path")
    column = next((name for name in names if name in rows.column_names), None)
    if column is None:
        raise DataError(
            f"{lists[0]} has no column file_name that names the files; it has: {', '.join(rows.column_names)}."
        )
    return located(rows, column, lists[0].parent)


def located(rows: Dataset, column: str, folder: Path) -> Dataset:
    """The rows with the paths in `column` that are relative to `folder` made whole."""
    names = rows[column][:]
    if not all(isinstance(name, str) for name in names):
        return rows
    whole = [name if Path(name).is_file() or not (folder / name).is_file() else str(folder / name) for name in names]
    return rows if whole == names else rows.remove_columns(column).add_column(column, whole)
