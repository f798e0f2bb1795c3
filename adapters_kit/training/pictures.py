"""Pictures of a run: loss and score over the steps, and which class is taken for which. Needs matplotlib."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_NAMED = 40  # classes whose names still fit beside a matrix
_COUNTED = 20  # classes whose counts still fit into its squares
_LONGEST = 22  # columns of a name


def curves(history: Sequence[Mapping[str, Any]], base: Mapping[str, float], metric: str, path: Path) -> None:
    """Training and held-out loss, the held-out score with the base model's as a line, and the learning rate."""
    figure, axes = blank(3)
    train = [line for line in history if "loss" in line]
    held_out = [line for line in history if "eval_loss" in line]
    scored = [line for line in held_out if f"eval_{metric}" in line]

    def draw(axis: Any, lines: Sequence[Mapping[str, Any]], key: str, **options: Any) -> None:
        # A single logged point is a dot: a line through it alone would be nothing.
        mark = "o" if len(lines) <= 30 else None
        axis.plot([line["step"] for line in lines], [line[key] for line in lines], marker=mark, markersize=4, **options)

    draw(axes[0], train, "loss", label="training")
    draw(axes[0], held_out, "eval_loss", label="held out")
    axes[0].axhline(base["loss"], linestyle=":", color="gray", label="base model, held out")
    axes[0].set_title("loss")
    axes[0].legend()
    draw(axes[1], scored, f"eval_{metric}", label="with the adapter")
    axes[1].axhline(base[metric], linestyle=":", color="gray", label="base model")
    axes[1].set_title(f"held-out {metric}")
    axes[1].legend()
    draw(axes[2], [line for line in train if "learning_rate" in line], "learning_rate")
    axes[2].set_title("learning rate")
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    _save(figure, path)


def confusion(base: Sequence[Sequence[int]], tuned: Sequence[Sequence[int]], labels: Sequence[str], path: Path) -> None:
    """Two confusion matrices side by side; rows are the true classes, shades the share of a row.

    Long names are cut, names that no font here can write are numbers, and past 40 classes only some are named.
    """
    import numpy as np

    size = len(labels)
    names, fonts = _writable(labels)
    figure, axes = blank(2, width=min(max(5.0, 0.34 * min(size, _NAMED) + 2), 11))
    step = 1 if size <= _NAMED else -(-size // 20)
    shown = range(0, size, step)
    small = 9 if size <= 12 else 7
    written: dict[str, Any] = {"fontsize": small, "fontfamily": fonts}
    for axis, matrix, title in ((axes[0], base, "base model"), (axes[1], tuned, "with the adapter")):
        counts = np.asarray(matrix)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axis.imshow(shares**0.5, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set(title=title, xlabel="predicted", ylabel="true")
        upright = 90 if size > 6 or max(map(_columns, names)) > 10 else 0
        axis.set_xticks(shown, [names[i] for i in shown], rotation=upright, **written)
        axis.set_yticks(shown, [names[i] for i in shown], **written)
        if size <= _COUNTED:
            for i, row in enumerate(matrix):
                for j, count in enumerate(row):
                    colour = "white" if shares[i, j] > 0.4 else "black"
                    axis.text(j, i, f"{count}", ha="center", va="center", color=colour, fontsize=small)
    _save(figure, path)


def _columns(text: str) -> int:
    """How wide a text is, in columns of a terminal: East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _cut(text: str) -> str:
    """A long name without its middle: many begin alike, and many end alike."""
    if _columns(text) <= _LONGEST:
        return text

    def fitting(characters: str, room: int) -> str:
        kept = ""
        for character in characters:
            if _columns(kept + character) > room:
                break
            kept += character
        return kept

    return f"{fitting(text, _LONGEST // 3)}…{fitting(text[::-1], 2 * _LONGEST // 3 - 1)[::-1]}"


_FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Hiragino Sans", "PingFang SC",
          "Microsoft YaHei", "Malgun Gothic", "WenQuanYi Zen Hei", "Arial Unicode MS")  # fmt: skip


def _writable(labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names as the fonts of this machine can write them, and these fonts."""
    shown = [_cut(label) for label in labels]
    wanted = {ord(character) for name in shown for character in name}
    fonts, missing = _fonts(wanted)
    if missing and _find_new_fonts():
        fonts, missing = _fonts(wanted)
    names = [
        f"class {index}" if any(ord(character) in missing for character in name) else name
        for index, name in enumerate(shown)
    ]
    return [name.replace("$", r"\$") for name in names], fonts


def _fonts(wanted: set[int]) -> tuple[list[str], set[int]]:
    """The fonts of `_FONTS` that are here, and the characters that none of them has."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    installed = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    fonts, missing = [name for name in _FONTS if name in installed], set(wanted)
    for name in fonts:
        if missing:
            missing -= FT2Font(installed[name]).get_charmap().keys()
    return fonts, missing


def _find_new_fonts() -> bool:
    """Fonts for East Asian scripts that were installed after matplotlib last looked; whether there are any."""
    from matplotlib import font_manager

    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    new = [path for path in font_manager.findSystemFonts() if path not in known and "cjk" in path.lower()]
    for path in new:
        font_manager.fontManager.addfont(path)
    return bool(new)


def available() -> bool:
    """Whether matplotlib is installed; a run without it just has no pictures."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def blank(columns: int, width: float = 5.0) -> tuple[Any, Any]:
    """An empty figure of so many plots side by side, and the plots (one plot: not in an array)."""
    from matplotlib.figure import Figure  # not pyplot: no window system, nothing global

    figure = Figure(figsize=(width * columns, max(4.0, 0.8 * width)), layout="constrained")
    return figure, figure.subplots(1, columns)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100)
