"""Folders of images or recordings: a class a folder, or beside a table that names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes
from adapters_kit.training.data.row_file import Format, read_file

IMAGES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
IMAGES |= {".jp2", ".j2k", ".tga"}
RECORDINGS = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au"}
MEDIA = {"image": IMAGES, "audio": RECORDINGS}


def medium(path: Path) -> str | None:
    """The role of a file that is one picture or one recording."""
    return next((role for role, suffixes in MEDIA.items() if path.suffix.lower() in suffixes), None)


def _files(folder: Path) -> list[tuple[Path, str | None]]:
    """(file, its role) of all files below a folder that are not hidden, in order."""
    return [(path, medium(path)) for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]


def media(folder: Path, notes: Notes) -> Dataset | None:
    """One row an image or a recording, its folder's name its class; or, without a class, those of the folder itself.

    Files deeper in a class's folder are of that class.
    """
    if not any(medium(path) for pattern in ("*/*", "*") for path in folder.glob(pattern)):
        return None
    found = _files(folder)
    media = [(path, role) for path, role in found if role is not None]
    if others := [path for path, role in found if role is None]:
        names = ", ".join(str(path.relative_to(folder)) for path in others[:5]) + ", …" * (len(others) > 5)
        notes.say(
            f"{folder.name}: {len(others):,} files are not read, as their names are of no image or recording that can "
            f"be: {names}.",
            files_not_read=len(others),
        )
    if len({role for _, role in media}) > 1:
        raise DataError(f"The folder {folder} holds images and recordings: keep each kind in a folder of its own.")
    classed = [
        {role: str(path), "label": path.relative_to(folder).parts[0]} for path, role in media if path.parent != folder
    ]
    beside = [{role: str(path)} for path, role in media if path.parent == folder]
    if classed and beside:
        notes.say(
            f"{folder.name}: {len(beside):,} files lie beside the classes' folders and are not read.",
            files_without_class=len(beside),
        )
    return Dataset.from_list(classed or beside)


def media_with_list(folder: Path, files: Sequence[Path], form: Format) -> Dataset | None:
    """Images or recordings beside a table `metadata` or `labels` that names them, as `datasets` lays them out."""
    lists = [path for path in files if path.stem.lower() in ("metadata", "labels", "annotations", "_annotations.coco")]
    if len(lists) != 1 or not any(medium(path) for path in folder.rglob("*")):
        return None
    (rows,) = read_file(lists[0], form).values()
    names = ("file_name", "image", "audio", "file", "filename", "path")
    column = next((name for name in names if name in rows.column_names), None)
    if column is None:
        raise DataError(
            f"{lists[0]} has no column file_name that names the files; it has: {', '.join(rows.column_names)}."
        )
    rows = located(rows, column, lists[0].parent)
    listed = {Path(name).resolve() for name in rows[column][:] if isinstance(name, str)}
    if left := [path for path, role in _files(folder) if role is not None and path.resolve() not in listed]:
        form.notes.say(
            f"{folder.name}: {len(left):,} files are not named in {lists[0].name} and are not read, the first "
            f"{left[0].relative_to(folder)}.",
            files_not_named=len(left),
        )
    return rows


def located(rows: Dataset, column: str, folder: Path) -> Dataset:
    """The rows with the paths in `column` that are relative to `folder` made whole."""
    names = rows[column][:]
    if not all(isinstance(name, str | None) for name in names):
        return rows
    whole = [name and _whole(name, folder) for name in names]
    if whole == names:
        return rows
    if rows.num_columns == 1:
        return Dataset.from_dict({column: whole})
    return rows.remove_columns(column).add_column(column, whole)


def _whole(name: str, folder: Path) -> str:
    """The path of a file; the name, if it is none. Windows' way of writing one is read too."""
    spellings = (name, name.replace("\\", "/"))
    ways = (way for spelling in spellings for way in (Path(spelling), folder / spelling))
    return name if len(name) > 1000 else str(next((way for way in ways if way.is_file()), name))
