"""Pictures of a run: loss and score over the steps, and which class is taken for which. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def curves(history: Sequence[Mapping[str, Any]], base: Mapping[str, float], metric: str, path: Path) -> None:
    """Training and held-out loss, the held-out score with the base model's as a line, and the learning rate."""
    figure, axes = blank(3)
    train = [line for line in history if "loss" in line]
    held_out = [line for line in history if "eval_loss" in line]
    axes[0].plot([line["step"] for line in train], [line["loss"] for line in train], label="training")
    axes[0].plot(
        [line["step"] for line in held_out], [line["eval_loss"] for line in held_out], marker="o", label="held out"
    )
    axes[0].axhline(base["loss"], linestyle=":", color="gray", label="base model, held out")
    axes[0].set_title("loss")
    axes[0].legend()
    scored = [line for line in held_out if f"eval_{metric}" in line]
    axes[1].plot([line["step"] for line in scored], [line[f"eval_{metric}"] for line in scored], marker="o")
    axes[1].axhline(base[metric], linestyle=":", color="gray", label="base model")
    axes[1].set_title(f"held-out {metric}")
    axes[1].legend()
    axes[2].plot([line["step"] for line in train], [line["learning_rate"] for line in train])
    axes[2].set_title("learning rate")
    for axis in axes:
        axis.set_xlabel("step")
    _save(figure, path)


def confusion(base: Sequence[Sequence[int]], tuned: Sequence[Sequence[int]], labels: Sequence[str], path: Path) -> None:
    """Two confusion matrices side by side; rows are the true classes."""
    figure, axes = blank(2)
    for axis, matrix, title in ((axes[0], base, "base model"), (axes[1], tuned, "with the adapter")):
        axis.imshow(matrix, cmap="Blues")
        axis.set(title=title, xlabel="predicted", ylabel="true")
        axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axis.set_yticks(range(len(labels)), labels)
        if len(labels) <= 20:
            half = max(max(row) for row in matrix) / 2
            for i, row in enumerate(matrix):
                for j, count in enumerate(row):
                    axis.text(j, i, count, ha="center", va="center", color="white" if count > half else "black")
    _save(figure, path)


def available() -> bool:
    """Whether matplotlib is installed; a run without it just has no pictures."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def blank(columns: int) -> tuple[Any, Any]:
    """An empty figure of so many plots side by side, and the plots (one plot: not in an array)."""
    from matplotlib.figure import Figure  # not pyplot: no window system, nothing global

    figure = Figure(figsize=(5 * columns, 4), layout="constrained")
    return figure, figure.subplots(1, columns)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100)
