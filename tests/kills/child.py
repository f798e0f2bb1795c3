"""A call in a forked child, which is killed or meets a full disk at one of its writes."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from matplotlib.figure import Figure

import adapters_kit as ak
from adapters_kit.comparison import worker
from tests.support import stopping

OK, REFUSED, CRASHED = 0, 3, 4
"""How a child ends, beside signals: an error in the package's own words, any other error."""
SECONDS = 60
"""Of CPU time, that a child may take; -SIGXCPU is its end otherwise."""
CLONE_NEWNS = 0x20000
HANGS = 900
"""Seconds after which a child that does nothing is ended with SIGALRM."""


class Writes(stopping.Writes):
    """Counts for the processes that it forks too.

    Attributes:
        used: bytes in use on the disk before each write of this process.
    """

    def __init__(self, *arguments: Any) -> None:
        self._shared = mmap.mmap(-1, 8)
        self.used: list[int] = []
        super().__init__(*arguments)

    def _one(self, path: Any) -> None:
        before = self.count
        super()._one(path)
        if self.count > before:
            self.used.append(used(Path(self.folder)))

    @property  # type: ignore[override]
    def count(self) -> int:
        """Writes so far."""
        return int.from_bytes(self._shared[:8], "little")

    @count.setter
    def count(self, value: int) -> None:
        self._shared[:8] = value.to_bytes(8, "little")


def used(folder: Path) -> int:
    """Bytes in use on the disk of a folder."""
    about = os.statvfs(folder)
    return (about.f_blocks - about.f_bfree) * about.f_frsize


class SmallDisk:
    """A disk of its own, whose size changes, mounted on `folder`; `is_there` tells whether that is allowed here."""

    LARGE = 1 << 28

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.is_there = self._alone() and self._mount(f"size={self.LARGE}")

    def resize(self, size: int) -> None:
        """To so many bytes."""
        if not self._mount(f"remount,size={size}"):
            raise RuntimeError(f"{self.folder} cannot be made {size} bytes large")

    def close(self) -> None:
        """Unmounts it."""
        if self.is_there:
            subprocess.run(["umount", "--lazy", self.folder], check=False)

    @staticmethod
    def _alone() -> bool:
        """From now on what this process mounts is its own, and goes when it ends, however it ends."""
        with suppress(OSError, AttributeError):
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) == 0:
                return subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode == 0
        return False

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.folder]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


def child(
    call: Callable[[], Any],
    watch: Path,
    said: Path,
    at: int | None = None,
    kill: bool = True,
    after: float | None = None,
    copies: tuple[Path, bool] | None = None,
) -> int:
    """Runs `call` in a process of its own; its `at`-th write below `watch` kills it, or fails as on a full disk.

    Args:
        said: file that takes the number of writes and what was in use before each, or the error.
        after: seconds until it is killed, whatever it does.
        copies: where the folder goes before each write, and whether forks meet a full disk; see `copies.Copying`.

    Returns:
        The exit status, negative for a signal.
    """
    number = os.fork()
    if number == 0:
        _child(call, watch, said, at, kill, copies)
    begun, limit = time.monotonic(), HANGS if after is None else after
    while True:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - begun > limit:
            os.kill(number, signal.SIGALRM if after is None else signal.SIGKILL)
        time.sleep(0.005)


def _child(
    call: Callable[[], Any], watch: Path, said: Path, at: int | None, kill: bool, copies: tuple[Path, bool] | None
) -> NoReturn:
    def die() -> BaseException:
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return stopping.full_disk()

    status = CRASHED
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    limit = SECONDS if copies is None else 10 * SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    said.unlink(missing_ok=True)
    try:
        Figure.savefig = _undrawn  # type: ignore[method-assign]
        worker._started = _forked  # type: ignore[assignment]
        if copies is None:
            writes = Writes(watch, at, die)
        else:
            from tests.kills.copies import Copying

            writes = Copying(watch, *copies)
        with writes.watched():
            call()
        said.write_text(json.dumps([writes.count, writes.used]))
        status = OK
    except ak.AdapterError as error:
        said.write_text(f"{type(error).__name__}: {error}")
        status = REFUSED
    except BaseException:
        said.write_text(traceback.format_exc()[-1500:])
    finally:
        os._exit(status)


def _undrawn(figure: Figure, target: Any, **options: Any) -> None:
    """In place of `Figure.savefig`: half of a tiny run's time is its pictures."""
    if hasattr(target, "write"):
        target.write("<svg></svg>")
    else:
        with open(target, "wb") as file:
            file.write(b"a picture")


def _forked(function: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """In place of `worker._started`: a fork, which has imported everything already, and whose writes count too."""

    def instead_of_a_program() -> NoReturn:
        os.closerange(3, 4096)  # also the pipe by which subprocess waits for the program to start
        sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")  # noqa: SIM115
        getattr(worker, function)()
        os._exit(0)

    pipe = subprocess.PIPE
    return subprocess.Popen(
        ["none"], start_new_session=True, stdin=pipe, stdout=pipe, text=True, preexec_fn=instead_of_a_program
    )


def imported(call: Callable[[], Any], said: Path) -> None:
    """Imports what a call imports, which is made in a process of its own: torch's threads survive no fork."""

    def told() -> None:
        call()
        (said.parent / "modules").write_text("\n".join(sys.modules))

    if child(told, said.parent, said) != OK:
        raise RuntimeError(said.read_text())
    for name in (said.parent / "modules").read_text().splitlines():
        with suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or every child would look through it all, again and again
