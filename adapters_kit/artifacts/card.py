"""A model card in Markdown: the front matter that hubs read, a title, sections. All cards are written through here."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from adapters_kit.recipe_text import parse_yaml

_FRONT = re.compile(r"\A---\r?\n(?P<matter>.*?)(?:^|\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def render(metadata: Mapping[str, Any], title: str, sections: Sequence[tuple[str, str]], lead: str = "") -> str:
    """A card.

    Args:
        metadata: of the front matter (`base_model`, `library_name`, `tags` …); entries that are None are left out.
        title: the heading.
        sections: (heading, Markdown); a section without text is left out, one without a heading follows on.
        lead: the text under the title.
    """
    parts = [with_front(metadata, "").rstrip(), f"# {title}", lead.strip()]
    for heading, text in sections:
        if text.strip():
            parts += [f"## {heading}"] * bool(heading) + [text.strip("\n")]
    return "\n\n".join(part for part in parts if part) + "\n"


def with_front(metadata: Mapping[str, Any], text: str) -> str:
    """A card's text under its front matter, without what is None."""
    matter = {key: value for key, value in metadata.items() if value is not None}
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, default_flow_style=None, width=10_000)
    return f"---\n{front}---\n{text}" if matter else text


def split(text: str) -> tuple[dict[str, Any], str]:
    """A card's front matter, empty where there is none or it cannot be read, and its text."""
    found = _FRONT.match(text)
    if found is None:
        return {}, text
    matter, _, _ = parse_yaml(found["matter"])  # within limits: a card may come from anybody
    return matter, text[found.end() :]


def model_index(name: str, pipeline: str, data: str, scores: Mapping[str, float]) -> list[dict[str, Any]]:
    """The scores as hubs read them, for the key `model-index`.

    Args:
        name: of the model.
        pipeline: what it does, as the task table's pipelines are called.
        data: the name of the rows of which a part was held out.
        scores: metric -> score on the held-out rows.
    """
    result = {
        "task": {"type": pipeline},
        "dataset": {"name": f"held-out rows of {data}", "type": data},
        "metrics": [{"type": key, "value": round(float(value), 6)} for key, value in scores.items()],
    }
    return [{"name": name, "results": [result]}]


def with_note(text: str, note: str) -> str:
    """The card with a note on top of its text, once; hubs read the front matter only at the very start."""
    if note in text:
        return text
    found = _FRONT.match(text)
    end = found.end() if found else 0
    return text[:end] + note + text[end:]
