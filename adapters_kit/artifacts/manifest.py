"""`manifest.json`: what a folder that was made here holds, file by file, and what it was made from."""

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adapters_kit.artifacts.files import write_json
from adapters_kit.artifacts.staging import MANIFEST, file_sha256
from adapters_kit.names import looks_like_path


def write_manifest(folder: Path, about: Mapping[str, Any], hashes: Mapping[str, str] | None = None) -> None:
    """Size and sha256 of every file of the folder, and where they come from.

    Args:
        about: what the folder was made from, named so that it says nothing about this machine.
        hashes: file name -> sha256, of files whose hash is known already.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {
        name: {"bytes": path.stat().st_size, "sha256": (hashes or {}).get(name) or file_sha256(path)}
        for name, path in names.items()
    }
    write_json(folder / MANIFEST, {"made_by": f"adapters-kit {version('adapters-kit')}", **about, "files": files})


def describe(place: str | os.PathLike) -> str:
    """How a shipped file names a model or an adapter: a hub id as it is, a folder or file of this machine by its last
    name alone (a path tells who made it and where)."""
    text = os.fspath(place)
    path = Path(text).expanduser()
    return path.resolve().name or text if text and (looks_like_path(place) or path.exists()) else text
