"""A folder that appears whole or not at all, and bytes copied between files.

The work is done in a hidden sibling of the target. When it is finished everything is flushed to the disk and one rename
puts it in place, so that a crash at any moment leaves either the old state or the new one.
"""

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters_kit.errors import ShippingError

_LIBC = ctypes.CDLL(None) if os.name == "posix" else None  # elsewhere none of its calls are there
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_SYNC_FILE_RANGE_WRITE = 2
PIECE = 1 << 18  # bytes: what is read stays in a core's cache until it is hashed or written


def explain(error: OSError, out: Path) -> ShippingError:
    """What a failed write means to the user. `out` is the folder that was to be written."""
    reasons = {
        errno.ENOSPC: "the disk is full: free some space or choose another disk",
        errno.EDQUOT: "your disk quota is used up",
        errno.EFBIG: "the file size limit of this process is too small (ulimit -f)",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "you may not write there",
        errno.EPERM: "you may not write there",
    }
    reason = reasons.get(error.errno, error.strerror or str(error))
    return ShippingError(f"Could not write {out}: {reason}. Nothing was changed.")


def copy_range(
    source: int, start: int, target: int, at: int, count: int, written: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Copy `count` bytes between file descriptors, in pieces that stay in a core's cache.

    That is 2.5 times as fast as `copy_file_range` (ext4, Linux 6.18), which goes page by page through a pipe; and no
    file system shares blocks between ranges that start at odd bytes.

    Args:
        written: called with the byte range of `target` after every piece.
    """
    buffer = memoryview(bytearray(min(PIECE, count)))
    while count:
        done = os.preadv(source, [buffer[: min(PIECE, count)]], start)
        if not done:
            raise OSError(errno.EIO, "the source file became shorter while it was copied")
        write_at(target, buffer[:done], at)
        written(at, at + done)
        start, at, count = start + done, at + done, count - done


def write_at(target: int, data: bytes | memoryview, at: int) -> None:
    """`pwrite` until everything is written."""
    view = memoryview(data)
    while view:
        done = os.pwrite(target, view, at)
        view, at = view[done:], at + done


def reserve(target: int, size: int) -> None:
    """Make a file this long, so that a full disk is noticed now; where that cannot be asked for, at the write."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(target, 0, size)
    else:
        os.truncate(target, size)


def start_writing(target: int, at: int, count: int) -> None:
    """Ask the kernel to begin with the disk already; without it everything waits for the `fsync` at the end."""
    if hasattr(_LIBC, "sync_file_range"):
        _LIBC.sync_file_range(target, ctypes.c_int64(at), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the kernel or the file system cannot."""
    if not hasattr(_LIBC, "renameat2"):
        return False
    done = _LIBC.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return done == 0


def _publish(stage: Path, out: Path) -> None:
    for folder, _, files in os.walk(stage):
        for file in files:
            _sync(Path(folder, file))
        _sync(Path(folder))
    if not out.exists():
        os.rename(stage, out)
    elif _exchange(stage, out):
        shutil.rmtree(stage, ignore_errors=True)
    else:
        # No atomic swap here: for a moment there is no `out`, but never a mixed one; the old folder lies beside it.
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent)) / "folder"
        os.rename(out, old)
        os.rename(stage, out)
        shutil.rmtree(old.parent, ignore_errors=True)
    _sync(out.parent)


def _sweep(out: Path) -> None:
    """Put right what killed runs left behind. A living run holds a lock on its folder; a dead one's is free."""
    for left in out.parent.glob(f".{out.name}.old-*/folder"):
        if not out.exists():  # killed between the two renames of `_publish`
            os.rename(left, out)
        shutil.rmtree(left.parent, ignore_errors=True)
    for left in out.parent.glob(f".{out.name}.partial-*"):
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextmanager
def staged(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into; on success it becomes `out`, on any error nothing has changed.

    Args:
        overwrite: replace `out` if it holds something; without it that is refused.

    Raises:
        ShippingError: `out` exists, or writing failed (disk full, read-only, no permission).
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not out.is_dir():
        raise ShippingError(f"{out} is a file; name a folder to write to.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ShippingError(f"{out} already holds something. Choose another folder, or allow it with overwrite=True.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise explain(error, out) from error
    lock = -1
    try:
        lock = os.open(stage, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield stage
        os.chmod(stage, 0o777 & ~_umask())
        _publish(stage, out)
    except OSError as error:
        raise explain(error, out) from error
    finally:
        if lock >= 0:
            os.close(lock)
        shutil.rmtree(stage, ignore_errors=True)


def _umask() -> int:
    """The process's umask; the only way to read it without changing it for a moment is Linux's /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022
