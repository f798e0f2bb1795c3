"""Translation models that are told the languages of a row by codes: NLLB, M2M100, mBART, PLBart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from adapters_kit.errors import ModelError, did_you_mean


def takes_codes(tokenizer: Any) -> bool:
    """Whether a tokenizer puts codes of languages around its texts."""
    return hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")


def set_languages(
    tokenizer: Any, model: nn.Module, name: str, source: str | None, target: str | None
) -> dict[str, str] | None:
    """Lets the tokenizer write the codes of these languages, and the model begin its answers with the target's.

    Args:
        name: the model's, for messages.
        source, target: codes as the model writes them; None leaves it to what the tokenizer was saved with.

    Returns:
        The codes by key of the recipe, or None for a model without any.

    Raises:
        ModelError: a code that the model does not have, none where it needs one, or one where it has none.
    """
    given = {"data.source_lang": source, "data.target_lang": target}
    if not takes_codes(tokenizer):
        named = [key for key, code in given.items() if code]
        if named:
            raise ModelError(f"{name} has no codes of languages: leave {' and '.join(named)} out.")
        return None
    # The tokenizer puts the source's code into an empty target once it has encoded anything: both are asked for here.
    codes = {"data.source_lang": source or tokenizer.src_lang, "data.target_lang": target or tokenizer.tgt_lang}
    missing = [key for key, code in codes.items() if not code]
    known = _codes(tokenizer)
    if missing:
        shown = ", ".join(known[:6]) + (f", … ({len(known)})" if known[6:] else "")
        raise ModelError(
            f"{name} is told the languages by codes, and its tokenizer does not say which they are: set "
            f"{' and '.join(missing)}. It knows {shown}."
        )
    for key, code in codes.items():
        if code not in known:
            raise ModelError(f"{key}: {name} has no language {code!r}. {did_you_mean(str(code), known)}")
    tokenizer.src_lang, tokenizer.tgt_lang = codes["data.source_lang"], codes["data.target_lang"]
    _begin_with(tokenizer, model)
    return codes


def _codes(tokenizer: Any) -> list[str]:
    for table in ("lang_code_to_token", "lang_code_to_id"):
        if isinstance(getattr(tokenizer, table, None), dict):
            return list(getattr(tokenizer, table))
    # The rest keep them among their special tokens; the names of the others are in brackets.
    tokens: Sequence[str] = tokenizer.all_special_tokens
    return [token for token in tokens if not token.startswith("<")]


def _begin_with(tokenizer: Any, model: nn.Module) -> None:
    """The answer begins with the target's code: forced behind the start token, or as that token itself (mBART-25)."""
    with_code = tokenizer(text_target="a")["input_ids"]
    without = tokenizer(text_target="a", add_special_tokens=False)["input_ids"]
    lead = with_code[: _find(with_code, without)]
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    if lead and lead[0] in special:
        config.forced_bos_token_id = lead[0]
    elif with_code[-1] in special:
        config.forced_bos_token_id = None
        config.decoder_start_token_id = with_code[-1]


def _find(ids: Sequence[int], part: Sequence[int]) -> int:
    """Where `part` begins in `ids`; 0 if nowhere."""
    places = range(len(ids) - len(part) + 1)
    return next((place for place in places if list(ids[place : place + len(part)]) == list(part)), 0)
