"""How the bytes of a text file are to be read: UTF-8, what a byte order mark says, or what a library makes of them."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from charset_normalizer import from_bytes

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What is looked for. Every encoding there is would find a rare one that happens to fit a short text.
_CANDIDATES = [
    *("cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp949"),
    *("shift_jis", "euc_jp", "gb18030", "big5", "euc_kr", "koi8_r"),
]
_LATIN = ("cp1250", "cp1252", "cp1254", "cp1257")
# A sign between two letters shows that the letters were meant in another encoding of this family.
_SIGN_IN_A_WORD = re.compile(r"[^\W\d_][\u00a1-\u00bf\u00d7\u00f7†‡ˆ‰][^\W\d_]")
_BLOCK = 1 << 20


def encoding_of(path: Path, given: str | None, notes: Notes) -> str:
    """The codec that reads `path` whole, as `open` takes it.

    Args:
        given: what the recipe says (`data.encoding`); tried, not trusted.
        notes: told of every encoding but UTF-8.

    Raises:
        DataError: bytes that do not fit, with the line of the first.
    """
    with path.open("rb") as file:
        head = file.read(4096)
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if given is not None:
        # A mark is no character of the text, whatever the user calls the encoding.
        name = marked if marked and codecs.lookup(given).name.startswith(marked[:5]) else given
        bad = _first_bad_line(path, name)
        if bad:
            raise DataError(f"{path}, line {bad[0]}: the byte 0x{bad[1]:02x} does not fit data.encoding: {given}.")
        return name
    if marked or _without_mark(head):
        found = marked or _without_mark(head)
        assert found is not None
        bad = _first_bad_line(path, found)
        if bad:
            raise DataError(
                f"{path}, line {bad[0]}: the file begins as {found}, but the byte 0x{bad[1]:02x} breaks it."
            )
        if found != "utf-8-sig":
            notes.say(f"{path.name} is read as {found}.")
        return found
    bad = _first_bad_line(path, "utf-8")
    return "utf-8" if bad is None else _detected(path, bad, notes)


def _without_mark(head: bytes) -> str | None:
    """UTF-16 that does not say so: mostly ASCII, with a zero in every second byte."""
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) * 5 < len(head):
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _first_bad_line(path: Path, encoding: str) -> tuple[int, int] | None:
    """Line and value of the first byte that `encoding` cannot read."""
    decoder = codecs.getincrementaldecoder(encoding)()
    lines = 1
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                good = error.object[: error.start].decode(encoding, errors="replace")
                return lines + good.count("\n"), error.object[min(error.start, len(error.object) - 1)]
            lines += text.count("\n")
            if not block:
                return None


def _detected(path: Path, bad: tuple[int, int], notes: Notes) -> str:
    sample = _odd_lines(path)
    readable = sample.decode("utf-8", errors="replace")
    right, wrong = sum(letter > "\x7f" and letter != "\ufffd" for letter in readable), readable.count("\ufffd")
    if right > 4 * wrong:
        raise DataError(
            f"{path}, line {bad[0]}: the byte 0x{bad[1]:02x} is not UTF-8, though the rest of the file is. Save that "
            "line as UTF-8, or say how the whole file is written: data.encoding: cp1252."
        )
    best = from_bytes(sample, cp_isolation=_CANDIDATES).best()
    found = _japanese(sample) or (best.encoding if best is not None else None)
    if found is None or found in _LATIN:
        # The library takes the first that fits; Western Europe's is the most common, unless it makes signs of letters.
        readings = {name: _reads(sample, name) for name in ("cp1252", *([found] if found else []), *_LATIN)}
        fitting = (name for name, text in readings.items() if text is not None and not _SIGN_IN_A_WORD.search(text))
        found = next(fitting, found)
    if found is None or _first_bad_line(path, found):
        raise DataError(
            f"{path}, line {bad[0]}: the byte 0x{bad[1]:02x} is not UTF-8, and the file's encoding cannot be told. Say "
            "it in the recipe, for example data.encoding: cp1252."
        )
    line = next(line for line in (_reads(sample, found) or "").splitlines() if not line.isascii())
    notes.say(
        f"{path.name} is not UTF-8 and is read as {found}, which makes a line {line.strip()[:60]!r}. If its letters "
        "are wrong, name the right one: data.encoding."
    )
    return found


def _japanese(sample: bytes) -> str | None:
    """The Japanese encoding by which much of a text is kana, which no other's text looks like; else None."""
    for name in ("shift_jis", "euc_jp"):
        letters = [letter for letter in _reads(sample, name) or "" if letter > "\x7f"]
        if letters and sum("\u3040" <= letter <= "\u30ff" for letter in letters) > 0.2 * len(letters):
            return name
    return None


def _reads(sample: bytes, encoding: str) -> str | None:
    try:
        return sample.decode(encoding)
    except UnicodeDecodeError:
        return None


def _odd_lines(path: Path, most: int = 1 << 16) -> bytes:
    """Lines with bytes beyond ASCII, up to `most` bytes of them: the others say nothing about the encoding."""
    found: list[bytes] = []
    size = 0
    with path.open("rb") as file:
        for line in file:
            if not line.isascii():
                found.append(line[:most])
                size += len(line)
                if size > most:
                    break
    return b"".join(found)
