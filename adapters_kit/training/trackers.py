"""wandb, mlflow and trackio, by transformers' integrations, and held so that what fails in them ends no training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from adapters_kit.errors import MissingPackageError, TrainingError, gist
from adapters_kit.recipe import Recipe

OWN = "tensorboard"
"""The tracker that is written here and not by transformers: see `callbacks.TensorBoard`."""


def check_trackers(recipe: Recipe) -> None:
    """Raises MissingPackageError if a tracker of `training.log_to` is not installed."""
    for name in recipe.training.log_to:
        if find_spec(name) is None:
            raise MissingPackageError(f"training.log_to: {name} is not installed: pip install {name}")


def trackers(recipe: Recipe, console: Console) -> list[TrainerCallback]:
    """A callback for each tracker of `training.log_to` but TensorBoard."""
    return [Tracker(name, console) for name in dict.fromkeys(recipe.training.log_to) if name != OWN]


class Tracker(TrainerCallback):
    """One integration. That it cannot start is an error before the first step; what fails later is told, once, and the
    training goes on without it: `metrics.jsonl` has every number all the same.
    """

    def __init__(self, name: str, console: Console) -> None:
        """Raises TrainingError if the integration cannot be made, as of a package that is half there."""
        self.name, self.console = name, console
        self.is_out = False
        with _starting(name):
            self.inner = integration_utils.INTEGRATION_TO_CALLBACK[name]()

    def _hand_on(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> Any:
        if self.is_out:
            return None
        if event in ("on_init_end", "on_train_begin"):
            with _starting(self.name):
                return getattr(self.inner, event)(args, state, control, **given)
        try:
            return getattr(self.inner, event)(args, state, control, **given)
        except Exception as error:
            self.is_out = True
            told = f"{self.name} failed and gets nothing more: {gist(error)} The numbers are in metrics.jsonl."
            self.console.print(told, style="yellow", highlight=False, markup=False, soft_wrap=True)
            return None


@contextmanager
def _starting(name: str) -> Iterator[None]:
    """Whatever a tracker raises when it starts becomes one sentence."""
    try:
        yield
    except Exception as error:
        raise TrainingError(
            f"training.log_to: {name} did not start: {gist(error)} Mend that, or leave it out of training.log_to, "
            "which --resume allows."
        ) from error


def _event(name: str) -> Callable[..., Any]:
    def happen(self: Tracker, args: Any, state: Any, control: Any, **given: Any) -> Any:
        return self._hand_on(name, args, state, control, **given)

    return happen


for _name in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(Tracker, _name, _event(_name))
