"""make kills: what survives when the process is killed or the disk is full, at every write. Prints what it tried.

Every trial runs in a forked child, so that SIGKILL is SIGKILL: no `finally` runs. The n-th write of the child kills it,
or fails as on a full disk; then the same call is made again, and must end with the bytes of a run that was never
stopped. Trials of all kinds take turns until the time is over: `python -m tests.kills --minutes 30`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters_kit as ak
from adapters_kit import registry
from adapters_kit.comparison import study, worker  # noqa: F401 (imported once, before any fork)
from adapters_kit.merging import merge  # noqa: F401
from adapters_kit.recipe import Recipe
from adapters_kit.serving import export  # noqa: F401
from adapters_kit.training import sweep, train  # noqa: F401
from tests.support import small, stopping

OK, REFUSED, CRASHED, LATE = 0, 3, 4, 5
"""How a child ends, beside -SIGKILL: an error in the package's own words, any other error, more than LIMIT seconds."""
LIMIT = 180
DONE = object()


@dataclass
class Kind:
    """One thing that can be interrupted.

    Attributes:
        name: what it is called in the report.
        call: does it, into the folder given; made again after an interruption with `again`.
        result: what has to be equal after the second call, from the folder.
        is_atomic: whether the folder is complete or absent at every moment.
    """

    name: str
    call: Callable[[Path], Any]
    again: Callable[[Path], Any]
    result: Callable[[Path], Any]
    is_atomic: bool = False


def child(
    call: Callable[[], Any],
    watch: Path,
    said: Path,
    at: int | None = None,
    kill: bool = True,
    after: float | None = None,
) -> int:
    """Runs `call` in a process of its own; its `at`-th write below `watch` kills it, or fails as on a full disk.

    Args:
        said: file that takes the number of writes, or the error.
        after: seconds until it is killed, whatever it does.

    Returns:
        The exit status, negative for a signal.
    """
    number = os.fork()
    if number == 0:
        _child(call, watch, said, at, kill)
    begun, limit = time.monotonic(), LIMIT if after is None else after
    while True:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - begun > limit:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            return LATE if after is None else -signal.SIGKILL
        time.sleep(0.01)


def _child(call: Callable[[], Any], watch: Path, said: Path, at: int | None, kill: bool) -> None:
    def die() -> BaseException:
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return stopping.full_disk()

    status = CRASHED
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        writes = stopping.Writes(watch, at, die)
        with writes.watched():
            call()
        said.write_text(str(writes.count))
        status = OK
    except ak.AdapterError as error:
        said.write_text(f"{type(error).__name__}: {error}")
        status = REFUSED
    except BaseException:
        said.write_text(traceback.format_exc()[-1500:])
    finally:
        os._exit(status)


def hashes(folder: Path) -> dict[str, str]:
    """File to sha256, of the weights and of what says what they are."""
    kept = [path for path in folder.rglob("*") if path.suffix == ".safetensors" and "checkpoints" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(kept)}


def _run(folder: Path) -> Any:
    hidden = [name for name in os.listdir(folder) if name.startswith(".")]
    return hashes(folder), stopping.metrics(folder), hidden


def _sweep(folder: Path) -> Any:
    return hashes(folder), [row["accuracy"] for row in json.loads((folder / "sweep.json").read_text())]


def _comparison(folder: Path) -> Any:
    found = json.loads((folder / "comparison.json").read_text())
    return [(row["label"], row["score"]) for row in found["methods"]], (folder / "cells" / ".work").exists()


def kinds(work: Path) -> list[Kind]:
    """Everything that is tried; data, models and an adapter to merge are made in `work`."""
    data = work / "data"
    data.mkdir()
    small.write_jsonl(data / "train.jsonl", small.sentiment(16))
    small.write_jsonl(data / "test.jsonl", small.sentiment(8, seed=1))
    small.write_jsonl(work / "text.jsonl", [{"text": row["text"]} for row in small.sentiment(24)])
    training = {"max_steps": 4, "batch_size": 4, "learning_rate": 3e-3, "log_every": 1, "samples": 1, "save_every": 1}
    bert, llama = str(small.model("bert")), str(small.model("llama"))

    def recipe(method: Any, task: str = "text-classification") -> Recipe:
        where = {"model": bert, "data": str(data)}
        if task == "causal-lm":
            where = {"model": llama, "data": {"train": str(work / "text.jsonl"), "test_size": 8}}
        return Recipe(**where, task=task, method=method, training=training)

    def trained(method: str, task: str) -> Kind:
        def call(out: Path) -> Any:
            return ak.train(recipe(method, task), out, quiet=True, resume=True)

        return Kind(f"train {method} {task}", call, call, _run)

    adapter = work / "adapter-run"
    if child(lambda: ak.train(recipe("lora"), adapter, quiet=True), work, work / "said") != OK:
        raise RuntimeError((work / "said").read_text())

    def whole(name: str, call: Callable[[Path], Any]) -> Kind:
        return Kind(name, call, call, hashes, is_atomic=True)

    def swept(out: Path) -> Any:
        return ak.sweep(recipe("lora"), out, learning_rates=[1e-3, 3e-3], quiet=True)

    def compared(out: Path) -> Any:
        return ak.compare(recipe("lora"), ["lora", "ia3"], 1, out=out, grid=None, validation_size=4, quiet=True)

    found = [
        whole("merge", lambda out: ak.merge(adapter / "adapter", out, overwrite=True)),
        whole("export", lambda out: ak.export(adapter / "adapter", out, canonical=True, overwrite=True)),
        Kind("sweep", swept, swept, _sweep),
        Kind("compare", compared, compared, _comparison),
    ]
    names = ["lora", *(name for name in registry.known_names() if name != "lora")]
    return found + [trained(name, task) for name in names for task in ("text-classification", "causal-lm")]


