"""Tokens and the places they come from, for tokenizers written in Python, which do not say where a token was read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np


def is_slow(processor: Any) -> bool:
    """Whether a tokenizer keeps no record of words and offsets."""
    return not getattr(processor, "is_fast", False)


def encode_words(processor: Any, words: Sequence[str], max_length: int) -> tuple[list[int], list[int | None]]:
    """A sentence given as words: token ids, `max_length` at most, and each one's word (or None)."""
    ids: list[int] = []
    owner: list[int | None] = []
    for number, word in enumerate(words):
        pieces = processor(word, add_special_tokens=False)["input_ids"]
        ids += pieces
        owner += [number] * len(pieces)
    room = max(max_length - processor.num_special_tokens_to_add(pair=False), 0)
    ids, owner = ids[:room], owner[:room]
    whole = processor.build_inputs_with_special_tokens(ids)
    before = _place(whole, ids)
    return whole, [None] * before + owner + [None] * (len(whole) - before - len(ids))


def encode_pair(
    processor: Any, question: str, context: str, max_length: int, stride: int
) -> list[tuple[list[int], list[int], np.ndarray, np.ndarray]]:
    """A question with its context, in windows that overlap by `stride` tokens of the context.

    Returns:
        Of each window: ids, token types, (tokens, 2) places in the context as int32, and (tokens,) whether a token is
        of the context. Empty if the question leaves no room for a context.
    """
    asked = processor(question, add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    for match in re.finditer(r"\S+", context):
        pieces = processor(match[0], add_special_tokens=False)["input_ids"]
        ids += pieces
        places += _places(match[0], match.start(), len(pieces))
    room = max_length - len(asked) - processor.num_special_tokens_to_add(pair=True)
    if room < 1:
        return []
    step = max(room - min(stride, room // 2), 1)
    windows = []
    for start in range(0, max(len(ids) - room, 0) + step, step):
        part = ids[start : start + room]
        whole = processor.build_inputs_with_special_tokens(asked, part)
        types = processor.create_token_type_ids_from_sequences(asked, part)
        before = _place(whole, part, behind=len(asked))
        offsets = np.zeros((len(whole), 2), dtype=np.int32)
        inside = np.zeros(len(whole), dtype=bool)
        inside[before : before + len(part)] = True
        offsets[before : before + len(part)] = places[start : start + room] if part else np.zeros((0, 2))
        windows.append((whole, types, offsets, inside))
        if start + room >= len(ids):
            break
    return windows


def _places(word: str, start: int, pieces: int) -> list[tuple[int, int]]:
    """The characters of each piece of a word: one or some bytes of one, if there are as many; else the whole word."""
    if pieces == len(word):
        return [(start + i, start + i + 1) for i in range(pieces)]
    sizes = [len(letter.encode()) for letter in word]
    if pieces == sum(sizes):
        return [(start + i, start + i + 1) for i, size in enumerate(sizes) for _ in range(size)]
    return [(start, start + len(word))] * pieces


def _place(whole: Sequence[int], part: Sequence[int], behind: int = 0) -> int:
    """Where `part` begins in `whole`, looked for from the end."""
    for at in range(len(whole) - len(part), behind - 1, -1):
        if list(whole[at : at + len(part)]) == list(part):
            return at
    return behind
