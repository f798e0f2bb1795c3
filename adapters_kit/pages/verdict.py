"""What a run came to, in one sentence; `advice` in its metrics tells what to try where it got worse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LESS_IS_BETTER = ("loss", "perplexity", "mae", "cer", "wer")
"""Scores of which a lower one is better."""

_MAIN = ("map", "accuracy", "span_f1", "exact_match", "f1", "bleu", "chrf", "rouge_l", "pearson", "perplexity", "loss")


def main_score(metrics: Mapping[str, Any], chosen: str | None = None) -> str | None:
    """The name of the score to show first: `chosen` if the run has it, else the most telling one that it has."""
    both = [name for name in metrics if f"base_{name}" in metrics]
    if chosen == "loss" and "perplexity" in both:  # which says the same in a number that people know
        return "perplexity"
    if chosen in both:
        return chosen
    return next((name for name in _MAIN if name in both), both[0] if both else None)


def verdict(metrics: Mapping[str, Any], chosen: str | None = None) -> tuple[str, bool]:
    """(sentence, whether the adapter is better than the base model)."""
    name = main_score(metrics, chosen)
    if name is None:
        return "There are no scores to compare.", True
    before, after = float(metrics[f"base_{name}"]), float(metrics[name])
    change = (before - after) if name in LESS_IS_BETTER else (after - before)
    rows = metrics.get("test_examples")
    where = f" on {rows:,} held-out examples" if isinstance(rows, int) else ""
    if change > 0:
        return f"{name} {before:.4g} → {after:.4g}{where}.", True
    return f"The adapter is no better than the base model: {name} {before:.4g} → {after:.4g}{where}.", False
