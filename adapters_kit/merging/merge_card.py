"""The README.md of a merged folder: what it was made from, how it was checked, how to load it."""

import re
from collections.abc import Sequence
from pathlib import Path

from adapters_kit.artifacts import card
from adapters_kit.artifacts.leaks import scrub
from adapters_kit.artifacts.manifest import describe
from adapters_kit.artifacts.side_files import without_sections


def model_card(
    *, kind: str, base: str, adapters: Sequence[Path], method: str, check: str, notes: Sequence[str], own: str
) -> str:
    """A model card in Markdown, with the front matter that model hubs read.

    Args:
        kind: the transformers class that loads it.
        base: the base, as the adapter names it.
        adapters: the folders that were merged.
        check: the outcome of the verification, in words.
        notes: warnings of the merge.
        own: the adapter's own card; kept below without its samples, data and recipe, since it tells the scores.
    """
    metadata, body = card.split(own)
    named = describe(base)
    names = " + ".join(f"`{describe(folder)}`" for folder in adapters)
    facts = "\n".join(f"- {line}" for line in [check, *notes, "`manifest.json` lists the sha256 of every file."])
    load = f'```python\nfrom transformers import {kind}\n\nmodel = {kind}.from_pretrained("path/to/this/folder")\n```'
    return card.render(
        {
            "library_name": "transformers",
            "base_model": named if named == base else None,  # a local path means nothing to others
            "pipeline_tag": metadata.get("pipeline_tag"),
            "license": metadata.get("license"),
            "datasets": metadata.get("datasets"),
            "tags": ["merged"],
            "model-index": metadata.get("model-index") if len(adapters) == 1 else None,  # of several none was scored
        },
        f"{named}, merged with {names.replace('`', '')}",
        [("", scrub(facts)), ("Load", load), ("", scrub(_lower(without_sections(body))))],
        f"The {method} adapter{'s' * (len(adapters) > 1)} {names} folded into the weights of `{named}`.",
    )


def _lower(text: str) -> str:
    """The adapter's title stands under the model's."""
    return re.sub(r"(?m)^# ", "## ", text)
