"""The verbs of the command line: one function each. Its docstring is the verb's help; torch is imported inside."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from adapters_kit.errors import AdapterError, DataError, did_you_mean


def methods(options: argparse.Namespace) -> None:
    """Every method: what it trains, whether it merges, where it was published."""
    from rich.table import Table

    from adapters_kit.methods import table

    shown = Table("name", "config", "trains", "merges", "paper", box=None, pad_edge=False)
    merges = {True: "yes", False: "no", None: "?"}
    for method in table():
        config = method.config.partition(":")[2]
        shown.add_row(method.name, config, method.trains, merges[method.mergeable], method.paper)
    _console().print(shown)


def inspect(options: argparse.Namespace) -> None:
    """Blocks, branches and linears of a model, and how much each method would train; reads no weights."""
    import copy

    from rich.table import Table

    from adapters_kit import registry
    from adapters_kit.anatomy import map_model, tree
    from adapters_kit.kernels.fuse import fuse
    from adapters_kit.loading import skeleton
    from adapters_kit.wrapping import wrap

    bare = skeleton(options.model, options.task)
    console = _console()
    console.print(tree(map_model(bare)))
    shown = Table("method", "trained parameters", "of all", "", box=None, pad_edge=False)
    # What a start from the weights, or the length of a run, decides does not change the count.
    needed = {"adalora": {"total_step": 1}, "pissa": {"init_lora_weights": True}, "olora": {"init_lora_weights": True}}
    for name in options.methods or registry.names():
        try:
            wrapped = wrap(copy.deepcopy(bare), name, fuse=False, **needed.get(name, {}))
            trained, total = wrapped.get_nb_trainable_parameters()
            shown.add_row(name, f"{trained:,}", f"{trained / total:.2%}", "")
        except AdapterError as error:
            shown.add_row(name, "", "", str(error).splitlines()[0])
    console.print(shown)
    try:
        console.print(str(fuse(wrap(copy.deepcopy(bare), "lora", fuse=False))), highlight=False, soft_wrap=True)
    except AdapterError as error:  # a model without a linear layer
        console.print(f"no LoRA: {error}", highlight=False, soft_wrap=True)


def plan(options: argparse.Namespace, flags: list[str]) -> None:
    """What a recipe will train, the memory that a step takes, and whether it fits; reads no weights."""
    from adapters_kit.recipe import Recipe

    recipe = Recipe.read(options.recipe, flags)
    from adapters_kit.training.plan import plan as make_plan

    print(make_plan(recipe, options.gpu))


def train(options: argparse.Namespace, flags: list[str]) -> None:
    """Train a recipe. Every key of the recipe is a flag too: --method.r 16 --training.learning_rate 1e-4"""
    from adapters_kit.recipe import Recipe

    recipe = Recipe.read(options.recipe, flags)
    if options.print_recipe:
        print(recipe.to_yaml(), end="")
        return
    out = options.out or Path("runs") / (options.recipe.stem if options.recipe else Path(recipe.method.label).name)
    from accelerate import PartialState

    from adapters_kit.training.train import train as run_training

    run = run_training(recipe, out, resume=options.resume, overwrite=options.overwrite)
    if PartialState().is_main_process:
        _show_metrics(run.metrics)
        print(f"Run folder: {run.path}   adapter: {run.adapter}")


def evaluate(options: argparse.Namespace, flags: list[str]) -> None:
    """Score a run, an adapter or a plain model on held-out data."""
    from adapters_kit.recipe import keys_of

    keys = keys_of(flags)
    from adapters_kit.inference import evaluate as score

    _show_metrics(score(options.name, options.data, **keys))


def predict(options: argparse.Namespace, flags: list[str]) -> None:
    """Answers of a run, an adapter or a plain model: one JSON object a line, written while the model writes.

    Texts that a model generates appear as they are made: plainly on a terminal, inside the JSON line elsewhere.
    """
    from adapters_kit.recipe import keys_of

    if bool(options.text) == bool(options.data):
        raise DataError("Give either texts or --data FILE: adapters-kit predict runs/x 'a text' 'another'")
    keys = keys_of(flags)
    if options.out and options.out.exists():
        raise DataError(f"{options.out} exists already; predictions never overwrite a file. Choose another --out.")
    from adapters_kit.inference import generates, stream
    from adapters_kit.inference import predict as answer

    if options.text and not options.out and generates(options.name, **keys):
        _print_streams(options.text, stream(options.name, options.text, **keys))
        return
    answers = answer(options.name, options.data or options.text, **keys)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
    if options.out:
        options.out.write_text(lines, encoding="utf-8")
        print(f"{len(answers)} predictions in {options.out}")
    else:
        print(lines, end="")


def _print_streams(prompts: list[str], answers: Iterable[Iterable[str]]) -> None:
    """Each piece at once; a JSON line that is written in pieces is still one JSON line."""
    plain = sys.stdout.isatty()
    for prompt, answer in zip(prompts, answers, strict=True):
        if not plain:
            print(f'{{"prompt": {json.dumps(prompt, ensure_ascii=False)}, "answer": "', end="")
        for piece in answer:
            print(piece if plain else json.dumps(piece, ensure_ascii=False)[1:-1], end="", flush=True)
        print("" if plain else '"}', flush=True)


def compare(options: argparse.Namespace, flags: list[str]) -> None:
    """Methods beside full fine-tuning on one recipe, several seeds; or finished runs beside each other, best first."""
    recipes = [path for path in options.paths if path.suffix in (".yaml", ".yml")]
    if recipes:
        if len(options.paths) > 1:
            raise DataError(f"Give one recipe, or run folders: here are {', '.join(map(str, options.paths))}.")
        _compare_methods(options, flags)
        return
    folders = [path for path in options.paths if path.is_dir()]
    if missing := [path for path in options.paths if path not in folders]:
        near = did_you_mean(missing[0].name, [path.name for path in missing[0].parent.glob("*/")])
        raise DataError(f"No run folder {str(missing[0])!r}. {near}".rstrip())
    if flags:
        raise DataError(f"{flags[0]} changes a recipe; the runs in {folders[0]} are finished.")
    from adapters_kit.training.table import as_text, compare_runs

    print(as_text(compare_runs(folders)))


def _compare_methods(options: argparse.Namespace, flags: list[str]) -> None:
    from adapters_kit.recipe import Recipe

    recipe = Recipe.read(options.paths[0], flags)
    out = options.out or Path("runs") / f"{options.paths[0].stem}-comparison"
    given = {
        "methods": options.methods.split(",") if options.methods else None,
        "metric": options.metric,
        "grid": [float(factor) for factor in options.grid.split(",")] if options.grid else None,
        "max_minutes": options.max_minutes,
    }
    from adapters_kit.comparison import compare as run_comparison

    given = {name: value for name, value in given.items() if value is not None}
    print(run_comparison(recipe, seeds=options.seeds, out=out, **given))


def sweep(options: argparse.Namespace, flags: list[str]) -> None:
    """Train a recipe with every learning rate and rank, and print the runs beside each other, best first."""
    from adapters_kit.recipe import Recipe

    recipe = Recipe.read(options.recipe, flags)
    out = options.out or Path("runs") / f"{options.recipe.stem if options.recipe else 'recipe'}-sweep"
    from adapters_kit.training.table import as_text
    from adapters_kit.training.table import sweep as run_sweep

    print(as_text(run_sweep(recipe, out, learning_rates=options.learning_rates, ranks=options.ranks)))
    print(f"Run folders: {out}")


def merge(options: argparse.Namespace) -> None:
    """Fold an adapter, or several, into the base model's weights, and prove that both compute the same."""
    from adapters_kit.merging.merge import merge as fold

    report = fold(
        options.adapters if len(options.adapters) > 1 else options.adapters[0],
        options.out,
        **_mixing(options),
        base=options.base,
        dtype=options.dtype,
        quantize=options.quantize,
        verify=options.verify,
        overwrite=options.overwrite,
        force=options.force,
    )
    print(report)


