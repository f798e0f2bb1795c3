"""compare(): which methods are as good as full fine-tuning on a recipe's data, and what each costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from adapters_kit import system, tasks
from adapters_kit.artifacts.source import find
from adapters_kit.comparison import report
from adapters_kit.comparison.cell import BASE, FULL, Cell, depends_on, digest_of_model, digest_of_options, rows_of
from adapters_kit.comparison.remaining import Remaining
from adapters_kit.comparison.space import as_changes
from adapters_kit.comparison.summary import Row, summarize
from adapters_kit.comparison.worker import Worker, worker
from adapters_kit.errors import RecipeError, TrainingError, WriteError, did_you_mean
from adapters_kit.loading import skeleton
from adapters_kit.loading.gguf import lay_in_blocks
from adapters_kit.loading.model import file_in_blocks
from adapters_kit.names import check_name
from adapters_kit.pages.comparison_page import rows_table
from adapters_kit.pages.verdict import LESS_IS_BETTER
from adapters_kit.quantization import KEEP
from adapters_kit.recipe import Recipe
from adapters_kit.training.assembly import method_options
from adapters_kit.training.callbacks import duration
from adapters_kit.training.inputs import Given, recipe_from
from adapters_kit.training.many.passes import passes
from adapters_kit.training.resolve import resolve
from adapters_kit.wrapping import build_config

METHODS = ("full", "lora", "dora", "ia3", "pfeiffer", "houlsby", "parallel", "prefix", "mam")
GRID = (1 / 3, 1.0, 3.0)
# What is usual for BERT-sized models; the grid reaches around it, and further where its edge is best.
FULL_RATE = 1e-4
MOST_RATES = 5


@dataclass(frozen=True)
class Variant:
    """One line of the comparison: a label, its recipe, and whether every parameter is trained."""

    label: str
    recipe: Recipe
    kind: str
    """"full", "base" or "adapter"."""
    rate: float
    """The learning rate that the search starts from."""
    config: Any = None
    """The adapter's peft config; None without an adapter."""


@dataclass(frozen=True)
class Comparison:
    """The outcome; `print` it.

    Attributes:
        path: the folder with comparison.json, report.md and the plots.
        metric: the score compared.
        rows: one a method, best first.
        document: what comparison.json holds.
        missing: cells that `max_minutes` left out.
    """

    path: Path
    metric: str
    rows: list[Row]
    document: dict[str, Any]
    missing: int = 0
    notes: list[str] = field(default_factory=list)
    """What a user should know."""

    def _repr_html_(self) -> str:
        """For a notebook."""
        return rows_table(report.page_rows(self.document))

    def __str__(self) -> str:
        return "\n".join([report.text_table(self.document), "", *self.notes])


