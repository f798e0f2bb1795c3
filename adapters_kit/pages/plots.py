"""Plots as SVG text for a page: matplotlib draws them, the page's own ink colours them. Empty without matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

_INK = "#010203"  # stands for the colour of the page's text
_COLOURS = ("#2f7ed8", "#e0712c", "#3a9d5d", "#9c5fc4")
Line = tuple[str, Sequence[float], Sequence[float]]


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def lines(title: str, series: Iterable[Line], *, level: tuple[str, float] | None = None, xlabel: str = "step") -> str:
    """Lines over steps; a single point is a dot. `level` is a dotted line with its name."""
    drawn = [(name, x, y) for name, x, y in series if len(x)]
    if not available() or not drawn:
        return ""
    figure, axis = _blank()
    for (name, x, y), colour in zip(drawn, _COLOURS, strict=False):
        axis.plot(x, y, marker="o" if len(x) <= 30 else None, markersize=4, label=name, color=colour)
    if level is not None:
        axis.axhline(level[1], linestyle=":", color=_INK, label=level[0])
    if len(drawn) > 1 or level is not None:
        axis.legend(frameon=False, fontsize=9, labelcolor=_INK)
    _dress(axis, title, xlabel)
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    return _svg(figure, title)


def bars(title: str, edges: Sequence[float], counts: Sequence[int], xlabel: str) -> str:
    """A histogram: `counts` between neighbouring `edges`."""
    if not available() or not counts:
        return ""
    figure, axis = _blank()
    axis.bar(edges[:-1], counts, width=[b - a for a, b in pairwise(edges)], align="edge",
             color=_COLOURS[0], edgecolor="none")  # fmt: skip
    _dress(axis, title, xlabel)
    from matplotlib.ticker import MaxNLocator

    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    return _svg(figure, title)


def dots(title: str, names: Sequence[str], x: Sequence[float], y: Sequence[float], xlabel: str, ylabel: str) -> str:
    """Points with their names, moved apart where they would cover each other; a log axis where values span decades."""
    if not available() or not names:
        return ""
    figure, axis = _blank(5.2, 3.6)
    axis.scatter(x, y, color=_COLOURS[0], s=28, zorder=3)
    if min(x) > 0 and max(x) / min(x) > 30:
        axis.set_xscale("log")
    else:
        axis.ticklabel_format(axis="x", useOffset=False)
        axis.locator_params(axis="x", nbins=5)  # long numbers beside each other
    axis.margins(0.15)
    _dress(axis, title, xlabel)
    axis.set_ylabel(ylabel, color=_INK, fontsize=9)
    place_names(figure, axis, names, x, y)
    return _svg(figure, title)


def ladder(title: str, series: Sequence[Line], ylabel: str) -> str:
    """Lines over steps that end where each stopped: the first in colour, those that came as far as any other named."""
    drawn = [(name, x, y) for name, x, y in series if len(x)]
    if not available() or not drawn:
        return ""
    figure, axis = _blank(6.4, 3.8)
    for number, (_, x, y) in reversed(list(enumerate(drawn))):
        first = number == 0
        axis.plot(x, y, marker="o", markersize=5 if first else 4, linewidth=2 if first else 1, zorder=3 if first else 2,
                  color=_COLOURS[0] if first else _INK, alpha=1.0 if first else 0.45)  # fmt: skip
    axis.margins(0.12)
    _dress(axis, title, "step")
    axis.set_ylabel(ylabel, color=_INK, fontsize=9)
    further = [(name, x[-1], y[-1]) for name, x, y in drawn if len(x) > 1] or [(n, x[-1], y[-1]) for n, x, y in drawn]
    place_names(figure, axis, *map(list, zip(*further, strict=True)))
    return _svg(figure, title)


def place_names(figure: Any, axis: Any, names: Sequence[str], x: Sequence[float], y: Sequence[float]) -> None:
    """Writes a name beside each point, at the first place around it where it covers no other name and no point."""
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    points = axis.transData.transform(list(zip(x, y, strict=True)))
    taken: list[tuple[float, float, float, float]] = [(px - 4, py - 4, px + 4, py + 4) for px, py in points]
    low, high = axis.bbox.x0, axis.bbox.x1
    for name, (px, py), value in zip(names, points, zip(x, y, strict=True), strict=True):
        width, height = 5.2 * scale * max(len(name), 1), 10 * scale
        for step in range(40):
            rise = (step // 2 + 1) // 2 * 11 * (-1 if step // 2 % 2 else 1)
            right = step % 2 == 0
            left = px + 6 * scale if right else px - 6 * scale - width
            box = (left, py + rise * scale - height / 2, left + width, py + rise * scale + height / 2)
            clear = all(box[2] < t[0] or box[0] > t[2] or box[3] < t[1] or box[1] > t[3] for t in taken)
            if clear and box[0] >= low and box[2] <= high:
                break
        taken.append(box)
        axis.annotate(name, value, xytext=(6 if right else -6, rise), textcoords="offset points", fontsize=8.5,
                      ha="left" if right else "right", va="center", color=_INK)  # fmt: skip


def heat(counts: Sequence[Sequence[int]], labels: Sequence[str], title: str) -> str:
    """A matrix as squares, dark where many are; only squares that hold something, each telling what it is."""
    size = len(labels)
    most = max((max(row) for row in counts), default=0) or 1
    cells = []
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count:
                kind = "var(--good)" if i == j else "var(--bad)"
                shown = max(count / most, 0.12) ** 0.5
                told = escape(f"{labels[i]} → {labels[j]}: {count}")
                cells.append(
                    f'<rect x="{j}" y="{i}" width="1" height="1" fill="{kind}" fill-opacity="{shown:.2f}">'
                    f"<title>{told}</title></rect>"
                )
    frame = f'<rect width="{size}" height="{size}" fill="none" stroke="var(--line)" stroke-width="{size / 300:.3f}"/>'
    return (
        f'<figure style="margin:0"><figcaption class="soft">{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {size} {size}" width="520" role="img" aria-label="{escape(title)}" '
        f'shape-rendering="crispEdges">{frame}{"".join(cells)}</svg></figure>'
    )


def _blank(width: float = 4.6, height: float = 3.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axis = figure.subplots()
    axis.patch.set_alpha(0)
    return figure, axis


def _dress(axis: Any, title: str, xlabel: str) -> None:
    axis.set_title(title, color=_INK, fontsize=11)
    axis.set_xlabel(xlabel, color=_INK, fontsize=9)
    axis.tick_params(colors=_INK, labelsize=9)
    for name, spine in axis.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_INK)
    axis.grid(alpha=0.25)


def _svg(figure: Any, title: str) -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
