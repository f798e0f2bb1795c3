"""Many seeds in one line: means, spreads, and the gap to full fine-tuning with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

LEVEL = 0.95
# Scores of which less is better, shown as they are; every other one is a part of one, shown in points of a hundred.
UNBOUNDED = ("loss", "perplexity", "mae")
"""Scores that are no shares, and are shown as they are."""
# What a cell costs; the median over the seeds stands in the table.
COSTS = (
    "trainable_params",
    "total_params",
    "adapter_bytes",
    "seconds",
    "cpu_seconds",
    "tokens_per_second",
    "peak_bytes",
    "optimizer_bytes",
)


@dataclass(frozen=True)
class Row:
    """One method over its seeds.

    Attributes:
        label: the method.
        seeds: number of seeds that gave a score.
        score: their mean.
        spread: their standard deviation (one seed: None).
        gap: mean difference to full fine-tuning, seed by seed (score minus full's); None without it.
        interval: 95 % confidence interval of the gap over the seeds (Student's t, paired), at least as wide as what the
            held-out rows can tell apart; None for one seed.
        costs: medians over the seeds.
        merge: largest difference between merged model and base + adapter, and the rounding floor; of `blocks`, which
            merges into a .gguf file, kl and kl_base in nats. None where the method does not merge.
    """

    label: str
    seeds: int
    score: float
    spread: float | None
    gap: float | None
    interval: tuple[float, float] | None
    costs: dict[str, float]
    merge: dict[str, float] | None


def summarize(
    finals: Mapping[str, Mapping[int, Mapping[str, Any]]], metric: str, higher: bool, full: str | None, held_out: int
) -> list[Row]:
    """One row a method, best first; methods without a result are left out.

    Args:
        finals: label to seed to a cell's result.
        full: the label of full fine-tuning, if it is there.
        held_out: rows that each score was made on.
    """
    of_full = finals.get(full, {}) if full is not None else {}
    reference = {seed: result["scores"][metric] for seed, result in of_full.items()}
    rows = []
    for label, results in finals.items():
        if not results:
            continue
        scores = {seed: result["scores"][metric] for seed, result in results.items()}
        shared = [seed for seed in scores if seed in reference] if label != full else []
        differences = [scores[seed] - reference[seed] for seed in shared]
        merge = next((result["merge"] for result in results.values() if result.get("merge")), None)
        rows.append(
            Row(
                label,
                len(scores),
                fmean(scores.values()),
                stdev(scores.values()) if len(scores) > 1 else None,
                fmean(differences) if differences else None,
                interval(differences, least=0.0 if metric in UNBOUNDED else resolution(held_out)),
                {name: _middle(results, name) for name in COSTS},
                merge,
            )
        )
    return sorted(rows, key=lambda row: -row.score if higher else row.score)


def _middle(results: Mapping[int, Mapping[str, Any]], cost: str) -> float:
    """Over the seeds that know it: those that went in a pass with others do not know all. The first went alone."""
    return median(result[cost] for result in results.values() if result[cost] is not None)


def resolution(rows: int) -> float:
    """What so many rows cannot tell apart: if two models never differ on n rows, they may still differ on 3/n of all
    rows (the rule of three, 95 %). Two seeds that agree on 20 rows do not prove that two methods are equal."""
    return min(3 / rows, 1.0) if rows else 1.0


def interval(differences: Sequence[float], level: float = LEVEL, least: float = 0.0) -> tuple[float, float] | None:
    """Confidence interval of the mean of paired differences, after Student; None for fewer than two.

    Args:
        least: half its width is at least this.
    """
    if len(differences) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    half = max(half, least)
    middle = fmean(differences)
    return middle - half, middle + half
