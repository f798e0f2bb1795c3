"""The page of explanations: every answer with the tokens, or the regions of the picture, that it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Protocol

from adapters_kit.pages import html

_STYLE = """<style>
.tokens { line-height: 2.1; white-space: pre-wrap; }
.tokens span { border-radius: .25rem; padding: .15rem 0; }
.tokens .more { border-bottom: 2px solid var(--good); } .tokens .less { border-bottom: 2px dotted var(--bad); }
</style>"""
_MORE, _LESS = "46 160 97", "214 69 58"


class Explained(Protocol):
    """What the page shows of an explanation; see `inference.explain.Explanation`."""

    of: str
    unit: str
    value: float
    nothing: float
    error: float
    tokens: tuple[tuple[str, float], ...]
    regions: tuple[tuple[float, ...], ...] | None
    picture: str


def explanation_page(title: str, rows: Sequence[Mapping[str, Any]], found: Sequence[Sequence[Any]]) -> str:
    """The whole page.

    Args:
        rows: of each row what was asked and answered.
        found: of each row its explanations, as `Explained` has them.
    """
    body = [
        f"<h1>{escape(title)}</h1>{_STYLE}",
        "<p>Green and underlined: speaks for the answer. Red and dotted: speaks against it. The scores of a row sum to "
        "what the answer gains by its input over padding (a picture: over even grey).</p>",
    ]
    for number, (row, explanations) in enumerate(zip(rows, found, strict=True), 1):
        shown = "".join(f"<p><b>{escape(str(key))}</b>: {escape(html.short(value))}</p>" for key, value in row.items())
        parts = "".join(map(_explanation, explanations)) or '<p class="soft">Nothing to explain.</p>'
        body.append(html.section(f"Row {number}", shown + parts))
    return html.page(title, "\n".join(body))


def _explanation(one: Explained) -> str:
    top = max(
        [abs(score) for _, score in one.tokens] + [abs(score) for row in one.regions or () for score in row] + [0.0]
    )
    sums = (
        f'<p class="soft">{escape(one.unit)} of <b>{escape(one.of)}</b>: {one.value:.4g}, without the input '
        f"{one.nothing:.4g}; the sum of the scores is off by {one.error:.2g}</p>"
    )
    if one.regions is not None:
        return sums + _regions(one, top)
    blanks = any(text.startswith(" ") for text, _ in one.tokens)  # else each token is a word, or begins with ##
    marked = "".join(_token(text, score, top, blanks) for text, score in one.tokens)
    strongest = sorted((pair for pair in one.tokens if pair[1]), key=lambda pair: -abs(pair[1]))[:10]
    listed = html.table(["token", "score"], strongest) if strongest else ""
    return f'{sums}<p class="tokens">{marked}</p><details><summary>Strongest tokens</summary>{listed}</details>'


def _paint(score: float, top: float) -> str:
    share = abs(score) / top if top else 0.0
    return f"rgb({_MORE if score > 0 else _LESS} / {0.55 * share:.3f})"


def _token(text: str, score: float, top: float, blanks: bool) -> str:
    kind = "" if not top or abs(score) < 0.15 * top else "more" if score > 0 else "less"
    before = "" if blanks or text.startswith("##") else " "
    shown = escape(text.removeprefix("##"))
    return f'{before}<span class="{kind}" style="background:{_paint(score, top)}" title="{score:+.4g}">{shown}</span>'


def _regions(one: Explained, top: float) -> str:
    grid = one.regions or ()
    height, width = len(grid), len(grid[0]) if grid else 0
    cells = "".join(
        f'<rect x="{x}" y="{y}" width="1" height="1" fill="{_paint(score, top)}"><title>{score:+.4g}</title></rect>'
        for y, row in enumerate(grid)
        for x, score in enumerate(row)
    )
    picture = f'<image href="{escape(one.picture)}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
    frame = f'viewBox="0 0 {width} {height}" width="336" height="{336 * height // max(width, 1)}" role="img"'
    return f'<svg {frame} aria-label="{escape(one.of)}">{picture}{cells}</svg>'
