"""A training that pauses part of the way, scored and saved there, and goes on from there if it is worth it.

`rungs.json` in the run folder holds what the pauses found. It is written before the checkpoint is: a score that stands
there needs no second scoring, and a checkpoint that was not saved any more costs steps, never another result.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters_kit.artifacts.files import write_json
from adapters_kit.artifacts.json_file import read_json

if TYPE_CHECKING:
    from adapters_kit.training.loop import AdapterTrainer

RUNGS = "rungs.json"


class Paused(Exception):
    """A training has come as far as it was to go for now."""


def rung_step(part: float, steps: int) -> int:
    """The step after which a run of so many steps has done so large a part of them; at least the first."""
    return max(1, int(part * steps + 1e-9))


def scores_at(folder: Path, part: float) -> tuple[int, dict[str, float]] | None:
    """The step of a rung and the scores there, their number of held-out rows (`rows`) among them; None where the run
    has not come so far."""
    if not (folder / RUNGS).is_file():
        return None
    found = read_json(folder / RUNGS)
    step = rung_step(part, found["steps"])
    scores = found["scores"].get(str(step))
    return None if scores is None else (step, scores)


class Rung(TrainerCallback):
    """Pauses a training after a part of its steps.

    Args:
        part: of its optimizer steps.
    """

    def __init__(self, trainer: AdapterTrainer, part: float) -> None:
        self.trainer, self.part = trainer, part

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Scores, saves and stops where the rung is reached."""
        if state.global_step >= rung_step(self.part, state.max_steps) and self.trainer.interruption.name is None:
            self.note(self.trainer.scored_now())
            control.should_log = control.should_save = control.should_training_stop = True

    def note(self, results: list[Any]) -> None:
        """Writes down the scores of this rung beside those of earlier ones."""
        trainer, steps = self.trainer, self.trainer.state.max_steps
        earlier = read_json(trainer.out / RUNGS)["scores"] if (trainer.out / RUNGS).is_file() else {}
        scores = {**trainer.task.score(results, trainer.test_features), "rows": len(trainer.test_features)}
        write_json(
            trainer.out / RUNGS, {"steps": steps, "scores": {**earlier, str(rung_step(self.part, steps)): scores}}
        )

    def close(self) -> None:
        """Ends the leg: a run that has ended of itself before the rung (early stopping) has its last score there.

        Raises:
            Paused: always, but where a signal has stopped the training.
        """
        trainer = self.trainer
        if trainer.interruption.name is not None:
            return
        if scores_at(trainer.out, self.part) is None:
            self.note(trainer.results_of_kept())
        raise Paused
