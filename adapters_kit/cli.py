"""The command `adapters-kit`. torch is imported after the arguments are known to be good.

Exit status: 0 done; 1 `check` found a problem, or something broke that is a fault of ours (the whole trace is then in a
file that the message names); 2 a mistake in what was given; 130 interrupted.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from adapters_kit.arguments import Parser, flags_of, help_of, make_parser
from adapters_kit.errors import AdapterError, did_you_mean

MISTAKE, OURS, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _let_every_character_out()
    if not sys.stderr.isatty():  # read by the hub's libraries when they are imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    parser, known = make_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        parser.error(f"there is no verb {arguments[0]!r}. {did_you_mean(arguments[0], known)}")
    verb = known.get(arguments[0]) if arguments else None
    if verb is not None and (word := _asked_about(arguments)):
        print(help_of(verb, word), end="")
        return 0
    flags = _take_recipe_flags(verb, arguments) if verb and verb.get_default("takes_recipe_keys") else []
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known[options.verb].error(
            f"unknown argument {unknown[0]!r}. {did_you_mean(unknown[0], flags_of(known[options.verb]))}"
        )
    options.flags = flags
    return _run(options, known[options.verb])


def _run(options: argparse.Namespace, verb: Parser) -> int:
    """The verb under the last net: whatever happens is one sentence and a status."""
    try:
        with _plain_warnings():
            shown = options.run(options)
        if shown is not None:
            shown.say(options.json)
        sys.stdout.flush()
        return 0 if shown is None else int(shown.status)
    except AdapterError as error:
        sys.stderr.write(f"adapters-kit: {as_flags(str(error), _names(verb))}\n")
        return MISTAKE
    except KeyboardInterrupt:
        sys.stderr.write("adapters-kit: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has enough, such as `head`. Python would complain once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit:
        raise
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            return _broke(options.verb, error)
        named = os.fsdecode(error.filename)[:60] if isinstance(error.filename, str | bytes) else "it"
        sys.stderr.write(f"adapters-kit: {named} … is no name of a file: it is too long.\n")
        return MISTAKE
    except BaseException as error:  # a library in Rust that panics raises what is no Exception
        return _broke(options.verb, error)


def _broke(verb: str, error: BaseException) -> int:
    gist = next((line for line in str(error).splitlines() if line.strip()), "")
    where = _write_trace()
    sys.stderr.write(
        f"adapters-kit: {verb} broke: {type(error).__name__}{': ' if gist else ''}{gist[:300]}\n"
        f"That is a fault of ours, not of yours. The whole trace is in {where}: please report it.\n"
    )
    return OURS


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """What we warn of is a sentence for whoever typed the command, without the line of code that said it."""
    usual, here = warnings.formatwarning, os.path.dirname(__file__) + os.sep

    def sentence(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        ours = category is UserWarning and filename.startswith(here)
        return f"{message}\n" if ours else usual(message, category, filename, lineno, line)

    warnings.formatwarning = sentence
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _write_trace() -> str:
    try:
        handle, name = tempfile.mkstemp(prefix="adapters-kit-trace-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{sys.argv!r}\n{traceback.format_exc()}")
    except OSError as error:
        return f"no file ({error.strerror}); it ends with {traceback.format_exc().strip().splitlines()[-3].strip()!r}"
    return name


def _let_every_character_out() -> None:
    """A terminal or file that is not UTF-8 gets `->` for an arrow and `?` for what it cannot show, not a crash."""
    codecs.register_error("adapters_kit", _in_plain_letters)
    for stream in (sys.stdout, sys.stderr):
        encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
        if encoding != "utf8" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="adapters_kit")


_PLAIN = {"→": "->", "←": "<-", "…": "...", "–": "-", "−": "-", "×": "x", "±": "+-", "’": "'"}


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


def _asked_about(arguments: Sequence[str]) -> str | None:
    """The KEY of `VERB --help KEY`."""
    for place, word in enumerate(arguments[:-1]):
        if word in ("--help", "-h"):
            return arguments[place + 1]
    return None


_OPTIONS = ("r", "lora_alpha", "lora_dropout", "target_modules")  # of a method, that are asked for as flags elsewhere
_ARGUMENT = re.compile(r"(?<![\w.])([a-z_]+)=(True|None|\.\.\.|[A-Z]+\b|'[^']*'|\"[^\"]*\"|[\w.]*\w)?(?![\w(])")
_CALL = re.compile(r"\w\([^()]*(?:\([^()]*\)[^()]*)*$")  # an opened call at the end of a text


def as_flags(message: str, names: Iterable[str]) -> str:
    """A message that speaks of Python's arguments, for whoever typed flags: `overwrite=True` becomes `--overwrite`.

    Args:
        names: the flags that exist; other words are left alone, and so is what stands inside a call.
    """
    flags = {name.removeprefix("--").replace("-", "_"): name for name in names if name.startswith("--")}

    def flag(found: re.Match[str]) -> str:
        name, value = found[1], found[2] or ""
        if name not in flags or _CALL.search(message[: found.start()]):
            return found[0]
        value = value.strip("'\"")
        return flags[name] if value in ("True", "") else f"{flags[name]} {value}"

    return _ARGUMENT.sub(flag, message)


def _names(verb: Parser) -> list[str]:
    keys: list[str] = []
    if verb.get_default("takes_recipe_keys"):
        from adapters_kit.recipe import known_flags

        keys = [f"--{key}" for key in known_flags() if "." not in key]
    return [*keys, *flags_of(verb)]


def _take_recipe_flags(verb: Parser, arguments: list[str]) -> list[str]:
    """Moves keys such as `--method.r 16` out of `arguments`; argparse would take their values for positionals."""
    from adapters_kit.recipe import known_flags

    own, keys = flags_of(verb), known_flags()
    taken: list[str] = []
    position = 1
    while position < len(arguments):
        word = arguments[position]
        name = word.partition("=")[0]
        if not word.startswith("--") or name in own:
            position += 1
            continue
        spelled = "--" + name[2:].replace("-", "_")
        if spelled[2:] in keys:
            word, name = spelled + word[len(name) :], spelled
        if name[2:].partition(".")[0] not in keys:
            there = [*own, *(f"--{key}" for key in keys), *(f"--method.{option}" for option in _OPTIONS)]
            verb.error(f"unknown argument {name!r}. {did_you_mean(name, there)}")
        has_value = "=" not in word and position + 1 < len(arguments) and not arguments[position + 1].startswith("--")
        taken += [word, *arguments[position + 1 : position + 1 + has_value]]
        del arguments[position : position + 1 + has_value]
    return taken


if __name__ == "__main__":
    sys.exit(main())
