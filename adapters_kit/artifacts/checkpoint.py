"""Safetensors checkpoints, read without building a model: headers, the shard index, one tensor at a time.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON (`name -> dtype, shape, data_offsets`)
and the tensors' bytes, back to back. Everything that the JSON claims is checked before a byte is used: these files come
from the network.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters_kit import system
from adapters_kit.artifacts.dtypes import STORED
from adapters_kit.errors import ShippingError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies.

    Attributes:
        file: the safetensors file.
        start, stop: byte range in that file, counted from its beginning.
        dtype: as the header spells it, e.g. "BF16".
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    """As the header has it."""
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Length of the range."""
        return self.stop - self.start

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        return STORED[self.dtype]


def _refuse(path: Path, what: str) -> ShippingError:
    return ShippingError(f"{path}: {what}. The file is damaged or incomplete: fetch or save it again.")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _parse_json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _refuse(path, f"{what} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise _refuse(path, f"{what} is not a JSON object")
    return value


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_entry(name: str, entry: object, path: Path, data_start: int, data_size: int) -> Stored:
    if not isinstance(entry, dict):
        raise _refuse(path, f"tensor {name!r} has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in STORED:
        raise ShippingError(
            f"{path}: tensor {name!r} has dtype {dtype!r}; these are known: {', '.join(STORED)}. "
            "Save the model in one of them."
        )
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise _refuse(path, f"tensor {name!r} has shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _refuse(path, f"tensor {name!r} has data_offsets {offsets!r}")
    begin, end = offsets
    if begin > end or end > data_size:
        raise _refuse(path, f"tensor {name!r} claims bytes {begin}–{end} of {data_size}")
    expected = prod(shape) * STORED[dtype].itemsize
    if end - begin != expected:
        raise _refuse(path, f"tensor {name!r} of shape {shape} in {dtype} needs {expected} bytes and has {end - begin}")
    return Stored(path, dtype, tuple(shape), data_start + begin, data_start + end)


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of one safetensors file, in the order of their bytes, and the file's metadata.

    Raises:
        ShippingError: the file is not a whole, consistent safetensors file: truncated, overlapping tensors, holes,
            sizes that contradict shapes, an unknown dtype, JSON that does not parse.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, MAX_HEADER):
                raise _refuse(path, f"not a safetensors file: a header of {length} bytes in a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise ShippingError(f"{path} cannot be read: {error.strerror}.") from error
    header = _parse_json(raw, path, "the header")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refuse(path, "__metadata__ is not a table of strings")
    data_start = 8 + length
    stored = [(name, _parse_entry(name, entry, path, data_start, size - data_start)) for name, entry in header.items()]
    stored.sort(key=lambda item: (item[1].start, item[1].stop))
    reached = data_start
    for name, place in stored:
        if place.start != reached:
            problem = "overlaps the tensor before it" if place.start < reached else "leaves a hole before it"
            raise _refuse(path, f"tensor {name!r} {problem}")
        reached = place.stop
    if reached != size:
        raise _refuse(path, f"the tensors end at byte {reached}, the file at {size}")
    return dict(stored), metadata


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file whose tensors (`name -> dtype name, shape`) follow in this order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + prod(shape) * STORED[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # tensors start on a multiple of 8, as readers that map the file expect
    return len(raw).to_bytes(8, "little") + raw


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The shard index: tensor name -> file name, and the index's metadata.

    Raises:
        ShippingError: not an index, or a shard named by anything but a bare file name (a path could lead out of the
            folder).
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ShippingError(f"{path} cannot be read: {error.strerror}.") from error
    index = _parse_json(raw, path, "the index")
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise _refuse(path, "the index has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or file in {".", ".."} or set(file) & {"/", "\\", "\0"}:
            raise ShippingError(
                f"{path}: tensor {name!r} is said to lie in {file!r}. A shard must be a bare file name beside its "
                "index; a path could lead to another file. Do not trust this folder."
            )
    return weight_map, metadata if isinstance(metadata, dict) else {}


@dataclass
class Checkpoint:
    """The safetensors files of a folder, opened lazily and read by tensor.

    Attributes:
        tensors: name -> where it lies, file by file, in the order of the bytes.
        metadata: file name -> that file's `__metadata__`.
        index: the metadata of the shard index, None for a single file.
        stamps: file -> what tells its contents from others' (see `stamp`), taken before its header was read.
    """

    folder: Path
    tensors: dict[str, Stored]
    metadata: dict[str, dict[str, str]]
    index: dict[str, Any] | None = None
    stamps: dict[Path, tuple[int, ...]] = field(default_factory=dict, repr=False)
    _open: dict[Path, int] = field(default_factory=dict, repr=False)

    @property
    def files(self) -> list[str]:
        """Shard file names, in the order of the index."""
        return list(self.metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors."""
        return sum(stored.nbytes for stored in self.tensors.values())

    def descriptor(self, file: Path) -> int:
        """An open file descriptor for reading `file`; closed by `close`."""
        if file not in self._open:
            self._open[file] = os.open(file, system.READ_BINARY)
        return self._open[file]

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored: contiguous, on the CPU, a fresh copy."""
        stored = self.tensors[name]
        buffer = np.empty(stored.nbytes, dtype=np.uint8)
        self.fill(name, buffer.data)
        if not stored.nbytes:
            return torch.empty(stored.shape, dtype=stored.torch_dtype)
        return torch.from_numpy(buffer).view(stored.torch_dtype).view(stored.shape)

    def fill(self, name: str, target: memoryview, start: int = 0) -> None:
        """Bytes of a tensor from its byte `start` on, as many as `target` takes."""
        stored = self.tensors[name]
        source, position = self.descriptor(stored.file), stored.start + start
        while target:
            count = system.read_at(source, target, position)
            if not count:
                raise _refuse(stored.file, f"the file ends inside tensor {name!r}")
            target, position = target[count:], position + count

    def chunks(self, name: str, buffer: memoryview) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of `buffer`, in which each is gone when the next is asked for."""
        size = self.tensors[name].nbytes
        for start in range(0, size, len(buffer)):
            piece = buffer[: min(len(buffer), size - start)]
            self.fill(name, piece, start)
            yield piece

    def check_unchanged(self) -> None:
        """Refuse files that were written to, or replaced, since they were opened: a mixture of two states was read.

        Raises:
            ShippingError: naming the file.
        """
        for file, before in self.stamps.items():
            opened = os.fstat(self._open[file]) if file in self._open else None
            if stamp(file) != before or (opened is not None and _stamp(opened) != before):
                raise ShippingError(
                    f"{file} was changed while it was read, so that what was read is neither the old nor the new file. "
                    "Nothing was written. Do it again when nothing writes there."
                )

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file's contents do: its number, size, and the times of its last writing and change of state,
    in nanoseconds; zeros for a file that is not there."""
    try:
        return _stamp(os.stat(path))
    except OSError:
        return (0, 0, 0, 0)


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def open_file(path: Path) -> Checkpoint:
    """One safetensors file as a checkpoint."""
    path = Path(path)
    before = stamp(path)
    tensors, metadata = read_header(path)
    return Checkpoint(path.parent, tensors, {path.name: metadata}, stamps={path: before})


def open_checkpoint(folder: Path) -> Checkpoint:
    """The model weights of a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
        ShippingError: no safetensors weights, both kinds at once, a shard that is missing, an index that contradicts
            its shards, or a damaged file.
    """
    folder = Path(folder)
    single, index = folder / SINGLE, folder / INDEX
    # MLX writes an index to a single file, too.
    if single.is_file() and index.is_file() and read_index(index)[0] != dict.fromkeys(read_header(single)[0], SINGLE):
        raise ShippingError(
            f"{folder} holds both {SINGLE} and {INDEX}: one of them is left over from an older save, and readers "
            "disagree which to take. Remove the stale one."
        )
    if single.is_file():
        return open_file(single)
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*") if path.suffix in {".bin", ".pt", ".gguf", ".h5"})
        found = f"; it has {', '.join(others[:5])}" if others else ""
        raise ShippingError(f"No {SINGLE} and no {INDEX} in {folder}{found}. Save the model with save_pretrained.")
    weight_map, index_metadata = read_index(index)
    tensors: dict[str, Stored] = {}
    metadata: dict[str, dict[str, str]] = {}
    stamps: dict[Path, tuple[int, ...]] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise ShippingError(f"{index} names {file!r}, which is not in {folder}. Fetch the missing shard.")
        stamps[folder / file] = stamp(folder / file)
        header, metadata[file] = read_header(folder / file)
        expected = {name for name, place in weight_map.items() if place == file}
        for problem, names in (("are missing", expected - header.keys()), ("are extra", header.keys() - expected)):
            if names:
                raise ShippingError(
                    f"{folder / file} does not hold what {INDEX} says: {len(names)} tensors {problem}, such as "
                    f"{min(names)!r}. Shards of two saves are mixed: fetch or save the model again."
                )
        tensors.update(header)
    return Checkpoint(folder, tensors, metadata, index_metadata, stamps)
