"""propose(): a recipe for a data file, each choice with its reason, for people to read and change."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Audio, Dataset, Image, Sequence, Value

from adapters_kit import tasks
from adapters_kit.errors import DataError, did_you_mean
from adapters_kit.recipe import Recipe, known_flags
from adapters_kit.recipe_text import dump
from adapters_kit.task_table import TASKS
from adapters_kit.tasks.marked_text import holds_spans
from adapters_kit.training import data
from adapters_kit.training.resolve import rows_of

# Tried in this order: a conversation is also a list, an article with a summary also a text.
_ORDER = (
    "question-answering",
    "token-classification",
    "object-detection",
    "image-classification",
    "audio-classification",
    "speech-recognition",
    "sentence-embedding",
    "reranking",
    "causal-lm",
    "seq2seq",
    "text-classification",
)
_FEW = 50  # classes that a column of labels may have
_LOOKED_AT = 1000


@dataclass(frozen=True)
class Proposal:
    """A recipe with its reasons.

    Attributes:
        text: the YAML file, commented.
        fields: what it says.
        reasons: a sentence for each choice.
    """

    text: str
    fields: dict[str, Any]
    reasons: list[str]


def propose(
    source: str | os.PathLike[str], *, task: str | None = None, model: str | None = None, method: str | None = None
) -> Proposal:
    """Looks at the rows and says what could be learned from them.

    Args:
        source: what a recipe's `data` may be.
        task, model, method: choices that the user has made.

    Raises:
        DataError: unreadable, or nothing in it tells a task.
        RecipeError: a task or method that does not exist.
    """
    rows = rows_of(os.fspath(source))
    if task is not None and task not in TASKS:
        raise DataError(f"task={task!r} is unknown. {did_you_mean(task, TASKS)}")
    columns, guessed = _columns(rows, task)
    chosen = task or guessed
    base = model or TASKS[chosen].example
    if base is None:
        raise DataError(f"Nobody has named a model to begin with for {chosen}: say one with --model.")
    reasons = [f"{source}: {len(rows):,} rows, columns {', '.join(rows.column_names)}"]
    reasons.append(f"task: {chosen} ({'as you said' if task else _why(chosen, columns)})")
    named = ", ".join(f"{role} is {column!r}" for role, column in columns.items())
    reasons.append(f"columns: {named}")
    reasons += _classes(rows, chosen, columns)
    reasons.append(f"model: {base} ({'as you said' if model else 'small; change it to yours'})")
    fields: dict[str, Any] = {
        "model": base,
        "task": chosen,
        "data": {"train": os.fspath(source), "columns": columns},
        "method": {"name": method or "lora", **({} if method else {"r": 16})},
        "training": {"epochs": 3, "batch_size": 16 if len(rows) >= 200 else 8},
    }
    problem = _problem(rows, chosen, columns)
    if problem:
        fields["problem"] = problem
    long = _tokens(rows, columns) if not {"image", "audio"} & columns.keys() else 0.0
    if long > 512:
        fields["training"]["max_length"] = min(1 << (int(long) - 1).bit_length(), 4096)
        reasons.append(f"max_length: {fields['training']['max_length']}, since long rows have about {long:,.0f} tokens")
    Recipe(**fields)
    return Proposal(_commented(fields, reasons), fields, reasons)


def _columns(rows: Dataset, task: str | None) -> tuple[dict[str, str], str]:
    """The columns that a task can use, by their names; else by what they hold."""
    for name in (task,) if task else _ORDER:
        kind = tasks.get(name)
        try:
            found = data.recognise(rows, {}, kind.needs, kind.optional)
        except DataError:
            continue
        if _holds(rows, name, found):
            return found, name
    texts = [name for name, feature in rows.features.items() if _is_text(feature)]
    if not texts:
        raise DataError(f"None of the columns {', '.join(rows.column_names)} holds text or images to learn from.")
    text = max(texts, key=lambda name: statistics.mean(len(value or "") for value in rows[:_LOOKED_AT][name]))
    label = next((name for name in rows.column_names if name != text and _is_label(rows, name)), None)
    if task in (None, "text-classification") and label is not None:
        return {"text": text, "label": label}, "text-classification"
    if task in (None, "causal-lm", "masked-lm"):
        return {"text": text}, task or "causal-lm"
    wanted = " or ".join(" and ".join(roles) for roles in tasks.get(task).needs)
    raise DataError(
        f"{task} needs {wanted}; the data has the columns {', '.join(rows.column_names)}. Rename them, or write "
        "the recipe by hand with data.columns."
    )


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_label(rows: Dataset, name: str) -> bool:
    values = [value for value in rows[:_LOOKED_AT][name] if value is not None]
    if not values or not all(isinstance(value, str | int | bool) for value in values):
        return False
    return 2 <= len(set(values)) <= min(_FEW, max(len(values) // 3, 2))


def _is_picture(rows: Dataset, columns: Mapping[str, str]) -> bool:
    name = columns["image"]
    return isinstance(rows.features[name], Image) or data.medium(Path(str(rows[0][name])[-20:])) == "image"


def _holds(rows: Dataset, task: str, columns: Mapping[str, str]) -> bool:
    """Whether columns of the right names hold the right kind of thing."""
    kinds = {role: rows.features[column] for role, column in columns.items()}
    if task == "token-classification" and "spans" in columns:
        return _is_text(kinds["text"]) and any(map(holds_spans, rows[:_LOOKED_AT][columns["spans"]]))
    if task == "token-classification":
        return all(isinstance(kinds[role], Sequence | list) or "List" in type(kinds[role]).__name__ for role in kinds)
    if task == "object-detection":
        return "objects" in columns and columns["objects"].lower() == "objects" and _is_picture(rows, columns)
    if task == "image-classification":
        return _is_picture(rows, columns)
    if task in ("audio-classification", "speech-recognition"):
        return isinstance(kinds["audio"], Audio) or data.medium(Path(str(rows[0][columns["audio"]])[-20:])) == "audio"
    if task == "question-answering":
        return {"question", "context", "answers"} <= set(columns)
    if task == "sentence-embedding":
        return columns.get("positive", "").lower() in ("positive", "pos", "positives") and _is_text(kinds["anchor"])
    if task == "reranking":
        named = {"query", "document"} <= set(columns) and columns["document"].lower() in ("document", "passage", "doc")
        return named and _is_text(kinds["document"])
    if task == "causal-lm":
        return "text" not in columns  # a text alone may be one to classify
    if task == "text-classification":
        return _is_text(kinds["text"])
    return all(_is_text(kinds[role]) for role in kinds if role in ("text", "source", "target"))


def _why(task: str, columns: Mapping[str, str]) -> str:
    if "messages" in columns:
        return "conversations"
    if "completion" in columns:
        return "prompts with their answers"
    return {
        "text-classification": "a text and a column of labels",
        "token-classification": "spans of a text" if "spans" in columns else "words with a tag each",
        "question-answering": "questions with their context and answers",
        "seq2seq": "one text for each other text",
        "object-detection": "pictures with boxes",
        "image-classification": "images with a class each",
        "audio-classification": "recordings with a class each",
        "speech-recognition": "recordings with what is said in them",
        "sentence-embedding": "texts that belong together",
        "reranking": "queries with documents",
        "causal-lm": "texts alone",
    }.get(task, "by its columns")


def _classes(rows: Dataset, task: str, columns: Mapping[str, str]) -> list[str]:
    if "label" not in columns or not TASKS[task].labelled:
        return []
    values = rows[columns["label"]][:]
    if _problem(rows, task, columns):
        numbers = _numbers(values)
        return [f"labels: numbers to predict ({min(numbers):g} to {max(numbers):g}), problem: regression"]
    if any(isinstance(value, list) for value in values):
        return ["labels: several a row"]
    counts: dict[str, int] = {}
    for value in values:
        counts[str(value)] = counts.get(str(value), 0) + 1
    shown = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda one: -one[1])[:8])
    more = f" … {len(counts)} in all" if len(counts) > 8 else ""
    alone = f"{columns['label']!r} holds another value in nearly every row: is it the label?"
    return [f"labels: {shown}{more}", *([alone] if len(counts) > max(len(values) / 2, 2) else [])]


def _problem(rows: Dataset, task: str, columns: Mapping[str, str]) -> str | None:
    if task != "text-classification":
        return None
    values = _numbers(rows[columns["label"]][:])
    seen = set(values)
    counted = len(seen) == max(seen, default=0) - min(seen, default=0) + 1  # 0, 1, 2 …: the numbers of classes
    measured = any(value != int(value) for value in seen) or (len(seen) > _FEW and not counted)
    return "regression" if measured else None


def _numbers(values: Iterable[Any]) -> list[float]:
    """The numbers in a column of nothing else, written as text or not; empty cells are left out."""
    try:
        found = [float(value) for value in values if value is not None and value != ""]
    except (TypeError, ValueError):
        return []
    return [value for value in found if math.isfinite(value)]


def _tokens(rows: Dataset, columns: Mapping[str, str]) -> float:
    """About how long a long row is: a token is about four characters of a European language."""
    lengths = [
        sum(len(str(row[column] or "")) for column in columns.values())
        for row in rows.select(range(min(len(rows), _LOOKED_AT)))
    ]
    return sorted(lengths)[int(0.95 * (len(lengths) - 1))] / 4


def _commented(fields: Mapping[str, Any], reasons: list[str]) -> str:
    """The fields as YAML, each top key with its meaning above it, and other keys to begin with below."""
    help_ = known_flags()
    lines = ["# What was seen:", *(f"#   {reason}" for reason in reasons), ""]
    for key, value in fields.items():
        meaning = " ".join(help_.get(key, "").split())
        lines += [f"# {meaning}" if meaning else "", dump({key: value}).rstrip()]
    lines += [
        "",
        "# Some of the other keys (adapters-kit train --help tells all):",
        "# quantize: nf4          # the frozen weights at 4 bit: fits on small cards",
        "# training.learning_rate # by default the one that suits the method",
        "# training.early_stopping, training.packing, training.gradient_checkpointing",
    ]
    return "\n".join(line for line in lines if line is not None) + "\n"
