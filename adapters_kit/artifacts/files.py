"""Files that are complete or not there: written beside their place, flushed, renamed. Permissions are the umask's."""

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

_BESIDE = re.compile(r"\.(?P<stem>.+)\.[0-9a-f]{8}\.tmp(?P<suffix>(?:\..*)?)")
_BESIDE_BEFORE = re.compile(r"\.(?P<stem>.+?)\.[0-9A-Za-z_]+(?:\.tmp)?(?P<suffix>)")  # as earlier versions named them


def place_of(name: str) -> str | None:
    """The file that was being written, if `name` is what a killed process left of `replacing`; None if it is not."""
    found = _BESIDE.fullmatch(name) or _BESIDE_BEFORE.fullmatch(name)
    return found["stem"] + found["suffix"] if found else None


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A new, empty file beside `path` to write into; it takes the place of `path` when the block ends well.

    Folders are made. The file exists from the start, with the permissions that the umask leaves, so that whoever
    writes into it keeps them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.stem[:40]}.{secrets.token_hex(4)}.tmp{path.suffix}"
    os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def write_text(path: str | os.PathLike, content: str) -> Path:
    """Write a UTF-8 text file with `\\n` line ends.

    Returns:
        The file.
    """
    with replacing(path) as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:
        file.write(content)
    return Path(path)


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = 2, sort_keys: bool = False) -> Path:
    """Write JSON and a line end; numbers of other libraries become floats."""
    text = json.dumps(content, indent=indent, ensure_ascii=False, sort_keys=sort_keys, default=float)
    return write_text(path, text + "\n")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    """Write a safetensors file. (`save_file` alone writes it for its owner only, and in place.)"""
    from safetensors.torch import save_file

    with replacing(path) as beside:
        mode = beside.stat().st_mode & 0o777
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, {"format": "pt"} | metadata)
        os.chmod(beside, mode)
    return Path(path)
