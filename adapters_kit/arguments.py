"""The arguments of every verb, and help by key. No torch: help and mistakes answer in a fraction of a second."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from adapters_kit.arguments_shipping import add_shipping
from adapters_kit.errors import did_you_mean
from adapters_kit.method_options import option_help
from adapters_kit.verbs import doctor, inference, models, training

# The recipe's keys as the help of a verb groups them; a key that is in no group stands in the last.
GROUPS: dict[str, tuple[str, ...]] = {
    "what is trained, on what": ("model", "task", "method", "problem", "labels", "data", "answer_only",
                                     "trust_remote_code"),
    "how long, how large": ("epochs", "max_steps", "batch_size", "eval_batch_size", "gradient_accumulation", 
                            "max_length", "packing", "group_by_length", "auto_batch"),
    "optimizer": ("learning_rate", "head_learning_rate", "optimizer", "lora_plus_ratio", "scheduler", "warmup",
                  "weight_decay", "max_grad_norm", "base_dropout", "seed"),
    "memory and speed": ("quantize", "precision", "gradient_checkpointing", "recompute", "fuse", "chunked_loss"),
    "evaluations, checkpoints, what is written": ("evals_per_epoch", "early_stopping", "keep_best", "save_every",
                                                  "log_every", "log_to", "samples", "max_new_tokens"),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse, with the nearest verb or flag in its errors."""

    def error(self, message: str) -> NoReturn:
        """One line, where to look, status 2."""
        sys.stderr.write(f"adapters-kit: {message}\nTry: {self.prog} --help\n")
        raise SystemExit(2)

    def format_help(self) -> str:
        """The usual help; for verbs that take them, the recipe's keys by group."""
        text = super().format_help()
        if not self.get_default("takes_recipe_keys"):
            return text
        lines = ["", "keys of the recipe, each of which is a flag:"]
        for title, keys in grouped_keys().items():
            words = "  ".join(f"--{key}" for key in keys)
            lines.append(f"  {title}:")
            lines += textwrap.wrap(words, _width() - 4, initial_indent="    ", subsequent_indent="    ",
                                   break_long_words=False, break_on_hyphens=False)  # fmt: skip
        lines += ["", f"{self.prog} --help KEY tells what a key does, --help all what each does."]
        return text + "\n".join(lines) + "\n"


def _width() -> int:
    return max(min(shutil.get_terminal_size().columns, 110), 30)


def grouped_keys() -> dict[str, list[str]]:
    """Title to dotted keys, every key of the recipe once."""
    from adapters_kit.recipe import known_flags

    found: dict[str, list[str]] = {title: [] for title in (*GROUPS, "more")}
    for key in known_flags():
        parts = {key.rpartition(".")[2], key.partition(".")[0]}
        place = next((title for title, names in GROUPS.items() if parts & set(names)), "more")
        if key not in ("data", "method", "training", "version"):
            found[place].append(key)
    return {title: keys for title, keys in found.items() if keys}


def help_of(verb: Parser, word: str) -> str:
    """What one flag or key does, or `all` of them.

    Raises:
        SystemExit: there is no such thing.
    """
    from adapters_kit.recipe import known_flags

    word = word.removeprefix("--")
    keys = known_flags() if verb.get_default("takes_recipe_keys") else {}
    own = {flag.removeprefix("--"): action for action in verb._actions for flag in action.option_strings}
    if word == "all":
        return verb.format_help() + "\n" + "\n".join(_explained(key, text) for key, text in keys.items())
    short = {key.rpartition(".")[2]: key for key in keys}
    if word in own:
        return _explained(word, own[word].help or "")
    key = word if word in keys else short.get(word)
    if key is not None:
        return _explained(key, keys[key])
    options = option_help() if keys else {}
    option = word.removeprefix("method.")
    if option in options:
        configs, text = list(options[option]), next(iter(options[option].values()))
        others = [*configs[1:4], *([f"{len(configs) - 4} others"] if len(configs) > 4 else [])]
        more = f" Also an option of {', '.join(others)}." if others else ""
        return _explained(f"method.{option}", f"{configs[0]}: {text.strip().rstrip('.')}.{more}")
    known = [*own, *keys, *short, *(f"method.{name}" for name in options)]
    verb.error(f"there is no flag or key {word!r}. {did_you_mean(word, known)}")


def _explained(key: str, text: str) -> str:
    meaning = " ".join(text.split()).replace("%%", "%")
    wrapped = textwrap.wrap(meaning, _width() - 6, initial_indent="      ", subsequent_indent="      ",
                            break_on_hyphens=False)  # fmt: skip
    return "\n".join([f"  --{key}", *wrapped]) + "\n"


