"""train_many(): several recipes of one base, a run folder each, in one pass through the base.

Each training is `train()`'s own, from the rows to the finished folder, in a seat of its own; `conductor.py` lays their
steps together. What is here: everything is checked and loaded before the first step, and all are ended in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from torch import nn

from adapters_kit import system
from adapters_kit.errors import ManyError, RecipeError, TrainingError, WriteError
from adapters_kit.names import check_name
from adapters_kit.recipe import RECIPE, Recipe
from adapters_kit.tasks.base import Features
from adapters_kit.training.callbacks import Interruption
from adapters_kit.training.inputs import Given, recipe_from
from adapters_kit.training.loop import AdapterTrainer
from adapters_kit.training.many.fitting import check
from adapters_kit.training.many.hall import Guest, Hall, seated
from adapters_kit.training.many.trainer import JointTrainer
from adapters_kit.training.resolve import processes, resolve
from adapters_kit.training.resuming import opened
from adapters_kit.training.run import Run
from adapters_kit.training.run_folder import Place, held
from adapters_kit.training.rungs import Paused
from adapters_kit.training.trackers import check_trackers
from adapters_kit.training.train import Training


def train_many(
    recipes: Sequence[Given],
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> list[Run]:
    """Trains several adapters over one frozen base in one pass, each as its own run would have trained it.

    The base is in memory once, and every step is one forward and one backward pass over the rows of all. Each training
    has its own data, order, optimizer, schedule, clipping, evaluations, checkpoints and run folder; one that ends,
    diverges or fails leaves the others going on. The recipes have `model`, `task`, `quantize`, `training.precision`,
    `training.gradient_checkpointing` and `training.recompute` in common; everything else is free.

    Args:
        recipes: as for `train`.
        out: folder of the run folders.
        names: of the run folders; by default those of the YAML files, or `1-lora`, `2-houlsby` by place and method.
        resume: go on from each training's last checkpoint; finished ones are opened.
        overwrite: replace the runs that are in `out` already.
        quiet: print nothing.

    Returns:
        The runs, in the order of the recipes.

    Raises:
        RecipeError: what cannot go together, by key and by recipe; before anything is loaded.
        DataError, ModelError, UnknownNameError, MissingPackageError: as for `train`, before anything is written.
        ManyError: some failed, once the others have finished.
        KeyboardInterrupt: all were stopped; what they had trained is saved.
    """
    check_name(out, WriteError)
    out = Path(out)
    PartialState(**processes())
    given = [recipe_from(recipe, out / "data") for recipe in recipes]
    called = _names(recipes, given, names)
    asked = dict(zip(called, given, strict=True))
    resolved = checked(asked)
    with system.lock(out), system.writing(out, "What was saved so far is kept: resume=True goes on."):
        runs = train_together(asked, resolved, out, resume=resume, overwrite=overwrite, quiet=quiet)
    return [runs[name] for name in called]


def checked(asked: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The recipes as they will run, by name.

    Raises:
        RecipeError, TrainingError, MissingPackageError: what cannot go together, or not at all.
    """
    resolved = {name: resolve(recipe) for name, recipe in asked.items()}
    check(resolved)
    for recipe in resolved.values():
        check_trackers(recipe)
    return resolved


def train_together(
    asked: Mapping[str, Recipe],
    resolved: Mapping[str, Recipe],
    out: Path,
    *,
    resume: bool,
    overwrite: bool = False,
    quiet: bool = False,
    until: float | None = None,
) -> dict[str, Run]:
    """As `train_many`, for recipes that were `checked` and a folder that is locked.

    Args:
        until: pause after this part of the steps; those that do give no run.
    """
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        together = _Together()
        for name, recipe in resolved.items():
            place = stack.enter_context(held(out / name, resume=resume, overwrite=overwrite))
            console = NamedConsole(name, quiet)
            if place.is_finished:
                runs[name] = opened(out / name, asked[name], console)
            else:
                goes_on = resume and (place.path / RECIPE).is_file()
                together.jobs[name] = _OfMany(recipe, place, goes_on, console, together, until)
        failures = together.train(runs)
    if together.stop.name is not None:
        raise KeyboardInterrupt(together.stop.name)
    if failures:
        raise ManyError([runs.get(name) for name in asked], failures) from next(iter(failures.values()))
    return runs


def _names(recipes: Sequence[Given], given: Sequence[Recipe], names: Sequence[str] | None) -> list[str]:
    if not recipes:
        raise TrainingError("train_many() was given no recipes.")
    if names is not None and len(names) != len(recipes):
        raise TrainingError(f"names has {len(names)} entries for {len(recipes)} recipes; give one for each.")
    found = list(names) if names is not None else []
    for number, (recipe, read) in enumerate(zip(recipes, given, strict=True), 1) if names is None else ():
        by_place = f"{number}-{Path(read.method.label).name}"
        found.append(Path(recipe).stem if isinstance(recipe, str | Path) else by_place)
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise RecipeError([f"two recipes are named {twice[0]!r}, and a run folder has one"], "names")
    return found


class NamedConsole(Console):
    """Lines of one training among many, each with its name in front."""

    def __init__(self, name: str, quiet: bool) -> None:
        super().__init__(stderr=True, quiet=quiet, force_terminal=False, markup=False)
        self.name = name

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's."""
        first, *others = objects or ("",)
        super().print(f"{self.name}: {first}", *others, **options)


class _Together:
    """The trainings of one call."""

    def __init__(self) -> None:
        self.hall = Hall()
        self.jobs: dict[str, _OfMany] = {}
        self.stop = _StopAll(self)

    def train(self, runs: dict[str, Run]) -> dict[str, BaseException]:
        """Trains all; the finished runs go into `runs`, what stopped the others is returned."""
        with self.stop:
            seats = seated(self.hall, [(name, job.seated) for name, job in self.jobs.items()])
        runs |= {seat.name: seat.result for seat in seats if seat.error is None}
        stopped = {seat.name: seat.error for seat in seats if seat.error is not None}
        return {name: error for name, error in stopped.items() if not isinstance(error, Paused)}


class _StopAll(Interruption):
    """Ctrl-C and SIGTERM stop all trainings after their step."""

    def __init__(self, together: _Together) -> None:
        super().__init__()
        self.together = together

    def _note(self, number: int, frame: Any) -> None:
        super()._note(number, frame)
        for job in self.together.jobs.values():
            job.stop(self.name)


class _OfMany(Training):
    """One training, with the base of all."""

    def __init__(
        self, recipe: Recipe, place: Place, resume: bool, console: Console, together: _Together, until: float | None
    ) -> None:
        self.together = together
        self.guest = Guest(together.hall)
        self.loop: JointTrainer | None = None
        super().__init__(recipe, place, resume, console, until)

    def seated(self, guest: Guest) -> Run:
        """The run, made in a seat."""
        self.guest.seat = guest.seat
        return self.run()

    def load(self, recipe: Recipe) -> tuple[nn.Module, Any]:
        """The base model, its tensors those of the first."""
        return self.guest.load(recipe, self.task)

    def trainer(self, recipe: Recipe, train_features: Features, test_features: Features) -> AdapterTrainer:
        """The loop, on its way through the shared bodies."""
        given = self.model, self.task, recipe, train_features, test_features, self.processor, self.path, self.console
        self.loop = self.guest.trainer(*given)
        self.stop(self.together.stop.name)
        return self.loop

    def stop(self, signal: str | None) -> None:
        """The step that is being made becomes the last."""
        if self.loop is not None and signal is not None:
            self.loop.interruption.name = signal
