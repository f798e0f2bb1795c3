"""Verbs that ask what was trained: eval, predict, chat, serve; and the page that does it all, ui."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters_kit.errors import DataError
from adapters_kit.verbs.display import Shown, ask_for, metrics_text

if TYPE_CHECKING:
    from adapters_kit.inference.session import Chat


def evaluate(options: argparse.Namespace) -> Shown:
    """Score a run, an adapter or a plain model on held-out data."""
    from adapters_kit.recipe import keys_of

    keys = keys_of(options.flags)
    if options.limit is not None and not options.harness:
        raise DataError("--limit is of --harness: give a task, such as --harness arc_easy.")
    if options.harness:
        if options.data:
            raise DataError("--harness brings its own data: leave out --data.")
        from adapters_kit.inference.harness import harness

        tables = harness(options.name, options.harness, limit=options.limit, **keys)
        return Shown(tables, "\n".join(f"{task}\n{metrics_text(values)}" for task, values in tables.items()))
    from adapters_kit.inference import evaluate as score

    found = score(options.name, options.data, **keys)
    return Shown(found, metrics_text(found))


def predict(options: argparse.Namespace) -> Shown | None:
    """Answers of a run, an adapter or a plain model: one JSON object a line, written while the model writes.

    Texts that a model generates appear as they are made: plainly on a terminal, inside the JSON line elsewhere. With
    --input and --out a whole file is answered: CSV, TSV, JSONL or Parquet, each class with its probability, memory that
    does not grow with the rows; the same command goes on where it was stopped.
    """
    from adapters_kit.recipe import keys_of

    if bool(options.text) == bool(options.data):
        raise DataError("Give either texts or --input FILE: adapters-kit predict runs/x 'a text' 'another'")
    keys = keys_of(options.flags)
    for text in options.text:
        if len(text) < 250 and Path(text).is_file():
            raise DataError(
                f"{text} is a file here: adapters-kit predict {options.name} --input {text} --out answers.csv"
            )
    if options.out and options.out.exists() and not options.overwrite:
        raise DataError(f"{options.out} exists already. Choose another --out, or give --overwrite to replace it.")
    explain = options.page or options.explain
    if options.page and options.page.exists() and not options.overwrite:
        raise DataError(f"{options.page} exists already. Choose another --page, or give --overwrite to replace it.")
    if explain and options.out and options.out.suffix != ".jsonl":
        raise DataError(f"{options.out}: explained answers are written as .jsonl, a JSON object a line.")
    if options.data and options.out and not explain:
        return _predict_file(options, keys)
    from adapters_kit.inference import generates, stream
    from adapters_kit.inference import predict as answer

    if (
        options.text
        and not options.out
        and not options.json
        and not explain
        and options.n_best == 1
        and generates(options.name, **keys)
    ):
        _print_streams(options.text, stream(options.name, options.text, **keys))
        return None
    answers = answer(options.name, options.data or options.text, n_best=options.n_best, explain=explain, **keys)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
    if options.out:
        from adapters_kit.artifacts.files import write_text

        write_text(options.out, lines)
        return Shown({"path": options.out, "rows": len(answers)}, f"{len(answers)} predictions in {options.out}")
    return Shown(answers, lines.rstrip("\n"))


def _predict_file(options: argparse.Namespace, keys: dict[str, Any]) -> Shown:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from adapters_kit.inference.answer_file import predict_file

    bars = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bars, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        row = bar.add_task("rows", total=None)
        made = predict_file(
            options.name,
            options.data,
            options.out,
            n_best=options.n_best,
            overwrite=options.overwrite,
            progress=lambda done, total: bar.update(row, completed=done, total=total),
            **keys,
        )
    return Shown(made, str(made))


def _print_streams(prompts: list[str], answers: Iterable[Iterable[str]]) -> None:
    """Each piece at once; a JSON line that is written in pieces is still one JSON line."""
    plain = sys.stdout.isatty()
    for prompt, answer in zip(prompts, answers, strict=True):
        if not plain:
            print(f'{{"prompt": {json.dumps(prompt, ensure_ascii=False)}, "answer": "', end="")
        for piece in answer:
            print(piece if plain else json.dumps(piece, ensure_ascii=False)[1:-1], end="", flush=True)
        print("" if plain else '"}', flush=True)


HELP = """/base TEXT    what the model without the adapter answers; alone: to the last question
/system TEXT  what the assistant is told before everything; alone: nothing. Begins anew.
/new          begins anew
/history      what was said
/help         this
/quit         ends (Ctrl-D too)"""


def chat(options: argparse.Namespace) -> None:
    """Talk to a run, an adapter or a plain model. /base asks the model without the adapter, /help tells the rest.

    Lines that do not come from a terminal are answered one after the other, so that it works in a pipe too.
    """
    from adapters_kit.recipe import keys_of

    keys = keys_of(options.flags)
    from adapters_kit.inference.session import Chat, Sampling, Writer

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    talk = Chat(Writer.open(options.name, **keys), sampling)
    if options.system:
        talk.system(options.system)
    if not talk.writer.has_template:
        sys.stderr.write(
            "This model has no chat template: it goes on from each line by itself, nothing is remembered.\n"
        )
    terminal = sys.stdin.isatty()
    if terminal:
        _remember_lines()
        print(f"{options.name}: /help tells the commands, /quit ends.")
    last = ""
    while (line := _next_line(terminal)) is not None:
        if not line:
            continue
        if line in ("/quit", "/exit"):
            break
        if line.startswith("/") and not line.startswith("/base"):
            print(_command(talk, line))
            continue
        base = line.startswith("/base")
        asked = line.removeprefix("/base").strip() or last if base else line
        if not asked:
            print("Nothing was asked yet.")
            continue
        last = asked
        _say(talk, asked, base)


def _next_line(terminal: bool) -> str | None:
    try:
        return input("> " if terminal else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print()
        return None


def _command(talk: Chat, line: str) -> str:
    """Does what a line with a slash asks for; what there is to say about it."""
    name, _, rest = line.partition(" ")
    if name == "/system":
        talk.system(rest.strip())
        return "The assistant is told that from here on." if rest.strip() else "The assistant is told nothing."
    if name == "/new":
        talk.forget()
        return "Begun anew."
    if name == "/history":
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in talk.turns) or "Nothing was said yet."
    if name == "/help":
        return HELP
    from adapters_kit.errors import did_you_mean

    names = ["/base", "/system", "/new", "/history", "/help", "/quit"]
    return f"There is no command {name!r}. {did_you_mean(name, names)}"


def _say(talk: Chat, asked: str, base: bool) -> None:
    """Prints the answer as it comes; Ctrl-C ends the answer, not the conversation."""
    from rich.console import Console

    out = Console(highlight=False, markup=False, soft_wrap=True)
    answer = talk.ask(asked, base=base)
    try:
        for piece in answer:
            out.print(piece, end="", style="dim" if base else None)
            sys.stdout.flush()
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
        out.print(" …", end="")
    out.print()


def _remember_lines() -> None:
    """Arrow keys bring back what was typed, where the system has readline."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