def numbers(text: str) -> list[float]:
    """`0.33,1,3` as numbers; argparse tells what is none."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.33,1,3") from None


def _recipe(made: Parser) -> None:
    made.add_argument(
        "recipe",
        nargs="?",
        type=Path,
        metavar="RECIPE",
        help="YAML file, or a data file or folder with --task and --model; without it, every key comes from flags",
    )


def make_parser(recipe_keys: bool = False) -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command, and those of its verbs by name.

    Args:
        recipe_keys: name every key of the recipe as a flag too, for shells that complete them; the command itself takes
            keys before argparse sees them.
    """
    parser = Parser(
        prog="adapters-kit",
        description="Freeze a Hugging Face model, train a small module on it, ship exactly what was trained.",
        epilog="Exit status: 0 done; 1 a check failed, or an error that is a fault of ours; 2 a mistake in what was "
        "given; 3 to 6 what prove found in place of the tuned model; 130 interrupted. --json after a verb prints its "
        "result as one JSON value.",
    )
    parser.add_argument("--version", action="version", version=f"adapters-kit {_version()}")
    subparsers: Any = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)

    def verb(function: Callable[..., Any], name: str = "", takes_keys: bool = False, json: bool = True) -> Parser:
        about = function.__doc__ or ""
        made: Parser = subparsers.add_parser(
            name or function.__name__, help=about.splitlines()[0], description=about, allow_abbrev=False
        )
        made.set_defaults(run=function, takes_recipe_keys=takes_keys, json=False, flags=[])
        if json:
            made.add_argument("--json", action="store_true", help="print the result as one JSON value")
        return made

    verb(models.methods)
    _looking(verb)
    _training(verb)
    _choosing(verb)
    _using(verb)
    add_shipping(verb)
    verb(doctor.doctor)
    made = verb(doctor.completion, json=False)
    made.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="which shell")
    made.set_defaults(whole_parser=lambda: make_parser(recipe_keys=True)[0])
    if recipe_keys:
        for made in subparsers.choices.values():
            _name_keys(made)
    return parser, subparsers.choices


def _name_keys(verb: Parser) -> None:
    """The keys of the recipe as flags, but for those that the verb has itself."""
    from adapters_kit.recipe import known_flags

    if verb.get_default("takes_recipe_keys"):
        for key in known_flags():
            if f"--{key}" not in flags_of(verb):
                verb.add_argument(f"--{key}", help="a key of the recipe")


Adder = Callable[..., Parser]


def _looking(verb: Adder) -> None:
    made = verb(models.inspect)
    made.add_argument("model", help="folder, hub id or .gguf file; of a run or an adapter, its base")
    made.add_argument("--task", help="put the head of this task on it (default: as it was saved)")
    made.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods (default: all declared ones)")

    made = verb(training.init)
    made.add_argument("data", metavar="DATA", help="file or folder of rows")
    made.add_argument("--out", type=Path, help="YAML file to write (default: the data's name)")
    made.add_argument("--task", help="what to learn (default: what the columns tell)")
    made.add_argument("--model", help="base model (default: a small one for the task)")
    made.add_argument("--method", help="fine-tuning method (default: lora)")
    made.add_argument("--overwrite", action="store_true", help="replace the file")

    made = verb(models.plan, takes_keys=True)
    _recipe(made)
    made.add_argument("--gpu", metavar="SIZE", help="memory of the card, such as 24GB (default: this machine's)")
    made.add_argument("--length", type=int, metavar="TOKENS", help="plan for inputs so long, without any data")


def _training(verb: Adder) -> None:
    made = verb(training.train, takes_keys=True)
    _recipe(made)
    made.add_argument("--out", type=Path, help="run folder (default: runs/ and the recipe's name)")
    made.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    made.add_argument("--overwrite", action="store_true", help="delete an earlier run in the same folder")
    made.add_argument("--print-recipe", action="store_true", help="print the effective recipe and stop")

    made = verb(training.train_many, "train-many")
    made.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE", help="YAML files, of one base model and task")
    made.add_argument("--out", type=Path, required=True, help="folder of the run folders, named as the recipes")
    made.add_argument("--resume", action="store_true", help="go on from the last checkpoint of each")
    made.add_argument("--overwrite", action="store_true", help="replace the runs that are in the folder already")


