"""Two plots: score against trained parameters, score against time and memory. Needs matplotlib; none without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_kit.comparison.summary import UNBOUNDED
from adapters_kit.pages.plots import place_names
from adapters_kit.training import pictures


def draw(document: Mapping[str, Any], out: Path, prefix: str = "") -> list[Path]:
    """score_and_parameters.png and score_and_cost.png in `out`, `prefix` before their names; returns their paths."""
    if not pictures.available():
        return []
    scale = 1 if document["metric"] in UNBOUNDED else 100
    label = document["metric"] if scale == 1 else f"{document['metric']} (points)"
    rows = document["methods"]
    kinds: dict[str, list[tuple[str, float, str, bool]]] = {
        "score_and_parameters.png": [("trainable_params", 1, "trained parameters", True)],
        "score_and_cost.png": [
            ("seconds", 1, "seconds of training", False),
            ("peak_bytes", 1e-6, "peak memory, MB", False),
        ],
    }
    made = []
    for name, axes in kinds.items():
        figure, places = pictures.blank(len(axes))
        for place, (cost, unit, title, logarithmic) in zip([places] if len(axes) == 1 else places, axes, strict=True):
            _scatter(place, rows, cost, unit, scale)
            place.set(xlabel=title, ylabel=label, **({"xscale": "log"} if logarithmic else {}))
            x, y = [row["costs"][cost] * unit for row in rows], [row["score"] * scale for row in rows]
            place_names(figure, place, [row["label"] for row in rows], x, y)
        figure.savefig(out / f"{prefix}{name}", dpi=110)
        made.append(out / f"{prefix}{name}")
    return made


def _scatter(place: Any, rows: Sequence[Mapping[str, Any]], cost: str, unit: float, scale: float) -> None:
    """One point a method with its spread; a band where full fine-tuning lies."""
    for row in rows:
        x, y = row["costs"][cost] * unit, row["score"] * scale
        spread = (row["spread"] or 0) * scale
        is_full = row["label"] == "full"
        place.errorbar(x, y, yerr=spread or None, fmt="s" if is_full else "o", color="black" if is_full else None)
        if is_full:
            place.axhspan(y - spread, y + spread, color="gray", alpha=0.15)
            place.axhline(y, color="gray", linewidth=0.8)
    place.margins(x=0.15)
