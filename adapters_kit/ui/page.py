"""The page itself: data, plan, train, ask, ship. Every step is a verb of the command line."""

from __future__ import annotations

import hmac
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import pandas as pd

from adapters_kit.errors import AdapterError, DataError
from adapters_kit.inference.answers import beside
from adapters_kit.task_table import TASKS
from adapters_kit.training.plan import plan
from adapters_kit.training.propose import propose
from adapters_kit.training.resolve import rows_of
from adapters_kit.ui.job import Job, curves

LOCAL = ("127.0.0.1", "localhost", "::1")
SHIP: dict[str, Callable[[str], list[str]]] = {
    "check for vLLM": lambda run: ["check", run],
    "merge into a model folder": lambda run: ["merge", run, f"{run}-merged"],
    "export for peft": lambda run: ["export", run, f"{run}-peft"],
    "export as GGUF": lambda run: ["export", run, f"{run}.gguf", "--format", "gguf"],
}
_ROWS, _CELL = 5, 200  # of the data that is shown
_MONO = ".mono textarea { font-family: monospace; white-space: pre; overflow-x: auto; }"  # what is laid out in columns


def launch(host: str = "127.0.0.1", port: int = 7860, *, token: str | None = None, runs: Path = Path("runs")) -> None:
    """Serves the page until Ctrl-C.

    Args:
        host: address to listen on; another than this machine's own needs a token.
        port: 0 takes a free one.
        token: the password of the page; any user name will do.
        runs: where run folders are made.

    Raises:
        DataError: another host without a token; a port that is taken.
    """
    if host not in LOCAL and not token:
        raise DataError(f"host={host} lets others in, who could train and read files here: give token=SECRET too.")

    def knows(_: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), str(token).encode())

    look = gr.themes.Default(font="system-ui", font_mono="monospace")  # no font from elsewhere
    page = build(runs)
    try:
        page.launch(
            server_name=host,
            server_port=port or None,
            auth=knows if token else None,
            auth_message="Any name; the password is the token.",
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=look,
            css=_MONO,
            footer_links=[],
        )
    except OSError as error:
        raise DataError(f"port={port}: it is taken on {host}. Choose another, or 0 for a free one.") from error
    print(f"The page is at {page.local_url} (Ctrl-C ends)", flush=True)
    page.block_thread()


def build(runs: Path) -> gr.Blocks:
    """The page; nothing is served yet."""
    with gr.Blocks(title="adapters-kit", analytics_enabled=False) as page:
        gr.Markdown("# adapters-kit\nFreeze a model, train a small module on it, ship exactly what was trained.")
        with gr.Tab("1 Data"):
            with gr.Row():
                source = gr.Textbox(label="Data", placeholder="file, folder or hub id", scale=2)
                model = gr.Textbox(label="Model", placeholder="folder or hub id; empty: a small one", scale=2)
                task = gr.Dropdown(["what the columns tell", *TASKS], label="Task", scale=1)
            look = gr.Button("Look", variant="primary")
            reasons = gr.Textbox(label="What was recognised", lines=6, interactive=False)
            rows = gr.Dataframe(label="First rows", interactive=False, wrap=True)
        with gr.Tab("2 Recipe and plan"):
            recipe = gr.Code(label="Recipe, yours to change", language="yaml", lines=12, interactive=True)
            with gr.Row():
                card = gr.Textbox(label="Memory of the card", placeholder="24GB; empty: this machine")
                planning = gr.Button("Plan", variant="primary")
            planned = gr.Textbox(label="Plan", lines=8, interactive=False, elem_classes="mono")
        with gr.Tab("3 Train"):
            with gr.Row():
                name = gr.Textbox(label="Name of the run", value="first")
                begin = gr.Button("Train", variant="primary")
                stop = gr.Button("Stop", variant="stop")
                resume = gr.Button("Go on")
            loss = gr.LinePlot(x="step", y="value", color="series", title="Loss", y_title="", height=260)
            score = gr.LinePlot(x="step", y="value", color="series", title="Held-out scores", y_title="", height=260)
            said = gr.Textbox(label="Progress", lines=10, interactive=False, autoscroll=True, elem_classes="mono")
        with gr.Tab("4 Ask"):
            question = gr.Textbox(label="Input", lines=2)
            asking = gr.Button("Ask both", variant="primary")
            with gr.Row():
                base = gr.Textbox(label="Base, without what was trained", lines=6, interactive=False)
                tuned = gr.Textbox(label="Tuned", lines=6, interactive=False)
        with gr.Tab("5 Ship"):
            kind = gr.Radio(list(SHIP), value=next(iter(SHIP)), label="What to do")
            shipping = gr.Button("Do it", variant="primary")
            shipped = gr.Textbox(label="Result", lines=10, interactive=False, elem_classes="mono")
        job = gr.State(list)  # of this visitor: the training that runs, if any

        def train(text: str, run: str, jobs: list[Job], *, again: bool) -> Iterator[tuple[Any, Any, str]]:
            yield from _train(runs, text, run, jobs, again)

        look.click(_look, [source, model, task], [reasons, rows, recipe])
        planning.click(_plan, [recipe, card], planned)
        begin.click(lambda *given: (yield from train(*given, again=False)), [recipe, name, job], [loss, score, said])
        resume.click(lambda *given: (yield from train(*given, again=True)), [recipe, name, job], [loss, score, said])
        stop.click(lambda jobs: [one.stop() for one in jobs] and None, job, None, queue=False)
        asking.click(lambda run, text: _ask(runs, run, text), [name, question], [base, tuned])
        shipping.click(lambda run, what: (yield from _ship(runs, run, what)), [name, kind], shipped)
    return page


