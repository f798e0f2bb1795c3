"""Several runs of one call, a folder each: in passes where they share a base and there is memory, else one by one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from adapters_kit.errors import ManyError, TrainingError, WriteError
from adapters_kit.recipe import RECIPE, Recipe
from adapters_kit.training.many.passes import passes
from adapters_kit.training.many.train_many import checked, train_together
from adapters_kit.training.rungs import Paused, scores_at
from adapters_kit.training.train import train_until


def train_cells(
    recipes: Mapping[Path, Recipe],
    *,
    together: bool,
    quiet: bool,
    until: float | None = None,
    failed: dict[str, BaseException] | None = None,
) -> None:
    """Trains each recipe in its folder; what is there already is gone on with.

    Args:
        recipes: run folder -> recipe; the folders lie beside each other.
        until: pause after this part of the steps; `rungs.scores_at` has the scores there.
        failed: what stops a training goes in here by its name, and the others go on. Without it, it is raised.

    Raises:
        ManyError, TrainingError: what stopped one, without `failed`.
        WriteError: always.
    """
    left = {path.name: given for path, given in recipes.items() if not _is_done(path, until)}
    if together and left:
        out = next(iter(recipes)).parent
        groups, told = passes(left)
        Console(stderr=True, quiet=quiet or not told).print(told, highlight=False, soft_wrap=True)
        for names in (names for names in groups if len(names) > 1):
            asked = {name: left[name] for name in names}
            try:
                train_together(asked, checked(asked), out, resume=True, quiet=quiet, until=until)
            except ManyError as error:
                if failed is None:
                    raise
                failed |= error.failures
    for path, given in recipes.items():  # also what has finished but for its last files
        if (until is not None and _is_done(path, until)) or (failed and path.name in failed):
            continue
        console = Console(stderr=True, quiet=quiet)
        try:
            train_until(given, path, until, (path / RECIPE).is_file(), False, console)
        except Paused:
            continue
        except WriteError:
            raise
        except TrainingError as error:
            if failed is None:
                raise
            failed[path.name] = error


def _is_done(path: Path, until: float | None) -> bool:
    return (path / "metrics.json").is_file() or (until is not None and scores_at(path, until) is not None)
