"""Weight files written tensor by tensor: what is untouched copied by the kernel, what changed put in its place.

Every range is hashed in a second thread soon after it was written, while it is still in memory, and sent to the disk
then: at the end little is left to wait for.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from adapters_kit.artifacts.adapter import is_finite
from adapters_kit.artifacts.checkpoint import DTYPES, Checkpoint
from adapters_kit.artifacts.staging import copy_range, start_writing, write_at
from adapters_kit.errors import ShippingError
from adapters_kit.shipping.layout import Layout, Tensor, write_index

_PIECE = 1 << 20


class _Digest:
    """The sha256 of a file that is written in any order: what is complete from the start on is hashed by a thread."""

    def __init__(self, descriptor: int, pool: ThreadPoolExecutor) -> None:
        self.descriptor, self.pool = descriptor, pool
        self.value = hashlib.sha256()
        self.waiting: dict[int, int] = {}
        self.reached = 0
        self.running: list[Future] = []

    def written(self, start: int, stop: int) -> None:
        if stop > start:
            self.waiting[start] = stop
        while self.reached in self.waiting:
            stop = self.waiting.pop(self.reached)
            self.running.append(self.pool.submit(self._update, self.reached, stop))
            self.reached = stop

    def _update(self, start: int, stop: int) -> None:
        buffer = memoryview(bytearray(min(_PIECE, stop - start)))
        begin = start
        while start < stop:
            count = os.preadv(self.descriptor, [buffer[: min(len(buffer), stop - start)]], start)
            self.value.update(buffer[:count])
            start += count
        start_writing(self.descriptor, begin, stop - begin)

    def hexdigest(self) -> str:
        for future in self.running:
            future.result()
        return self.value.hexdigest()


def write(
    layout: Layout, checkpoint: Checkpoint, changed: Iterable[tuple[str, torch.Tensor]], folder: Path
) -> dict[str, str]:
    """Write the weight files that `layout` plans, and their index, into `folder`.

    Args:
        checkpoint: where tensors with an origin come from.
        changed: (name in the output, value) of all the others, in any order; each is cast, checked and written at once.

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

            digests, put = {}, _Put()
            for name, header in layout.headers.items():
                file = descriptors[name] = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                size = len(header) + sum(tensor.nbytes for tensor in layout.files[name])
                os.posix_fallocate(file, 0, size)  # a full disk is noticed now, not at the end
                digests[name] = _Digest(file, pool)
                write_at(file, header, 0)
                digests[name].written(0, len(header))
                _copy_untouched(checkpoint, layout.files[name], file, digests[name], put)
            for name, value in changed:
                place, tensor = places[name]
                put(descriptors[place], tensor, value)
                digests[place].written(tensor.at, tensor.at + tensor.nbytes)
            hashes = {name: digest.hexdigest() for name, digest in digests.items()}
        finally:
            torch.set_num_threads(threads)
            pool.shutdown(cancel_futures=True)
            for descriptor in descriptors.values():
                os.close(descriptor)
    write_index(layout, checkpoint, folder)
    return hashes


def _copy_untouched(checkpoint: Checkpoint, tensors: list[Tensor], target: int, digest: _Digest, put: Callable) -> None:
    """Copy runs of neighbours in one call; cast what gets another dtype."""
    run: tuple[Path, int, int, int] | None = None  # source file, start, position in the target, count

    def flush() -> None:
        if run is not None:
            copy_range(checkpoint.descriptor(run[0]), run[1], target, run[2], run[3])
            digest.written(run[2], run[2] + run[3])

    for tensor in tensors:
        if tensor.origin is None:
            continue
        stored = checkpoint.tensors[tensor.origin]
        if stored.dtype != tensor.dtype:
            put(target, tensor, checkpoint.read(tensor.origin))
            digest.written(tensor.at, tensor.at + tensor.nbytes)
        elif run and run[0] == stored.file and run[1] + run[3] == stored.start and run[2] + run[3] == tensor.at:
            run = (*run[:3], run[3] + stored.nbytes)
        else:
            flush()
            run = (stored.file, stored.start, tensor.at, stored.nbytes)
    flush()


class _Put:
    """Casts a value, checks it and writes it where it belongs; the memory of the cast is kept for the next one."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def __call__(self, target: int, tensor: Tensor, value: torch.Tensor) -> None:
        if tuple(value.shape) != tuple(tensor.shape):
            raise ShippingError(
                f"{tensor.name} came out as {tuple(value.shape)} where {tuple(tensor.shape)} was planned."
            )
        if self.memory.numel() < tensor.nbytes:
            self.memory = torch.empty(tensor.nbytes, dtype=torch.uint8)
        cast = self.memory[: tensor.nbytes].view(DTYPES[tensor.dtype]).view(tensor.shape).copy_(value)
        if not is_finite(cast):
            if not is_finite(value):
                raise ShippingError(f"{tensor.name} is not finite: the base or the adapter is broken.")
            raise ShippingError(
                f"{tensor.name} has values that do not fit {cast.dtype}. Choose dtype='bfloat16' or 'float32'."
            )
        if tensor.nbytes:
            write_at(target, self.memory[: tensor.nbytes].numpy().data, tensor.at)