def compare(
    recipe: Given,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = METHODS,
    seeds: int | Sequence[int] = 3,
    *,
    out: str | Path = "comparison",
    metric: str | None = None,
    grid: Sequence[float] | None = GRID,
    rates: Mapping[str, float] | None = None,
    validation_size: float = 0.2,
    max_minutes: float | None = None,
    threads: int | None = None,
    together: Literal["auto", "off"] = "off",
    quiet: bool = False,
) -> Comparison:
    """Trains every method and full fine-tuning on the same rows, for the same number of epochs, with several seeds.

    The learning rate of each is searched first, with one seed, on rows set aside from the training data: its own
    default times each factor of `grid`, and on by the same step while the best lies at an edge (at most five rates).
    Then each seed is trained once with the chosen rate and scored once on the test rows.

    Every cell runs in a process of its own and is kept in `out`/cells under a hash of all that it depends on: an
    interrupted comparison goes on where it stopped, and one with another method or seed trains only what is new.

    Args:
        recipe: model, data, task and budget; as for `train` a `Recipe`, a YAML file or a dict. Its method's options
            hold for that method.
        methods: names ("full" is full fine-tuning, "lora+prefix" trains both as one adapter), or label to changes of
            the recipe: {"lora r=4": {"method": {"name": "lora", "r": 4}}, "lora nf4": {"quantize": "nf4"}}.
        seeds: a number of seeds (0, 1, 2 …), or the seeds.
        out: folder of the results, made here.
        metric: the score to compare; by default the task's own (perplexity for language models).
        grid: factors around the default learning rate; None takes the defaults without a search.
        rates: label to learning rate; these are not searched.
        validation_size: rows set aside for the search, a fraction of the training rows (below 1) or a number.
        max_minutes: start no cell that would end later; the table then says what is missing.
        threads: torch threads of each cell; by default as many as this process has.
        together: "auto" trains what shares a base in one pass, as much as there is memory for, with the results of
            going apart (`train_many`): the learning rates' search, and all seeds but the first, by which time, speed
            and memory are told. With `max_minutes` everything goes apart.
        quiet: print nothing while running.

    Raises:
        RecipeError, DataError, ModelError, UnknownNameError: before anything is trained.
        TrainingError: none of the cells gave a result.
        WriteError: `out` cannot be written, or another process writes there.
    """
    check_name(out, WriteError)
    out = Path(out)
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise RecipeError([f"seeds={seeds}: give at least one seed, each once."])
    if grid is not None and (not grid or min(grid) <= 0):
        raise RecipeError([f"grid={list(grid)}: give factors above 0, such as 0.33, 1, 3; or None for no search."])
    if together not in ("auto", "off"):
        raise RecipeError([f"together={together!r} is neither 'auto' nor 'off'."], "the comparison")
    joint = together == "auto" and max_minutes is None
    limits = _Limits(seeds, grid, rates or {}, validation_size, max_minutes, threads or torch.get_num_threads(), joint)
    recipe = recipe_from(recipe, out / "data")
    if recipe.eval.keep is not None:
        raise RecipeError(["eval.keep: a comparison scores held-out rows alone; leave it and keep_within out."])
    if recipe.eval.judge is not None:
        raise RecipeError(["eval.judge: a comparison writes no answers; leave it out."])
    if recipe.training.init is not None:
        raise RecipeError(["training.init: a comparison starts every method as that method does; leave it out."])
    with (
        system.lock(out),
        system.stoppable(),
        system.writing(out, "The same call goes on with the cells that are done."),
    ):
        return _Study(recipe, methods, out, metric, limits, Console(stderr=True, quiet=quiet)).run()


@dataclass(frozen=True)
class _Limits:
    """How much is tried, as `compare` takes it."""

    seeds: list[int]
    grid: Sequence[float] | None
    rates: Mapping[str, float]
    validation_size: float
    max_minutes: float | None
    threads: int
    together: bool


