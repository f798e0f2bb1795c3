"""What a merged folder holds beside the weights: the config, the tokenizer's and processor's files, the model card.

Files are copied by a list of what is wanted, never "everything": a base's folder may hold data, code and links to
elsewhere. Code is never copied, and what would make a reader fetch code is taken out and told.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters_kit.artifacts.files import write_json
from adapters_kit.artifacts.reading import read_json
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
_SUBFOLDERS = {"additional_chat_templates": (".jinja",), "1_Pooling": (".json",), "2_Normalize": (".json",)}
# Of an adapter's folder only what a tokenizer or processor consists of: training may have changed that.
_PROCESSOR = re.compile(r"(?!generation_config|modules|sentence_bert|config_|LICEN|NOTICE|USE_POLICY|COPYING)", re.I)
_CODE_KEYS = ("auto_map", "custom_pipelines")


def write_side_files(base: Path, adapter: Path, config: dict[str, Any], stage: Path) -> list[str]:
    """The config, the base's side files, and the adapter's tokenizer over them.

    Returns:
        What a user should know: what was left out, and why.
    """
    left: set[str] = set()
    config = _without_code(config, "config.json", left)
    write_json(stage / "config.json", config)
    for path, name in [*side_files(base), *((p, n) for p, n in side_files(adapter) if _PROCESSOR.match(n))]:
        _copy(path, stage / name, left)
    notes = []
    if left:
        notes.append(
            f"{', '.join(sorted(left))} named code of their own (auto_map), which is neither copied nor run: the entry "
            "was "
            "left out."
        )
    return notes


def side_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, name relative to the folder) of the side files that a model folder holds."""
    if not folder.is_dir():
        return
    places = [(folder, "", None), *((folder / sub, f"{sub}/", ends) for sub, ends in _SUBFOLDERS.items())]
    for place, prefix, ends in places:
        for path in sorted(place.iterdir()) if place.is_dir() and not place.is_symlink() else ():
            wanted = path.name.endswith(ends) if ends else bool(_WANTED.fullmatch(path.name))
            index = path.name.endswith(".index.json") or path.name == "config.json"
            if wanted and not index and path.is_file() and _at_home(path, folder):
                yield path, prefix + path.name


def _at_home(path: Path, folder: Path) -> bool:
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
        except (OSError, ValueError, RecursionError) as error:
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


def tokenizer_notes(stage: Path) -> list[str]:
    """Opens the finished folder's tokenizer as a user would, and compares it with the embeddings; what is wrong."""
    if not any((stage / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return []
    from transformers import AutoTokenizer

    try:
        size = len(AutoTokenizer.from_pretrained(stage, trust_remote_code=False))
    except Exception as error:  # tokenizers raises bare Exceptions for what it cannot read
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [f"Warning: the tokenizer cannot be opened ({reason[:200]}). Copy its files from where it works."]
    raw = read_json(stage / "config.json")
    text = raw.get("text_config") if isinstance(raw.get("text_config"), dict) else {}
    rows = raw.get("vocab_size") or (text or {}).get("vocab_size")
    if isinstance(rows, int) and size > rows:
        return [
            f"Warning: the tokenizer has {size} entries and the embeddings {rows} rows: later ids have no embedding."
        ]
    return []
