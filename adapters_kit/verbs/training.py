"""Verbs that train: init, train, train-many, compare, sweep, search."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters_kit.errors import DataError, RecipeError, did_you_mean
from adapters_kit.recipe import RECIPE, Recipe
from adapters_kit.recipe_sections import DATA_SUFFIXES, rows_suffix
from adapters_kit.verbs.display import Shown, metrics_text, print_table

if TYPE_CHECKING:
    from adapters_kit.training.run import Run


def is_data(path: Path) -> bool:
    """Whether a path given where a recipe is expected is the data itself."""
    return rows_suffix(path) in DATA_SUFFIXES or (path.is_dir() and not (path / RECIPE).is_file())


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe that the arguments describe: a YAML file, or a data file with the rest in flags; flags go over both.

    Raises:
        RecipeError: every problem, each with its line or flag.
    """
    path: Path | None = options.recipe
    if path is None or not is_data(path):
        return Recipe.read(path, options.flags)
    if not path.exists():
        near = did_you_mean(path.name, [one.name for one in path.parent.glob("*")])
        raise RecipeError([f"No file {str(path)!r}. {near}".rstrip()], "the arguments")
    given = {flag.partition("=")[0] for flag in options.flags if flag.startswith("--")}
    missing = [key for key in ("task", "model") if f"--{key}" not in given]
    if missing:
        from adapters_kit.task_table import TASKS

        what = {
            "task": f"what to learn, --task {'|'.join(TASKS)}",
            "model": "from which model, --model FOLDER-OR-HUB-ID",
        }
        raise RecipeError(
            [
                f"{path} is data, so say {' and '.join(what[key] for key in missing)}; "
                f"or let `adapters-kit init {path}` propose a recipe"
            ],
            "the arguments",
        )
    return Recipe.read(None, ["--data.train", str(path), *options.flags])


def default_out(options: argparse.Namespace, otherwise: str) -> Path:
    """`runs/` and the name of the recipe or data file; a run folder is its own."""
    recipe: Path | None = options.recipe
    if options.out is None and recipe and recipe.is_dir() and not is_data(recipe):
        return recipe
    return options.out or Path("runs") / (recipe.stem if recipe else otherwise)


def init(options: argparse.Namespace) -> Shown:
    """Look at a data file and write a recipe for it: task, columns, model and method, each with its reason."""
    out = options.out or Path(f"{Path(options.data).stem or 'recipe'}.yaml")
    if out.exists() and not options.overwrite:
        raise DataError(f"{out} exists already. Choose another --out, or give --overwrite to replace it.")
    from adapters_kit.artifacts.files import write_text
    from adapters_kit.training.propose import propose

    made = propose(options.data, task=options.task, model=options.model, method=options.method)
    write_text(out, made.text)
    told = [*made.reasons, f"Written to {out}. Next: adapters-kit plan {out}, then adapters-kit train {out}"]
    return Shown({"recipe": str(out), "fields": made.fields, "reasons": made.reasons}, "\n".join(told))


def train(options: argparse.Namespace) -> Shown | None:
    """Train a recipe, or a data file with --task and --model. Every key of the recipe is a flag: --method.r 16"""
    recipe = recipe_of(options)
    if options.print_recipe:
        return Shown(recipe, recipe.to_yaml().rstrip())
    out = default_out(options, Path(recipe.method.label).name)
    from accelerate import PartialState

    from adapters_kit.training.train import train as run_training

    run = run_training(recipe, out, resume=options.resume, overwrite=options.overwrite)
    if not PartialState().is_main_process:
        return None
    from adapters_kit.pages.verdict import verdict
    from adapters_kit.training.run import metric_of

    sentence, better = verdict(run.metrics, metric_of(run))
    return Shown(
        {"path": run.path, "adapter": run.adapter, "metrics": run.metrics, "better": better, "verdict": sentence},
        f"{sentence}\n{metrics_text(run.metrics)}\nRun folder: {run.path}   adapter: {run.adapter}\n{_next(run)}",
    )


def train_many(options: argparse.Namespace) -> Shown:
    """Train several recipes of one base in one pass: one base in memory, each adapter as its own run would have it."""
    from adapters_kit.pages.verdict import verdict
    from adapters_kit.training.many.train_many import train_many as run_many
    from adapters_kit.training.run import metric_of

    runs = run_many(options.recipes, options.out, resume=options.resume, overwrite=options.overwrite)
    told = [(run, *verdict(run.metrics, metric_of(run))) for run in runs]
    return Shown(
        [{"path": run.path, "metrics": run.metrics, "better": better, "verdict": said} for run, said, better in told],
        "\n".join(f"{run.path}: {said}" for run, said, _ in told),
    )


