"""A column of numbers."""

from __future__ import annotations

import math

import numpy as np
from datasets import Dataset

from adapters_kit.errors import DataError
from adapters_kit.tasks.rows import cells

_NONE = ("", "nan", "na", "n/a", "null", "none")


def numbers_of(data: Dataset, column: str, needs: str, *, truths: bool = False) -> np.ndarray:
    """The numbers of a column, (rows,) float64; NaN where there is none.

    Args:
        needs: who needs numbers, for the message: "Regression".
        truths: whether true and false are 1 and 0.

    Raises:
        DataError: by row.
    """
    found = np.empty(len(data))
    for index, value in enumerate(cells(data, column)):
        try:
            missing = value is None or (isinstance(value, str) and value.strip().lower() in _NONE)
            number = math.nan if missing else float("" if isinstance(value, bool) and not truths else value)
        except (TypeError, ValueError):
            number = math.inf
        if math.isinf(number):
            hint = " Write numbers as 1234.5." if isinstance(value, str) and any(map(str.isdigit, value)) else ""
            raise DataError(f"{needs} needs numbers; column {column!r}, row {index + 1} holds {value!r:.80}.{hint}")
        found[index] = number
    return found
