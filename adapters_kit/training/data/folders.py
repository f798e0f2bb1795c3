"""Folders of files: which are to train on and which are held out, all shards of each; folders of images, recordings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

from adapters_kit.errors import DataError
from adapters_kit.training.data.json_rows import SPLITS
from adapters_kit.training.data.row_file import READERS, Format, Parts, read_file

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
RECORDINGS = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au"}
MEDIA = {"image": IMAGES, "audio": RECORDINGS}
_PARTS = "|".join(SPLITS)
# train, train-00000-of-00002, train_1, test.2; and the_corpus-train, the_corpus.train-00000-of-00002
_SHARD = r"(?:[-_.]?(?P<number>\d+)(?:[-_]of[-_](?P<of>\d+))?)?"
_PLAIN = re.compile(rf"(?P<part>{_PARTS}){_SHARD}", re.IGNORECASE)
_NAMED = re.compile(rf"(?P<stem>.+?)[-_.](?P<part>{_PARTS}){_SHARD}", re.IGNORECASE)


def read_folder(folder: Path, form: Format) -> Parts:
    """The parts of a folder: saved by `datasets`, files named after the parts, folders named after them, or images or
    recordings.

    Raises:
        DataError: no rows that can be told to be the training part; a shard that is missing.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return _saved(folder)
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    files = [path for path in entries if path.is_file() and path.suffix.lower() in READERS]
    folders = {path.name.lower(): path for path in entries if path.is_dir()}
    grouped = _by_part(files)
    if _train_of(grouped):
        unread = [path.name for path in files if not any(path in members for members in grouped.values())]
        if unread:
            form.notes.say(f"{folder.name}: {', '.join(unread[:10])} belong to no part and are not read.")
        return {part: _joined(members, form) for part, members in grouped.items()}
    named = {name: path for name, path in folders.items() if name in SPLITS}
    if _train_of(named):
        return {name: _part_folder(path, form) for name, path in named.items()}
    if not files and (found := _media(folder)) is not None:
        return {"train": found}
    if (listed := _media_with_list(folder, files, form)) is not None:
        return {"train": listed}
    if "data" in folders and not files:  # as the hub lays them out
        return read_folder(folders["data"], form)
    shards = _numbered(files)
    if shards:
        return {"train": _joined(shards, form)}
    present = ", ".join(path.name for path in entries[:10]) or "nothing"
    raise DataError(
        f"The folder {folder} needs one train file (train.csv, train.jsonl, train.parquet …) and may have a test file, "
        f"folders train/ and test/, or one sub-folder of images or recordings a class. It holds: {present}."
    )


def _saved(folder: Path) -> Parts:
    try:
        found = load_from_disk(str(folder))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"Cannot read the data set saved in {folder}: {reason}") from error
    return dict(found) if isinstance(found, DatasetDict) else {"train": found}


def _train_of(parts: Mapping[str, object]) -> bool:
    return "train" in parts or "training" in parts


def _by_part(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each part: by name alone, or all with the same word before it (corpus-train, corpus-test)."""
    plain = [(path, match) for path in files if (match := _PLAIN.fullmatch(path.stem))]
    if not any(match["part"].lower() in ("train", "training") for _, match in plain):
        plain = [(path, match) for path in files if (match := _NAMED.fullmatch(path.stem))]
        stems = {match["stem"] for _, match in plain}
        if len(stems) > 1:
            return {}
    found: dict[str, list[tuple[Path, re.Match[str]]]] = {}
    for path, match in plain:
        found.setdefault(match["part"].lower(), []).append((path, match))
    return {part: _whole(members) for part, members in found.items()}


def _whole(members: list[tuple[Path, re.Match[str]]]) -> list[Path]:
    """The files of one part, all of one kind, and all of those that say how many there are."""
    kinds = {path.suffix.lower() for path, _ in members}
    unnumbered = [path for path, match in members if match["number"] is None]
    if len(kinds) > 1 or (unnumbered and len(members) > 1):
        names = ", ".join(path.name for path, _ in members)
        raise DataError(f"{names} could each be the same part of the data: keep one of them, or name the file itself.")
    numbers = {int(match["number"]) for _, match in members if match["of"] is not None}
    for path, match in members:
        if match["of"] is not None and len(numbers) != int(match["of"]):
            raise DataError(f"{path.parent}: {path.name} is one of {int(match['of'])} shards, {len(numbers)} are here.")
    return [path for path, _ in members]


def _numbered(files: Sequence[Path]) -> list[Path]:
    """Shards without the name of a part, such as part-00000 and 0001, if all files are such and of one kind."""
    alike = {(re.sub(r"\d+", "0", path.stem), path.suffix.lower()) for path in files}
    numbered = all(re.search(r"\d", path.stem) for path in files)
    return list(files) if len(alike) == 1 and len(files) > 1 and numbered else []


def _joined(files: Sequence[Path], form: Format) -> Dataset:
    parts: list[Dataset] = []
    for path in files:
        inside = read_file(path, form)
        if len(inside) > 1:
            raise DataError(f"{path} holds the parts {', '.join(inside)} itself: name that file instead of its folder.")
        parts += inside.values()
    for path, part in zip(files[1:], parts[1:], strict=True):
        if set(part.column_names) != set(parts[0].column_names):
            raise DataError(
                f"{path.name} has the columns {', '.join(part.column_names)}, {files[0].name} has "
                f"{', '.join(parts[0].column_names)}: shards of one part have the same."
            )
    try:
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    except (pa.ArrowException, ValueError, TypeError) as error:
        names = ", ".join(path.name for path in files[:5])
        raise DataError(f"{names} do not have columns of the same kind: {str(error).splitlines()[0]}") from error


def _part_folder(folder: Path, form: Format) -> Dataset:
    """All files of a folder that is itself a part, or its images."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in READERS and not p.name.startswith("."))
    listed = _media_with_list(folder, files, form)
    if listed is not None:
        return listed
    if (found := _media(folder)) is not None:
        return found
    if not files:
        raise DataError(
            f"The folder {folder} holds no file that can be read: {', '.join(READERS)}, images or recordings."
        )
    if len({path.suffix.lower() for path in files}) > 1:
        raise DataError(f"The folder {folder} holds files of several kinds: {', '.join(p.name for p in files[:10])}.")
    return _joined(files, form)


def medium(path: Path) -> str | None:
    """The role of a file that is one picture or one recording."""
    return next((role for role, suffixes in MEDIA.items() if path.suffix.lower() in suffixes), None)


def _media(folder: Path) -> Dataset | None:
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


def _media_with_list(folder: Path, files: Sequence[Path], form: Format) -> Dataset | None:
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