@dataclass
class Trials:
    """The trials of one kind, each step of the iteration is one.

    Attributes:
        counts: kills, full disks, and what did not happen as it should, by name.
        faults: a sentence each.
        notes: kinds that are refused here, with the reason.
    """

    kind: Kind
    work: Path
    most: int | None
    counts: Counter[str]
    faults: list[str]
    notes: list[str]

    def __iter__(self) -> Iterator[None]:
        """Counts the writes of a whole call, then stops it at each, in random order."""
        folder, said = self.work / self.kind.name.replace(" ", "-"), self.work / "said"
        folder.mkdir(exist_ok=True)
        begun = time.monotonic()
        status = child(lambda: self.kind.call(folder / "whole"), folder, said)
        lasted = time.monotonic() - begun
        if status != OK:
            short = said.read_text().strip().splitlines()[-1][:160]
            self.counts["refused" if status == REFUSED else "did not run"] += 1
            (self.faults if status != REFUSED else self.notes).append(f"{self.kind.name}: {short}")
            shutil.rmtree(folder, ignore_errors=True)
            return
        writes, expected = int(said.read_text()), self.kind.result(folder / "whole")
        yield
        draw = random.Random(self.kind.name)
        places = [(at, kill) for at in range(1, writes + 1) for kill in (True, False)]
        draw.shuffle(places)
        for at, kill in places[: self.most]:
            self._one(folder / "out", said, expected, at, kill, None)
            yield
            if at % 3 == 0 and self.most is None:  # not only at a write
                self._one(folder / "out", said, expected, None, True, draw.uniform(0, lasted))
                yield

    def _one(self, out: Path, said: Path, expected: Any, at: int | None, kill: bool, after: float | None) -> None:
        what = f"{self.kind.name}, {'killed' if kill else 'disk full'} " + (
            f"at write {at}" if at else f"after {after or 0:.2f} s"
        )
        status = child(lambda: self.kind.call(out), out.parent, said, at, kill, after)
        self.counts["kills" if kill else "full disks"] += 1
        allowed = (-signal.SIGKILL, OK) if kill else (REFUSED, OK)
        if status not in allowed:
            self.faults.append(f"{what}: ended with {status}: {said.read_text().strip().splitlines()[-1][:160]}")
        if self.kind.is_atomic and out.exists() and self.kind.result(out) != expected:
            self.faults.append(f"{what}: half of it stands under its final name")
        status = child(lambda: self.kind.again(out), out.parent, said)
        if status != OK:
            self.faults.append(f"{what}: the next call ended with {said.read_text().strip().splitlines()[-1][:160]}")
        elif self.kind.result(out) != expected:
            self.faults.append(f"{what}: the next call gave something else")
        left = sorted(name for name in os.listdir(out.parent) if name not in ("whole", "out"))
        if left:
            self.faults.append(f"{what}: left behind {left}")
        for name in (*left, "out"):
            path = out.parent / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def main() -> int:
    """Takes turns until the time is over; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--most", type=int, help="trials of each kind; all of its writes if not given")
    parser.add_argument("--only", default="", help="kinds whose names begin so, with commas between")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    until = time.monotonic() + 60 * options.minutes
    faults: list[str] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        starts = tuple(options.only.split(","))
        chosen = [kind for kind in kinds(Path(folder)) if kind.name.startswith(starts)]
        trials = [Trials(kind, Path(folder), options.most, Counter(), faults, notes) for kind in chosen]
        waiting = deque(iter(one) for one in trials)
        while waiting and time.monotonic() < until:
            turn = waiting.popleft()
            if next(turn, DONE) is not DONE:
                waiting.append(turn)
    total: Counter[str] = Counter()
    for name in dict.fromkeys(kind.name for kind in chosen):
        counts = sum((one.counts for one in trials if one.kind.name == name), Counter())
        total += counts
        print(f"{name:<32}" + "  ".join(f"{what}: {count}" for what, count in sorted(counts.items())))
    print("all".ljust(32) + "  ".join(f"{what}: {count}" for what, count in sorted(total.items())))
    print("\n".join(["refused:", *notes]))
    print("\n".join(["faults:", *faults]) if faults else "nothing was lost")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
