"""A merged folder opened as a user would open it: the model by `from_pretrained`, and its tokenizer."""

import logging
from pathlib import Path

import transformers

from adapters_kit.artifacts.json_file import read_json
from adapters_kit.errors import ShippingError, gist


def tokenizer_notes(stage: Path) -> list[str]:
    """Opens the finished folder's tokenizer as a user would, and compares it with the embeddings; what is wrong."""
    if not any((stage / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return []
    try:
        size = len(transformers.AutoTokenizer.from_pretrained(stage, trust_remote_code=False))
    except Exception as error:  # tokenizers raises bare Exceptions for what it cannot read
        return [f"Warning: the tokenizer cannot be opened ({gist(error)}). Copy its files from where it works."]
    raw = read_json(stage / "config.json")
    text = raw.get("text_config") if isinstance(raw.get("text_config"), dict) else {}
    rows = raw.get("vocab_size") or (text or {}).get("vocab_size")
    if isinstance(rows, int) and size > rows:
        return [
            f"Warning: the tokenizer has {size} entries and the embeddings {rows} rows: later ids have no embedding."
        ]
    return []


def open_whole(merged: Path, architecture: str) -> None:
    """Open the finished folder as a user would, with `from_pretrained`, without memory for its weights.

    Raises:
        ShippingError: a tensor is missing, has no use, or is of another shape than the config says.
    """
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise ShippingError(f"transformers {transformers.__version__} has no {architecture}, which the base names.")
    noisy = logging.getLogger("transformers.modeling_utils")
    level = noisy.level
    try:
        noisy.setLevel(logging.ERROR)
        _, info = kind.from_pretrained(
            merged, device_map={"": "meta"}, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # whatever transformers trips over, a user would trip over too
        raise ShippingError(f"The merged folder cannot be opened: {gist(error)} Nothing was written.") from error
    finally:
        noisy.setLevel(level)
    wrong = {what: sorted(map(str, info[f"{what}_keys"])) for what in ("missing", "unexpected", "mismatched")}
    told = [f"{len(names)} {what}, such as {names[0]}" for what, names in wrong.items() if names]
    if told:
        raise ShippingError(
            f"The merged folder does not open as a {architecture}: {'; '.join(told)}. Nothing was written."
        )
