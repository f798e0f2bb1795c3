"""Every write of one call, at the price of one call: what lies on the disk is copied, and a fork meets a full disk.

A copy of the folder before the n-th write is what a kill at that write leaves, of every process at once. A fork whose
n-th write fails shows what a full disk leaves; then the folder is put back, and the call goes on as if nothing had
been. What is left the same way twice is gone on from once. That a disturbed call still gives what an undisturbed one
gives shows that the folder was put back well.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.kills.child import Writes
from tests.support import stopping


class Copying(Writes):
    """Copies `folder` into `copies` before each write.

    Attributes:
        copies: a folder for each state of the disk, by its hash, without `whole*`; the file `all` says of what.
        forks: whether each write is also made to fail, in a fork. Not for calls with threads or processes of their own.
    """

    def __init__(self, folder: Path, copies: Path, forks: bool) -> None:
        super().__init__(folder)
        self.copies, self.forks = copies, forks
        self.is_quiet = False

    def _one(self, path: Any) -> None:
        below = isinstance(path, str | os.PathLike) and str(path).startswith(self.folder)
        if self.is_quiet or not below:
            return
        self.count += 1
        self.is_quiet = True
        keep(Path(self.folder), self.copies, f"killed at write {self.count}")
        if self.forks:
            before = _State(Path(self.folder), self.copies.parent / "links")
            number = os.fork()
            if number == 0:
                raise stopping.full_disk()  # and its later writes succeed, uncounted
            status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
            keep(Path(self.folder), self.copies, f"full disk at write {self.count}, which ended with {status}")
            before.restore()
        self.is_quiet = False


def keep(folder: Path, copies: Path, what: str) -> bool:
    """Copies a folder, unless one like it is there; whether it was new."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not name.parts[0].startswith("whole"):
            digest.update(f"\0{name}\0".encode() + (path.read_bytes() if path.is_file() else b""))
    place = copies / digest.hexdigest()[:24]
    with open(copies / "all", "a", encoding="utf-8") as file:
        file.write(f"{place.name} {what}\n")
    if place.exists():
        return False
    shutil.copytree(folder, place, symlinks=True, ignore=lambda _, names: [n for n in names if n.startswith("whole")])
    return True


class _State:
    """A folder as it is, so that the files that this process holds open are still the ones that are in it later."""

    def __init__(self, folder: Path, links: Path) -> None:
        shutil.rmtree(links, ignore_errors=True)
        links.mkdir()
        self.folder, self.links = folder, links
        self.folders = [path for path in folder.rglob("*") if path.is_dir()]
        self.files: dict[Path, tuple[str, bytes]] = {}
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                name = str(path.stat().st_ino)
                if not (links / name).exists():
                    os.link(path, links / name)
                self.files[path] = name, path.read_bytes()
        self.offsets = {}
        for number in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):
                if stat.S_ISREG(os.fstat(number).st_mode):
                    self.offsets[number] = os.lseek(number, 0, os.SEEK_CUR)

    def restore(self) -> None:
        """Puts everything back: names, contents, and how far this process has read and written."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if path not in self.folders:
                    path.rmdir()
            elif path not in self.files or str(path.stat().st_ino) != self.files[path][0]:
                path.unlink()
        for path in sorted(self.folders):
            path.mkdir(exist_ok=True)
        for path, (name, content) in self.files.items():
            if not path.exists():
                os.link(self.links / name, path)
            if path.read_bytes() != content:
                with open(path, "r+b") as file:
                    file.write(content)
                    file.truncate()
        for number, offset in self.offsets.items():
            with suppress(OSError):
                os.lseek(number, offset, os.SEEK_SET)
