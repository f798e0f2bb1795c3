"""Cells in processes of their own, so that peak memory is a cell's alone and a crash takes one cell with it.

The worker reads jobs from stdin, one JSON object a line, and says "done" after each. It imports torch and transformers
once and forks for each cell. It never starts a thread or touches a GPU itself: a forked child can use neither if its
parent has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import logging

from adapters_kit import system
from adapters_kit.artifacts.files import write_json
from adapters_kit.comparison.cell import Cell, run_cell
from adapters_kit.errors import AdapterError, TrainingError


@contextmanager
def worker(folder: Path, threads: int) -> Iterator[Callable[[Cell], dict[str, Any]]]:
    """Gives `run(cell) -> result`; a result is what `run_cell` returns, or {"error": why there is none}.

    Args:
        folder: results are kept here as KEY.json; a cell that has one is not run again. Errors are not kept.
        threads: torch threads of each cell.
    """
    # Progress would be drawn for every model that is loaded: here that is every cell.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **quiet}
    command = [sys.executable, "-c", "from adapters_kit.comparison.worker import serve; serve()"]
    folder.mkdir(parents=True, exist_ok=True)
    process: subprocess.Popen | None = None

    def run(cell: Cell) -> dict[str, Any]:
        nonlocal process
        kept, error = folder / f"{cell.key}.json", folder / f"{cell.key}.error.json"
        if not kept.is_file():
            error.unlink(missing_ok=True)
            if process is None:
                # In a session of its own: stopping the comparison stops the cell that is running too.
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
            process.stdin.write(json.dumps({"cell": asdict(cell), "kept": str(kept), "error": str(error)}) + "\n")
            process.stdin.flush()
            while (line := process.stdout.readline()) and line != "done\n":
                pass
            if not line:
                raise TrainingError(
                    "The process that runs the comparison's cells has died. Start the comparison again."
                )
        if kept.is_file():
            return json.loads(kept.read_text(encoding="utf-8"))["result"]
        if not error.is_file():
            return {"error": "its process was killed, most likely because memory ran out"}
        return json.loads(error.read_text(encoding="utf-8"))

    try:
        yield run
    finally:
        if process is not None:
            process.stdin.close()
            system.stop_group(process.pid)
            process.wait()


def _work(job: dict[str, Any]) -> None:
    """Runs one job and writes its result, or why there is none."""
    try:
        result = run_cell(Cell(**job["cell"]))
    except AdapterError as error:
        write_json(Path(job["error"]), {"error": str(error)})
    except Exception as error:  # whatever a model or a method throws belongs into the table, not over it
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        write_json(Path(job["error"]), {"error": text, "traceback": traceback.format_exc()})
    else:
        write_json(Path(job["kept"]), {"cell": job["cell"], "result": result})


def serve() -> None:
    """The worker's side: runs until stdin ends."""
    logging.set_verbosity_error()  # fresh heads are reported for every model
    for line in sys.stdin:
        job = json.loads(line)
        if system.FORKS:
            child = os.fork()
            if child == 0:
                os.dup2(2, 1)  # what a library prints must not be taken for the worker's answer
                _work(job)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
            os.waitpid(child, 0)
        else:
            _work(job)
        print("done", flush=True)