def _look(source: str, model: str, task: str) -> tuple[str, Any, str]:
    """What `init` says of the data, its first rows, and the recipe."""
    try:
        if not source.strip():
            raise DataError("Name the data first: a file, a folder or a hub id.")
        made = propose(source.strip(), task=task if task in TASKS else None, model=model.strip() or None)
        first = rows_of(source.strip()).select_columns(list(made.fields["data"]["columns"].values()))
        shown = [{name: _short(value) for name, value in row.items()} for row in first.take(_ROWS)]
        share = f"{100 // max(len(first.column_names), 1)}%"
        table = gr.Dataframe(pd.DataFrame(shown), column_widths=[share] * len(first.column_names))
        return "\n".join(made.reasons), table, made.text
    except AdapterError as error:
        return str(error), None, ""


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _CELL else f"{text[:_CELL]} …"


def _plan(recipe: str, card: str) -> str:
    if not recipe.strip():
        return "There is no recipe yet: look at some data first, or write one."
    path = _written(recipe)
    try:
        return str(plan(path, card.strip() or None))
    except AdapterError as error:
        return str(error).replace(str(path), "the recipe")
    finally:
        path.unlink()


def _written(recipe: str) -> Path:
    handle, name = tempfile.mkstemp(suffix=".yaml")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(recipe)
    return Path(name)


def _folder(runs: Path, run: str) -> str:
    """The folder of a run by its name, which is a name and no way out of `runs`.

    Raises:
        DataError: it is none.
    """
    if not run.strip() or run != Path(run).name or run.startswith((".", "-")):
        raise DataError(f"{run!r} is no name for a run: letters, digits, - and _ will do.")
    return str(runs / run)


def _train(runs: Path, text: str, run: str, jobs: list[Job], again: bool) -> Iterator[tuple[Any, Any, str]]:
    """Curves and progress while `train` works."""
    empty = gr.skip()
    if any(one.status is None for one in jobs):
        yield empty, empty, "A training runs already: stop it first."
        return
    try:
        folder = _folder(runs, run)
    except DataError as error:
        yield empty, empty, str(error)
        return
    if not text.strip():
        yield empty, empty, "There is no recipe yet: look at some data first, or write one."
        return
    path = _written(text)
    job = Job(["train", str(path), "--out", folder, *(["--resume"] if again else [])])
    jobs[:] = [job]
    try:
        for said in job.follow():
            found = pd.DataFrame(curves(Path(folder)), columns=["step", "series", "value"])
            losses = found["series"].str.contains("loss")
            yield found[losses], found[~losses], said.replace(str(path), "RECIPE")
    finally:
        path.unlink(missing_ok=True)


def _ask(runs: Path, run: str, text: str) -> tuple[str, str]:
    try:
        if not text.strip():
            raise DataError("There is nothing to ask yet.")
        base, tuned = beside(_folder(runs, run), text)
    except AdapterError as error:
        return "", str(error)
    return _answer(base), _answer(tuned)


def _answer(found: dict[str, Any]) -> str:
    """The text of an answer; of other tasks one line a value."""
    if isinstance(found.get("answer"), str):
        return str(found["answer"])
    return "\n".join(f"{name}: {_short(value)}" for name, value in found.items() if name not in ("text", "prompt"))


def _ship(runs: Path, run: str, what: str) -> Iterator[str]:
    try:
        yield from Job(SHIP[what](_folder(runs, run))).follow()
    except DataError as error:
        yield str(error)
