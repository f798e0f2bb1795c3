"""Methods beside full fine-tuning: the same data, budget and model for each, and what each costs."""

from adapters_kit.comparison.study import Comparison, compare

__all__ = ["Comparison", "compare"]
