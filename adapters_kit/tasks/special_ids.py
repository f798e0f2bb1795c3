"""Special tokens that a model's configs name: whether the model has them at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from adapters_kit.errors import ModelError
from adapters_kit.tasks.notes import Notes

_MUST = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")  # they are put in, whatever is said
_MAY = ("pad_token_id", "eos_token_id", "bos_token_id", "sep_token_id", "cls_token_id", "unk_token_id")


def check_special(model: nn.Module, name: str, size: int | None, notes: Notes) -> None:
    """Says which special tokens of a model's configs are none of its tokens, and are not looked at for that.

    Args:
        name: the model's.
        size: how many tokens it has embeddings for; None: not known, and nothing is checked.

    Raises:
        ModelError: such a token would be given to the model all the same.
    """
    if size is None:
        return
    strange = dict(_beyond(model, size))
    if must := next((key for key in strange if key in _MUST), None):
        raise ModelError(
            f"{must} is {strange[must]} in the configs of {name}, which has the tokens 0 to {size - 1:,}. Set it to "
            "one of them in its config.json, and in its generation_config.json if it stands there."
        )
    if strange:
        told = ", ".join(f"{key} {value}" for key, value in strange.items())
        notes.say(
            f"{name} has {size:,} tokens, and its configs name others as special ones: {told}. They count as none."
        )


def _beyond(model: nn.Module, size: int) -> Iterator[tuple[str, Any]]:
    text = model.config.get_text_config()
    for config in (model.config, text, getattr(model, "generation_config", None)):
        for key in (*_MUST, *_MAY):
            value = getattr(config, key, None)
            ids = value if isinstance(value, list) else [value]
            if any(isinstance(one, int) and not 0 <= one < size for one in ids):
                yield key, value
