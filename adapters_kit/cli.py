"""The command `adapters-kit`: its arguments. torch is imported after they are known to be good."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from adapters_kit import verbs
from adapters_kit.errors import AdapterError, did_you_mean


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
    parser, known = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        parser.error(f"there is no verb {arguments[0]!r}. {did_you_mean(arguments[0], known)}")
    verb = known.get(arguments[0]) if arguments else None
    flags = _take_recipe_flags(verb, arguments) if verb and verb.get_default("takes_recipe_keys") else []
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known[options.verb].error(
            f"unknown argument {unknown[0]!r}. {did_you_mean(unknown[0], _flags(known[options.verb]))}"
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


def _version() -> str:
    try:
        return version("adapters-kit")
    except PackageNotFoundError:
        return "(a checkout that is not installed)"


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="adapters-kit",
        description="Freeze a Hugging Face model, train a small module on it, ship exactly what was trained.",
    )
    parser.add_argument("--version", action="version", version=f"adapters-kit {_version()}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(function: Callable, name: str = "", recipe_keys: bool = False) -> _Parser:
        summary = function.__doc__.splitlines()[0]
        name = name or function.__name__
        made = subparsers.add_parser(name, help=summary, description=function.__doc__, allow_abbrev=False)
        made.set_defaults(run=function, takes_recipe_keys=recipe_keys)
        return made

    def several(made: _Parser) -> None:
        """The flags for several adapters."""
        made.add_argument(
            "--weights", nargs="+", type=float, metavar="W", help="a factor for each adapter (default: 1)"
        )
        made.add_argument(
            "--method",
            choices=["sum", "ties", "dare"],
            default="sum",
            help="how several adapters become one: weighted sum, TIES or DARE (default: sum)",
        )
        made.add_argument(
            "--density", type=float, default=0.5, help="share of values that TIES and DARE keep (default: 0.5)"
        )
        made.add_argument("--seed", type=int, default=0, help="of DARE's choice (default: 0)")

    verb(verbs.methods)

    made = verb(verbs.inspect)
    made.add_argument("model", help="folder, hub id or .gguf file")
    made.add_argument("--task", help="put the head of this task on it (default: as it was saved)")
    made.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods (default: all declared ones)")

    made = verb(verbs.plan, recipe_keys=True)
    made.add_argument("recipe", nargs="?", type=Path, help="YAML file; without it, every key comes from flags")
    made.add_argument("--gpu", metavar="SIZE", help="memory of the card, such as 24GB (default: this machine's)")

    made = verb(verbs.train, recipe_keys=True)
    made.add_argument("recipe", nargs="?", type=Path, help="YAML file; without it, every key comes from flags")
    made.add_argument("--out", type=Path, help="run folder (default: runs/ and the recipe's name)")
    made.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    made.add_argument("--overwrite", action="store_true", help="delete an earlier run in the same folder")
    made.add_argument("--print-recipe", action="store_true", help="print the effective recipe and stop")

    made = verb(verbs.evaluate, "eval", recipe_keys=True)
    made.add_argument("name", help="run folder, adapter folder, or a model with --task")
    made.add_argument("--data", help="file, folder or hub id (default: the run's own held-out data)")

    made = verb(verbs.predict, recipe_keys=True)
    made.add_argument("name", help="run folder, adapter folder, or a model with --task")
    made.add_argument("text", nargs="*", help="inputs")
    made.add_argument("--data", help="file or folder of inputs")
    made.add_argument("--out", type=Path, help="JSONL file to write instead of printing")

    made = verb(verbs.compare, recipe_keys=True)
    made.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="one recipe, or two run folders or more")
    made.add_argument("--methods", metavar="A,B", help="methods beside the recipe's data (default: full,lora,dora,…)")
    made.add_argument("--seeds", type=int, default=3, help="seeds of each method (default: 3)")
    made.add_argument("--metric", help="score to compare (default: the task's own)")
    made.add_argument("--grid", metavar="X,Y", help="factors around each default learning rate (default: 0.33,1,3)")
    made.add_argument("--max-minutes", type=float, help="start nothing that would end later; go on with the same call")
    made.add_argument("--out", type=Path, help="folder of the results (default: runs/ and the recipe's name)")

    made = verb(verbs.sweep, recipe_keys=True)
    made.add_argument("recipe", nargs="?", type=Path, help="YAML file; without it, every key comes from flags")
    rates = [1e-4, 3e-4, 1e-3]
    made.add_argument(
        "--learning-rates", nargs="+", type=float, metavar="RATE", default=rates, help=f"default: {rates}"
    )
    made.add_argument("--ranks", nargs="+", type=int, metavar="R", default=[], help="default: the recipe's own rank")
    made.add_argument("--out", type=Path, help="folder of the run folders (default: runs/ and the recipe's name)")

    made = verb(verbs.merge)
    made.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="adapter folder, such as runs/x/adapter; or several"
    )
    made.add_argument("out", help="model folder to write")
    several(made)
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

    made = verb(verbs.combine)
    made.add_argument("adapters", nargs="+", metavar="ADAPTER", help="LoRA adapter folders, two or more")
    made.add_argument("out", help="adapter folder to write")
    several(made)
    made.add_argument("--rank", type=int, help="of the result (default: the sum of the ranks, exact for a sum)")
    made.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")

    made = verb(verbs.check)
    made.add_argument("folder", help="adapter or model folder")
    made.add_argument(
        "--target",
        choices=["peft", "transformers", "vllm", "sglang", "llama.cpp", "ollama"],
        default="vllm",
        help="what it shall load in (default: vllm)",
    )
    made.add_argument("--max-lora-rank", type=int, default=16, help="vLLM's option of that name (default: 16)")

    made = verb(verbs.export)
    made.add_argument("source", help="adapter folder; for GGUF also a model folder")
    made.add_argument("out", help="folder to write; for GGUF the file")
    made.add_argument("--format", choices=["peft", "gguf", "kv-cache"], default="peft", help="default: peft")
    made.add_argument("--canonical", action="store_true", help="fold all scales into B, alpha = r, one rank")
    made.add_argument("--rank", type=int, help="best approximation of that rank; implies --canonical")
    made.add_argument("--dtype", help="of the written tensors; for GGUF also q8_0")
    made.add_argument("--base", help="base model of a GGUF adapter or a KV cache (default: the one that it names)")
    made.add_argument("--overwrite", action="store_true", help="replace what is there")

    made = verb(verbs.convert)
    made.add_argument("source", help="folder of an AdapterHub adapter")
    made.add_argument("base", help="its base model: folder or hub id")
    made.add_argument("out", help="adapter folder to write")
    made.add_argument("--task", default="causal-lm", help="the head to load the base with (default: causal-lm)")
    return parser, subparsers.choices


if __name__ == "__main__":
    sys.exit(main())
