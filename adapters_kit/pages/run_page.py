"""The page of a run, from the files in its folder: scores before and after, curves, errors, costs, recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from adapters_kit.artifacts.files import write_text
from adapters_kit.artifacts.json_file import read_json, read_json_lines
from adapters_kit.pages import html, plots
from adapters_kit.pages.verdict import main_score, verdict

PAGE = "report.html"
DETAILS = "details.json"
TABLE_UP_TO = 12  # classes that a table of counts can show


def write_run_page(folder: Path, name: Path | None = None) -> Path:
    """Writes `report.html` into a run folder, anew from what is there.

    Args:
        name: what the folder is called, where it is still being made under another name.
    """
    return write_text(folder / PAGE, run_page(folder, name))


def run_page(folder: Path, called: Path | None = None) -> str:
    """The whole page."""
    metrics = _json(folder / "metrics.json", {})
    details = _json(folder / DETAILS, {})
    history = _lines(folder / "metrics.jsonl")
    recipe = _text(folder / "recipe.yaml")
    called = called or folder
    name = called.resolve().name
    metric = main_score(metrics, details.get("metric"))
    sentence, better = verdict(metrics, details.get("metric"))
    body = [
        f'<h1>{escape(name)}</h1><p class="{"good" if better else "bad"}"><b>{escape(sentence)}</b></p>',
        "".join(
            f"<p>{escape(line)}</p>" for line in metrics.get("advice", []) if not line.startswith("The adapter is")
        ),
        f'<p class="soft">{escape(_about(details, metrics))}</p>',
        html.figures(_costs(metrics)),
        html.section("Scores", scores_table(metrics) + _kept(metrics)),
        html.section("Notes", "".join(f"<p>{escape(note)}</p>" for note in metrics.get("notes", []))),
        html.section("Curves", _curves(history, metrics, metric)),
        html.section("Which class is taken for which", _confusion(_json(folder / "confusion.json", {}))),
        html.section("Largest errors", _worst(details.get("worst", []))),
        html.section("Answers before and after", _samples(_lines(folder / "samples.jsonl"))),
        html.section("Lengths", _lengths(details.get("lengths", {}))),
        html.section("Load it", html.pre(_load(called))),
        html.section("Recipe", html.pre(recipe) if recipe else ""),
        html.section("Environment", _environment(_json(folder / "environment.json", {}))),
    ]
    return html.page(f"{name}: {sentence}", "\n".join(part for part in body if part))


def scores_table(metrics: Mapping[str, Any]) -> str:
    """Every score before and after."""
    names = [name[5:] for name in metrics if name.startswith("base_") and name[5:] in metrics]
    rows = [[name, metrics[f"base_{name}"], metrics[name]] for name in names]
    return html.table(["score", "base model", "with the adapter"], rows) if rows else ""


def _kept(metrics: Mapping[str, Any]) -> str:
    """What the rows of `eval.keep` are, what was chosen for their sake, and what the judge has found."""
    told = [metrics["kept"]["told"]] if "kept" in metrics else []
    if "keep_examples" in metrics:
        told.append(f"The scores that begin with keep_ are those on {metrics['keep_examples']:,} rows of eval.keep.")
    told += [metrics["judged"]["told"]] if "judged" in metrics else []
    return "".join(f'<p class="soft">{escape(line)}</p>' for line in told)


def _about(details: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    told = [f"{details['method']} on {details['model']} for {details['task']}"] if "method" in details else []
    if "train_examples" in metrics:
        told.append(f"{metrics['train_examples']:,} examples, {metrics.get('steps', 0):,} steps")
    return "; ".join(told)


def _costs(metrics: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    if metrics.get("total_params"):
        share = metrics["trainable_params"] / metrics["total_params"]
        found["parameters trained"] = f"{metrics['trainable_params']:,} ({share:.2%})"
    if "train_seconds" in metrics:
        found["training"] = _duration(metrics["train_seconds"])
    if "tokens_per_second" in metrics:
        found["tokens a second"] = f"{metrics['tokens_per_second']:,.0f}"
    if "peak_memory_bytes" in metrics:
        found["peak memory"] = f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB"
    return found


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min" if whole >= 3600 else f"{whole // 60} min {whole % 60} s"


def _curves(history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], metric: str | None) -> str:
    def series(name: str, key: str) -> plots.Line:
        found = [line for line in history if isinstance(line.get(key), int | float)]
        return name, [line["step"] for line in found], [line[key] for line in found]

    base_loss, base = metrics.get("base_loss"), metrics.get(f"base_{metric}")
    made = [
        plots.lines(
            "loss",
            [series("training", "loss"), series("held out", "eval_loss")],
            level=("base model, held out", base_loss) if base_loss is not None else None,
        )
    ]
    if metric not in (None, "loss"):
        level = ("base model", float(base)) if base is not None else None
        made.append(plots.lines(f"held-out {metric}", [series("with the adapter", f"eval_{metric}")], level=level))
    made.append(plots.lines("learning rate", [series("", "learning_rate")]))
    found = [plot for plot in made if plot]
    return f'<div class="plots">{"".join(f"<div>{plot}</div>" for plot in found)}</div>' if found else ""


def _confusion(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    labels, made = [str(label) for label in found["labels"]], []
    for key, title in (("tuned", "with the adapter"), ("base", "base model")):
        matrix = found[key]
        shown = _matrix(matrix, labels, title) if len(labels) <= TABLE_UP_TO else plots.heat(matrix, labels, title)
        made.append(f'<div class="scroll">{shown}</div>')
    pairs = [
        (count, labels[i], labels[j])
        for i, row in enumerate(found["tuned"])
        for j, count in enumerate(row)
        if i != j and count
    ]
    pairs.sort(key=lambda one: (-one[0], one[1], one[2]))
    rows = [[true, guess, count] for count, true, guess in pairs[:15]]
    most = (
        html.table(["true class", "taken for", "examples"], rows, sortable=True) if rows else "<p>None is mistaken.</p>"
    )
    return (
        '<p class="soft">Rows are the true classes, columns what was predicted.</p>'
        f'<div class="plots">{"".join(made)}</div>'
        f"<h3>The most frequent mistakes with the adapter</h3>{most}"
    )


def _matrix(matrix: Sequence[Sequence[int]], labels: Sequence[str], title: str) -> str:
    most = max((max(row) for row in matrix), default=0) or 1
    head = "".join(f'<th title="{escape(label)}">{number}</th>' for number, label in enumerate(labels, 1))
    rows = []
    for i, row in enumerate(matrix):
        cells = []
        for j, count in enumerate(row):
            colour = "var(--good)" if i == j else "var(--bad)"
            part = round(60 * (count / most) ** 0.5) if count else 0
            style = f"background: color-mix(in srgb, {colour} {part}%, transparent)"
            cells.append(f'<td style="{style}">{count:,}</td>')
        rows.append(f"<tr><th>{i + 1} {escape(labels[i])}</th>{''.join(cells)}</tr>")
    return (
        f'<table class="matrix"><caption class="soft">{escape(title)}</caption><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _worst(worst: Sequence[Mapping[str, Any]]) -> str:
    if not worst:
        return ""
    columns = list(dict.fromkeys(key for row in worst for key in row))
    rows = [[row.get(column) for column in columns] for row in worst]
    return html.table(columns, rows, sortable=True, text=[name for name in columns if name == "input"])


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    def told(side: Mapping[str, Any]) -> str:
        return "\n".join(f"{key}: {value}" for key, value in side.items())

    rows = [[told(one.get("base", {})), told(one.get("tuned", {}))] for one in samples]
    columns = ["base model", "with the adapter"]
    return html.table(columns, rows, text=columns) if rows else ""


def _lengths(lengths: Mapping[str, Any]) -> str:
    made = [
        plots.bars(f"{name}: {found['examples']:,} examples", found["edges"], found["counts"], "tokens")
        for name, found in lengths.items()
    ]
    return f'<div class="plots">{"".join(f"<div>{plot}</div>" for plot in made if plot)}</div>' if any(made) else ""


def _load(folder: Path) -> str:
    return "\n".join(
        [
            "# the command line",
            f'adapters-kit predict {folder} "a text"',
            f"adapters-kit eval {folder} --data FILE",
            f"adapters-kit merge {folder} merged/",
            "",
            "# Python",
            "import adapters_kit as ak",
            f'ak.predict({str(folder)!r}, ["a text"])',
            "",
            f"# peft alone: see README.md in {folder / 'adapter'}",
        ]
    )


def _environment(found: Mapping[str, Any]) -> str:
    rows = [
        [name, json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)]
        for name, value in found.items()
    ]
    return html.table(["what", "value"], rows, text=["value"]) if rows else ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _json(path: Path, otherwise: Any) -> Any:
    return read_json(path) if path.is_file() else otherwise


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path) if path.is_file() else []
