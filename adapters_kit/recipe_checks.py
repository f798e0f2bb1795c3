"""What no field of a recipe can know by itself: methods, columns and keys that do not belong together. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from adapters_kit import names, registry
from adapters_kit.errors import did_you_mean
from adapters_kit.quantization_table import KINDS
from adapters_kit.recipe_sections import ObjectiveSpec
from adapters_kit.task_table import OBJECTIVES, TASKS, roles_of, tasks_with

_LONGEST, _LARGEST = 10**15, 3.4e38  # counts; other numbers, which float32 has to hold
Problem = tuple[tuple[str, ...], str]  # dotted path, sentence


def cross_checks(fields: Mapping[str, Any], sections: Mapping[str, type[BaseModel]]) -> list[Problem]:
    """What one field alone cannot know. Works on raw input, so that these problems are told with all the others.

    Args:
        fields: the recipe's, as given.
        sections: the mappings inside a recipe by name; "" is the recipe itself.
    """

    def part(name: str) -> Mapping[str, Any]:
        value = fields.get(name)
        if isinstance(value, BaseModel):
            value = value.model_dump()
        return value if isinstance(value, Mapping) else {}

    problems: list[Problem] = []
    task, training = fields.get("task"), part("training")

    method = fields.get("method", "lora")
    method = method if isinstance(method, str | list | tuple) else part("method").get("name", "lora")
    known = registry.known_names()
    for name in method if isinstance(method, list | tuple) else [method]:
        if not isinstance(name, str) or registry.canonical(name) in known:
            continue
        if not names.is_adapter_folder(names.adapter_inside(name)):
            missing = f"no {names.ADAPTER_CONFIG} in that folder."
            reason = missing if names.looks_like_folder(name) else did_you_mean(name, known)
            problems.append((("method",), f"there is no method {name!r}: {reason}"))

    problems += _number_checks({"": fields, **{name: part(name) for name in sections if name}})
    row = TASKS.get(task) if isinstance(task, str) else None
    objective = fields.get("objective")
    objective = objective if isinstance(objective, str) else part("objective").get("name")
    objective = objective if task == "causal-lm" and isinstance(objective, str) and objective in OBJECTIVES else None
    problems += _objective_checks(objective, part("objective"), training, bool(fields.get("quantize")))
    roles = roles_of(task, objective) if row and isinstance(task, str) else ()
    for section, key, allowed in (("data", "columns", roles), ("eval", "keep_columns", row.roles if row else ())):
        columns = part(section).get(key)
        for role in columns if row and isinstance(columns, Mapping) else ():
            if role not in allowed:
                by = f" by the objective {objective}" if objective and section == "data" else ""
                text = f"the task {task}{by} has no column {role!r}. {did_you_mean(str(role), allowed)}"
                problems.append(((section, key, str(role)), text))
    for key in dict.fromkeys(key for other in TASKS.values() for key in other.keys) if row else ():
        section, _, last = key.rpartition(".")
        default = sections[section].model_fields[last].default
        given = (part(section) if section else fields).get(last, default)
        if given != default and task not in tasks_with(key):
            owners = " and ".join(tasks_with(key))
            problems.append((tuple(key.split(".")), f"only {owners} has this key; the task is {task}."))
    if training.get("early_stopping") and training.get("evals_per_epoch", 1) == 0:
        problems.append((("training", "early_stopping"), "needs evaluations: set evals_per_epoch to 1 or more."))
    if not part("eval").get("keep"):
        lone = [("training", "keep_within")] if training.get("keep_within") is not None else []
        lone += [("eval", key) for key in ("keep_columns", "keep_limit") if part("eval").get(key)]
        problems += [(path, "needs rows that are to be kept: set eval.keep.") for path in lone]
    if part("eval").get("judge_limit") not in (None, 64) and not part("eval").get("judge"):
        problems.append((("eval", "judge_limit"), "needs somebody who judges: set eval.judge."))
    quantize = fields.get("quantize")
    if training.get("precision") == "fp32" and quantize in KINDS and not KINDS[quantize].computes_in_fp32:
        text = f"{quantize} weights compute in 16 bits: use auto, bf16 or fp16."
        problems.append((("training", "precision"), text))
    return problems


def _number_checks(sections: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    problems: list[Problem] = []
    for section, values in sections.items():
        for key, value in values.items():
            path = (section, str(key)) if section else (str(key),)
            most = _LARGEST if type(value) is float and key != "epochs" else _LONGEST
            if section == "method" and isinstance(value, float) and not math.isfinite(value):
                problems.append((path, f"{value!r} does not fit: give a finite number."))
            elif type(value) in (int, float) and math.inf > abs(value) > most:
                problems.append((path, f"is more than any run has: {most:.0e} is the most."))
    size = sections.get("data", {}).get("test_size")
    if isinstance(size, float) and math.inf > size > 1 and size != int(size):
        text = f"{size!r} is no number of rows: below 1 it is a fraction, else whole."
        problems.append((("data", "test_size"), text))
    return problems


def _objective_checks(
    name: str | None, given: Mapping[str, Any], training: Mapping[str, Any], quantized: bool
) -> list[Problem]:
    """Options that belong to other objectives, or that this one lacks; packing, which joins what is compared."""
    if name is None:
        return []
    problems: list[Problem] = []
    row = OBJECTIVES[name]
    for key, field in ObjectiveSpec.model_fields.items():
        if key in given and key not in ("name", *row.keys) and given[key] != field.default:
            owners = " and ".join(other for other, one in OBJECTIVES.items() if key in one.keys)
            problems.append((("objective", key), f"only {owners} has this key; the objective is {name}."))
        if key in row.needs and given.get(key) is None:
            problems.append((("objective", key), f"is missing: {name} needs it. {field.description}"))
    if name == "distill" and given.get("teacher") is None and not quantized:
        told = "is missing: a base that is not quantized has nothing to learn from itself. Name a teacher, or quantize"
        problems.append((("objective", "teacher"), f"{told}: nf4."))
    if training.get("packing"):
        problems.append((("training", "packing"), f"joins rows, which {name} takes one by one: leave it out."))
    return problems