def serve(options: argparse.Namespace) -> None:
    """Serve runs or adapters of one base, or a plain model, behind an OpenAI-compatible address; Ctrl-C ends it.

    A request's `model` is the name of a run's folder, or of the base. NAME=FOLDER gives another name.
    """
    from adapters_kit.recipe import keys_of

    keys = keys_of(options.flags)
    named = dict(_name_of(text) for text in options.names)
    if len(named) < len(options.names):
        raise DataError(f"Two of {', '.join(options.names)} have one name: give others, NAME=FOLDER.")
    from adapters_kit.inference.server import Served, make_server

    def log(line: str) -> None:
        sys.stderr.write(line + "\n")

    server = make_server(Served(named, **keys), options.host, options.port, api_key=options.api_key, log=log)
    host = f"http://{options.host}:{server.server_port}"
    print(f"Serving {', '.join(named)} at {host}/v1 (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
    finally:
        server.server_close()


def _name_of(text: str) -> tuple[str, str]:
    """NAME=FOLDER, or the folder's own name; `runs/x/adapter` is called x."""
    name, equals, folder = text.partition("=")
    if equals and name and not Path(text).exists():
        return name, folder
    path = Path(text)
    return (
        path.resolve().parent.name if path.name == "adapter" else path.resolve().name if path.exists() else text
    ), text


def ui(options: argparse.Namespace) -> None:
    """A page in the browser: data, plan, train, ask, ship. For this machine only, or with --host and --token."""
    ask_for("gradio", "ui", "ui")
    from adapters_kit.ui.page import launch

    launch(options.host, options.port, token=options.token, runs=options.runs)
