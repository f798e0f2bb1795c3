"""Verbs of the command line, run beside the page: what they say is read while they work, and they can be stopped."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_all: list[Job] = []


class Job:
    """One command in a process of its own, so that a training can be stopped, and saves what it has, as on a terminal.

    Attributes:
        command: what to type on a terminal for the same.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.command = "adapters-kit " + " ".join(f'"{word}"' if " " in word else word for word in arguments)
        handle, name = tempfile.mkstemp(prefix="adapters-kit-ui-", suffix=".txt")
        self._said = Path(name)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "adapters_kit", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
        )
        os.close(handle)
        _all.append(self)

    @property
    def status(self) -> int | None:
        """The exit status; None as long as it runs."""
        return self._process.poll()

    def said(self) -> str:
        """The command, and everything that it has printed."""
        return f"$ {self.command}\n{self._said.read_text(encoding='utf-8', errors='replace')}"

    def stop(self) -> None:
        """A training ends its step and saves it, as with Ctrl-C; anything else ends at once."""
        if self.status is None:
            self._process.terminate()

    def forget(self) -> None:
        """Removes what was said."""
        self._said.unlink(missing_ok=True)

    def follow(self, every: float = 0.5) -> Iterator[str]:
        """What was said so far, again and again until it ends; the last time with everything."""
        while self.status is None:
            yield self.said()
            try:
                self._process.wait(every)
            except subprocess.TimeoutExpired:
                continue
        yield self.said()


@atexit.register
def _stop_all() -> None:
    """The page ends: so do its trainings, saved."""
    for job in _all:
        job.stop()
        job.forget()


def _shown(score: str) -> str:
    return "held-out loss" if score == "loss" else score


def curves(run: Path) -> list[dict[str, Any]]:
    """The numbers in a run's metrics.jsonl so far, one row each: step, series, value."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return []
    rows = []
    for line in lines:
        if not line.endswith("\n"):  # being written
            continue
        try:
            found = json.loads(line)
        except ValueError:  # what a crash left
            continue
        for name, value in found.items():
            if name == "loss" or (name.startswith("eval_") and isinstance(value, int | float)):
                series = "training loss" if name == "loss" else _shown(name.removeprefix("eval_"))
                rows.append({"step": found["step"], "series": series, "value": value})
    return rows
