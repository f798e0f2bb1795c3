"""Which base an adapter sits on, down to the bytes: a base compared with the record that training left (`record`)."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapters_kit.artifacts.adapter import Adapter, read_config
from adapters_kit.artifacts.checkpoint import Checkpoint, open_checkpoint, stamp
from adapters_kit.artifacts.record_reader import RECORD, read_record
from adapters_kit.artifacts.source import WEIGHT_SUFFIXES, locate, locate_here
from adapters_kit.artifacts.staging import PIECE, file_sha256
from adapters_kit.errors import ShippingError


def hash_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor name -> hex sha256 of its stored bytes. Reads everything once, in pieces that stay in a core's cache."""

    def digest(_: int) -> dict[str, str]:
        buffer, found = memoryview(bytearray(PIECE)), {}
        for name in names:  # the threads share it: each takes the next one
            value = hashlib.sha256()
            for piece in checkpoint.chunks(name, buffer):
                value.update(piece)
            found[name] = value.hexdigest()
        return found

    for stored in checkpoint.tensors.values():
        checkpoint.descriptor(stored.file)  # opened here, so that the threads only read
    names = iter(list(checkpoint.tensors))
    threads = min(4, max(1, (os.cpu_count() or 1) - 1))  # one core is the caller's
    with ThreadPoolExecutor(threads) as pool:
        hashes = {name: value for found in pool.map(digest, range(threads)) for name, value in found.items()}
    return {name: hashes[name] for name in checkpoint.tensors}


def base_hashes(base: Path) -> dict[str, str]:
    """The hashes of a base: by tensor for safetensors; by file for a .gguf file or pickled weights.

    Kept for the rest of the process, until a file changes its size or its time.
    """
    files = [base] if base.is_file() else sorted(path for path in base.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    stats = [(str(path.resolve()), *stamp(path)) for path in files]
    return dict(_hashes(base, tuple(stats)))


@lru_cache(maxsize=8)
def _hashes(base: Path, _versions: tuple) -> dict[str, str]:
    if base.is_file():
        return {base.name: file_sha256(base)}
    pickles = sorted(base.glob("pytorch_model*.bin"))
    if pickles and not any(base.glob("model*.safetensors*")):
        return {path.name: file_sha256(path) for path in pickles}
    with open_checkpoint(base) as checkpoint:
        return hash_tensors(checkpoint)


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
    record = read_record(folder)
    named = base if base is not None else read_config(folder).base_model_name_or_path
    source = locate(named or record.get("base") or "")
    _compare(folder, record, source, base_hashes(source))


def check_loaded(adapter: str | os.PathLike, config: Any) -> None:
    """As `check_base`, for a model in memory: compares the files that its config says it was loaded from.

    Does nothing where these are not on this machine (a model built from its config), and knows nothing of what was done
    to the weights since.

    Args:
        config: the model's transformers config.
    """
    folder, name = Path(adapter), getattr(config, "_name_or_path", None)
    if not name or not (folder / RECORD).is_file():
        return
    source = locate_here(name, getattr(config, "_commit_hash", None))
    if source is None:
        return
    try:
        hashes = base_hashes(source)
    except ShippingError:  # no weights there: a folder of GGUF files, a config
        return
    _compare(folder, read_record(folder), source, hashes)


def _compare(folder: Path, record: Mapping[str, Any], source: Path, hashes: Mapping[str, str]) -> None:
    expected = record.get("tensors")
    found = compare_hashes(expected, hashes) if isinstance(expected, Mapping) and expected else []
    if found:
        raise wrong_base(folder, record, source, found)


def wrong_base(folder: Path, record: Mapping[str, Any], base: Path, found: list[str]) -> ShippingError:
    """The error for a base that differs from the recorded one."""
    return ShippingError(
        f"{base} is not the base that {folder} was trained on ({record.get('base')}): {'; '.join(found)}. Take "
        "the right model or revision, or go on regardless with force=True."
    )


def check_bases(adapters: Sequence[Adapter], source: Path, hashes: Mapping[str, str], force: bool) -> list[str]:
    """Compare the base with the records of the training; what to tell the user."""
    notes = []
    for adapter in adapters:
        expected = adapter.record.get("tensors")
        if not expected:
            notes.append(
                f"{adapter.folder} has no hashes of its base on record: nobody checked that it is the right one."
            )
            continue
        found = compare_hashes(expected, hashes)
        if found and not force:
            raise wrong_base(adapter.folder, adapter.record, source, found)
        notes += [f"Forced onto another base than the recorded one: {line}." for line in found]
    return notes
