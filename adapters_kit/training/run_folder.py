"""The run folder while it is written: who may write there, what is there already, what a run that died left behind.

A run that shall replace another is written beside it, in the hidden folder `.NAME.new`, and takes its place when it is
complete: until then the old run is as it was.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from adapters_kit import system
from adapters_kit.artifacts.files import place_of
from adapters_kit.errors import TrainingError
from adapters_kit.pages.run_page import DETAILS, PAGE
from adapters_kit.training.checkpoints import CHECKPOINTS
from adapters_kit.training.rungs import RUNGS

# What a run writes. Everything else in its folder is the user's.
OWN = {
    "recipe.yaml",
    "environment.json",
    "metrics.json",
    "metrics.jsonl",
    "samples.jsonl",
    RUNGS,
    "confusion.json",
    "curves.png",
    "confusion.png",
    DETAILS,
    PAGE,
    "README.md",
    "adapter",
    "tensorboard",
    CHECKPOINTS,
}


@dataclass(frozen=True)
class Place:
    """Where a run is written.

    Attributes:
        out: the run folder, as the user named it.
        path: where the run is written until it is complete: `out`, or the hidden folder beside it.
        is_finished: whether a finished run is in `out` already, and nothing is left to do.
    """

    out: Path
    path: Path
    is_finished: bool = False

    def publish(self) -> None:
        """The complete run takes its place in `out`, with what the user had put beside the old one's files."""
        if self.path == self.out:
            return
        if self.out.exists():
            _check_own(self.out)
            for entry in self.out.iterdir():
                if not _is_ours(entry.name):
                    _copy(entry, self.path / entry.name)
        system.put_in_place(self.path, self.out)


@contextmanager
def held(out: Path, *, resume: bool, overwrite: bool) -> Iterator[Place]:
    """The place for a run in `out`, locked against other processes as long as the block runs.

    Raises:
        TrainingError: `out` holds something else, or a run that was to be neither resumed nor replaced.
        WriteError: another process writes there; or nobody may.
    """
    state = PartialState()
    if not state.is_main_process:
        place = _find(out, resume, overwrite)
        state.wait_for_everyone()
        yield place
        return
    with system.lock(out):
        system.recover(Path(os.path.abspath(out)))
        place = _find(out, resume, overwrite)
        state.wait_for_everyone()  # all have looked before anything changes
        if place.path != out and not resume:
            shutil.rmtree(place.path, ignore_errors=True)
        elif place.path.is_dir():
            _clean(place.path, everything=not (place.path / "recipe.yaml").is_file())
        yield place


def _find(out: Path, resume: bool, overwrite: bool) -> Place:
    replacing = out.parent / f".{out.name}.new"
    _check_own(out)
    begun, finished = (out / "recipe.yaml").is_file(), (out / "metrics.json").is_file()
    if resume and (replacing / "recipe.yaml").is_file():
        return Place(out, replacing)
    if begun and overwrite:
        return Place(out, replacing)
    if begun and finished and not resume:
        raise TrainingError(f"{out} holds a finished run. Choose another folder, or give overwrite=True to replace it.")
    if begun and not resume:
        raise TrainingError(
            f"{out} holds a run that has not finished: resume=True goes on, overwrite=True starts anew."
        )
    # Checkpoints go last: while they are there, a part of what follows the metrics may be missing.
    return Place(out, out, is_finished=begun and finished and not (out / CHECKPOINTS).exists())


def _check_own(out: Path) -> None:
    """Refuses a folder with something in it that no run wrote and no run stands beside."""
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file. Name a folder for the run.")
    if not out.is_dir() or (out / "recipe.yaml").is_file():
        return
    foreign = sorted(name for name in os.listdir(out) if not _is_ours(name))
    if foreign:
        shown = ", ".join(foreign[:3]) + (" …" if foreign[3:] else "")
        raise TrainingError(f"{out} exists and is not a run folder (it holds {shown}). Choose another folder.")


def _is_ours(name: str) -> bool:
    return name in OWN or place_of(name) in OWN


def _clean(path: Path, everything: bool) -> None:
    """Removes the files that a dead run was writing; `everything` of ours, where it died before it had a recipe."""
    for name in os.listdir(path):
        if _is_ours(name) and (everything or name not in OWN):
            entry = path / name
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _copy(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target, follow_symlinks=False)
