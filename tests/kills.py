"""make kills: what survives when the process is killed or the disk is full, at every write. Prints what it tried.

Every trial runs in a forked child, so that SIGKILL is SIGKILL: no `finally` runs. The n-th write of the child kills it,
or fails as on a full disk; then the same call is made again (and stopped again in every fourth trial), and must end
with the bytes of a run that was never stopped. Trials of all kinds take turns until the time is over:
`python -m tests.kills --minutes 20`.

A trial is cheap: whatever a run imports is imported before the first fork, pictures are written but not drawn, and the
cells of a comparison are forks of the trial. Limits are of CPU time, since other work on the machine is no fault.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from matplotlib.figure import Figure

import adapters_kit as ak
from adapters_kit import registry
from adapters_kit.comparison import worker
from adapters_kit.recipe import Recipe
from tests.support import small, stopping

OK, REFUSED, CRASHED = 0, 3, 4
"""How a child ends, beside signals: an error in the package's own words, any other error."""
SECONDS = 60
"""Of CPU time, that a child may take; -SIGXCPU is its end otherwise."""
HANGS = 900
"""Seconds after which a child that does nothing is ended with SIGALRM."""
DONE = object()


@dataclass
class Kind:
    """One thing that can be interrupted.

    Attributes:
        name: what it is called in the report.
        call: does it, into the folder given; made again after an interruption.
        result: what has to be equal after the second call, from the folder.
        is_atomic: whether the folder is complete or absent at every moment.
        otherwise: tried where this one is refused.
    """

    name: str
    call: Callable[[Path], Any]
    result: Callable[[Path], Any]
    is_atomic: bool = False
    otherwise: Kind | None = None


class Writes(stopping.Writes):
    """Counts for the processes that it forks too."""

    def __init__(self, *arguments: Any) -> None:
        self._shared = mmap.mmap(-1, 8)
        super().__init__(*arguments)

    @property  # type: ignore[override]
    def count(self) -> int:
        """Writes so far."""
        return int.from_bytes(self._shared[:8], "little")

    @count.setter
    def count(self, value: int) -> None:
        self._shared[:8] = value.to_bytes(8, "little")


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
    begun, limit = time.monotonic(), HANGS if after is None else after
    while True:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - begun > limit:
            os.kill(number, signal.SIGALRM if after is None else signal.SIGKILL)
        time.sleep(0.005)


