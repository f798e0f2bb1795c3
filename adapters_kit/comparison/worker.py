"""Cells in processes of their own, so that peak memory is a cell's alone and a crash takes one cell with it.

The worker reads jobs from stdin, one JSON object a line, and says "done" after each. It imports torch and transformers
once and forks for each cell; where a process cannot fork, or torch was built for a GPU, each cell imports anew: a
forked child cannot use a GPU that its parent has asked anything, which importing bitsandbytes does. For the same reason
the worker starts no thread. Worker and cell end with the process that
started them, however that ends; what a cell was writing lies in one folder, which the next comparison removes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from transformers.utils import logging

from adapters_kit import devices, system
from adapters_kit.artifacts.files import write_json
from adapters_kit.comparison.cell import Cell, run_cell
from adapters_kit.errors import AdapterError, TrainingError
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_changes import without_paths
from adapters_kit.training.many.hall import Guest, Hall, seated


@dataclass(frozen=True)
class Worker:
    """What `worker` gives.

    Attributes:
        run: a cell in a process of its own; returns what `run_cell` does, or {"error": why there is none}.
        together: cells in one pass; what each gives is kept for `run`. One that fails leaves nothing.
    """

    run: Callable[[Cell], dict[str, Any]]
    together: Callable[[Sequence[Cell]], None]


@contextmanager
def worker(folder: Path, threads: int) -> Iterator[Worker]:
    """Gives `run(cell) -> result` and `run.together(cells)`.

    Args:
        folder: results are kept here as KEY.json; a cell that has one is not run again. Errors are not kept. No other
            process uses it.
        threads: torch threads of each cell.
    """
    # Progress would be drawn for every model that is loaded: here that is every cell.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **quiet}
    work = folder / ".work"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work, ignore_errors=True)  # of a comparison that was killed
    process: subprocess.Popen[str] | None = None

    def ask(cells: Sequence[Cell]) -> None:
        nonlocal process
        work.mkdir(exist_ok=True)
        process = process or _started(_SERVE, environment)
        jobs = [{"cell": asdict(cell), **{name: str(file) for name, file in files(cell).items()}} for cell in cells]
        _ask(process, {"cells": jobs, "work": str(work)})

    def files(cell: Cell) -> dict[str, Path]:
        return {"kept": folder / f"{cell.key}.json", "error": folder / f"{cell.key}.error.json"}

    def run(cell: Cell) -> dict[str, Any]:
        kept, error = files(cell).values()
        if not kept.is_file():
            error.unlink(missing_ok=True)
            ask([cell])
        if kept.is_file():
            return json.loads(kept.read_text(encoding="utf-8"))["result"]
        if not error.is_file():
            full = shutil.disk_usage(folder).free < 1 << 20
            return {"error": "its process ended, most likely because " + ("the disk is full" if full else _KILLED)}
        return json.loads(error.read_text(encoding="utf-8"))

    try:
        yield Worker(run, ask)
    finally:
        if process is not None:
            system.stop_group(process.pid)
            process.communicate()
        shutil.rmtree(work, ignore_errors=True)


_SERVE, _ONE = "serve", "serve_one"
_KILLED = "memory ran out and the system killed it"


def _started(function: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """A process that runs a function of this file. In a session of its own: stopping it stops all that it started."""
    command = [sys.executable, "-c", f"from adapters_kit.comparison.worker import {function}; {function}()"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdin=pipe, stdout=pipe, text=True, encoding="utf-8"
    )


def _ask(process: subprocess.Popen[str], job: dict[str, Any]) -> None:
    """Hands a job over and waits until it is done."""
    assert process.stdin is not None and process.stdout is not None  # they are pipes
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    while (line := process.stdout.readline()) and line != "done\n":
        pass
    if not line:
        raise TrainingError("The process that runs the comparison's cells has died. Start the comparison again.")


def _work(job: dict[str, Any]) -> None:
    """Runs one job: a cell, whose result is written, or why there is none; or several in one pass."""
    asked = [(Cell(**one["cell"]), one) for one in job["cells"]]
    works = [(cell.key, partial(_keep, cell, one, Path(job["work"]))) for cell, one in asked]
    if len(works) > 1:
        seated(Hall(), works)
        return
    error = Path(asked[0][1]["error"])
    try:
        works[0][1]()
    except AdapterError as wrong:
        write_json(error, {"error": str(wrong)})
    except Exception as wrong:  # whatever a model or a method throws belongs into the table, not over it
        text = system.reason(wrong) or f"{type(wrong).__name__}: {wrong}".splitlines()[0]
        write_json(error, {"error": text, "traceback": traceback.format_exc()})


def _keep(cell: Cell, asked: Mapping[str, Any], work: Path, guest: Guest | None = None) -> None:
    """Runs a cell and writes its result as soon as it is there."""
    result = run_cell(cell, work, guest)
    # What was asked, for whoever looks; paths of this machine are nobody's business.
    told = {**asked["cell"], "recipe": without_paths(Recipe(**cell.recipe)).model_dump(mode="json")}
    write_json(Path(asked["kept"]), {"cell": told, "result": result})


def serve() -> None:
    """The worker's side: runs until stdin ends."""
    system.end_with_parent()
    logging.set_verbosity_error()  # fresh heads are reported for every model
    for line in sys.stdin:
        if system.FORKS and not devices.may_have_one():
            child = os.fork()
            if child == 0:
                _alone(json.loads(line))
            os.waitpid(child, 0)
        else:
            command = [sys.executable, "-c", f"from adapters_kit.comparison.worker import {_ONE}; {_ONE}()"]
            subprocess.run(command, input=line, text=True, encoding="utf-8", stdout=sys.stderr, check=False)
        print("done", flush=True)


def serve_one() -> None:
    """One cell, in a process that was made for it."""
    system.end_with_parent()
    logging.set_verbosity_error()
    _work(json.loads(sys.stdin.readline()))


def _alone(job: dict[str, Any]) -> NoReturn:
    """The forked child: one cell, then the end, whatever happens."""
    status = 1
    try:
        system.end_with_parent()
        os.dup2(2, 1)  # what a library prints must not be taken for the worker's answer
        _work(job)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