def _choosing(verb: Adder) -> None:
    made = verb(training.compare, takes_keys=True)
    made.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="one recipe, one data file with --task and --model, or two run folders or more",
    )
    made.add_argument("--methods", metavar="A,B", help="methods beside the recipe's data (default: full,lora,dora,…)")
    made.add_argument("--seeds", type=int, default=3, help="seeds of each method (default: 3)")
    made.add_argument("--metric", help="score to compare (default: the task's own)")
    made.add_argument(
        "--grid", type=numbers, metavar="X,Y", help="factors around each default learning rate (default: 0.33,1,3)"
    )
    made.add_argument("--max-minutes", type=float, help="start nothing that would end later; go on with the same call")
    made.add_argument(
        "--together", choices=("auto", "off"), default="off", help="auto: as many in one pass as there is memory for"
    )
    made.add_argument("--out", type=Path, help="folder of the results (default: runs/ and the recipe's name)")

    made = verb(training.sweep, takes_keys=True)
    _recipe(made)
    rates = [1e-4, 3e-4, 1e-3]
    made.add_argument(
        "--learning-rates", nargs="+", type=float, metavar="RATE", default=rates, help=f"default: {rates}"
    )
    made.add_argument("--ranks", nargs="+", type=int, metavar="R", default=[], help="default: the recipe's own rank")
    made.add_argument(
        "--together", choices=("auto", "off"), default="off", help="auto: as many in one pass as there is memory for"
    )
    made.add_argument("--out", type=Path, help="folder of the run folders (default: runs/ and the recipe's name)")

    made = verb(training.search, takes_keys=True)
    _recipe(made)
    made.add_argument("--budget", type=float, default=0.2, metavar="B", help="optimizer steps to spend: below 1 a part "
                      "of those of the whole grid, from 1 on so many trainings (default: 0.2)")  # fmt: skip
    made.add_argument("--methods", metavar="A,B", help="methods to choose from (default: the recipe's own)")
    made.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        metavar="RATE",
        help="default: each method's own, a third, three times",
    )
    made.add_argument("--ranks", nargs="+", type=int, metavar="R", help="default: 8 32, for methods that have a rank")
    made.add_argument("--dropouts", nargs="+", type=float, metavar="P", help="of the adapter (default: 0 0.1)")
    made.add_argument(
        "--together", choices=("auto", "off"), default="auto", help="auto: as many in one pass as there is memory for"
    )
    made.add_argument("--out", type=Path, help="folder of the run folders (default: runs/ and the recipe's name)")


def _using(verb: Adder) -> None:
    made = verb(inference.evaluate, "eval", takes_keys=True)
    made.add_argument("name", metavar="NAME", help="run folder, adapter folder or model")
    made.add_argument("--data", help="file, folder or hub id (default: the run's own held-out data)")
    made.add_argument(
        "--harness", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness, by name or .yaml file, instead"
    )
    made.add_argument("--limit", type=int, metavar="N", help="so many examples of each of these tasks")

    made = verb(inference.predict, takes_keys=True)
    made.add_argument("name", metavar="NAME", help="run folder, adapter folder or model")
    made.add_argument("text", nargs="*", help="inputs")
    made.add_argument("--input", "--data", dest="data", metavar="FILE", help="file or folder of inputs")
    made.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write to this file instead: .jsonl, for --input also .csv, .tsv, .parquet",
    )
    made.add_argument(
        "--n-best", type=int, default=1, metavar="N", help="so many answers a row, best first, each with its score"
    )
    made.add_argument(
        "--explain", action="store_true", help="add what each answer comes from: tokens, or regions of a picture"
    )
    made.add_argument("--page", type=Path, metavar="FILE", help="write what --explain finds as a page too: .html")
    made.add_argument("--overwrite", action="store_true", help="replace the file")

    made = verb(inference.chat, takes_keys=True, json=False)
    made.add_argument("name", metavar="NAME", help="run folder, adapter folder or model")
    made.add_argument("--system", metavar="TEXT", help="what the assistant is told before everything")
    made.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest answer, always the same (default)"
    )
    made.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest tokens of this probability")
    made.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default: 512)")
    made.add_argument("--seed", type=int, help="of the draws")

    made = verb(inference.serve, takes_keys=True, json=False)
    made.add_argument(
        "names", nargs="+", metavar="NAME", help="run or adapter folders of one base, NAME=FOLDER, or a model"
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    made.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    made.add_argument("--api-key", metavar="KEY", help="what requests have to bring; needed for other hosts")

    made = verb(inference.ui, json=False)
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    made.add_argument("--port", type=int, default=7860, help="default: 7860; 0 takes a free one")
    made.add_argument("--token", metavar="SECRET", help="the page's password; needed for other hosts")
    made.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are made (default: runs)")


def _version() -> str:
    """The package's version, read without importing it: nothing inside imports the root."""
    import re

    text = Path(__file__).with_name("__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    return found[1] if found else "unknown"


def flags_of(verb: argparse.ArgumentParser) -> Sequence[str]:
    """Every flag that a verb has of its own."""
    return [flag for action in verb._actions for flag in action.option_strings]
