"""The one file that knows Linux, macOS and Windows: locks, renames, flushing, reading at an offset, memory, processes.

Each function does the same thing everywhere, or says what it does where a system cannot. Nothing here needs torch, and
no module that one system lacks (`fcntl`, `resource`, `msvcrt`) is imported before it is used: every public name of
adapters_kit can be imported on all three.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters_kit.errors import WriteError
from adapters_kit.names import check_name

# elsewhere none of the calls below are there
_LIBC: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux, renameat2
_RENAME_SWAP = 2  # macOS, renamex_np
_SYNC_FILE_RANGE_WRITE = 2
_PR_SET_PDEATHSIG = 1

READ_BINARY: int = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags of `os.open` to read bytes: Windows would otherwise turn line ends around, and children inherit the file."""
WRITE_BINARY: int = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags of `os.open` for a new file of bytes, which must not be there yet."""
FORKS: bool = hasattr(os, "fork") and sys.platform.startswith("linux")
"""Whether a process that has imported torch may fork. macOS has `fork`, but its frameworks do not stand it."""

# ---------------------------------------------------------------------------------------------- what a failure means

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space or choose another disk",
    errno.EDQUOT: "your disk quota is used up",
    errno.EFBIG: "the file size limit of this process is too small (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "you may not write there",
    errno.EPERM: "you may not write there",
    errno.ENOTDIR: "a part of that path is a file, not a folder",
    errno.EEXIST: "a file of that name is in the way",
    errno.EISDIR: "that is a folder, not a file",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.ELOOP: "a link is in the way, or leads to itself",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.EIO: "the disk reported an error",
}


def reason(error: BaseException) -> str | None:
    """What a failed write means, for people: the disk is full, you may not write there … None if it was no such thing.

    Libraries hide the system's answer: safetensors puts its number into the text, torch.save leaves it out.
    """
    if isinstance(error, OSError):
        return _REASONS.get(error.errno or 0)
    text = str(error)
    if hidden := re.search(r"\(os error (\d+)\)", text):
        return _REASONS.get(int(hidden[1]))
    if any(known in text for known in ("PytorchStreamWriter", "[enforce fail at inline_container", "iostream error")):
        return "a file could not be written whole; most likely the disk is full"
    return None


@contextlib.contextmanager
def writing(out: Path, kept: str = "Nothing was changed.") -> Iterator[None]:
    """Every failure to write inside becomes one sentence about `out`.

    Args:
        out: the folder or file being written, as the user named it.
        kept: what the user finds there now.

    Raises:
        WriteError: no space, no permission, a read-only disk. Everything else passes through, and so does a file
            elsewhere that may not be read.
    """
    try:
        yield
    except Exception as error:
        why = reason(error)
        if why is None or not _concerns(error, out):
            raise
        raise WriteError(f"Could not write {out}: {why}. {kept}".rstrip()) from error


def _concerns(error: Exception, out: Path) -> bool:
    """Whether a failure is about `out`. A full disk always is; a missing permission only on its own path."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str | bytes | os.PathLike) or getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT):
        return True
    target, place = os.path.abspath(out), os.path.abspath(os.fsdecode(name))
    return place.startswith(os.path.dirname(target)) or target.startswith(place)


# ------------------------------------------------------------------------------------------------------------- locks


@contextlib.contextmanager
def lock(path: str | os.PathLike) -> Iterator[None]:
    """Holds `path` (a folder or file, there or not) for this process as long as the block runs.

    The lock is a hidden file beside `path`, `.NAME.lock`, that holds the process's number; it goes with the block. A
    process that dies lets go of its lock, and the next one takes over what it left.

    Raises:
        WriteError: another process holds it, named by its number; or nothing can be written there.
    """
    from filelock import FileLock, Timeout

    check_name(path, WriteError)
    target = Path(os.path.abspath(path))
    file = target.parent / f".{target.name}.lock"
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        before = _holder(file)  # a loser of old filelock versions empties the file
        held = FileLock(file, timeout=0, thread_local=False)
        try:
            held.acquire()
        except Timeout as error:
            number = _holder(file) or before
            who = f"process {number}" if number else "another process"
            raise WriteError(
                f"{target} is being written by {who}. Wait until it has finished, stop it, or choose another folder."
            ) from error
    try:
        with contextlib.suppress(OSError), open(file, "r+b", buffering=0) as stream:
            stream.seek(1)  # the first byte is what Windows locks, against readers too
            stream.write(f"{os.getpid()}\n".encode())
            stream.truncate()
        yield
    finally:
        # Removed while it is held: whoever opened it before finds that its file has no name any more, and tries again.
        with contextlib.suppress(OSError):
            os.unlink(file)
        held.release()
        with contextlib.suppress(OSError):  # Windows removes no open file
            if os.name == "nt":
                os.unlink(file)


def is_locked(path: str | os.PathLike) -> bool:
    """Whether a living process holds `path`; what a dead one left behind may be cleaned up."""
    target = Path(os.path.abspath(path))
    if not (target.parent / f".{target.name}.lock").exists():
        return False
    try:
        with lock(target):
            return False
    except WriteError:
        return True


