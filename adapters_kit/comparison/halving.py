"""Successive halving: how far a number of candidates goes before the worse of them stop, under a budget.

    12 of them to 8 %   →   the best 4 to 25 %   →   the best one to the end

Jamieson and Talwalkar 2016, arXiv:1502.07943, with the geometric rungs of ASHA (Li et al. 2020, arXiv:1810.05934).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapters_kit.errors import RecipeError

FACTOR = 3
"""One of so many goes on from each rung, that many times as far."""
_LEAST = 0.02  # a part of a training that still tells something


@dataclass(frozen=True)
class Found:
    """What a candidate has at a rung.

    Attributes:
        score: more is better; -inf for one that is none.
        loss: on the same rows; inf where the task has none.
        noise: what so many rows cannot tell apart.
    """

    score: float
    loss: float
    noise: float = 0.0


def noise(score: float, rows: int) -> float:
    """Two standard errors of a share of so many rows; 0 for a score that is no share."""
    return 2 * math.sqrt(score * (1 - score) / rows) if rows and 0 <= score <= 1 else 0.0


def ranked(found: Mapping[str, Found]) -> list[str]:
    """The best first. Scores that the rows cannot tell from the best count as equal, and the loss decides.

    Early on that is most of them: after a few steps a loss orders candidates, where accuracies are still chance.
    """
    best = max(found.values(), key=lambda one: one.score)

    def key(name: str) -> tuple[bool, float, float]:
        one = found[name]
        equal = one.score >= best.score - best.noise
        return not equal, 0.0 if equal else -one.score, one.loss

    return sorted(found, key=key)


@dataclass(frozen=True)
class Rung:
    """A stop.

    Attributes:
        count: candidates that go so far.
        part: of their steps; 1.0 is the end.
    """

    count: int
    part: float


def cost(rungs: Sequence[Rung]) -> float:
    """Trainings that the rungs take, in whole ones."""
    before = [0.0, *(rung.part for rung in rungs)]
    return sum(rung.count * (rung.part - part) for rung, part in zip(rungs, before, strict=False))


def rungs(candidates: int, budget: float) -> list[Rung]:
    """The rungs that spend a budget.

    Args:
        budget: below 1, the part of what training every candidate to its end takes; from 1 on, a number of trainings.

    Raises:
        RecipeError: it is no number above 0, or too little for one training and a look at the others.
    """
    if not 0 < budget < math.inf:
        told = f"budget={budget!r}: give a part of the whole grid below 1, or a number of trainings from 1 on."
        raise RecipeError([told], "the search")
    trainings = budget * candidates if budget < 1 else min(budget, candidates)
    counts = [candidates]
    while counts[-1] > 1:
        counts.append(max(1, counts[-1] // FACTOR))

    def at(first: float) -> list[Rung]:
        last = len(counts) - 1
        return [Rung(n, 1.0 if i == last else min(1.0, first * FACTOR**i)) for i, n in enumerate(counts)]

    low, high = _LEAST, 1.0
    if cost(at(low)) > trainings + 1e-9:
        least = math.ceil(100 * cost(at(low))) / 100
        part = math.ceil(100 * least / candidates) / 100
        or_part = f", which is {part:g}" if part < 1 else ""
        raise RecipeError(
            [
                f"budget={budget:g} is {trainings:.3g} of {candidates} trainings, but the best one's own and "
                f"{_LEAST:.0%} of every other take {least:g}{or_part}: give at least that."
            ],
            "the search",
        )
    for _ in range(60):  # the cost rises with the first rung
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= trainings + 1e-9 else (low, middle)
    found = at(low)
    # Rungs at the end are one: those who come so far have finished.
    whole = next(i for i, rung in enumerate(found) if rung.part > 1 - 1e-6)
    return [*found[:whole], Rung(found[whole].count, 1.0)]
