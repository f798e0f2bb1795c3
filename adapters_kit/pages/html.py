"""The frame of a page: its style, light and dark, tables that sort, and nothing that is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --paper: #ffffff; --card: #f5f7f9; --line: #d5dbe1;
        --good: #14713d; --bad: #a8231b; --mark: #1f5fbf; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebee; --soft: #a3acb6; --paper: #14171b; --card: #1d2227; --line: #39414a;
          --good: #5fd08d; --bad: #ff8a80; --mark: #7db2ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; }
p { margin: .5rem 0; } .soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; max-width: 100%; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.figures > div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.figures b { display: block; font-size: 1.25rem; } .figures span { color: var(--soft); font-size: .85rem; }
table { border-collapse: collapse; font-size: .92rem; overflow-wrap: normal; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
@media (max-width: 40rem) { th, td { padding: .3rem .4rem; } td.text { min-width: 9rem !important; } }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--mark); }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; overflow-x: auto;
      overflow-wrap: normal; font-size: .85rem; }
td.text { min-width: 14rem; max-width: 34rem; overflow-wrap: anywhere; white-space: pre-line; }
svg { max-width: 100%; height: auto; } .plots { display: grid; gap: 1rem;
      grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.matrix td { text-align: center; padding: .25rem .5rem; border: 1px solid var(--line); }
.matrix th { max-width: 14rem; font-weight: 500; overflow-wrap: anywhere; } .matrix thead th { text-align: center; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""

# Sorting by a click on a column's head; numbers by the value in data-value.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const column = [...head.parentElement.children].indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => { const cell = row.children[column], number = cell.dataset.value;
      return number === undefined ? cell.textContent : number === "" ? Infinity : Number(number); };
    const order = (a, b) => { const x = value(a), y = value(b);
      const numbers = typeof x === "number" && typeof y === "number";
      return (numbers ? x - y : String(x).localeCompare(String(y))) * (up ? 1 : -1); };
    for (const row of [...body.rows].sort(order)) body.append(row);
  });
}
"""


def page(title: str, body: str) -> str:
    """A whole page; `body` is markup, `title` text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n<script>{SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )


def figures(values: Mapping[str, str]) -> str:
    """Large numbers with what they are below."""
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in values.items())
    return f'<div class="figures">{cells}</div>'


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, sortable: bool = False, text: Sequence[str] = ()
) -> str:
    """A table in a box that scrolls by itself.

    Args:
        rows: cells; numbers are written short and sort by their value, None is empty.
        text: the columns that hold long text.
    """
    kinds = [
        "number" if any(_is_number(row[i]) for row in rows) else "text" if name in text else ""
        for i, name in enumerate(columns)
    ]
    head = "".join(
        f'<th class="{kind}">{f"<button>{escape(name)}</button>" if sortable else escape(name)}</th>'
        for name, kind in zip(columns, kinds, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(_cell(value, kind) for value, kind in zip(row, kinds, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any, kind: str) -> str:
    if kind == "number":
        number = value if _is_number(value) else ""
        return f'<td class="number" data-value="{number}">{escape(short(value))}</td>'
    return f'<td class="{kind}">{escape(short(value))}</td>'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def short(value: Any) -> str:
    """A value as a person reads it: four digits of a fraction, thousands apart."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return f"{value:,}" if _is_number(value) else str(value)


def pre(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>"


def section(title: str, body: str) -> str:
    """A titled part; nothing where there is nothing to show."""
    return f"<h2>{escape(title)}</h2>\n{body}\n" if body else ""
