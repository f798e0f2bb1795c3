"""What training should not spoil: a second set of rows, scored before and after it, and a budget on what it may lose.

`Kept` reads and scores the rows of `eval.keep`. `choose` is for `training.keep_within`: among the evaluated
checkpoints, and for methods whose update grows with a factor of theirs among parts of that factor too, it takes
what scores best on the held-out rows while the loss on the kept ones stays within the budget. The scale is multiplied
into the parameters themselves: what is scored is what is saved, for whoever loads it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from torch import nn

from adapters_kit import tasks
from adapters_kit.errors import DataError, ModelError, TrainingError
from adapters_kit.recipe import Recipe
from adapters_kit.task_table import TASKS
from adapters_kit.tasks.base import Features, Task
from adapters_kit.training import checkpoints, data

if TYPE_CHECKING:
    from adapters_kit.training.loop import AdapterTrainer

_TOLD = ("loss", "perplexity", "accuracy", "f1", "exact_match", "span_f1", "wer", "pearson", "ndcg", "map")
STEPS = 16
"""Into how many parts the scale of an adapter is divided."""
LEAST = 2**-10
"""The smallest scale that is tried."""

# Factors of which the update of a weight is a multiple, and what is trained beside them in the same product.
_FACTORS = ("lora_B", "lora_embedding_B", "hada_w1_a", "lokr_w1", "lokr_w1_a", "vera_lambda_b")
_BESIDE = (
    *("lora_A", "lora_embedding_A", "lora_E", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "vera_lambda_d"),
)
_WHOLE = ("modules_to_save", "token_adapter", "trainable_tokens_delta")  # copies: they stay as they are
# Starts that leave the base as it is; the others move a part of it into the adapter, whose absence is no base.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass
class Kept:
    """The rows of `eval.keep`, as the task reads them.

    Attributes:
        task: reads and scores them.
        source: them.
        budget: the part of the base's loss by which theirs may rise; None for no budget.
        batch_size: in a forward pass.
        features: them, encoded.
        before: the base model's scores, once it was asked.
    """

    task: Task
    source: Dataset
    budget: float | None
    batch_size: int
    features: Features = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, recipe: Recipe, main: Task) -> Kept | None:
        """The rows that a recipe wants kept, checked; None where it names none. Reads no model.

        Args:
            recipe: resolved.
            main: what is trained: its classes are those of the kept rows too.

        Raises:
            DataError: rows that the task cannot read.
        """
        if recipe.eval.keep is None:
            return None
        kind, roles = tasks.get(recipe.task), TASKS[recipe.task].roles  # whatever the objective
        try:
            with main.notes.about("kept data"):
                rows = data.read_rows(recipe.eval.keep, recipe.data, main.notes)
                own = {role: name for role, name in recipe.data.columns.items() if role in roles}
                own = {role: name for role, name in own.items() if name in rows.column_names}
                given = recipe.eval.keep_columns or own
                kind.refuse(rows, given)
                columns = data.recognise(rows, given, kind.needs, kind.optional)
                known = {k: v for k, v in main.found().items() if k not in ("data.columns", "training.max_length")}
                plain = recipe.changed(**{**known, "objective": None, "data.columns": columns})
                task = kind(plain, columns, labels=main.labels, notes=main.notes)
                rows = data.labelled(task, rows, "eval.keep")
                rows = data.take(rows, recipe.eval.keep_limit, recipe.training.seed)
                task.fit(rows, None)
                task.labels = main.labels
        except DataError as error:
            told = str(error).replace("data.columns", "eval.keep_columns").replace("data.test", "eval.keep")
            raise DataError(told) from error
        batch = recipe.training.eval_batch_size or 2 * recipe.training.batch_size
        return cls(task, rows, recipe.training.keep_within, batch)

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.source)

    def score_base(self, model: nn.Module, processor: Any) -> None:
        """Scores the model before anything is put on it.

        Raises:
            ModelError: a budget on what the model cannot do yet.
        """
        fresh = getattr(model, "fresh_modules", ())
        if fresh and self.budget is not None:
            raise ModelError(
                f"training.keep_within: {self.task.recipe.model} has no trained head for {self.task.name} "
                f"({', '.join(fresh)} starts at random), so that its loss before training is no measure of what is to "
                "be kept. Leave keep_within out; eval.keep scores those rows before and after all the same."
            )
        self.task.bind(processor, model)
        with self.task.notes.about("kept data"):
            self.features = self.task.encode(self.source)
        self.before = self._score(model)
        if self.budget is not None and "loss" not in self.before:
            raise TrainingError(f"training.keep_within: {self.task.name} gives no loss that a budget could be about.")

    def _score(self, model: nn.Module) -> dict[str, float]:
        return self.task.score(self.task.run(model, self.features, self.batch_size), self.features)

    def scores(self, model: nn.Module) -> dict[str, float]:
        """The scores of a model, each under `keep_` and its name."""
        return {f"keep_{name}": value for name, value in self._score(model).items()}

    def told(self, metrics: Mapping[str, Any]) -> str:
        """What has become of them, from a run's metrics."""
        pairs = {name: (value, metrics[f"keep_{name}"]) for name, value in self.before.items() if name in _TOLD}
        pairs = pairs or {name: (value, metrics[f"keep_{name}"]) for name, value in self.before.items()}
        scores = ", ".join(f"{name} {before:.4f} -> {after:.4f}" for name, (before, after) in pairs.items())
        return f"{self.rows:,} kept rows of {Path(self.task.recipe.eval.keep or '').name}: {scores}"

    @property
    def most(self) -> float:
        """The highest loss within the budget."""
        return self.before["loss"] + (self.budget or 0.0) * abs(self.before["loss"])

    def rise(self, loss: float) -> float:
        """By which part of the base's loss a loss is above it."""
        return (loss - self.before["loss"]) / (abs(self.before["loss"]) or 1.0)