class _Study:
    """One comparison while it is made; `run` reads from top to bottom."""

    def __init__(
        self,
        recipe: Recipe,
        methods: Sequence[str] | Mapping[str, Mapping[str, Any]],
        out: Path,
        metric: str | None,
        limits: _Limits,
        console: Console,
    ) -> None:
        self.recipe, self.out, self.limits, self.console = recipe, out, limits, console
        self.begun = time.monotonic()
        shapes = cache(_shapes)
        self.variants = [
            _variant(recipe, label, changes, shapes) for label, changes in as_changes(recipe, methods).items()
        ]
        unknown = [label for label in limits.rates if label not in {v.label for v in self.variants}]
        if unknown:
            raise RecipeError([f"rates: there is no method {unknown[0]!r} here. {did_you_mean(unknown[0], methods)}"])
        self.rows = rows_of(recipe, limits.validation_size)[1]
        self.everyone = depends_on(recipe, self.rows, None)
        self.models = {recipe.model: self.everyone["model"]}
        others = {v.recipe.model for v in self.variants} - set(self.models)
        self.models |= {name: digest_of_model(name) for name in others}
        self.metric, self.higher = _metric(recipe, metric)
        self.left_out: list[str] = []
        self.failures: dict[str, str] = {}
        searched = 0 if limits.grid is None or len(limits.grid) == 1 else len(limits.grid)
        each = {v.label: len(limits.seeds) + (searched if v.label not in limits.rates else 0) for v in self.variants}
        self.remaining = Remaining({BASE: 1, **each})

    def run(self) -> Comparison:
        """The base's score, a learning rate for each variant, each variant with each seed, the report."""
        counts = {name: len(part) for name, part in self.rows.items()}
        self._tell(
            f"{counts['train']:,} rows to train on, {counts['validation']:,} to choose learning rates on, "
            f"{counts['test']:,} held out"
        )
        with worker(self.out / "cells", self.limits.threads) as made:
            attempt = partial(self._attempt, made)
            untrained = Variant(BASE, self.recipe.changed(method={"name": "lora"}, quantize=None), BASE, 0.0)
            base = attempt(untrained, None, self.limits.seeds[0], "test")
            self._together(made, self._first_rates())
            chosen, searched = self._rates(attempt)
            others = [(v, chosen[v.label], seed, "test") for seed in self.limits.seeds[1:] for v in self.variants]
            self._together(made, [one for one in others if one[0].label not in self.failures])
            finals = self._finals(attempt, chosen)
        if not any(finals.values()):
            reasons = "; ".join(f"{label}: {why}" for label, why in self.failures.items())
            late = f"max_minutes={self.limits.max_minutes} left no time."
            raise TrainingError(f"No method gave a result. {reasons or late}")
        full = next((v.label for v in self.variants if v.kind == FULL), None)
        ranked = summarize(finals, self.metric, self.higher, full, counts["test"])
        document = report.document(
            self.recipe, ranked, self.metric, self.higher, base, chosen, searched, finals, self.failures, counts
        )
        notes = report.write(self.out, document)
        notes += [f"{label} gave no result: {why}" for label, why in self.failures.items() if not finals.get(label)]
        if self.left_out:
            notes.append(
                f"{len(self.left_out)} cells are missing (max_minutes={self.limits.max_minutes:g}); the same call goes "
                "on with them."
            )
        return Comparison(self.out, self.metric, ranked, document, len(self.left_out), notes)

    def _rates(
        self, attempt: Callable[..., dict | None]
    ) -> tuple[dict[str, float], dict[str, dict[str, float | None]]]:
        """A learning rate for each label, given or searched; and what each search found."""
        chosen: dict[str, float] = {}
        searched: dict[str, dict[str, float | None]] = {}
        seed = self.limits.seeds[0]
        for variant in self.variants:
            if variant.label in self.limits.rates:
                chosen[variant.label] = self.limits.rates[variant.label]
                continue
            tried = partial(attempt, seed=seed, part="validation")
            found = _search(variant, self.limits.grid, self.higher, self.metric, tried)
            searched[variant.label] = {f"{rate:.3g}": score for rate, score in sorted(found.items())}
            good = {rate: score for rate, score in found.items() if score is not None}
            pick = max if self.higher else min
            chosen[variant.label] = pick(good, key=good.__getitem__) if good else variant.rate
        return chosen, searched

    def _finals(self, attempt: Callable[..., dict | None], chosen: Mapping[str, float]) -> dict[str, dict[int, dict]]:
        """Label -> seed -> result. Seed by seed: stopped early, every method has equally many."""
        finals: dict[str, dict[int, dict]] = {v.label: {} for v in self.variants}
        if self.left_out:  # a search that was cut short has chosen nothing yet
            return finals
        for seed in self.limits.seeds:
            for variant in self.variants:
                if variant.label in self.failures and not finals[variant.label]:
                    self.remaining.dropped(variant.label)
                    continue
                result = attempt(variant, chosen[variant.label], seed, "test")
                if result is not None:
                    finals[variant.label][seed] = result
        return finals

    def _first_rates(self) -> list[tuple[Variant, float, int, str]]:
        """What the search of learning rates tries in any case."""
        factors = self.limits.grid if self.limits.grid is not None and len(self.limits.grid) > 1 else ()
        searched = [v for v in self.variants if v.label not in self.limits.rates]
        return [(v, v.rate * factor, self.limits.seeds[0], "validation") for v in searched for factor in factors]

    def _together(self, made: Worker, asked: Sequence[tuple[Variant, float, int, str]]) -> None:
        """Makes cells that share a base in passes; they are kept, and what fails here is tried again by itself."""
        if not self.limits.together:
            return
        cells = {}
        for variant, rate, seed, part in asked:
            cell = self._cell(variant, rate, seed, part)
            if variant.kind == "adapter" and not (self.out / "cells" / f"{cell.key}.json").is_file():
                changes = {"training.learning_rate": rate, "training.seed": seed}
                cells[f"{variant.label} lr {rate:.1e} seed {seed}"] = cell, variant.recipe.changed(**changes)
        groups, told = passes({name: recipe for name, (_, recipe) in cells.items()})
        if told:
            self._tell(told)
        for names in (names for names in groups if len(names) > 1):
            self._tell(f"in one pass: {', '.join(names)}")
            made.together([cells[name][0] for name in names])

    def _attempt(self, made: Worker, variant: Variant, rate: float | None, seed: int, part: str) -> dict | None:
        """The cell's result; None where it failed or there is no time left for it."""
        cell = self._cell(variant, rate, seed, part)
        what = f"{variant.label:<16} seed {seed} lr {rate or 0:.1e} {part:<10}"
        known = (self.out / "cells" / f"{cell.key}.json").is_file()
        spent, expected = time.monotonic() - self.begun, self.remaining.took(variant.label)
        most = self.limits.max_minutes
        if not known and most is not None and spent + expected > 60 * most:
            self.left_out.append(what)
            return None
        started = time.monotonic()
        result = made.run(cell)
        if "error" in result:
            self._tell(f"{what} failed: {result['error']}")
            self.remaining.done(variant.label, None)
            self.failures.setdefault(variant.label, result["error"])
            return None
        took = None if known else time.monotonic() - started
        self.remaining.done(variant.label, took)
        score, left = result["scores"].get(self.metric, math.nan), self.remaining.seconds()
        note = "kept from before" if took is None else duration(took)
        eta = "" if left is None else f"  ETA {duration(left)}"
        self._tell(f"{what} {self.metric} {score:.4f}  {note}{eta}")
        return result

    def _cell(self, variant: Variant, rate: float | None, seed: int, part: str) -> Cell:
        merges = part == "test" and variant.kind == "adapter" and seed == self.limits.seeds[0]
        model = self.models[variant.recipe.model]
        depends = self.everyone | {"model": model, "method": digest_of_options(variant.config)}
        fields = variant.recipe.model_dump(mode="json")
        return Cell(fields, variant.kind, rate, seed, part, self.limits.validation_size, merges, depends)

    def _tell(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


_SOME_STEPS = 10**9  # the rows, and so the length of a run, are not known yet; each run fills in its own


def _variant(recipe: Recipe, label: str, changes: dict[str, Any], shapes: Callable[..., nn.Module]) -> Variant:
    """Checks on the model's shapes that the method suits it: refused now, not after an hour."""
    if changes.get("method") == FULL:
        rest = {name: value for name, value in changes.items() if name != "method"}
        plain = recipe.changed(**rest, method={"name": "lora"}, quantize=None)
        return Variant(label, plain, FULL, plain.training.learning_rate or FULL_RATE)
    changed = recipe.changed(**changes)
    # Written out: a default that moves is another cell.
    resolved = resolve(changed).training
    assert resolved.learning_rate is not None  # that is what resolving is for
    changed = changed.changed(**{"training.base_dropout": resolved.base_dropout})
    options = method_options(changed, _SOME_STEPS)
    config = build_config(shapes(changed.model, changed.head, changed.quantize), changed.method.name, **options)
    return Variant(label, changed, "adapter", resolved.learning_rate, config)


def _shapes(name: str, head: str, quantize: str | None) -> nn.Module:
    """The model without weights; which of them lie in which blocks, where a .gguf file keeps them."""
    model = skeleton(name, head)
    if quantize == KEEP:
        lay_in_blocks(model, file_in_blocks(find(name)), torch.float32)
    return model


def _metric(recipe: Recipe, metric: str | None) -> tuple[str, bool]:
    """The score to compare, and whether more is better."""
    task = tasks.of(recipe)
    chosen = metric or ("perplexity" if recipe.task == "causal-lm" and recipe.objective is None else task.metric)
    return chosen, chosen not in LESS_IS_BETTER


def _search(variant: Variant, grid: Sequence[float] | None, higher: bool, metric: str, attempt: Any) -> dict:
    """Learning rate to validation score (None: failed) around the default, going on while the best is at an edge."""
    if grid is None or len(grid) == 1:
        return {variant.rate * (grid[0] if grid else 1.0): None}
    factors = sorted(grid)
    step = factors[-1] / factors[-2]
    found: dict[float, float | None] = {}
    waiting = [variant.rate * factor for factor in factors]
    while waiting:
        for rate in waiting:
            result = attempt(variant, rate)
            found[rate] = None if result is None else result["scores"][metric]
        good = {rate: score for rate, score in found.items() if score is not None and math.isfinite(score)}
        if not good or len(found) >= MOST_RATES:
            break
        best = (max if higher else min)(good, key=good.__getitem__)
        waiting = [best * step] if best == max(found) else [best / step] if best == min(found) else []
    return found
