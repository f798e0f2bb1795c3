"""A comparison as JSON, as a table, as a Markdown report and as two plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters_kit.artifacts.files import write_json, write_text
from adapters_kit.comparison import score_plots
from adapters_kit.comparison.summary import UNBOUNDED, Row
from adapters_kit.pages.comparison_page import write_table_page
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_changes import without_paths
from adapters_kit.training import run as run_report
from adapters_kit.training.table import aligned


def document(
    recipe: Recipe,
    rows: list[Row],
    metric: str,
    higher: bool,
    base: Mapping[str, Any] | None,
    chosen: Mapping[str, float],
    searched: Mapping[str, Mapping[str, float | None]],
    finals: Mapping[str, Mapping[int, Mapping[str, Any]]],
    failures: Mapping[str, str],
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """What comparison.json holds; everything else is drawn from it."""
    return {
        "recipe": without_paths(recipe).model_dump(mode="json"),
        "metric": metric,
        "higher_is_better": higher,
        "rows": sizes,
        "base": base["scores"] if base else None,
        "methods": [asdict(row) for row in rows],
        "learning_rates": dict(chosen),
        "searched": {label: dict(found) for label, found in searched.items()},
        "cells": {
            label: {str(seed): {"scores": result["scores"]} for seed, result in results.items()}
            for label, results in finals.items()
        },
        "failures": dict(failures),
        "environment": run_report.environment(),
    }


def shown(value: float | None, metric: str, sign: str = "") -> str:
    """A score for people: 0.8123 of an accuracy is 81.2 points, a perplexity stays one."""
    if value is None:
        return "–"
    return f"{value:{sign}.2f}" if metric in UNBOUNDED else f"{100 * value:{sign}.1f}"


def gap(row: Mapping[str, Any], metric: str) -> str:
    """The gap to full fine-tuning for people, with its interval where there is one."""
    edges = [shown(edge, metric, "+") for edge in row["interval"] or ()]
    return shown(row["gap"], metric, "+") + (f" [{', '.join(edges)}]" if edges else "")


def cells(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table, as text."""
    metric = document["metric"]
    head = ["method", metric, "gap to full [95 %]", "trained", "adapter MB", "lr"]
    head += ["seconds", "tokens/s", "peak MB", "optimizer MB", "merged − trained"]
    body = []
    for row in document["methods"]:
        cost = row["costs"]
        spread = "" if row["spread"] is None else f" ± {shown(row['spread'], metric)}"
        body.append(
            [
                row["label"],
                shown(row["score"], metric) + spread,
                gap(row, metric),
                f"{cost['trainable_params'] / cost['total_params']:.2%}",
                f"{cost['adapter_bytes'] / 1e6:.2f}",
                f"{document['learning_rates'][row['label']]:.1e}",
                f"{cost['seconds']:.0f}",
                f"{cost['tokens_per_second']:,.0f}",
                f"{cost['peak_bytes'] / 1e6:,.0f}",
                f"{cost['optimizer_bytes'] / 1e6:.1f}",
                _merged(row["merge"]),
            ]
        )
    return head, body


def _merged(merge: Mapping[str, float] | None) -> str:
    if merge is None:
        return "–"
    if "kl" in merge:  # of a .gguf file
        return f"KL {merge['kl']:.0e} (base {merge['kl_base']:.0e})"
    return f"{merge['largest']:.0e} (rounding {merge['floor']:.0e})"


def text_table(document: Mapping[str, Any]) -> str:
    """The table in columns of equal width."""
    head, body = cells(document)
    return aligned([head, *body])


def as_markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    rule = "|---|" + "---:|" * (len(head) - 1)
    lines = ["| " + " | ".join(line) + " |" for line in (head, *body)]
    return "\n".join([lines[0], rule, *lines[1:]])


