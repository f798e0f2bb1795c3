"""Weight files written tensor by tensor: what is untouched copied, what changed put in its place.

Every range is hashed in a second thread soon after it was written, while it is still in memory, and sent to the disk
then: at the end little is left to wait for.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from adapters_kit.artifacts.adapter import is_finite, surely_fits
from adapters_kit.artifacts.checkpoint import Checkpoint
from adapters_kit.artifacts.dtypes import STORED
from adapters_kit.artifacts.staging import PIECE, copy_range
from adapters_kit.errors import ShippingError
from adapters_kit.merging.output import Layout, Tensor, write_index
from adapters_kit.system import WRITE_BINARY, read_at, reserve, start_writing, write_at

Values = torch.Tensor | Iterable[torch.Tensor]
Written = Callable[[int, int], None]

_BATCH = 1 << 22  # bytes: what is handed to the disk and to the hashing thread at once
_BLOCK = 1 << 16  # values: what is cast, checked and written at once stays in a core's cache


class _Digest:
    """The sha256 of a file that is written in any order: what is complete from the start on is hashed by a thread."""

    def __init__(self, descriptor: int, pool: ThreadPoolExecutor, buffer: memoryview) -> None:
        self.descriptor, self.pool, self.buffer = descriptor, pool, buffer
        self.value = hashlib.sha256()
        self.waiting: dict[int, int] = {}
        self.sent = self.reached = 0
        self.running: list[Future] = []

    def written(self, start: int, stop: int) -> None:
        if stop > start:
            self.waiting[start] = stop
        while self.reached in self.waiting:
            self.reached = self.waiting.pop(self.reached)
        if self.reached - self.sent >= _BATCH:
            self._send()

    def _send(self) -> None:
        self.running.append(self.pool.submit(self._update, self.sent, self.reached))
        self.sent = self.reached

    def _update(self, start: int, stop: int) -> None:
        start_writing(self.descriptor, start, stop - start)
        while start < stop:
            count = read_at(self.descriptor, self.buffer[: min(PIECE, stop - start)], start)
            if not count:
                raise OSError(errno.EIO, "a file became shorter while it was written")
            self.value.update(self.buffer[:count])
            start += count

    def hexdigest(self) -> str:
        self._send()
        for future in self.running:
            future.result()
        return self.value.hexdigest()


def write(
    layout: Layout, checkpoint: Checkpoint, changed: Iterable[tuple[str, Values]], folder: Path
) -> dict[str, str]:
    """Write the weight files that `layout` plans, and their index, into `folder`.

    Args:
        checkpoint: where tensors with an origin come from.
        changed: (name in the output, value) of all the others, in any order; each is cast, checked and written at once.
            A value may come as blocks of rows, one after the other.

    Returns:
        File name -> sha256 in hex.

    Raises:
        ShippingError: a value is not finite, does not fit its dtype, or has another shape than planned.
    """
    places = layout.tensors()
    descriptors: dict[str, int] = {}
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1) as pool:
        try:
            torch.set_num_threads(max(1, threads - 1))  # OpenMP's threads spin at every barrier if hashing has a core

            digests, put, buffer = {}, _Put(), memoryview(bytearray(PIECE))  # one for the pool's one thread
            for name, header in layout.headers.items():
                file = descriptors[name] = os.open(folder / name, WRITE_BINARY, 0o666)
                size = len(header) + sum(tensor.nbytes for tensor in layout.files[name])
                reserve(file, size)
                digests[name] = _Digest(file, pool, buffer)
                write_at(file, header, 0)
                digests[name].written(0, len(header))
                _copy_untouched(checkpoint, layout.files[name], file, digests[name].written, put)
            for name, value in changed:
                place, tensor = places[name]
                put(descriptors[place], tensor, value, digests[place].written)
            for name, descriptor in descriptors.items():
                if digests[name].reached != os.fstat(descriptor).st_size:
                    raise ShippingError(f"{name} was planned with a tensor that the adapter does not give.")
            hashes = {name: digest.hexdigest() for name, digest in digests.items()}
        finally:
            torch.set_num_threads(threads)
            pool.shutdown(cancel_futures=True)
            for descriptor in descriptors.values():
                os.close(descriptor)
    write_index(layout, checkpoint, folder)
    return hashes


def _copy_untouched(
    checkpoint: Checkpoint, tensors: list[Tensor], target: int, written: Written, put: Callable[..., None]
) -> None:
    """Copy runs of neighbours in one go; cast what gets another dtype."""
    run: tuple[Path, int, int, int] | None = None  # source file, start, position in the target, count

    def flush() -> None:
        if run is not None:
            copy_range(checkpoint.descriptor(run[0]), run[1], target, run[2], run[3], written)

    for tensor in tensors:
        if tensor.origin is None:
            continue
        stored = checkpoint.tensors[tensor.origin]
        if stored.dtype != tensor.dtype:
            put(target, tensor, checkpoint.read(tensor.origin), written)
        elif run and run[0] == stored.file and run[1] + run[3] == stored.start and run[2] + run[3] == tensor.at:
            run = (*run[:3], run[3] + stored.nbytes)
        else:
            flush()
            run = (stored.file, stored.start, tensor.at, stored.nbytes)
    flush()


class _Put:
    """Casts values, checks them and writes them where they belong; the memory of a cast is kept for the next one."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.made: dict[tuple, tuple[torch.Tensor, memoryview]] = {}  # views of the memory: shapes are few

    def __call__(self, target: int, tensor: Tensor, value: Values, written: Written) -> None:
        shape, at = tuple(tensor.shape), tensor.at
        if isinstance(value, torch.Tensor):
            if tuple(value.shape) != shape:
                raise ShippingError(f"{tensor.name} came out as {tuple(value.shape)} where {shape} was planned.")
            value = _blocks(value)
        for block in value:
            data = self._cast(tensor, block)
            write_at(target, data, at)
            written(at, at + len(data))
            at += len(data)
        if at != tensor.at + tensor.nbytes:
            raise ShippingError(f"{tensor.name} came out as {at - tensor.at} of {tensor.nbytes} bytes.")

    def _cast(self, tensor: Tensor, value: torch.Tensor) -> memoryview:
        """The bytes of the value in its final dtype, which are overwritten by the next call."""
        key = tensor.dtype, value.shape
        if key not in self.made:
            self._make(*key)
        cast, data = self.made[key]
        cast.copy_(value)
        if not surely_fits(value, cast.dtype) and not is_finite(cast):
            if not is_finite(value):
                raise ShippingError(f"{tensor.name} is not finite: the base or the adapter is broken.")
            raise ShippingError(
                f"{tensor.name} has values that do not fit {cast.dtype}. Choose dtype='bfloat16' or 'float32'."
            )
        return data

    def _make(self, name: str, shape: torch.Size) -> None:
        size = shape.numel() * STORED[name].itemsize
        if self.memory.numel() < size:
            self.memory, self.made = torch.empty(size, dtype=torch.uint8), {}
        memory = self.memory[:size]
        self.made[name, shape] = memory.view(STORED[name]).view(shape), memory.numpy().data


def _blocks(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor in blocks of rows."""
    value = value.view(1) if value.ndim == 0 else value
    rows = value.shape[0] if value.numel() else 0
    step = max(1, _BLOCK * rows // max(value.numel(), 1))
    return (value[start : start + step] for start in range(0, rows, step))
