"""search(): the best of many rates, ranks, methods and dropouts for a part of what training them all would take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from adapters_kit import system, tasks
from adapters_kit.artifacts.files import write_json
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.comparison.halving import Found, Rung, cost, noise, ranked, rungs
from adapters_kit.comparison.space import Candidate, grid
from adapters_kit.errors import RecipeError, TrainingError, WriteError
from adapters_kit.names import check_name
from adapters_kit.pages.comparison_page import write_search_page
from adapters_kit.pages.verdict import LESS_IS_BETTER
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_changes import differences, left_open
from adapters_kit.training import checkpoints
from adapters_kit.training.cells import train_cells
from adapters_kit.training.inputs import Given, recipe_from
from adapters_kit.training.run import Run, metric_of
from adapters_kit.training.rungs import rung_step, scores_at
from adapters_kit.training.table import Table, as_text

SEARCH = "search.json"


@dataclass(frozen=True)
class Search:
    """The outcome; `print` it.

    Attributes:
        path: the folder with search.json, report.html and the run folders.
        best: the finished run that scored best; its folder is a run folder like any other.
        table: one row a candidate, best first: what sets it apart, its score at each rung that it reached.
        cost: of the steps made, in whole trainings; evaluations come on top.
        failures: candidate -> what stopped it.
    """

    path: Path
    best: Run
    table: Table
    cost: float
    failures: Mapping[str, str]

    def _repr_html_(self) -> str:
        """For a notebook."""
        return self.table._repr_html_()

    def __str__(self) -> str:
        return as_text(self.table)


def search(
    recipe: Given,
    out: str | Path = "search",
    *,
    budget: float = 0.2,
    methods: Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
    ranks: Sequence[int] | None = None,
    dropouts: Sequence[float] | None = None,
    together: Literal["auto", "off"] = "auto",
    quiet: bool = False,
) -> Search:
    """Finds the best of methods x learning rates x ranks x dropouts by successive halving.

    All candidates begin; at each rung the best third goes on from its checkpoint, three times as far, until one is
    trained to its end. That one is the run that `train` would have made of its recipe. What the candidates are held
    against is what `train` scores on: the recipe's held-out rows and its task's metric. Where so many rows cannot tell
    two scores apart (two standard errors), the loss decides until the last rung; there the metric does.

    The same call goes on with what is there; stopped or killed, no step before the last checkpoint is made again.

    Args:
        recipe: as for `train`; its learning rate, and the rank and the dropout of its method, are searched.
        out: folder of the run folders, of search.json and report.html.
        budget: optimizer steps to spend. Below 1: a part of those of the whole grid, trained to the end; from 1 on: so
            many times those of one training. Never exceeded, but by the rounding of a rung up to its first step;
            evaluations come on top.
        methods: names of methods; by default the recipe's own.
        learning_rates: by default each method's own, a third of it and three times it.
        ranks: `r` of the LoRA family, `bottleneck_dim` of bottleneck adapters; methods that have neither are tried
            without. By default 8 and 32.
        dropouts: of the adapter; by default 0 and 0.1.
        together: "auto" trains as many in one pass through the base as there is memory for (`train_many`).
        quiet: print nothing.

    Raises:
        RecipeError, DataError, ModelError, UnknownNameError, MissingPackageError: before anything is trained.
        TrainingError: `out` holds another search, or no candidate could be trained.
        WriteError: `out` cannot be written, or another process writes there.
    """
    check_name(out, WriteError)
    out = Path(out)
    recipe = recipe_from(recipe, out / "data")
    if recipe.eval.keep is not None:
        raise RecipeError(["eval.keep: a search scores held-out rows alone; leave it and keep_within out."])
    if together not in ("auto", "off"):
        raise RecipeError([f"together={together!r} is neither 'auto' nor 'off'."], "the search")
    candidates = grid(recipe, methods, learning_rates, ranks, dropouts)
    plan = rungs(len(candidates), budget)
    console = Console(stderr=True, quiet=quiet)
    with system.lock(out), system.writing(out, "The same call goes on with what is there."):
        _check_same(out, recipe, candidates, budget)
        return _Ladder(recipe, candidates, plan, budget, out, together == "auto", console).climb()


def _check_same(out: Path, recipe: Recipe, candidates: Mapping[str, Candidate], budget: float) -> None:
    """Refuses a folder with the results of another search: those of both would stand in one table."""
    if not (out / SEARCH).is_file():
        return
    before = read_json(out / SEARCH)
    told = differences(Recipe(**before["recipe"]), recipe, left_open(recipe))
    if before["candidates"] != list(candidates):
        told.append(f"candidates: {', '.join(before['candidates'])} -> {', '.join(candidates)}")
    if before["budget"] != budget:
        told.append(f"budget: {before['budget']:g} -> {budget:g}")
    if told:
        raise TrainingError(f"{out} holds another search; search into a new folder. {'; '.join(told)}.")


class _Ladder:
    """One search while it is made."""

    def __init__(
        self,
        recipe: Recipe,
        candidates: Mapping[str, Candidate],
        plan: Sequence[Rung],
        budget: float,
        out: Path,
        together: bool,
        console: Console,
    ) -> None:
        self.recipe, self.candidates, self.plan, self.budget = recipe, candidates, plan, budget
        self.out, self.together, self.console = out, together, console
        self.metric = tasks.of(recipe).metric
        self.failed: dict[str, BaseException] = {}
        self.scores: dict[str, list[tuple[int, float]]] = {name: [] for name in candidates}
        self.ranked: list[str] = []  # those that stopped, the best first

    def climb(self) -> Search:
        """Rung by rung; then the table and the page."""
        self._write([])
        going = list(self.candidates)
        for number, rung in enumerate(self.plan, 1):
            self._tell(
                f"rung {number} of {len(self.plan)}: {rung.count} of {len(going)} to {rung.part:.0%} of their steps"
            )
            tried: list[str] = []
            while going and not any(name not in self.failed for name in tried):
                going, now = going[rung.count :], going[: rung.count]
                self._train(now, rung)
                tried += now
            found = {name: self._score(name, rung) for name in tried if name not in self.failed}
            if not found:
                why = "; ".join(f"{name}: {error}" for name, error in self.failed.items())
                raise TrainingError(f"No candidate could be trained so far. {why}")
            self._stop(going)
            going = ranked(found)
        self._stop(going)
        return self._outcome(going[0])

    def _train(self, names: Sequence[str], rung: Rung) -> None:
        recipes = {self.out / name: self.candidates[name].recipe for name in names}
        until = rung.part if rung.part < 1 else None
        train_cells(recipes, together=self.together, quiet=self.console.quiet, until=until, failed=self.failed)

    def _score(self, name: str, rung: Rung) -> Found:
        """By what candidates are sorted: the metric, and the loss."""
        path = self.out / name
        at = scores_at(path, rung.part) if rung.part < 1 else None
        if at is None:
            run = Run.open(path)
            self.metric = metric_of(run)
            at = run.metrics["steps"], run.metrics
        step, scores = at
        chosen = self.metric if self.metric in scores else next(n for n in ("f1", "pearson", "loss") if n in scores)
        score, loss = float(scores[chosen]), float(scores.get("loss", math.inf))
        self.scores[name].append((step, score))
        self._tell(f"{name}: {chosen} {score:.4f}, loss {loss:.4f} after {step} steps")
        sign = -1 if chosen in LESS_IS_BETTER else 1
        # The last word is the metric's own: what ends is a run, and the table says which is best.
        told = noise(score, int(scores.get("rows", 0))) if sign > 0 else 0.0
        return Found(-math.inf if math.isnan(score) else sign * score, math.inf if math.isnan(loss) else loss, told)

    def _stop(self, names: Sequence[str]) -> None:
        """These go no further: nothing will go on from their checkpoints."""
        self.ranked = [*names, *self.ranked]
        for name in names:
            checkpoints.drop(self.out / name)

    def _tell(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _outcome(self, best: str) -> Search:
        run = Run.open(self.out / best)
        rows = [self._row(name, run) for name in [*self.ranked, *self.failed]]
        steps = {name: max([0, *(step for step, _ in found)]) for name, found in self.scores.items()}
        spent = sum(steps.values()) / run.metrics["steps"]
        notes = [
            f"Steps of {spent:.2f} trainings were made; the whole grid would take {len(self.candidates)}.",
            "The best was chosen by the held-out rows: on rows that nothing was chosen by it may score a little less "
            "(adapters-kit eval RUN --data FILE).",
        ]
        if self.failed:
            notes += [f"{name} failed: {error}" for name, error in self.failed.items()]
        table = Table(rows, notes)
        self._write(table, spent)
        curves = [(name, [step for step, _ in found], [score for _, score in found])
                  for name, found in ((name, self.scores[name]) for name in self.ranked)]  # fmt: skip
        write_search_page(self.out, f"{self.out.name}: search", rows, self.metric, curves, notes)
        return Search(self.out, run, table, spent, {name: str(error) for name, error in self.failed.items()})

    def _row(self, name: str, best: Run) -> dict[str, Any]:
        found = dict(self.scores[name])
        at = {
            f"{self.metric} at {rung.part:.0%}": found.get(rung_step(rung.part, best.metrics["steps"]))
            for rung in self.plan[:-1]
        }
        ended = (self.out / name / "metrics.json").is_file()
        final = self.scores[name][-1][1] if ended and self.scores[name] else None
        return {"run": name, **self.candidates[name].told, **at, self.metric: final, "steps": max([0, *found])}

    def _write(self, rows: Sequence[Mapping[str, Any]], spent: float | None = None) -> None:
        told = {"recipe": self.recipe.model_dump(mode="json"), "candidates": list(self.candidates)}
        plan = [{"candidates": rung.count, "part": rung.part} for rung in self.plan]
        done = {"best": rows[0]["run"], "cost": spent, "rows": list(rows)} if rows else {}
        if rows or not (self.out / SEARCH).is_file():
            write_json(
                self.out / SEARCH, {**told, "budget": self.budget, "rungs": plan, "planned": cost(self.plan)} | done
            )
