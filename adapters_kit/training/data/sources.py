"""What a recipe's `data` names: a file, a folder or a data set of the hub, as the parts that it has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from datasets import Audio, Dataset, DatasetDict, Features, Translation, Value, config, load_dataset
from huggingface_hub import constants

from adapters_kit.artifacts.hub_ping import endpoint, reachable
from adapters_kit.errors import AdapterError, DataError, did_you_mean
from adapters_kit.names import check_name, looks_like_file
from adapters_kit.recipe_sections import DataSpec
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.opened import undecoded
from adapters_kit.tasks.rows import in_parts, made
from adapters_kit.training.data.folders import read_folder
from adapters_kit.training.data.media import located, medium
from adapters_kit.training.data.row_file import Format, Parts, read_file

TRAIN_NAMES = ("train", "training")
TEST_NAMES = (
    *("test", "testing", "validation", "valid", "val", "dev", "eval", "heldout", "held_out"),
    # a data set with matched and mismatched parts
    *("test_matched", "validation_matched"),
)


@dataclass(frozen=True)
class Source:
    """The rows that a recipe names.

    Attributes:
        train: the rows to train on.
        held_out: parts that can be the held-out one, best first, by name; empty where a part is to be set aside.
        others: names of parts that are neither.
        folder: the folder that relative paths in the rows start from; None for a data set of the hub.
    """

    train: Dataset
    held_out: dict[str, Dataset] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def test(self) -> Dataset | None:
        """The first of the held-out parts."""
        return next(iter(self.held_out.values()), None)


def read(spec: DataSpec, notes: Notes | None = None) -> Source:
    """The data that a recipe names.

    Args:
        notes: told of what was guessed about the files, and of what is in them and not read.

    Raises:
        DataError: a file that is missing, empty, damaged or of an unknown kind.
    """
    form = Format(spec.encoding, spec.delimiter, notes if notes is not None else Notes())
    source = _source(spec.train, spec.subset, form)
    if spec.test is not None:
        # A folder, a document or a hub id given as `test` stands for its held-out part.
        other = _source(spec.test, spec.subset, form)
        found = other.held_out or {Path(spec.test).name: other.train}
        source = Source(source.train, found, source.others, source.folder)
    for name, part in (("training", source.train), ("held-out", source.test)):
        if part is not None and len(part) == 0:
            where = spec.train if name == "training" else spec.test or spec.train
            raise DataError(f"The {name} data has no rows: {where}")
    return source


def read_rows(source: str | Path, spec: DataSpec | None = None, notes: Notes | None = None) -> Dataset:
    """One set of rows, for evaluation and prediction: a file, or the held-out part of a folder or hub data set.

    Args:
        spec: whose encoding and delimiter hold for the file too.

    Raises:
        DataError: as for `read`.
    """
    encoding, delimiter = (spec.encoding, spec.delimiter) if spec is not None else (None, None)
    found = _source(str(source), None, Format(encoding, delimiter, notes if notes is not None else Notes()))
    rows = found.test if found.test is not None else found.train
    if len(rows) == 0:
        raise DataError(f"{source} has no rows.")
    for name, first in rows[0].items():
        if found.folder is not None and isinstance(first, str) and len(first) < 1000 and medium(Path(first)):
            rows = located(rows, name, found.folder)
    return rows


def _source(name: str, subset: str | None, form: Format) -> Source:
    if address := _ADDRESS.match(name):
        raise DataError(f"{name} is an address, and no file here. {_to_fetch(name, address['scheme'])}")
    check_name(name, DataError)
    path = Path(name).expanduser()
    try:
        if subset is not None and path.exists():
            path = _subset(path, subset)
        if path.is_dir():
            return _parted(read_folder(path, form), name, path)
        if path.is_file() and (role := medium(path)) is not None:
            return Source(Dataset.from_list([{role: str(path)}]))
        if path.is_file():
            return _parted(read_file(path, form), name, path.parent)
        if path.exists():
            raise DataError(
                f"{name!r} is neither a file nor a folder: a pipe, a socket or a device cannot be read twice."
            )
    except PermissionError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise DataError(f"No data file {name!r}: {error}.") from error
    if looks_like_file(name):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) if siblings else f"The folder {path.parent} does not exist either."
        raise DataError(f"No data file {name!r}. {hint}")
    return _parted(_from_hub(name, subset), name, None)


_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_HUB = re.compile(
    r"(?:hf://|https?://(?:huggingface\.co|hf\.co)/)datasets/(?P<id>[\w.-]+/[\w.-]+|[\w.-]+(?=/?$))"
    r"(?:/?$|(?:@[\w.-]+|/(?:resolve|blob|tree|raw)/[\w.%-]+)?/(?P<file>[^?]*))",
    re.IGNORECASE,
)


def _to_fetch(name: str, scheme: str) -> str:
    """How rows at an address become something that a recipe can name."""
    if hub := _HUB.match(name):
        whole = f"The data set itself: data: {hub['id']}"
        if not hub["file"]:
            return whole
        fetched = f"hf download --repo-type dataset {hub['id']} {hub['file']} --local-dir data"
        return f"{whole}. That file of it: {fetched}, then data: data/{hub['file']}"
    file = Path(urlsplit(name).path).name or "data.csv"
    if scheme.lower() in ("http", "https"):
        return f"Fetch it first: curl -L -o {file} '{name}', then data: {file}"
    if scheme.lower() == "file":
        return f"Name its path: data: {urlsplit(name).path}"
    return f"Copy it here with the tool of that service, then data: {file}"


def _subset(path: Path, subset: str) -> Path:
    """The folder of a configuration inside the folder of a data set."""
    if (path / subset).is_dir():
        return path / subset
    inside = [entry.name for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []
    hint = did_you_mean(subset, inside) if inside else "Leave data.subset out: it chooses among the folders in one."
    raise DataError(f"data.subset: {path} has no folder {subset!r}. {hint}")


def _from_hub(name: str, subset: str | None) -> Parts:
    try:
        with _asked_briefly():
            found = load_dataset(name, subset)
    except Exception as error:  # the hub library has no common root for what can go wrong
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not reachable():
            raise DataError(
                f"There is no file or folder {name!r} here, the cache has no data set of that name, and the hub "
                f"({endpoint()}) does not answer. Check the name, or the network; behind a mirror set HF_ENDPOINT."
            ) from error
        raise DataError(f"{name!r} is neither a file here nor a data set that the hub gives: {first_line}") from error
    if not isinstance(found, DatasetDict):
        raise DataError(f"{name!r} is a data set of the hub that is only streamed; download it and name its files.")
    return dict(found)


@contextmanager
def _asked_briefly() -> Iterator[None]:
    """The cache alone is looked at where the hub does not answer: its library would ask again for half a minute."""
    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if not reachable():
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _parted(parts: Mapping[str, Dataset], name: str, folder: Path | None) -> Source:
    parts = {part: _languages(_undecoded(rows)) for part, rows in parts.items()}
    train = next((parts[part] for part in TRAIN_NAMES if part in parts), None)
    if train is None:
        raise DataError(f"{name} has no train part; it has: {', '.join(parts)}.")
    held_out = {part: parts[part] for part in TEST_NAMES if part in parts}
    others = tuple(part for part in parts if part not in held_out and part not in TRAIN_NAMES)
    return Source(train, held_out, others, folder)


def _undecoded(rows: Dataset) -> Dataset:
    """Recordings as bytes or paths."""
    for name, kind in rows.features.items():
        if isinstance(kind, Audio):
            rows = undecoded(rows, name)
    return rows


def _languages(rows: Dataset) -> Dataset:
    """A column of `{"en": …, "de": …}`, as translations are published, as the columns `translation.en` and so on."""
    for name, kind in rows.features.items():
        fields = kind.languages if isinstance(kind, Translation) else kind if isinstance(kind, dict) else ()
        if name not in ("translation", "translations") or not len(fields):
            continue
        if isinstance(kind, dict) and not all(getattr(field, "dtype", "") == "string" for field in kind.values()):
            continue
        rows = _by_language(rows, name, fields)
    return rows


def _by_language(rows: Dataset, name: str, languages: Iterable[str]) -> Dataset:
    kinds = {key: kind for key, kind in rows.features.items() if key != name}
    kinds |= {f"{name}.{language}": Value("string") for language in languages}

    def parts() -> Iterator[dict[str, list[Any]]]:
        for _, part in in_parts(rows, rows.column_names):
            cells = part.pop(name)
            for language in languages:
                part[f"{name}.{language}"] = [None if cell is None else cell[language] for cell in cells]
            yield part

    return made(parts(), Features(kinds))
