"""What a text that a user gave stands for, by its looks: a path, a hub id, an adapter folder. Floor 0, no torch."""

import os
import re
from pathlib import Path

from adapters_kit.errors import AdapterError

ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a folder an adapter folder."""

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.\-]*(/[A-Za-z0-9_][\w.\-]*)?", re.ASCII)
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, as systems have it
_SUFFIX = re.compile(r"\.[A-Za-z]\w{0,7}")


def looks_like_path(name: str | os.PathLike[str]) -> bool:
    """Whether `name` cannot be a hub id: `./x`, `~/x`, `/x`, `a/b/c`, `a\\b`, a `Path`. `a/b` may be either.

    Example:
        >>> [looks_like_path(name) for name in ("models/tiny", "runs/a/adapter", "./tiny", "my models")]
        [False, True, True, True]
    """
    return isinstance(name, os.PathLike) or not _HUB_ID.fullmatch(name)


def looks_like_folder(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is meant as a folder where the alternative is a short name without a slash, as methods have."""
    return looks_like_path(name) or "/" in os.fspath(name)


def looks_like_file(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is meant as a file or folder here and not as a hub id: it looks like a path, or has a suffix.

    Example:
        >>> [looks_like_file(name) for name in ("imdb", "reviews.csv", "org/data-v1.2")]
        [False, True, False]
    """
    return looks_like_path(name) or bool(_SUFFIX.fullmatch(Path(name).suffix))


def check_name(name: str | os.PathLike[str], error: type[AdapterError]) -> None:
    """Refuse what no disk and no hub has a name for; asked whether it exists, the system would answer with an error.

    Raises:
        AdapterError: of the type given.
    """
    text = os.fspath(name)
    wrong = None
    try:
        parts = os.fsencode(text).split(b"/")
    except UnicodeEncodeError as half:
        wrong = f"the character at {half.start} is half of one"
    else:
        if b"\0" in os.fsencode(text):
            wrong = "it holds a zero byte"
        elif max(map(len, parts)) > _LONGEST_NAME or len(text) > _LONGEST_PATH:
            wrong = f"it has {len(text):,} characters, where {_LONGEST_NAME} between two slashes are the most"
    if wrong is not None:
        shown = ascii(text[:60]) + (" …" if len(text) > 60 else "")
        raise error(f"{shown} is no name of a file, a folder or a model: {wrong}.")


def is_adapter_folder(path: str | os.PathLike[str]) -> bool:
    """Whether an adapter is saved in that folder, by whichever library."""
    return os.path.isfile(os.path.join(path, ADAPTER_CONFIG))  # of a name that nothing can have: no


def adapter_inside(name: str) -> str:
    """The adapter's folder where a run folder is named; every other name as it is, methods' too."""
    inside = os.path.join(name, "adapter")
    return inside if looks_like_folder(name) and not is_adapter_folder(name) and is_adapter_folder(inside) else name
