"""The command `adapters-kit`: one function a verb. torch is imported after the arguments are known to be good."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from adapters_kit.errors import AdapterError, DataError, did_you_mean


class _Parser(argparse.ArgumentParser):
    """argparse, with the nearest verb or flag in its errors."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"adapters-kit: {message}\nTry: {self.prog} --help\n")
        raise SystemExit(2)

    def format_help(self) -> str:
        """The usual help, and for verbs that take them every recipe key with its meaning."""
        text = super().format_help()
        if not self.get_default("takes_recipe_keys"):
            return text
        from adapters_kit.recipe import known_flags

        lines = [f"  --{key}\n      {' '.join(meaning.split())}" for key, meaning in known_flags().items()]
        return f"{text}\nrecipe keys:\n" + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0; 1 where `check` finds a problem; 2 for a mistake; 130 when stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, verbs = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in verbs:
        parser.error(f"there is no verb {arguments[0]!r}. {did_you_mean(arguments[0], verbs)}")
    verb = verbs.get(arguments[0]) if arguments else None
    flags = _take_recipe_flags(verb, arguments) if verb and verb.get_default("takes_recipe_keys") else []
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        verbs[options.verb].error(
            f"unknown argument {unknown[0]!r}. {did_you_mean(unknown[0], _flags(verbs[options.verb]))}"
        )
    try:
        status = options.run(options, flags) if options.takes_recipe_keys else options.run(options)
    except AdapterError as error:
        sys.stderr.write(f"adapters-kit: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("adapters-kit: interrupted\n")
        return 130
    return status or 0


def _flags(verb: argparse.ArgumentParser) -> list[str]:
    return [flag for action in verb._actions for flag in action.option_strings]


def _take_recipe_flags(verb: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """Moves keys such as `--method.r 16` out of `arguments`; argparse would take their values for positionals."""
    from adapters_kit.recipe import known_flags

    own, keys = _flags(verb), known_flags()
    taken: list[str] = []
    position = 1
    while position < len(arguments):
        word = arguments[position]
        name = word.partition("=")[0]
        if not word.startswith("--") or name in own:
            position += 1
            continue
        if name[2:].partition(".")[0] not in keys:
            verb.error(f"unknown argument {name!r}. {did_you_mean(name, [*own, *(f'--{key}' for key in keys)])}")
        has_value = "=" not in word and position + 1 < len(arguments) and not arguments[position + 1].startswith("--")
        taken += arguments[position : position + 1 + has_value]
        del arguments[position : position + 1 + has_value]
    return taken


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

    from adapters_kit.training.trainer import train as run_training

    run = run_training(recipe, out, resume=options.resume, overwrite=options.overwrite)
    if PartialState().is_main_process:
        _show_metrics(run.metrics)
        print(f"Run folder: {run.path}   adapter: {run.adapter}")


def evaluate(options: argparse.Namespace, flags: list[str]) -> None:
    """Score a run, an adapter or a plain model on held-out data."""
    from adapters_kit.recipe import keys_of

    keys = keys_of(flags)
    from adapters_kit.training.using import evaluate as score

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
    from adapters_kit.training.using import generates, stream
    from adapters_kit.training.using import predict as answer

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
    from adapters_kit.training.runs import as_text, compare_runs

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
    from adapters_kit.training.runs import as_text
    from adapters_kit.training.runs import sweep as run_sweep

    print(as_text(run_sweep(recipe, out, learning_rates=options.learning_rates, ranks=options.ranks)))
    print(f"Run folders: {out}")


def merge(options: argparse.Namespace) -> None:
    """Fold an adapter into its base model's weights, and prove that both compute the same."""
    from adapters_kit.shipping.merge import merge as fold

    report = fold(
        options.adapter,
        options.out,
        base=options.base,
        dtype=options.dtype,
        quantize=options.quantize,
        verify=options.verify,
        overwrite=options.overwrite,
        force=options.force,
    )
    print(report)


def check(options: argparse.Namespace) -> int:
    """Whether an adapter or a merged model loads in a server, and every reason if not."""
    from adapters_kit.shipping.check import check as look

    report = look(options.folder, options.target, max_lora_rank=options.max_lora_rank)
    print(report)
    return 0 if report else 1


def export(options: argparse.Namespace) -> None:
    """Write an adapter or a merged model in the form that a server takes."""
    from adapters_kit.shipping.export import export as write

    kinds = {"format": options.format, "canonical": options.canonical, "rank": options.rank, "dtype": options.dtype}
    print(write(options.source, options.out, base=options.base, overwrite=options.overwrite, **kinds))


def convert(options: argparse.Namespace) -> None:
    """Turn an adapter saved by AdapterHub's `adapters` into a peft adapter folder."""
    from adapters_kit.loading import load
    from adapters_kit.methods.adapterhub import convert_folder

    print(f"Converted to {convert_folder(options.source, load(options.base, task=options.task), options.out)}")


def _console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _show_metrics(metrics: dict[str, object]) -> None:
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.6g}" if isinstance(value, float) else f"{name:<{width}}  {value}")


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="adapters-kit",
        description="Freeze a Hugging Face model, train a small module on it, ship exactly what was trained.",
    )
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(function: Callable, name: str = "", recipe_keys: bool = False) -> _Parser:
        summary = function.__doc__.splitlines()[0]
        name = name or function.__name__
        made = subparsers.add_parser(name, help=summary, description=function.__doc__, allow_abbrev=False)
        made.set_defaults(run=function, takes_recipe_keys=recipe_keys)
        return made

    verb(methods)

    made = verb(inspect)
    made.add_argument("model", help="folder, hub id or .gguf file")
    made.add_argument("--task", help="put the head of this task on it (default: as it was saved)")
    made.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods (default: all declared ones)")

    made = verb(plan, recipe_keys=True)
    made.add_argument("recipe", nargs="?", type=Path, help="YAML file; without it, every key comes from flags")
    made.add_argument("--gpu", metavar="SIZE", help="memory of the card, such as 24GB (default: this machine's)")

    made = verb(train, recipe_keys=True)
    made.add_argument("recipe", nargs="?", type=Path, help="YAML file; without it, every key comes from flags")
    made.add_argument("--out", type=Path, help="run folder (default: runs/ and the recipe's name)")
    made.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    made.add_argument("--overwrite", action="store_true", help="delete an earlier run in the same folder")
    made.add_argument("--print-recipe", action="store_true", help="print the effective recipe and stop")

    made = verb(evaluate, "eval", recipe_keys=True)
    made.add_argument("name", help="run folder, adapter folder, or a model with --task")
    made.add_argument("--data", help="file, folder or hub id (default: the run's own held-out data)")

    made = verb(predict, recipe_keys=True)
    made.add_argument("name", help="run folder, adapter folder, or a model with --task")
    made.add_argument("text", nargs="*", help="inputs")
    made.add_argument("--data", help="file or folder of inputs")
    made.add_argument("--out", type=Path, help="JSONL file to write instead of printing")

    made = verb(compare, recipe_keys=True)
    made.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="one recipe, or two run folders or more")
    made.add_argument("--methods", metavar="A,B", help="methods beside the recipe's data (default: full,lora,dora,…)")
    made.add_argument("--seeds", type=int, default=3, help="seeds of each method (default: 3)")
    made.add_argument("--metric", help="score to compare (default: the task's own)")
    made.add_argument("--grid", metavar="X,Y", help="factors around each default learning rate (default: 0.33,1,3)")
    made.add_argument("--max-minutes", type=float, help="start nothing that would end later; go on with the same call")
    made.add_argument("--out", type=Path, help="folder of the results (default: runs/ and the recipe's name)")

    made = verb(sweep, recipe_keys=True)
    made.add_argument("recipe", nargs="?", type=Path, help="YAML file; without it, every key comes from flags")
    rates = [1e-4, 3e-4, 1e-3]
    made.add_argument(
        "--learning-rates", nargs="+", type=float, metavar="RATE", default=rates, help=f"default: {rates}"
    )
    made.add_argument("--ranks", nargs="+", type=int, metavar="R", default=[], help="default: the recipe's own rank")
    made.add_argument("--out", type=Path, help="folder of the run folders (default: runs/ and the recipe's name)")

    made = verb(merge)
    made.add_argument("adapter", help="adapter folder, such as runs/x/adapter")
    made.add_argument("out", help="model folder to write")
    made.add_argument("--base", help="base model (default: the one that the adapter names)")
    made.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="dtype of the result (default: the base's)")
    made.add_argument(
        "--quantize", choices=["nf4", "fp4", "int8"], help="round the result again; prints what the update loses"
    )
    made.add_argument(
        "--verify",
        choices=["sample", "full", "off"],
        default="sample",
        help="compare outputs on 2 batches, or on 16 and every written tensor, or nothing (default: sample)",
    )
    made.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")
    made.add_argument(
        "--force", action="store_true", help="merge into another base than the adapter's; says what differs"
    )

    made = verb(check)
    made.add_argument("folder", help="adapter or model folder")
    made.add_argument(
        "--target",
        choices=["peft", "transformers", "vllm", "sglang", "llama.cpp", "ollama"],
        default="vllm",
        help="what it shall load in (default: vllm)",
    )
    made.add_argument("--max-lora-rank", type=int, default=16, help="vLLM's option of that name (default: 16)")

    made = verb(export)
    made.add_argument("source", help="adapter folder; for GGUF also a model folder")
    made.add_argument("out", help="folder to write; for GGUF the file")
    made.add_argument("--format", choices=["peft", "gguf", "kv-cache"], default="peft", help="default: peft")
    made.add_argument("--canonical", action="store_true", help="fold all scales into B, alpha = r, one rank")
    made.add_argument("--rank", type=int, help="best approximation of that rank; implies --canonical")
    made.add_argument("--dtype", help="of the written tensors; for GGUF also q8_0")
    made.add_argument("--base", help="base model of a GGUF adapter or a KV cache (default: the one that it names)")
    made.add_argument("--overwrite", action="store_true", help="replace what is there")

    made = verb(convert)
    made.add_argument("source", help="folder of an AdapterHub adapter")
    made.add_argument("base", help="its base model: folder or hub id")
    made.add_argument("out", help="adapter folder to write")
    made.add_argument("--task", default="causal-lm", help="the head to load the base with (default: causal-lm)")
    return parser, subparsers.choices


if __name__ == "__main__":
    sys.exit(main())