def _next(run: Run) -> str:
    if run.recipe.task == "causal-lm":
        ask = f"adapters-kit chat {run.path}"
    elif run.recipe.task == "question-answering":
        ask = f"adapters-kit predict {run.path} --input FILE"
    else:
        ask = (
            f'adapters-kit predict {run.path} "{"FILE" if run.recipe.task.startswith(("image", "audio")) else "TEXT"}"'
        )
    page = run.path / "report.html"
    return f"Look: {page}   ask: {ask}" if page.is_file() else f"Ask: {ask}"


def compare(options: argparse.Namespace) -> Shown:
    """Methods beside full fine-tuning on one recipe, several seeds; or finished runs beside each other, best first."""
    files = any(rows_suffix(path) in (".yaml", ".yml", *DATA_SUFFIXES) for path in options.paths)
    if files and len(options.paths) > 1:
        raise DataError(f"Give one recipe, or run folders: here are {', '.join(map(str, options.paths))}.")
    if files or (len(options.paths) == 1 and (options.flags or options.methods)):
        return _compare_methods(options)
    folders = [path for path in options.paths if path.is_dir()]
    if missing := [path for path in options.paths if path not in folders]:
        near = did_you_mean(missing[0].name, [path.name for path in missing[0].parent.glob("*/")])
        raise DataError(f"No run folder {str(missing[0])!r}. {near}".rstrip())
    if len(folders) == 1:
        raise DataError(
            f"One run compares with nothing: give another run folder, or --methods full,lora to compare methods on the "
            f"recipe of {folders[0]}."
        )
    if options.flags:
        raise DataError(f"{options.flags[0]} changes a recipe; the runs in {folders[0]} are finished.")
    from adapters_kit.training.table import cells, compare_runs

    rows = compare_runs(folders)
    return Shown(rows, partial(_print, cells(rows), rows.notes))


def _print(lines: list[list[str]], below: list[str]) -> None:
    """A table as wide as the terminal, and what is said below it."""
    print_table(lines[0], lines[1:])
    for line in below:
        print(line)


def _compare_methods(options: argparse.Namespace) -> Shown:
    options.recipe = options.paths[0]
    recipe = recipe_of(options)
    out = options.out or Path("runs") / f"{options.paths[0].stem}-comparison"
    given: dict[str, Any] = {
        "methods": options.methods.split(",") if options.methods else None,
        "metric": options.metric,
        "grid": options.grid,
        "max_minutes": options.max_minutes,
        "together": options.together,
    }
    from adapters_kit.comparison import compare as run_comparison
    from adapters_kit.comparison.report import cells

    given = {name: value for name, value in given.items() if value is not None}
    found = run_comparison(recipe, seeds=options.seeds, out=out, **given)
    head, body = cells(found.document)
    return Shown(found.document, partial(_print, [head, *body], ["", *found.notes]))


def sweep(options: argparse.Namespace) -> Shown:
    """Train a recipe with every learning rate and rank, and print the runs beside each other, best first."""
    recipe = recipe_of(options)
    out = options.out or Path("runs") / f"{options.recipe.stem if options.recipe else 'recipe'}-sweep"
    from adapters_kit.training.sweep import sweep as run_sweep
    from adapters_kit.training.table import cells

    chosen = {"learning_rates": options.learning_rates, "ranks": options.ranks, "together": options.together}
    rows = run_sweep(recipe, out, **chosen)
    return Shown(rows, partial(_print, cells(rows), [*rows.notes, f"Run folders: {out}"]))


def search(options: argparse.Namespace) -> Shown:
    """Find the best rate, rank, method and dropout for a part of what training the whole grid would take."""
    recipe = recipe_of(options)
    out = options.out or Path("runs") / f"{options.recipe.stem if options.recipe else 'recipe'}-search"
    from adapters_kit.comparison.search import search as run_search
    from adapters_kit.training.table import cells

    given = {"methods": options.methods.split(",") if options.methods else None, "budget": options.budget}
    given |= {name: getattr(options, name) for name in ("learning_rates", "ranks", "dropouts", "together")}
    found = run_search(recipe, out, **given)
    best = {"best": found.best.path, "metrics": found.best.metrics, "cost": found.cost, "failures": found.failures}
    below = [*found.table.notes, f"Best: {found.best.path}   page: {out / 'report.html'}", _next(found.best)]
    return Shown({**best, "rows": found.table}, partial(_print, cells(found.table), below))