def combine(options: argparse.Namespace) -> None:
    """Write one LoRA adapter that stands for several of the same base."""
    from adapters_kit.serving.combine import combine as join

    kinds = {"rank": options.rank, "overwrite": options.overwrite}
    print(join(options.adapters, options.out, **_mixing(options), **kinds))


def _mixing(options: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(options, name) for name in ("weights", "method", "density", "seed")}


def check(options: argparse.Namespace) -> int:
    """Whether an adapter or a merged model loads in a server, and every reason if not."""
    from adapters_kit.serving.check import check as look

    report = look(options.folder, options.target, max_lora_rank=options.max_lora_rank)
    print(report)
    return 0 if report else 1


def export(options: argparse.Namespace) -> None:
    """Write an adapter or a merged model in the form that a server takes."""
    from adapters_kit.serving.export import export as write

    kinds = {"format": options.format, "canonical": options.canonical, "rank": options.rank, "dtype": options.dtype}
    print(write(options.source, options.out, base=options.base, overwrite=options.overwrite, **kinds))


def convert(options: argparse.Namespace) -> None:
    """Turn an adapter saved by AdapterHub's `adapters` into a peft adapter folder."""
    from adapters_kit.loading import load
    from adapters_kit.methods.adapterhub.folder import convert_folder

    print(f"Converted to {convert_folder(options.source, load(options.base, task=options.task), options.out)}")


def _console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _show_metrics(metrics: dict[str, object]) -> None:
    notes = {"notes", "counts"}  # printed while the run went on
    width = max(map(len, metrics))
    for name, value in metrics.items():
        if name in notes:
            continue
        print(f"{name:<{width}}  {value:.6g}" if isinstance(value, float) else f"{name:<{width}}  {value}")
