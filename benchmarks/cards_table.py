"""The table of results/cards.json, for a script and for a page: needs no torch."""

from typing import Any


def table(found: dict[str, Any]) -> str:
    """As Markdown: longest input at batch 1 / rows of 2,048 tokens."""
    cards = sorted({int(card) for recipes in found.values() for cells in recipes.values() for card in cells})
    lines = ["| model | recipe | " + " | ".join(f"{card} GB" for card in cards) + " |", "|---" * (len(cards) + 2) + "|"]
    for name, recipes in found.items():
        for label, cells in recipes.items():
            shown = []
            for card in cards:
                one = cells[str(card)]
                shown.append(f"{one['longest']:,} / {one['batch']}" if one["longest"] else "–")
            lines.append(f"| {name} | {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)
