"""Folders of files: which are to train on and which are held out, all shards of each; classes and values by folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_from_disk

from adapters_kit.errors import DataError
from adapters_kit.recipe_sections import PACKED_SUFFIXES, rows_suffix
from adapters_kit.training.data.joined import joined, listed, partitioned, row_files, texts_by_class
from adapters_kit.training.data.json_rows import SPLITS
from adapters_kit.training.data.media import media, media_with_list
from adapters_kit.training.data.row_file import READERS, Format, Parts, holds_rows

_PARTS = "|".join(SPLITS)
# train, train-00000-of-00002, train_1, test.2; and the_corpus-train, the_corpus.train-00000-of-00002
_SHARD = r"(?:[-_.]?(?P<number>\d+)(?:[-_]of[-_](?P<of>\d+))?)?"
_PLAIN = re.compile(rf"(?P<part>{_PARTS}){_SHARD}", re.IGNORECASE)
_NAMED = re.compile(rf"(?P<stem>.+?)[-_.](?P<part>{_PARTS}){_SHARD}", re.IGNORECASE)


def read_folder(folder: Path, form: Format) -> Parts:
    """The parts of a folder: saved by `datasets`; files and folders named after the parts; or rows of one part, as
    shards, or in folders named after classes or values.

    Raises:
        DataError: no rows that can be told to be the training part; a shard that is missing.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return _saved(folder)
    entries = listed(folder)
    files = [path for path in entries if path.is_file() and holds_rows(path)]
    folders = [path for path in entries if path.is_dir()]
    grouped = _by_part([*files, *folders])
    if "train" in grouped or "training" in grouped:
        if left := [path for path in entries if not any(path in members for members in grouped.values())]:
            told = ", ".join(path.name + "/" * path.is_dir() for path in left[:10])
            form.notes.say(f"{folder.name}: {told} belong to no part and are not read as rows.")
        return {part: _part(members, form) for part, members in grouped.items()}
    if not files and (found := media(folder, form.notes)) is not None:
        return {"train": found}
    if (found := media_with_list(folder, files, form)) is not None:
        return {"train": found}
    if (parts := partitioned(folder, form)) is not None:
        return parts
    if "data" in {path.name.lower() for path in folders} and not files:  # as the hub lays them out
        return read_folder(next(path for path in folders if path.name.lower() == "data"), form)
    if not files and (found := texts_by_class(folder, form)) is not None:
        return {"train": found}
    if shards := _numbered(files):
        return {"train": joined(shards, form)}
    present = ", ".join(path.name for path in entries[:10]) or "nothing"
    one = next((path for path in [*files, *folders] if path.is_dir() or rows_suffix(path) in READERS), None)
    raise DataError(
        f"The folder {folder} needs one train file (train.csv, train.jsonl, train.parquet …) and may have a test file, "
        "folders train/ and test/, or one sub-folder of images, recordings or .txt files a class. It holds: "
        f"{present}." + (f" If one of them is the data, name it: data: {one}" if one else "")
    )


def _saved(folder: Path) -> Parts:
    try:
        found = load_from_disk(str(folder))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"Cannot read the data set saved in {folder}: {reason}") from error
    return dict(found) if isinstance(found, DatasetDict) else {"train": found}


def _stem(path: Path) -> str:
    """A file's name without what says how it is read; a folder's name."""
    if path.is_dir():
        return path.name
    return Path(path.stem).stem if path.suffix.lower() in PACKED_SUFFIXES else path.stem


def _by_part(entries: Sequence[Path]) -> dict[str, list[Path]]:
    """The files and folders of each part: by name alone, or all with the same word before it (corpus-train).

    Beside tables, folders without any file of rows are where the tables' images and recordings lie.
    """
    plain = [(path, match) for path in entries if (match := _PLAIN.fullmatch(_stem(path)))]
    if not any(match["part"].lower() in ("train", "training") for _, match in plain):
        plain = [(path, match) for path in entries if (match := _NAMED.fullmatch(_stem(path)))]
        stems = {match["stem"] for _, match in plain}
        if len(stems) > 1:
            return {}
    tables = any(path.is_file() for path, _ in plain)
    found: dict[str, list[tuple[Path, re.Match[str]]]] = {}
    for path, match in plain:
        if path.is_file() or not tables or row_files(path):
            found.setdefault(match["part"].lower(), []).append((path, match))
    return {part: _whole(members) for part, members in found.items()}


def _whole(members: list[tuple[Path, re.Match[str]]]) -> list[Path]:
    """The files of one part, all of one kind, and all of those that say how many there are; or its one folder."""
    kinds = {"/" if path.is_dir() else rows_suffix(path) for path, _ in members}
    unnumbered = [path for path, match in members if match["number"] is None or path.is_dir()]
    if len(kinds) > 1 or (unnumbered and len(members) > 1):
        names = ", ".join(path.name + "/" * path.is_dir() for path, _ in members)
        raise DataError(
            f"{names} could each be the same part of the data: keep one of them, or name the one that is meant: "
            f"data: {{train: {members[0][0]}}}"
        )
    numbers = {int(match["number"]) for _, match in members if match["of"] is not None}
    for path, match in members:
        if match["of"] is not None and len(numbers) != int(match["of"]):
            raise DataError(f"{path.parent}: {path.name} is one of {int(match['of'])} shards, {len(numbers)} are here.")
    return [path for path, _ in members]


def _numbered(files: Sequence[Path]) -> list[Path]:
    """Shards without the name of a part, such as part-00000 and 0001, if all files are such and of one kind."""
    alike = {(re.sub(r"\d+", "0", _stem(path)), rows_suffix(path)) for path in files}
    numbered = all(re.search(r"\d", _stem(path)) for path in files)
    return list(files) if len(alike) == 1 and len(files) > 1 and numbered else []


def _part(members: Sequence[Path], form: Format) -> Dataset:
    return _part_folder(members[0], form) if members[0].is_dir() else joined(members, form)


def _part_folder(folder: Path, form: Format) -> Dataset:
    """All files of a folder that is itself a part, or its images, recordings or texts, a class a folder."""
    files = row_files(folder)
    for found in (media_with_list(folder, files, form), media(folder, form.notes), texts_by_class(folder, form)):
        if found is not None:
            return found
    if (parts := partitioned(folder, form)) is not None:
        if set(parts) != {"train"}:
            raise DataError(f"The folder {folder} is one part and holds the parts {', '.join(parts)}: name the latter.")
        return parts["train"]
    if not files:
        raise DataError(
            f"The folder {folder} holds no file that can be read: {', '.join(READERS)}, images or recordings."
        )
    if len({rows_suffix(path) for path in files}) > 1:
        raise DataError(
            f"The folder {folder} holds files of several kinds: {', '.join(p.name for p in files[:10])}. Keep one kind."
        )
    below = sorted({str(path.parent.relative_to(folder)) for path in files} - {"."})
    if below:
        form.notes.say(f"{folder.name}: the names of the folders in it ({', '.join(below[:10])}) are not used.")
    return joined(files, form)