def _holder(file: Path) -> int | None:
    """The number of the process that wrote the lock file."""
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(1)
            return int(stream.read(32))
    except (OSError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------- folders and files


def folder_beside(path: Path, kind: str) -> Path:
    """A new empty hidden folder `.NAME.KIND-…` beside `path`, on the same file system, with the mode that the umask
    gives to new folders."""
    while True:
        made = path.parent / f".{path.name[:200]}.{kind}-{secrets.token_hex(4)}"
        with contextlib.suppress(FileExistsError):
            made.mkdir()
            return made


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    if hasattr(_LIBC, "renameat2"):
        swapped = _LIBC.renameat2(
            _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE)
        )
        return bool(swapped == 0)
    if sys.platform == "darwin" and hasattr(_LIBC, "renamex_np"):
        swapped = _LIBC.renamex_np(os.fsencode(first), os.fsencode(second), ctypes.c_uint(_RENAME_SWAP))
        return bool(swapped == 0)
    return False


def put_in_place(stage: Path, out: Path) -> None:
    """`stage` becomes `out`; a folder that is there already goes when the new one stands.

    Where two folders can be swapped in one step, there is never a moment without `out`. Elsewhere the old one lies
    beside it for that moment, as `.NAME.old-…/folder`: `recover` puts it back after a crash.
    """
    if not out.exists():
        os.rename(stage, out)
    elif exchange(stage, out):
        shutil.rmtree(stage, ignore_errors=True)
    else:
        old = folder_beside(out, "old")
        os.rename(out, old / "folder")
        os.rename(stage, out)
        shutil.rmtree(old, ignore_errors=True)
    flush(out.parent)


def recover(out: Path) -> None:
    """Puts right what a killed `put_in_place` left of `out`: the old folder comes back if the new one never came."""
    for old in _beside(out, "old"):
        if not out.exists() and (old / "folder").exists():
            os.rename(old / "folder", out)
        shutil.rmtree(old, ignore_errors=True)


def leftovers(out: Path, kind: str) -> list[Path]:
    """The folders that `folder_beside(out, kind)` made and that are still there. Names are compared, not patterns."""
    return _beside(out, kind)


def _beside(out: Path, kind: str) -> list[Path]:
    start = f".{out.name[:200]}.{kind}-"
    try:
        names = os.listdir(out.parent)
    except OSError:
        return []
    return [out.parent / name for name in sorted(names) if name.startswith(start)]


def flush(path: Path) -> None:
    """Have the system put a file, or the names in a folder, on the disk. Windows flushes no folders."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    flags = os.O_RDONLY if is_folder or os.name != "nt" else os.O_RDWR
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ bytes at an offset

_position = threading.Lock()  # where a file has one position only, one thread moves it at a time


def read_at(descriptor: int, into: memoryview | bytearray, at: int) -> int:
    """Read into a buffer from byte `at`; returns how many bytes came (0: the end of the file)."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [into], at)
    with _position:
        os.lseek(descriptor, at, os.SEEK_SET)
        with io.FileIO(descriptor, "rb", closefd=False) as stream:
            return stream.readinto(into) or 0


def write_at(descriptor: int, data: bytes | memoryview, at: int) -> None:
    """Write all of `data` from byte `at` on."""
    view = memoryview(data)
    if hasattr(os, "pwrite"):
        while view:
            done = os.pwrite(descriptor, view, at)
            view, at = view[done:], at + done
        return
    with _position:
        os.lseek(descriptor, at, os.SEEK_SET)
        while view:
            view = view[os.write(descriptor, view) :]


def reserve(descriptor: int, size: int) -> None:
    """Make a file `size` bytes long, so that a full disk is noticed now; where nobody can tell, at the write."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def start_writing(descriptor: int, at: int, count: int) -> None:
    """Ask the kernel to begin with the disk already; without it everything waits for the flush at the end."""
    if hasattr(_LIBC, "sync_file_range"):
        _LIBC.sync_file_range(descriptor, ctypes.c_int64(at), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


# --------------------------------------------------------------------------------------------- memory and processes


def peak_memory() -> int:
    """Bytes: the most that this process ever occupied; where the system does not keep that, what it occupies now."""
    try:
        import resource
    except ImportError:
        import psutil

        usage = psutil.Process().memory_info()
        return int(getattr(usage, "peak_wset", usage.rss))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Bytes that this process occupies now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def free_memory() -> int:
    """Bytes that this machine can still give without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def end_with_parent() -> None:
    """This process shall not outlive the one that started it: it is killed when that one ends, however it ends."""
    parent = os.getppid()
    if hasattr(_LIBC, "prctl"):  # no thread: whoever forks must not have one
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it ended just before
            os._exit(1)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    """Ends this process when its parent is gone, where the kernel does not."""
    import psutil

    while os.getppid() == parent and psutil.pid_exists(parent):
        time.sleep(0.5)
    os._exit(1)


class Stopped(KeyboardInterrupt):
    """SIGTERM, which ends a block as Ctrl-C does: everything that tidies up runs."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM (and Ctrl-Break on Windows) raises `Stopped`; only the main thread can arrange that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Stopped(signal.Signals(number).name)

    kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGBREAK") if hasattr(signal, name)]
    before = {kind: signal.signal(kind, stop) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler if handler is not None else signal.SIG_DFL)


def stop_group(number: int) -> None:
    """Ask a process that was started with `start_new_session=True`, and all that it started, to end."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(number, signal.SIGTERM)
        return
    import psutil

    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(number)
        for process in [*parent.children(recursive=True), parent]:
            process.terminate()
