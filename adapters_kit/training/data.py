"""Reading examples: files, folders and hub data sets become `datasets.Dataset`s; finding columns; making splits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from pyarrow import csv, parquet

from adapters_kit.errors import DataError, did_you_mean
from adapters_kit.names import looks_like_file
from adapters_kit.recipe import DataSpec

# Names under which a role's column is recognised, best first.
ALIASES: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "review", "content", "comment", "sentence1", "premise", "question1", "document"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2", "text2"),
    "label": ("label", "labels", "class", "category", "sentiment", "rating", "stars", "score"),
    "prompt": ("prompt", "instruction", "question", "query", "input"),
    "completion": ("completion", "response", "answer", "output", "chosen"),
    "input": ("input", "context"),
    "history": ("history",),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "messages": ("messages", "conversation", "conversations", "chat"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "labels", "pos_tags"),
    "question": ("question", "query"),
    "context": ("context", "passage", "paragraph"),
    "answers": ("answers", "answer"),
    "source": ("source", "src", "input", "document", "article", "text", "question"),
    "target": ("target", "tgt", "output", "summary", "highlights", "translation", "answer"),
    "image": ("image", "img", "picture", "file_name", "file", "path"),
}
_TEST_NAMES = ("test", "validation", "valid", "dev", "eval", "heldout", "held_out")
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Splits(NamedTuple):
    """The rows to train on and, where the source has them, the held-out ones."""

    train: Dataset
    test: Dataset | None


def read(spec: DataSpec) -> Splits:
    """The data that a recipe names.

    Raises:
        DataError: a file that is missing, empty, unreadable or of an unknown kind.
    """
    train, test = _read_source(spec.train, spec.subset)
    if spec.test is not None:
        # A folder or hub id given as `test` stands for its test part.
        first, second = _read_source(spec.test, spec.subset)
        test = second if second is not None else first
    for name, part in (("training", train), ("held-out", test)):
        if part is not None and len(part) == 0:
            raise DataError(
                f"The {name} data has no rows: {spec.train if name == 'training' else spec.test or spec.train}"
            )
    return Splits(train, test)


def read_rows(source: str | Path) -> Dataset:
    """One set of rows, for evaluation and prediction: a file, or the test part of a folder or hub data set."""
    train, test = _read_source(str(source), None)
    found = test if test is not None else train
    if len(found) == 0:
        raise DataError(f"{source} has no rows.")
    return found


def _read_source(name: str, subset: str | None) -> tuple[Dataset, Dataset | None]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return read_table(path), None
    if looks_like_file(name):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) if siblings else f"The folder {path.parent} does not exist either."
        raise DataError(f"No data file {name!r}. {hint}")
    try:
        found = load_dataset(name, subset)
    except Exception as error:  # the hub library has no common root for what can go wrong
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name!r} is neither a file here nor a data set that the hub gives: {first_line}") from error
    return _two_parts(found, name)


def _two_parts(found: Mapping[str, Dataset], name: str) -> tuple[Dataset, Dataset | None]:
    if "train" not in found:
        raise DataError(f"{name} has no train part; it has: {', '.join(found)}.")
    return found["train"], next((found[part] for part in _TEST_NAMES if part in found), None)


def _read_folder(folder: Path) -> tuple[Dataset, Dataset | None]:
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        found = load_from_disk(str(folder))
        return _two_parts(found, str(folder)) if isinstance(found, DatasetDict) else (found, None)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in READERS)
    train = [p for p in files if p.stem.lower().startswith("train")]
    test = [p for wanted in _TEST_NAMES for p in files if p.stem.lower().startswith(wanted)]
    if len(train) == 1:
        return read_table(train[0]), read_table(test[0]) if test else None
    if not files and any(p.suffix.lower() in _IMAGES for p in folder.glob("*/*")):
        return _image_folder(folder), None
    if not files and (folder / "train").is_dir():
        held_out = next((folder / part for part in _TEST_NAMES if (folder / part).is_dir()), None)
        return _image_folder(folder / "train"), _image_folder(held_out) if held_out else None
    present = ", ".join(p.name for p in sorted(folder.iterdir())[:10]) or "nothing"
    raise DataError(
        f"The folder {folder} needs one train file (train.csv, train.jsonl, train.parquet …) and may have a test file, "
        f"or one sub-folder of images a class. It holds: {present}."
    )


def _image_folder(folder: Path) -> Dataset:
    rows = [
        {"image": str(p), "label": p.parent.name} for p in sorted(folder.glob("*/*")) if p.suffix.lower() in _IMAGES
    ]
    if not rows:
        raise DataError(f"{folder} has no sub-folders with images ({', '.join(sorted(_IMAGES))}).")
    return Dataset.from_list(rows)


def read_table(path: Path) -> Dataset:
    """One file as a data set; the kind goes by the suffix.

    Raises:
        DataError: unknown suffix, or content that does not parse (with the line, where it is known).
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"Cannot read {path}: {path.suffix or 'no suffix'} is none of {', '.join(READERS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")
    try:
        return reader(path)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}") from error


