"""Every table and plot of README, docs/measured.md and docs/defaults.md, from the committed results alone.

    python benchmarks/figures.py            # draws the plots, writes the tables between the markers
    python benchmarks/figures.py --check    # says which table is not the measured one

A page holds `<!-- table NAME -->`, the table, `<!-- end -->`; NAME is one of `TABLES`.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import common
import comparison
import gguf_roads
import loading
import memory
import merging
import step_time

PAGES = tuple(common.ROOT / page for page in ("README.md", "docs/measured.md", "docs/defaults.md"))
TABLES: dict[str, Callable[[], str]] = {
    "comparison": lambda: comparison.sentiment_table(comparison.read()),
    "costs": lambda: comparison.cost_table(comparison.read()),
    "rates": lambda: comparison.rates_table(comparison.read()),
    "combinations": lambda: comparison.movies_table(comparison.read()["combinations"]),
    "others": lambda: comparison.movies_table(comparison.read()["others"]),
    "language": lambda: comparison.language_table(comparison.read()),
    "rank": lambda: comparison.curve_table(comparison.read(), "rank"),
    "rate": lambda: comparison.curve_table(comparison.read(), "rate"),
    "gguf roads": lambda: gguf_roads.table(gguf_roads.read()),
    "loading": lambda: loading.table(loading.read()),
    "memory": lambda: memory.table(memory.read()["cases"]),
    "step time": lambda: step_time.table(common.read("step_time")["cases"]),
    "merging": lambda: merging.table(common.read("merging")),
}
_BLOCK = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The text with every table written anew; an unknown name is a KeyError of the author's."""
    return _BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def names(text: str) -> list[str]:
    """The tables that the text has places for."""
    return [found[1] for found in _BLOCK.findall(text)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    if not options.check:
        comparison.draw()
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        stale += [f"{page.name}: {found[2]}" for found in _BLOCK.finditer(text) if filled(found[0]) != found[0]]
        if not options.check:
            page.write_text(filled(text), encoding="utf-8")
    print("\n".join(stale) or "every table is the measured one")
    return bool(stale) and options.check


if __name__ == "__main__":
    sys.exit(main())
