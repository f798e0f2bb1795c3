"""Answers judged by a function of the user's (`eval.judge`): the base's beside those of the tuned model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from adapters_kit.artifacts.files import write_text
from adapters_kit.errors import RecipeError
from adapters_kit.named_function import Scoring, named_function, scored
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Task
from adapters_kit.training import data

_KEY = "eval.judge"


@dataclass
class Judged:
    """The held-out rows whose answers are judged.

    Attributes:
        function: rows and answers to numbers, the higher the better.
        task: makes the answers.
        rows: that are asked.
        batch_size: in a forward pass.
        before: what the base writes, and the numbers that it gets.
        after: the same of the tuned model.
    """

    function: Scoring
    task: Task
    rows: Dataset
    batch_size: int
    before: tuple[list[str], list[float]] = field(default_factory=lambda: ([], []))
    after: tuple[list[str], list[float]] = field(default_factory=lambda: ([], []))

    @classmethod
    def read(cls, recipe: Recipe, task: Task, held_out: Dataset) -> Judged | None:
        """The rows and the function; None where the recipe names no judge.

        Raises:
            RecipeError: no such function, or a task whose answers are no text.
        """
        if recipe.eval.judge is None:
            return None
        if not task.generates:
            by = f" by {recipe.objective.name}" if recipe.objective else ""
            told = f"{_KEY}: it judges texts that the model writes, and {recipe.task}{by} writes none. Leave it out."
            raise RecipeError([told])
        function = named_function(_KEY, recipe.eval.judge)
        rows = data.take(held_out, recipe.eval.judge_limit, recipe.training.seed)
        return cls(function, task, rows, recipe.training.eval_batch_size or 2 * recipe.training.batch_size)

    def ask(self, model: nn.Module) -> tuple[list[str], list[float]]:
        """What a model writes, and the judge's numbers.

        Raises:
            RecipeError: the judge fails, with the row.
        """
        answers = [one["answer"] for one in self.task.predict(model, self.rows, self.batch_size)]
        return answers, scored(_KEY, self.function, [dict(row) for row in self.rows], answers)

    def compare(self, model: nn.Module) -> dict[str, Any]:
        """The scores of metrics.json, once both were asked. A judge that fails now costs nobody a trained model."""
        try:
            self.after = self.ask(model)
        except RecipeError as error:
            return {"judged": {"told": f"The answers after training were not judged: {'; '.join(error.problems)}"}}
        before, after = self.before[1], self.after[1]
        better = sum(now > was for was, now in zip(before, after, strict=True))
        worse = sum(now < was for was, now in zip(before, after, strict=True))
        count, same = len(after), len(after) - better - worse
        rate = (better + same / 2) / count
        told = (
            f"Of {count:,} held-out rows the judge prefers the answer of the adapter {better:,} times and that of the "
            f"base {worse:,} times; {same:,} are as good as each other: a win rate of {rate:.2f}."
        )
        found = {"base_judge": sum(before) / count, "judge": sum(after) / count, "judge_win_rate": rate}
        return {**found, "judged": {"told": told, "examples": count}}

    def write(self, folder: Path) -> None:
        """Every answer with its number, base beside tuned, as judged.jsonl."""
        if not self.after[0]:
            return
        columns = zip(self.rows, *self.before, *self.after, strict=True)
        lines = [
            {"row": row, "base": {"answer": a, "judge": b}, "tuned": {"answer": c, "judge": d}}
            for row, a, b, c, d in columns
        ]
        text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        write_text(folder / "judged.jsonl", text)


def told(metrics: Mapping[str, Any]) -> list[str]:
    """What the judge has found, as a sentence; nothing where there was none."""
    return [metrics["judged"]["told"]] if "judged" in metrics else []