def factors(model: nn.Module) -> list[nn.Parameter] | None:
    """The trained parameters of which the adapter's update is a multiple; None for a method that has no such factor.

    Multiplied by s they make the update s times as large, whatever the other parameters are.
    """
    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    if any(getattr(config, "init_lora_weights", True) not in _PLAIN_STARTS for config in configs):
        return None
    found = []
    for name, parameter in model.named_parameters():
        parts = set(name.split("."))
        if not parameter.requires_grad or parts & set(_WHOLE):
            continue
        if parts & set(_FACTORS):
            found.append(parameter)
        elif not parts & set(_BESIDE):
            return None
    return found or None


def check(recipe: Recipe, model: nn.Module) -> str | None:
    """What a budget can choose among, as a sentence; None where there is no budget.

    Raises:
        TrainingError: nothing to choose among, or parameters that are spread over processes.
    """
    training = recipe.training
    if training.keep_within is None:
        return None
    if any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED")):
        raise TrainingError("training.keep_within: under FSDP or DeepSpeed no checkpoint can be scaled: leave it out.")
    if factors(model) is not None:
        return None
    if not training.keep_best or not training.evals_per_epoch:
        raise TrainingError(
            f"training.keep_within: an adapter of the method {recipe.method.label} has no scale, so that only "
            "checkpoints are left to choose among: set keep_best: true and evals_per_epoch to 1 or more."
        )
    return (
        f"An adapter of the method {recipe.method.label} has no scale that could be lowered: to hold the budget of "
        "training.keep_within the run chooses among its checkpoints alone."
    )


@dataclass(frozen=True)
class _Candidate:
    step: int
    scale: float
    score: float
    loss: float  # on the kept rows


def choose(trainer: AdapterTrainer, tell: Callable[[str], None]) -> tuple[list[Any], dict[str, Any]]:
    """Puts the best parameters within the trainer's budget into the model; where none holds it, those that rise least.

    Returns:
        The predictions on the held-out rows, and what was chosen, as metrics.json has it; without a budget nothing was.
    """
    if (kept := trainer.budget) is None:
        return trainer.results_of_kept(), {}
    PartialState().wait_for_everyone()  # the last checkpoint is whole
    model, task = trainer.accelerator.unwrap_model(trainer.model), trainer.task
    held_out, batch, sign = trainer.test_features, kept.batch_size, 1 if task.higher_is_better else -1

    def answers() -> list[Any]:
        return task.run(trainer.model_wrapped, held_out, batch)

    def kept_loss() -> float:
        return kept.scores(trainer.model_wrapped)["keep_loss"]

    def score() -> float:
        return float(task.score(answers(), held_out)[task.metric])

    whole = [_Candidate(step, 1.0, *numbers) for step, numbers in _evaluated(trainer).items()]
    whole = whole or [_Candidate(trainer.state.global_step, 1.0, score(), kept_loss())]
    found: list[_Candidate] = []
    for one in whole:
        if one.loss <= kept.most:
            found.append(one)
        elif factors(model) is not None and _load(trainer, one.step, tell):
            with _scaling(model) as scale:
                size, loss = _largest(scale, kept_loss, kept.most)
                found.append(_Candidate(one.step, size, score(), loss))
        else:
            found.append(one)
    holding = [one for one in found if one.loss <= kept.most]
    best = max(holding, key=lambda one: (sign * one.score, -one.loss)) if holding else min(found, key=_loss)
    free = max(whole, key=lambda one: sign * one.score)
    if not _load(trainer, best.step, tell):
        raise TrainingError(f"The checkpoint of step {best.step}, which is to be shipped, is damaged.")
    with _scaling(model) as scale:
        scale(best.scale)
    told: dict[str, Any] = {
        "step": best.step,
        "scale": best.scale,
        "rise": kept.rise(best.loss),
        "budget": kept.budget,
        "holds": bool(holding),
        "metric": task.metric,
        "score": best.score,
        "score_without_budget": free.score,
        "rise_without_budget": kept.rise(free.loss),
        "checkpoints": len(whole),
    }
    told["told"] = _sentence(told)
    tell(told["told"])
    return answers(), {"kept": told}


