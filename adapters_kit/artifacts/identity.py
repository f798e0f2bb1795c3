"""Which base an adapter sits on, down to the bytes: a base compared with the record that training left (`record`)."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from adapters_kit.artifacts.adapter import RECORD, read_config, read_json
from adapters_kit.artifacts.checkpoint import Checkpoint, open_checkpoint
from adapters_kit.artifacts.source import locate
from adapters_kit.artifacts.staging import file_sha256
from adapters_kit.errors import ShippingError


def hash_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor name -> hex sha256 of its stored bytes. Reads everything once, in small pieces."""

    def digest(name: str) -> str:
        value = hashlib.sha256()
        for piece in checkpoint.chunks(name):
            value.update(piece)
        return value.hexdigest()

    for stored in checkpoint.tensors.values():
        checkpoint.descriptor(stored.file)  # opened here, so that the threads only read
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(checkpoint.tensors, pool.map(digest, checkpoint.tensors), strict=True))


def base_hashes(base: Path) -> dict[str, str]:
    """The hashes of a base: by tensor for safetensors; by file for a .gguf file or pickled weights."""
    if base.is_file():
        return {base.name: file_sha256(base)}
    pickles = sorted(base.glob("pytorch_model*.bin"))
    if pickles and not any(base.glob("model*.safetensors*")):
        return {path.name: file_sha256(path) for path in pickles}
    with open_checkpoint(base) as checkpoint:
        return hash_tensors(checkpoint)


def differences(record: Mapping[str, Any], base: Path, checkpoint: Checkpoint | None = None) -> list[str]:
    """How a base differs from the one that an adapter was trained on; empty if it is the same or nothing is recorded.

    Args:
        record: `Adapter.record`.
        base: the base's folder or .gguf file.
        checkpoint: the base, if it is open already.
    """
    expected = record.get("tensors")
    if not isinstance(expected, Mapping) or not expected:
        return []
    return compare_hashes(expected, hash_tensors(checkpoint) if checkpoint is not None else base_hashes(base))


def compare_hashes(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Differences of two tables of hashes, in words."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    changed = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    lines = []
    for names, what in ((changed, "have other values"), (missing, "are missing"), (extra, "are new")):
        if names:
            shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
            lines.append(f"{len(names)} of {len(expected)} tensors {what}: {shown}")
    return lines


def check_base(adapter: str | os.PathLike, base: str | os.PathLike | None = None) -> None:
    """Refuse a base that is not the one that the adapter was trained on. Does nothing for an adapter without a record.

    Raises:
        ShippingError: tensors differ; the message says which.
    """
    folder = Path(adapter)
    if not (folder / RECORD).is_file():
        return
    record = read_json(folder / RECORD)
    source = locate(base if base is not None else record.get("base") or read_config(folder).base_model_name_or_path)
    found = differences(record, source)
    if found:
        raise wrong_base(folder, record, source, found)


def wrong_base(folder: Path, record: Mapping[str, Any], base: Path, found: list[str]) -> ShippingError:
    """The error for a base that differs from the recorded one."""
    return ShippingError(
        f"{base} is not the base that {folder} was trained on ({record.get('base')}): {'; '.join(found)}. Give the "
        "right model or revision with base=, or go on regardless with force=True."
    )
