"""The command `adapters-kit`: one function a verb. torch is imported after the arguments are known to be good."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from adapters_kit.errors import AdapterError, did_you_mean


class _Parser(argparse.ArgumentParser):
    """argparse, with the nearest verb or flag in its errors."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"adapters-kit: {message}\nTry: {self.prog} --help\n")
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 2 for a mistake in what was asked, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, verbs = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in verbs:
        parser.error(f"there is no verb {arguments[0]!r}. {did_you_mean(arguments[0], verbs)}")
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.takes_recipe_keys:
        verb = verbs[options.verb]
        flags = [flag for action in verb._actions for flag in action.option_strings if flag.startswith("--")]
        verb.error(f"{options.verb} takes no {rest[0]!r}. {did_you_mean(rest[0], flags)}")
    try:
        options.run(options, rest) if options.takes_recipe_keys else options.run(options)
    except AdapterError as error:
        sys.stderr.write(f"adapters-kit: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("adapters-kit: interrupted\n")
        return 130
    return 0


def methods(options: argparse.Namespace) -> None:
    """Every method: what it trains, whether it merges, where it was published."""
    from rich.console import Console
    from rich.table import Table

    from adapters_kit.methods import table

    shown = Table("name", "config", "trains", "merges", "paper", box=None, pad_edge=False)
    merges = {True: "yes", False: "no", None: "?"}
    for method in table():
        config = method.config.partition(":")[2]
        shown.add_row(method.name, config, method.trains, merges[method.mergeable], method.paper)
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="adapters-kit",
        description="Freeze a Hugging Face model, train a small module on it, ship exactly what was trained.",
    )
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, function, recipe_keys: bool = False) -> _Parser:
        summary = function.__doc__.splitlines()[0]
        made = subparsers.add_parser(name, help=summary, description=function.__doc__, allow_abbrev=False)
        made.set_defaults(run=function, takes_recipe_keys=recipe_keys)
        return made

    verb("methods", methods)
    return parser, subparsers.choices


if __name__ == "__main__":
    sys.exit(main())
