"""A note in an adapter's model card: which package it needs.

Without that package peft stops at the adapter's type with a bare KeyError, before any code of ours could explain it.
"""

from pathlib import Path

from adapters_kit.artifacts import card
from adapters_kit.artifacts.files import write_text

NOTE = """
> **Loading this adapter** needs `adapters_kit` beside peft: `pip install adapters-kit`, then `import adapters_kit`
> before `PeftModel.from_pretrained` or `AutoModel….from_pretrained`. Without it peft raises `KeyError: '{kind}'`.
"""


def add_note(folder: str | Path, kind: str) -> None:
    """Put the note on top of `folder`/README.md, once; the card is made if there is none.

    Args:
        folder: where peft has saved the adapter.
        kind: peft's name for the adapter's type, e.g. "BOTTLENECK".
    """
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\n---\n"
    write_text(path, card.with_note(text, NOTE.format(kind=kind)))
