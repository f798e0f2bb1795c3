"""What a verb has to say: data for `--json`, and the same for people, on terminals of any width. No torch here."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PIPED_WIDTH = 1000
"""Columns of a table that goes into a file or a pipe, where COLUMNS does not say."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """The result of a verb.

    Attributes:
        data: what `--json` prints, as one JSON value.
        text: what people read; or a function that prints it.
        status: the exit status.
    """

    data: Any
    text: str | Callable[[], None] = ""
    status: int = 0

    def say(self, as_json: bool) -> None:
        """Print it."""
        if as_json:
            print(json.dumps(plain(self.data), ensure_ascii=False, indent=None if sys.stdout.isatty() else 2))
        elif callable(self.text):
            self.text()
        elif self.text:
            print(self.text)


def plain(value: Any) -> Any:
    """`value` in JSON's own types: records become mappings, paths and everything else unknown become text."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "item"):  # a number of numpy or torch
        return value.item()
    return str(value)


def console() -> Any:
    """Standard output as rich writes it: as wide as the terminal, `COLUMNS` or `PIPED_WIDTH`; NO_COLOR is heeded."""
    from rich.console import Console

    told = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if told else PIPED_WIDTH, soft_wrap=False)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; where the terminal is too narrow for its words, one line a cell instead: nothing is cut."""
    from rich.table import Table

    out = console()
    table = Table(*columns, box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*row)
    whole, *broken = zip(columns, *rows, strict=True)  # the first column keeps its lines, the others break at spaces
    least = max(map(len, whole)) + sum(
        2 + max(len(word) for cell in one for word in (cell.split() or [""])) for one in broken
    )
    with out.capture() as caught:
        if least <= out.width and out.width >= 12 * len(columns):
            out.print(table, highlight=False, markup=False)
        else:
            _print_list(out, columns, rows)
    print("\n".join(line.rstrip() for line in caught.get().splitlines()))


def _print_list(out: Any, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in rows:
        out.print(row[0], style="bold", highlight=False, markup=False)
        for name, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                out.print(f"  {name}: {cell}".rstrip(), highlight=False, markup=False)


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Names and values in two columns; what was printed while the run went on is left out."""
    shown = {name: value for name, value in metrics.items() if name not in ("notes", "counts", "advice")}
    width = max(map(len, shown), default=0)
    return "\n".join(
        f"{name:<{width}}  {value:.6g}" if isinstance(value, float) else f"{name:<{width}}  {value}"
        for name, value in shown.items()
    )


def ask_for(package: str, what: str, extra: str | None = None) -> None:
    """Refuse a verb whose package is not installed, with what to type.

    Raises:
        MissingPackageError: it is not.
    """
    from importlib.util import find_spec

    from adapters_kit.errors import MissingPackageError

    if find_spec(package) is None:
        install = f'pip install "adapters-kit[{extra}]"' if extra else f"pip install {package}"
        raise MissingPackageError(f"{what} needs the package {package}: {install}")