def page_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The methods as rows of a page's table: numbers as numbers, so that they sort."""
    metric = document["metric"]
    return [
        {
            "method": row["label"],
            metric: row["score"],
            "± over seeds": row["spread"],
            "gap to full": row["gap"],
            "95 %": gap(row, metric).partition(" ")[2],
            "trainable_params": row["costs"]["trainable_params"],
            "adapter_bytes": row["costs"]["adapter_bytes"],
            "learning rate": document["learning_rates"][row["label"]],
            "train_seconds": row["costs"]["seconds"],
            "tokens_per_second": row["costs"]["tokens_per_second"],
            "peak_memory_bytes": row["costs"]["peak_bytes"],
        }
        for row in document["methods"]
    ]


def write(out: Path, document: Mapping[str, Any]) -> list[str]:
    """comparison.json, the plots and report.md; returns where they are, for people."""
    write_json(out / "comparison.json", document)
    pictures = score_plots.draw(document, out)
    write_text(out / "report.md", markdown(document, [path.name for path in pictures]))
    seeds = len(next(iter(document["cells"].values()), {}))
    note = f"Score: {document['metric']}, the mean over {seeds} seed{'s' * (seeds != 1)}; gaps are paired by seed."
    write_table_page(
        out, f"{out.name}: methods beside full fine-tuning", page_rows(document), document["metric"], "method", [note]
    )
    return [f"Report: {out / 'report.md'}, {out / 'report.html'}   figures: {out / 'comparison.json'}"]


def _budget(training: Mapping[str, Any]) -> str:
    """How long each was trained, in the unit that decided it."""
    return f"{training['max_steps']:,} steps" if training["max_steps"] else f"{training['epochs']:g} epochs"


def markdown(document: Mapping[str, Any], pictures: list[str]) -> str:
    """The report: what was compared, the table, the plots, the rates that were tried, how to read it."""
    recipe, metric, sizes = document["recipe"], document["metric"], document["rows"]
    training = recipe["training"]
    seeds = max(row["seeds"] for row in document["methods"])
    base = document["base"]
    better = "higher" if document["higher_is_better"] else "lower"
    lines = [
        f"# {recipe['task']} on {recipe['model']}: adapters beside full fine-tuning",
        "",
        f"{sizes['train']:,} rows to train on, {sizes['validation']:,} to choose learning rates on, {sizes['test']:,} "
        f"held out and seen once a cell. {_budget(training)} in batches of {training['batch_size']}, "
        f"{training['scheduler']} schedule; {seeds} {'seeds' if seeds > 1 else 'seed'}. {better.capitalize()} {metric} "
        "is better." + (f" Before training: {shown(base[metric], metric)}." if base and metric in base else ""),
        "",
        as_markdown(*cells(document)),
        "",
        "Score: mean ± standard deviation over the seeds. Gap: to full fine-tuning with the same seed, mean and 95 % "
        "interval (Student's t, paired); it holds the spread over seeds, not that of drawing another test set, but is "
        f"never narrower than what {sizes['test']:,} rows can tell apart (three rows either way). Costs "
        "are medians; peak memory is above what the imports take. Merged − trained: largest difference of an output of "
        "the merged model, and what rounding alone makes.",
        "",
        *[f"![{Path(name).stem}]({name})\n" for name in pictures],
        "## Learning rates tried (score on the validation rows, one seed)",
        "",
    ]
    for label, found in document["searched"].items():
        tried = ", ".join(f"{rate}: {shown(score, metric)}" for rate, score in found.items() if score is not None)
        lines.append(f"- {label}: {tried or 'not searched'}; taken: {document['learning_rates'][label]:.1e}")
    lines += [f"- {label} failed: {why}" for label, why in document["failures"].items()]
    environment = document["environment"]
    versions = ", ".join(
        f"{name} {environment[name]}" for name in ("torch", "transformers", "peft") if name in environment
    )
    where = ", ".join(environment["gpus"]) or f"{environment['cpus']} CPU cores, {environment['threads']} threads"
    return "\n".join([*lines, "", f"Made with {versions}, on {where}.", ""])
