"""Rows of pictures and recordings, opened when their batch is made: decoded, a data set would not fit in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Audio, Dataset, Image

from adapters_kit.tasks.encoded import MadeRows


def undecoded(data: Dataset, column: str) -> Dataset:
    """The rows with pictures or recordings as bytes or paths: `datasets` would open each, its own way, at a look."""
    kind = data.features[column]
    return data.cast_column(column, type(kind)(decode=False)) if isinstance(kind, Audio | Image) else data


class Opened(MadeRows):
    """Rows of files that are opened when their batch is made.

    Attributes:
        columns: role -> column, of what a batch is made from.
        rows: numbers of the rows in `data`.
        more: other features of each of them, by name.
    """

    def __init__(
        self,
        data: Dataset,
        columns: Mapping[str, str],
        rows: Sequence[int],
        more: Mapping[str, Any],
    ) -> None:
        for column in columns.values():
            data = undecoded(data, column)
        self.data, self.columns, self.rows, self.more = data, dict(columns), rows, dict(more)

    def __len__(self) -> int:
        return len(self.rows)

    def _made(self, row: int) -> dict[str, Any]:
        cells = self.data[self.rows[row]]
        named = {role: cells[column] for role, column in self.columns.items()}
        return {"row": self.rows[row], **named, **{name: values[row] for name, values in self.more.items()}}
