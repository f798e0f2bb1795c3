"""Recipes beside each other: where two differ, what one leaves open, what of one may leave this machine. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_kit import names, registry
from adapters_kit.recipe import Recipe

# Fields that are found out when a recipe runs, if they are left at what they are here.
_LEFT_OPEN: dict[str, Any] = {
    "labels": None,
    "problem": None,
    "training.precision": "auto",
    "training.learning_rate": None,
    "training.head_learning_rate": None,
    "training.base_dropout": None,
    "training.eval_batch_size": None,
    "training.max_length": None,
}


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields under dotted names.

    Example:
        >>> flat({"training": {"seed": 1}, "labels": None})
        {'training.seed': 1, 'labels': None}
    """
    found: dict[str, Any] = {}
    for key, value in fields.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differences(before: Recipe, now: Recipe, free: Sequence[str] = ()) -> list[str]:
    """The fields in which two recipes differ, as "training.seed: 0 -> 1".

    Args:
        free: dotted names, or beginnings of them, that may differ.
    """
    old, new = flat(before.model_dump()), flat(now.model_dump())
    keys = [key for key in {**old, **new} if not key.startswith(tuple(free)) and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys]


def left_open(recipe: Recipe) -> list[str]:
    """The dotted names of the fields that the recipe leaves to be found out when it runs."""
    given = flat(recipe.model_dump())
    found = [key for key, value in _LEFT_OPEN.items() if given[key] == value]
    return found if recipe.data.columns else [*found, "data.columns"]


def without_paths(recipe: Recipe) -> Recipe:
    """The recipe as it may travel with an adapter: what lies on this machine goes by its name alone, hub ids stay."""

    def name(text: str) -> str:
        is_here = names.looks_like_file(text) or Path(text).exists()
        return Path(text.replace("\\", "/")).name or "here" if is_here else text

    fields = recipe.model_dump()
    fields["model"] = name(recipe.model)
    for part in ("train", "test"):
        if fields["data"][part] is not None:
            fields["data"][part] = name(fields["data"][part])
    mix: dict[str, Any] = {}
    for path, one in fields["data"]["mix"].items():
        short, count = name(path), 1
        while short in mix:  # two files of one name
            count += 1
            short = f"{name(path)} ({count})"
        mix[short] = one
    fields["data"]["mix"] = mix
    if recipe.eval.keep is not None:
        fields["eval"]["keep"] = name(recipe.eval.keep)
    if recipe.eval.judge is not None:
        place, mark, function = recipe.eval.judge.rpartition(":")
        fields["eval"]["judge"] = f"{name(place)}{mark}{function}"
    begun_from = recipe.method.name
    if isinstance(begun_from, str) and names.is_adapter_folder(begun_from):
        fields["method"]["name"] = _kind(Path(begun_from))
    return Recipe(**fields)


def _kind(folder: Path) -> str:
    """The method that an adapter folder was made with, as a recipe spells it; the folder itself would be a path."""
    config = json.loads((folder / names.ADAPTER_CONFIG).read_text(encoding="utf-8"))
    kind = registry.canonical(str(config.get("peft_type", "")))
    return kind if kind in registry.known_names() else "lora"