def _read_csv(path: Path) -> Dataset:
    table = csv.read_csv(
        path,
        # One block, so that a column's type is decided by all of its rows and not by the first megabyte.
        read_options=csv.ReadOptions(block_size=max(path.stat().st_size + 1, 1 << 20)),
        parse_options=csv.ParseOptions(
            newlines_in_values=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ","
        ),
        # The words NA, null and None are text here, and missing only in columns of numbers.
        convert_options=csv.ConvertOptions(strings_can_be_null=False),
    )
    return Dataset(table)


def _read_jsonl(path: Path) -> Dataset:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error.msg}): {line.strip()[:80]}") from None
            if not isinstance(rows[-1], dict):
                raise DataError(f"{path}, line {number}: each line is one {{...}} object, this is {line.strip()[:80]}")
    return _from_rows(rows)


def _read_json(path: Path) -> Dataset:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return _read_jsonl(path)
    if isinstance(rows, dict):
        rows = next((v for v in rows.values() if isinstance(v, list)), [rows])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} holds no list of objects.")
    return _from_rows(rows)


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return Dataset(pa.table({key: pa.array([row.get(key) for row in rows]) for key in keys}))


def _read_text(path: Path) -> Dataset:
    """One example a paragraph; if there are no blank lines, one a line."""
    text = path.read_text(encoding="utf-8")
    parts = text.split("\n\n") if "\n\n" in text.strip() else text.splitlines()
    return Dataset.from_dict({"text": [part.strip() for part in parts if part.strip()]})


READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": lambda path: Dataset(parquet.read_table(path)),
    ".txt": _read_text,
    ".md": _read_text,
}


def recognise(
    data: Dataset, given: Mapping[str, str], alternatives: Sequence[Sequence[str]], optional: Sequence[str] = ()
) -> dict[str, str]:
    """Which column plays which role.

    Args:
        given: role to column name, from the user; these are binding.
        alternatives: sets of roles, any one of which is enough; the first that can be filled wins.
        optional: roles used if their column is there.

    Raises:
        DataError: with the columns that exist and how to name them.
    """
    names = data.column_names
    missing = {role: column for role, column in given.items() if column not in names}
    if missing:
        told = "; ".join(f"{role}: {column!r}. {did_you_mean(column, names)}" for role, column in missing.items())
        raise DataError(f"data.columns names columns that the data does not have. {told}")
    lower = {name.lower().strip(): name for name in names}

    def find(role: str, taken: Sequence[str]) -> str | None:
        if role in given:
            return given[role]
        return next((lower[a] for a in ALIASES.get(role, (role,)) if a in lower and lower[a] not in taken), None)

    ranked = sorted(alternatives, key=lambda roles: -len(set(roles) & set(given)))
    for roles in ranked:
        found: dict[str, str] = {}
        for role in roles:
            column = find(role, list(found.values()))
            if column is not None:
                found[role] = column
        if len(found) == len(roles):
            for role in optional:
                column = find(role, list(found.values()))
                if column is not None:
                    found[role] = column
            return found
    wanted = " or ".join(" and ".join(roles) for roles in alternatives)
    example = ", ".join(f"{role}: NAME" for role in alternatives[-1])
    raise DataError(
        f"Cannot tell which column is what: the task needs {wanted}, the data has the columns {', '.join(names)}. "
        f"Name them in the recipe: data.columns: {{{example}}}"
    )


def take(data: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most `limit` rows, drawn with the seed."""
    return data if limit is None or limit >= len(data) else data.shuffle(seed=seed).select(range(limit))


def split(data: Dataset, size: float, seed: int, classes: Sequence[Any] | None = None) -> Splits:
    """Sets aside a held-out part, of the same mixture of classes where `classes` (one per row) is given.

    Args:
        size: a fraction below 1, or a number of rows.
    """
    from sklearn.model_selection import train_test_split

    count = round(size * len(data)) if size < 1 else int(size)
    count = max(count, 1)
    if count >= len(data):
        raise DataError(f"Cannot set {count} of {len(data)} rows aside: lower data.test_size or give data.test.")
    stratify = None
    if classes is not None:
        counts: dict[Any, int] = {}
        for item in classes:
            counts[item] = counts.get(item, 0) + 1
        possible = min(counts.values()) >= 2 and count >= len(counts) and len(data) - count >= len(counts)
        stratify = list(classes) if possible else None
    train, test = train_test_split(range(len(data)), test_size=count, random_state=seed, stratify=stratify)
    return Splits(data.select(sorted(train)), data.select(sorted(test)))
