"""Files beside a model's weights: the tokenizer's and the processor's, generation settings, licences, model cards.

They are copied by a list of what is wanted, never "everything": a base's folder may hold data, code and links to
elsewhere. Code is never copied, and what would make a reader fetch code is taken out and told. Cards lose what shows
the user's data or machine.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adapters_kit.artifacts import card
from adapters_kit.artifacts.files import write_json, write_text
from adapters_kit.artifacts.leaks import scrub
from adapters_kit.errors import ShippingError

# Names of what transformers reads beside weights and config. A folder's own subfolders are not looked into, but for
# chat templates and what sentence-transformers keeps there.
_WANTED = re.compile(
    r"""(
        (tokenizer|special_tokens|added_tokens|chat_template|preprocessor|processor|video_preprocessor|image_processor
         |feature_extractor|generation_config|normalizer|vocab|merges|entity_vocab|sentence_bert_config|modules
         |config_sentence_transformers)[\w.\-]*\.(json|txt|model|jinja)
        | (spiece|sentencepiece|source|target|tokenizer|[\w\-]+\.bpe)[\w.\-]*\.(model|spm)
        | [\w.\-]+\.tiktoken | vocab\.bpe | bpe\.codes | dict\.txt | emoji\.json
        | (LICENSE|LICENCE|NOTICE|USE_POLICY|COPYING)[\w.\-]*
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_TEMPLATES = "additional_chat_templates"
# The layers that sentence-transformers puts behind the model, each in a folder of its own: with their weights.
_LAYER, _OF_LAYER = re.compile(r"\d+_[A-Za-z]\w*"), (".json", ".safetensors", ".bin")
# Of an adapter's folder only what a tokenizer or processor consists of: training may have changed that.
_PROCESSOR = re.compile(r"(?!generation_config|modules|sentence_bert|config_|LICEN|NOTICE|USE_POLICY|COPYING)", re.I)
_CODE_KEYS = ("auto_map", "custom_pipelines")


# Sections of a card that show the user's data, or a machine's paths.
_PRIVATE = ("samples", "recipe", "data")


def write_side_files(base: Path, adapter: Path, config: dict[str, Any], stage: Path) -> list[str]:
    """The config, the base's side files, and the adapter's tokenizer over them.

    Returns:
        What a user should know: what was left out, and why.
    """
    left: set[str] = set()
    write_json(stage / "config.json", _without_code(config, "config.json", left))
    for path, name in [*side_files(base), *processor_files(adapter)]:
        _copy(path, stage / name, left)
    return code_notes(left)


def copy_processor(adapter: Path, stage: Path) -> list[str]:
    """The tokenizer's and processor's files of an adapter's folder; what a user should know of them."""
    left: set[str] = set()
    for path, name in processor_files(adapter):
        _copy(path, stage / name, left)
    return code_notes(left)


def copy_card(source: Path, stage: Path, *, changed: bool = False) -> None:
    """The README.md of a folder without what shows the user's data or machine, if there is one.

    Args:
        changed: the weights became others: the scores that hubs read off the card (`model-index`) are not theirs.
    """
    if (own := own_file(source, "README.md")) is not None:
        text = public_card(own.read_text(encoding="utf-8", errors="replace"))
        if changed:
            front, body = card.split(text)
            front.pop("model-index", None)
            text = card.with_front(front, body)
        write_text(stage / "README.md", text)


def public_card(text: str) -> str:
    """A card without its samples, data and recipe, and with the last names of paths only."""
    _, body = card.split(text)
    front = text[: len(text) - len(body)]
    return scrub(front) + scrub(without_sections(body)) + "\n"


def without_sections(text: str, headings: Sequence[str] = _PRIVATE) -> str:
    """Markdown without the sections of these headings, in lower case."""
    kept, leaving, fenced = [], False, False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith(("# ", "## ")) and not fenced:
            leaving = line.startswith("## ") and line[3:].strip().lower() in headings
        if not leaving:
            kept.append(line)
    return "\n".join(kept).rstrip()


def code_notes(left: set[str]) -> list[str]:
    """What to tell about files that named code."""
    if not left:
        return []
    named = ", ".join(sorted(left))
    return [f"{named} named code of their own (auto_map), which is neither copied nor run: the entry was left out."]


def processor_files(adapter: Path) -> Iterator[tuple[Path, str]]:
    """As `side_files`, of an adapter's folder: only what a tokenizer or processor consists of, which training may have
    changed."""
    return ((path, name) for path, name in side_files(adapter) if _PROCESSOR.match(name))


def side_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, name relative to the folder) of the side files that a model folder holds."""
    if not folder.is_dir():
        return
    layers = sorted(path.name for path in folder.iterdir() if _LAYER.fullmatch(path.name))
    within = [(_TEMPLATES, (".jinja",)), *((name, _OF_LAYER) for name in layers)]
    places = [(folder, "", None), *((folder / name, f"{name}/", ends) for name, ends in within)]
    for place, prefix, ends in places:
        for path in sorted(place.iterdir()) if place.is_dir() and not place.is_symlink() else ():
            wanted = path.name.endswith(ends) if ends else bool(_WANTED.fullmatch(path.name))
            index = path.name.endswith(".index.json") or (path.name == "config.json" and not ends)
            if wanted and not index and path.is_file() and at_home(path, folder):
                yield path, prefix + path.name


def own_file(folder: Path, name: str) -> Path | None:
    """A file of a folder, if it is there and no link to elsewhere: what a link leads to is not the folder's to give."""
    path = folder / name
    return path if path.is_file() and at_home(path, folder) else None


def at_home(path: Path, folder: Path) -> bool:
    """Whether a file is what it seems: no link, or one that stays in the folder or in the hub cache that holds it."""
    if not path.is_symlink():
        return True
    target, home = path.resolve(), folder.resolve()
    cache = home.parent.parent / "blobs"  # models--org--name/snapshots/commit/ beside models--org--name/blobs/
    return target.is_relative_to(home) or (home.parent.name == "snapshots" and target.is_relative_to(cache))


def _copy(source: Path, target: Path, left: set[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".json" and not source.name.startswith(("tokenizer.json", "vocab")):
        try:
            raw = json.loads(source.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, MemoryError) as error:
            raise ShippingError(f"{source} is not valid JSON ({str(error)[:120]}).") from None
        if isinstance(raw, dict) and any(key in raw for key in _CODE_KEYS):
            write_json(target, _without_code(raw, source.name, left))
            return
    shutil.copyfile(source, target)


def _without_code(raw: dict[str, Any], name: str, left: set[str]) -> dict[str, Any]:
    """A config without the entries that name code."""
    if not any(key in raw for key in _CODE_KEYS):
        return raw
    left.add(name)
    return {key: value for key, value in raw.items() if key not in _CODE_KEYS}
