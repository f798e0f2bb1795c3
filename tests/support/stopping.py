"""Runs that end in the middle: killed at a chosen write or step, or with a disk that is full from then on.

A kill is an exception that nothing in the package catches, so that hundreds fit into a minute; `kill_at_file` and
tests/kills also end processes with SIGKILL.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from adapters_kit.training import loop


class Killed(BaseException):
    """The process is gone: no `except Exception` sees it."""


@contextmanager
def killed_at_step(step: int) -> Iterator[None]:
    """The run dies in the forward pass of that optimizer step."""
    original = loop.AdapterTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step + 1 == step:
            raise Killed
        return original(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.AdapterTrainer, "compute_loss", compute_loss)
        yield


def kill_at_file(
    folder: Path, pattern: str, run: Callable[..., Any], *arguments: Any, number: int = signal.SIGKILL
) -> None:
    """Calls `run(*arguments)` in a process of its own, and kills it once `folder` holds a file like `pattern`.

    The process is a fork, which has imported everything already.

    Args:
        number: of the signal that ends it.
    """
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    process.start()
    deadline = time.monotonic() + 600  # a busy machine
    try:
        while not list(folder.glob(pattern)):
            assert process.is_alive(), "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        if process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
        process.join()


class Writes:
    """Counts writes below `folder` (folders, files opened, saved by torch or safetensors, renames), and fails at one.

    Attributes:
        count: writes so far.
    """

    def __init__(self, folder: Path, fail_at: int | None = None, failure: Callable[[], BaseException] = Killed) -> None:
        self.folder, self.fail_at, self.failure, self.count = str(folder), fail_at, failure, 0

    def _one(self, path: Any) -> None:
        if isinstance(path, str | os.PathLike) and str(path).startswith(self.folder):
            self.count += 1
            if self.fail_at is not None and self.count == self.fail_at:
                raise self.failure()

    @contextmanager
    def watched(self) -> Iterator[Writes]:
        """Inside, every write counts."""
        renamed, moved, opened, made, folders = os.replace, os.rename, open, os.open, os.mkdir
        saved, serialized = torch.save, safetensors.torch.serialize_file

        def replace(source: Any, target: Any, **options: Any) -> None:
            self._one(target)
            renamed(source, target, **options)

        def rename(source: Any, target: Any, **options: Any) -> None:
            self._one(target)
            moved(source, target, **options)

        def open_file(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if set(mode) & set("wxa"):
                self._one(path)
            return opened(path, mode, *args, **options)

        def open_descriptor(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if flags & os.O_CREAT and not str(path).endswith(".lock"):
                self._one(path)
            return made(path, flags, *args, **options)

        def mkdir(path: Any, *args: Any, **options: Any) -> None:
            if not os.path.isdir(path):
                self._one(path)
            folders(path, *args, **options)

        def save(value: Any, target: Any, *args: Any, **options: Any) -> None:
            self._one(target)
            saved(value, target, *args, **options)

        def serialize(tensors: Any, target: Any, *args: Any, **options: Any) -> None:
            self._one(target)
            serialized(tensors, target, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "mkdir", mkdir)
            patch.setattr(torch, "save", save)
            patch.setattr(safetensors.torch, "serialize_file", serialize)
            patch.setattr(os, "replace", replace)
            patch.setattr(os, "rename", rename)
            patch.setattr(os, "open", open_descriptor)
            patch.setattr("builtins.open", open_file)
            yield self


def full_disk() -> OSError:
    """What a write meets on a full disk."""
    return OSError(errno.ENOSPC, "No space left on device")


def digest(folder: Path) -> str:
    """Of the adapter's weights in a run folder."""
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


TIMED = {"train_seconds", "tokens_per_second", "peak_memory_bytes"}


def metrics(folder: Path) -> dict[str, Any]:
    """metrics.json without what depends on the clock and the process."""
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if name not in TIMED}
