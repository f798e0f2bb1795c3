"""A note in an adapter's model card: which package it needs.

Without that package peft stops at the adapter's type with a bare KeyError, before any code of ours could explain it.
"""

import re
from pathlib import Path

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
    card = Path(folder) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else "---\nlibrary_name: peft\n---\n"
    note = NOTE.format(kind=kind)
    if note in text:
        return
    # The hub reads the metadata block only at the very start.
    metadata = re.match(r"---\n.*?\n---\n", text, flags=re.DOTALL)
    end = metadata.end() if metadata else 0
    card.write_text(text[:end] + note + text[end:], encoding="utf-8")