def _child(call: Callable[[], Any], watch: Path, said: Path, at: int | None, kill: bool) -> NoReturn:
    def die() -> BaseException:
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return stopping.full_disk()

    status = CRASHED
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    said.unlink(missing_ok=True)
    try:
        Figure.savefig = _undrawn  # type: ignore[method-assign]
        worker._started = _forked  # type: ignore[assignment]
        writes = Writes(watch, at, die)
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
    small.write_jsonl(data / "train.jsonl", small.sentiment(12))
    small.write_jsonl(data / "test.jsonl", small.sentiment(4, seed=1))
    small.write_jsonl(work / "text.jsonl", [{"text": row["text"]} for row in small.sentiment(16)])
    training = {"max_steps": 3, "batch_size": 4, "learning_rate": 3e-3, "log_every": 1, "samples": 1, "save_every": 1}
    bert, llama = str(small.model("bert")), str(small.model("llama"))

    def recipe(method: Any, task: str = "text-classification") -> Recipe:
        where = {"model": bert, "data": str(data)}
        if task == "causal-lm":
            where = {"model": llama, "data": {"train": str(work / "text.jsonl"), "test_size": 4}}
        return Recipe(**where, task=task, method=method, training=training)

    def trained(method: str, *tasks: str) -> Kind:
        def call(out: Path) -> Any:
            return ak.train(recipe(method, tasks[0]), out, quiet=True, resume=True)

        otherwise = trained(method, *tasks[1:]) if tasks[1:] else None
        return Kind(f"train {method} {tasks[0]}", call, _run, otherwise=otherwise)

    adapter = work / "adapter-run"
    imported(lambda: ak.train(recipe("lora"), adapter, quiet=True), work / "said")

    def whole(name: str, call: Callable[[Path], Any]) -> Kind:
        return Kind(name, call, hashes, is_atomic=True)

    def swept(out: Path) -> Any:
        return ak.sweep(recipe("lora"), out, learning_rates=[1e-3, 3e-3], quiet=True)

    def compared(out: Path) -> Any:
        return ak.compare(recipe("lora"), ["lora", "ia3"], 1, out=out, grid=None, validation_size=2, quiet=True)

    found = [
        whole("merge", lambda out: ak.merge(adapter / "adapter", out, overwrite=True)),
        whole("export", lambda out: ak.export(adapter / "adapter", out, canonical=True, overwrite=True)),
        Kind("sweep", swept, _sweep),
        Kind("compare", compared, _comparison),
        trained("lora", "causal-lm"),
    ]
    return found + [trained(name, "text-classification", "causal-lm") for name in registry.known_names()]


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
        said = self.work / "said"
        while True:
            folder = self.work / self.kind.name.replace(" ", "-")
            folder.mkdir(exist_ok=True)
            begun = time.monotonic()
            status = child(partial(self.kind.call, folder / "whole"), folder, said)
            lasted = time.monotonic() - begun
            if status == OK:
                break
            short = f"{self.kind.name}: {_last(said, status)}"
            shutil.rmtree(folder, ignore_errors=True)
            if status != REFUSED:
                self.counts["did not run"] += 1
                self.faults.append(short)
                return
            if self.kind.otherwise is None:
                self.counts["refused"] += 1
                self.notes.append(short)
                return
            self.kind = self.kind.otherwise
        writes, expected = int(said.read_text()), self.kind.result(folder / "whole")
        yield
        draw = random.Random(self.kind.name)
        kills, full = (draw.sample(range(1, writes + 1), writes) for _ in range(2))
        for number, (killed, failed) in enumerate(list(zip(kills, full, strict=True))[: self.most]):
            self._one(folder / "out", said, expected, [{"at": killed}])
            yield
            self._one(folder / "out", said, expected, [{"at": failed, "kill": False}])
            yield
            # Not only at a write, and not only once.
            self._one(folder / "out", said, expected, [{"after": draw.uniform(0, lasted)}] * (1 + number % 2))
            yield
            self._one(folder / "out", said, expected, [{"at": killed}, {"at": draw.randint(1, 1 + writes // 2)}])
            yield

    def _one(self, out: Path, said: Path, expected: Any, stops: list[dict[str, Any]]) -> None:
        what = f"{self.kind.name}, {stops}"
        for stop in stops:
            status = child(lambda: self.kind.call(out), out.parent, said, **stop)
            kill = stop.get("kill", True)
            self.counts["kills" if kill else "full disks"] += status != OK or not kill
            if status not in ((-signal.SIGKILL, OK) if kill else (REFUSED, OK)):
                self.faults.append(f"{what}: ended with {_last(said, status)}")
            if self.kind.is_atomic and out.exists() and self.kind.result(out) != expected:
                self.faults.append(f"{what}: half of it stands under its final name")
        status = child(lambda: self.kind.call(out), out.parent, said)
        if status != OK:
            self.faults.append(f"{what}: the next call ended with {_last(said, status)}")
        elif self.kind.result(out) != expected:
            self.faults.append(f"{what}: the next call gave something else")
        left = sorted(name for name in os.listdir(out.parent) if name not in ("whole", "out"))
        if left:
            self.faults.append(f"{what}: left behind {left}")
        for name in (*left, "out"):
            path = out.parent / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _last(said: Path, status: int) -> str:
    """The exit status of a child, and the last line of its error."""
    lines = said.read_text().strip().splitlines() if said.is_file() else []
    return f"{status}: {lines[-1][:160] if lines else 'nothing said'}"


def main() -> int:
    """Takes turns until the time is over; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--most", type=int, help="trials of each kind; all of its writes if not given")
    parser.add_argument("--only", default="", help="kinds whose names begin so, with commas between")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    begun = time.monotonic()
    faults: list[str] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        starts = tuple(options.only.split(","))
        chosen = [kind for kind in kinds(Path(folder)) if kind.name.startswith(starts)]
        trials = [Trials(kind, Path(folder), options.most, Counter(), faults, notes) for kind in chosen]
        waiting = deque(iter(one) for one in trials)
        seen = 0
        while waiting and time.monotonic() - begun < 60 * options.minutes:
            turn = waiting.popleft()
            if next(turn, DONE) is not DONE:
                waiting.append(turn)
            for fault in faults[seen:]:
                print(f"{fault}", flush=True)
            seen = len(faults)
    total: Counter[str] = Counter()
    for one in trials:
        counts = one.counts
        total += counts
        print(f"{one.kind.name:<40}" + "  ".join(f"{what}: {count}" for what, count in sorted(counts.items())))
    print("all".ljust(40) + "  ".join(f"{what}: {count}" for what, count in sorted(total.items())))
    print("\n".join(["refused:", *notes]))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{time.monotonic() - begun:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU")
    print("\n".join(["faults:", *faults]) if faults else "nothing was lost")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