def _sentence(told: Mapping[str, Any]) -> str:
    """What was chosen and what it costs, from metrics.json's `kept`."""
    scale = f" at {told['scale']:g} of its size" if told["scale"] != 1 else ""
    what = f"The adapter of step {told['step']}{scale}"
    numbers = f"the loss on the kept rows {_by(told['rise'])} (a rise of {told['budget']:.2%} is allowed)"
    held = f"{told['metric']} {told['score']:.4f}, against {told['score_without_budget']:.4f} without a budget"
    held += f" (where the kept rows' loss {_by(told['rise_without_budget'])})"
    if told["holds"]:
        return f"{what} is kept: {numbers}; held-out {held}."
    return (
        f"Nothing holds the budget of training.keep_within. {what} spoils least: {numbers}; held-out {held}. A lower "
        "training.learning_rate, fewer steps, or rows like the kept ones among the training data may help."
    )


def _by(part: float) -> str:
    return f"{'rises' if part > 0 else 'falls'} by {abs(part):.2%}"


def _loss(one: _Candidate) -> float:
    return one.loss if math.isfinite(one.loss) else math.inf


def _evaluated(trainer: AdapterTrainer) -> dict[int, tuple[float, float]]:
    """Step -> held-out score and loss on the kept rows, where the run may choose among its evaluations."""
    if not trainer.args.load_best_model_at_end:
        return {}
    key = f"eval_{trainer.task.metric}"
    lines = [line for line in trainer.state.log_history if "eval_keep_loss" in line]
    return {line["step"]: (line[key], line["eval_keep_loss"]) for line in lines}


def _load(trainer: AdapterTrainer, step: int, tell: Callable[[str], None]) -> bool:
    """The parameters of a checkpoint; False, and a sentence, if it is damaged."""
    folder = checkpoints.folder_of(trainer.out, step)
    if wrong := checkpoints.damage(folder):
        tell(f"{folder.name} is damaged: {wrong}.")
        return False
    return checkpoints.load_trained(trainer.accelerator.unwrap_model(trainer.model), folder)


@contextmanager
def _scaling(model: nn.Module) -> Iterator[Callable[[float], None]]:
    """A function that sets the adapter to a part of what it is now."""
    parts = [(parameter, parameter.detach().clone()) for parameter in factors(model) or ()]

    @torch.no_grad()
    def scale(part: float) -> None:
        for parameter, whole in parts:
            parameter.copy_(whole * part)

    yield scale


def _largest(scale: Callable[[float], None], loss: Callable[[], float], most: float) -> tuple[float, float]:
    """The largest scale that was found within the budget, and its loss; the adapter is left at it.

    In sixteenths, by halving, which finds the largest where the loss rises with the scale; below one sixteenth halved
    on, down to `LEAST`, which is what is left where nothing is within.
    """
    held, over, found = 0, STEPS, math.inf
    while over - held > 1:
        middle = (held + over) // 2
        scale(middle / STEPS)
        value = loss()
        if value <= most:
            held, found = middle, value
        else:
            over = middle
    part = held / STEPS
    while not part or (found > most and part > LEAST):
        part = part / 2 or 1 / (2 * STEPS)
        scale(part)
        found = loss()
    scale(part)
    return part, found
