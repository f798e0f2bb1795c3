"""How much of a comparison is left, for one ETA of the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class Remaining:
    """The cells that are planned, counted down as they are made; a search may add some at the edge of its grid.

    Args:
        planned: label to number of cells.
    """

    def __init__(self, planned: Mapping[str, int]) -> None:
        self._cells = Counter(planned)
        self._took: dict[str, float] = {}

    def done(self, label: str, seconds: float | None) -> None:
        """One cell less; `seconds` None where it was kept from before, which tells nothing about the others."""
        self._cells[label] -= 1
        if seconds is not None:
            self._took[label] = seconds

    def dropped(self, label: str) -> None:
        """No more cells of this label are tried."""
        self._cells[label] = 0

    def took(self, label: str) -> float:
        """Seconds of the label's last cell; 0.0 before there is one."""
        return self._took.get(label, 0.0)

    def seconds(self) -> float | None:
        """What is left, each cell as long as its label's last, or as the mean of all; None while nothing is known."""
        if not self._took:
            return None
        mean = sum(self._took.values()) / len(self._took)
        return sum(max(count, 0) * self._took.get(label, mean) for label, count in self._cells.items())
