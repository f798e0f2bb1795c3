"""The README.md of a merged folder: what it was made from, how it was checked, how to load it."""

from pathlib import Path
from typing import Any


def model_card(*, kind: str, base: str, adapter: str, method: str, check: str, notes: list[str], body: str) -> str:
    """A model card in Markdown, with the front matter that model hubs read.

    Args:
        kind: the transformers class that loads it.
        base, adapter: what was merged.
        check: the outcome of the verification, in words.
        notes: warnings of the merge.
        body: the adapter's own card without its front matter; kept below, since it tells the data and the scores.
    """
    front: dict[str, Any] = {"library_name": "transformers"}
    if not Path(base).exists():  # a local path means nothing to others
        front["base_model"] = base
    head = "\n".join(["---", *(f"{key}: {value}" for key, value in front.items()), "tags:", "- merged", "---"])
    lines = [
        head,
        "",
        f"# {Path(adapter).resolve().parent.name or 'model'}, merged",
        "",
        f"The {method} adapter `{Path(adapter).name}` folded into the weights of `{Path(base).name}`.",
        "",
        f"- {check}",
        *(f"- {note}" for note in notes),
        "- `manifest.json` lists the sha256 of every file.",
        "",
        "```python",
        f"from transformers import {kind}",
        "",
        f'model = {kind}.from_pretrained("path/to/this/folder")',
        "```",
    ]
    return "\n".join(lines) + "\n" + (f"\n{body.strip()}\n" if body.strip() else "")


def without_front_matter(text: str) -> str:
    """A card's text after its `---` block."""
    if text.startswith("---\n"):
        _, _, rest = text[4:].partition("\n---")
        return rest.partition("\n")[2]
    return text
