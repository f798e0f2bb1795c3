"""Stops one kind of call at one write after the other, makes it again, and looks at what it made."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tests.kills.child import CRASHED, OK, REFUSED, SmallDisk, child, used
from tests.kills.copies import keep
from tests.kills.kinds import Kind


@dataclass
class Trials:
    """The trials of one kind, each step of an iteration is one.

    Attributes:
        most: trials of each sort; None for as many as there are writes.
        skip: trials of each sort that are left out, since an earlier call made them.
        counts: kills, full disks, and what did not happen as it should, by name.
        faults: a sentence each.
        notes: kinds that are refused here, with the reason.
    """

    kind: Kind
    work: Path
    disk: SmallDisk
    most: int | None
    skip: int
    counts: Counter[str]
    faults: list[str]
    notes: list[str]

    @cached_property
    def said(self) -> Path:
        """The file in which a child tells how it ended."""
        return self.work / "said"

    @cached_property
    def whole(self) -> tuple[int, Any, float] | None:
        """The writes of a call that nothing stops, its result and its seconds; None if it is refused."""
        while True:
            begun = time.monotonic()
            status = child(partial(self.kind.call, self._out("whole")), self.folder, self.said)
            if status == OK:
                return (
                    json.loads(self.said.read_text())[0],
                    self.kind.result(self._out("whole")),
                    time.monotonic() - begun,
                )
            short = f"{self.kind.name}: {_last(self.said, status)}"
            shutil.rmtree(self.folder, ignore_errors=True)
            if status != REFUSED:
                self.counts["did not run"] += 1
                self.faults.append(short)
                return None
            if self.kind.otherwise is None:
                self.counts["refused"] += 1
                self.notes.append(short)
                return None
            self.kind = self.kind.otherwise

    @property
    def folder(self) -> Path:
        """Where this kind writes."""
        folder = self.work / self.kind.name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        return folder

    def _out(self, name: str, folder: Path | None = None) -> Path:
        return (folder or self.folder) / (name + self.kind.suffix)

    def stops(self) -> Iterator[None]:
        """Stops a call at each of its writes, in random order: by a kill, a full disk, a kill meanwhile, two kills."""
        if self.whole is None:
            return
        writes, _, lasted = self.whole
        yield
        draw = random.Random(self.kind.name)
        kills, full = (draw.sample(range(1, writes + 1), writes) for _ in range(2))
        for number, (killed, failed) in enumerate(zip(kills, full, strict=True)):
            meanwhile, early = draw.uniform(0, lasted), draw.randint(1, 1 + writes // 2)
            if number < self.skip or number - self.skip == self.most:
                continue
            self._one([{"at": killed}])
            yield
            if not self.kind.every:  # those have it elsewhere
                self._one([{"at": failed, "kill": False}])
                yield
            # Not only at a write, and not only once.
            self._one([{"after": meanwhile}] * (1 + number % 2))
            yield
            self._one([{"at": killed}, {"at": early}])
            yield

    def full_disks(self) -> Iterator[None]:
        """Fails a call as on a full disk at each of its writes, in random order, and on small disks."""
        if not self.kind.every or self.whole is None:
            return
        draw = random.Random(self.kind.name)
        writes = draw.sample(range(1, self.whole[0] + 1), self.whole[0])
        sizes = self._sizes() if self.disk.is_there else []
        draw.shuffle(sizes)
        for number, (write, size) in enumerate(zip_longest(writes, sizes)):
            if number < self.skip or (self.most is not None and number >= self.skip + self.most):
                continue
            if write is not None:
                self._one([{"at": write, "kill": False}])
                self.counts[f"of {len(writes)} writes with a full disk"] += 1
                yield
            if size is not None:
                self._one([{"size": size, "kill": False}])
                self.counts[f"of {len(sizes)} small disks"] += 1
                yield

    def copied(self) -> Iterator[None]:
        """Every write at once: goes on from what a kill, or a full disk, at each leaves behind; see `copies`."""
        if self.whole is None:
            return
        copies = self.work / f"{self.folder.name}-copies"
        copies.mkdir()
        out = self._out("out")
        status = child(lambda: self.kind.call(out), self.folder, self.said, copies=(copies, self.kind.is_alone))
        if status != OK or self.kind.result(out) != self.whole[1]:
            self.faults.append(f"{self.kind.name}, copied at each write: ended with {_last(self.said, status)}")
        self._clear(self.folder)
        yield
        for number in () if self.kind.is_alone else range(1, self.whole[0] + 1):
            if number > self.skip:
                status = child(lambda: self.kind.call(out), self.folder, self.said, at=number, kill=False)
                keep(self.folder, copies, f"full disk at write {number}, which ended with {status}")
                self._clear(self.folder)
                yield
        lines = [line.split(" ", 1) for line in (copies / "all").read_text(encoding="utf-8").splitlines()]
        first: dict[str, str] = {}
        for name, what in lines:
            self.counts["kills" if what.startswith("killed") else "full disks"] += 1
            first.setdefault(name, what)
            if what.endswith(tuple(f"with {code}" for code in (CRASHED, -signal.SIGXCPU, -signal.SIGALRM))):
                self.faults.append(f"{self.kind.name}, {what}")
        for name, what in first.items():
            shutil.copytree(copies / name, self.folder, dirs_exist_ok=True)
            self._again(f"{self.kind.name}, {what}", self.folder)
            self.counts[f"of {len(first)} different states gone on from"] += 1
            yield
        shutil.rmtree(copies)

    def _sizes(self) -> list[int]:
        """What is in use before each write, where that changes: on a disk of that size nothing more fits."""
        empty = used(self.disk.folder)
        call = partial(self.kind.call, self._out("out", self.disk.folder))
        if child(call, self.disk.folder, self.said) != OK:
            self.faults.append(f"{self.kind.name}: did not run on a disk of its own")
            return []
        found = {size for size in json.loads(self.said.read_text())[1] if size > empty}
        self._clear(self.disk.folder)
        return sorted(found)

    def _one(self, stops: list[dict[str, Any]]) -> None:
        assert self.whole is not None
        expected, what = self.whole[1], f"{self.kind.name}, {stops}"
        folder = self.disk.folder if "size" in stops[0] else self.folder
        out = self._out("out", folder)
        for stop in stops:
            size, kill = stop.get("size"), stop.get("kill", True)
            if size is not None:
                self.disk.resize(size)
            status = child(
                lambda: self.kind.call(out), folder, self.said, **{key: stop[key] for key in stop if key != "size"}
            )
            if size is not None:
                self.disk.resize(self.disk.LARGE)
            self.counts["kills" if kill else "full disks"] += status != OK or not kill
            if status not in ((-signal.SIGKILL, OK) if kill else (REFUSED, OK)):
                self.faults.append(f"{what}: ended with {_last(self.said, status)}")
            if self.kind.is_atomic and out.exists() and self.kind.result(out) != expected:
                self.faults.append(f"{what}: half of it stands under its final name")
        self._again(what, folder)

    def _again(self, what: str, folder: Path) -> None:
        """Makes the call once more where it was stopped: it must give what a call that nothing stops gives."""
        assert self.whole is not None
        expected, out = self.whole[1], self._out("out", folder)
        status = child(lambda: self.kind.call(out), folder, self.said)
        if status != OK:
            self.faults.append(f"{what}: the next call ended with {_last(self.said, status)}")
        elif self.kind.result(out) != expected:
            self.faults.append(
                f"{what}: the next call gave something else: {self.kind.result(out)}, not {expected}"[:900]
            )
        left = self._clear(folder)
        if left:
            self.faults.append(f"{what}: left behind {left}")

    def _clear(self, folder: Path) -> list[str]:
        """Empties a folder but for the whole result; the names there that do not begin as `out`."""
        whole, out = (self._out(name).name for name in ("whole", "out"))
        names = [name for name in sorted(os.listdir(folder)) if not name.startswith(whole)]
        for name in names:
            path = folder / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        return [name for name in names if not name.startswith(out)]


def _last(said: Path, status: int) -> str:
    """The exit status of a child, and the last line of its error."""
    lines = said.read_text().strip().splitlines() if said.is_file() else []
    return f"{status}: {lines[-1][:160] if lines else 'nothing said'}"
