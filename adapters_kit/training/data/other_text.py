"""Text that is no table: running text, sentences with a tag a word (CoNLL), lines with fastText's labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from adapters_kit.errors import DataError
from adapters_kit.tasks.notes import Notes
from adapters_kit.training.data.encoding import encoding_of

_LABEL = "__label__"
_DOCUMENT = "-DOCSTART-"  # before each document in CoNLL 2003
_CONLLU = 10  # columns: number, form, lemma, part of speech …
_NUMBERED = re.compile(r"\d+([-.]\d+)?")
_AT_ONCE = 1 << 25  # characters of a table's part


def read_text(path: Path, encoding: str | None, notes: Notes) -> Iterator[pa.Table]:
    """One example a paragraph; without blank lines, one a line. Lines with fastText's labels are read as such."""
    codec = encoding_of(path, encoding, notes)
    with path.open(encoding=codec) as file:
        begins = file.read(len(_DOCUMENT))
    if begins.startswith(_LABEL):
        notes.say(f"{path.name} has fastText's form: labels, then the text.")
        yield from read_fasttext(path, encoding, notes)
        return
    if begins == _DOCUMENT:
        notes.say(f"{path.name} has CoNLL's form: a word a line, its tag last.")
        yield from read_conll(path, encoding, notes)
        return
    paragraphs = _has_paragraphs(path, codec)
    parts: list[str] = []
    lines: list[str] = []
    size = 0

    def close() -> None:
        text = "".join(lines).strip()
        if text:
            parts.append(text)
        lines.clear()

    with path.open(encoding=codec) as file:
        for line in file:
            if not paragraphs or not line.strip("\n"):
                close()
            lines.append(line)
            size += len(line)
            if not paragraphs:
                close()
            if size > _AT_ONCE and not lines:
                yield pa.table({"text": pa.array(parts, pa.string())})
                parts, size = [], 0
    close()
    yield pa.table({"text": pa.array(parts, pa.string())})


def _has_paragraphs(path: Path, codec: str) -> bool:
    """Whether a blank line stands between two lines of text."""
    text_before = blank = False
    with path.open(encoding=codec) as file:
        for line in file:
            if line == "\n":
                blank = text_before
            elif line.strip():
                if blank:
                    return True
                text_before = True
    return False


def read_conll(path: Path, encoding: str | None, notes: Notes) -> Iterator[pa.Table]:
    """CoNLL's columns: a word a line, its tag in the last column, an empty line behind each sentence.

    Where words are numbered the word is the second; of CoNLL-U's ten columns the tag is the fourth, the part of speech.

    Raises:
        DataError: a line with another number of columns, by its number.
    """
    words: list[list[str]] = []
    tags: list[list[str]] = []
    sentence: list[tuple[str, str]] = []
    codec = encoding_of(path, encoding, notes)
    numbered, width = _numbered(path, codec), 0

    def close() -> None:
        if sentence:
            words.append([word for word, _ in sentence])
            tags.append([tag for _, tag in sentence])
        sentence.clear()

    with path.open(encoding=codec) as file:
        for number, line in enumerate(file, 1):
            fields = _fields(line)
            if not line.strip() or fields[0] == _DOCUMENT or line.startswith("# "):
                close()
                continue
            width = width or len(fields)
            if len(fields) != width or width < 2:
                raise DataError(
                    f"{path}, line {number}: {len(fields)} columns, where "
                    f"{'the lines before' if width > 1 else 'a word and its tag'} "
                    f"need {max(width, 2)}: {line.strip()[:80]!r}"
                )
            if numbered and not _NUMBERED.fullmatch(fields[0]):
                raise DataError(f"{path}, line {number}: no number before the word, as the lines before have one.")
            if numbered and not fields[0].isdigit():
                continue  # "3-4 del", which is written again as words 3 and 4; "5.1", a word that is only thought
            word, tag = (1, 3 if width == _CONLLU else -1) if numbered else (0, -1)
            sentence.append((fields[word], fields[tag]))
    close()
    if numbered and width == _CONLLU:
        notes.say(f"{path.name} has CoNLL-U's form: the words are the second column, the tags the fourth (UPOS).")
    elif numbered:
        notes.say(f"{path.name}: words are numbered; the second column is taken for them, the last for the tags.")
    elif width > 2:
        notes.say(f"{path.name} has {width} columns; the first is taken for the words, the last for the tags.")
    yield pa.table({"tokens": words, "tags": tags})


def _fields(line: str) -> list[str]:
    return line.rstrip("\n").split("\t") if "\t" in line else line.split()


def _numbered(path: Path, codec: str) -> bool:
    """Whether the words of the first sentence have their numbers before them."""
    found: list[str] = []
    with path.open(encoding=codec) as file:
        for line in file:
            if line.strip() and not line.startswith("#") and not line.startswith(_DOCUMENT):
                fields = _fields(line)
                found.append(fields[0] if len(fields) > 2 else "")
            elif found:
                break
    words = [field for field in found if field.isdigit()]
    counted = words == [str(number) for number in range(int(words[0]), int(words[0]) + len(words))] if words else False
    return counted and words[0] in ("0", "1") and all(map(_NUMBERED.fullmatch, found))


def read_fasttext(path: Path, encoding: str | None, notes: Notes) -> Iterator[pa.Table]:
    """fastText's lines, `__label__a __label__b the text`: a label, or a list where a line has several.

    Raises:
        DataError: a line without a label, by its number.
    """
    labels: list[list[str]] = []
    texts: list[str] = []
    with path.open(encoding=encoding_of(path, encoding, notes)) as file:
        for number, line in enumerate(file, 1):
            found, rest = [], line.strip()
            while rest.startswith(_LABEL):
                first, _, rest = rest.partition(" ")
                found.append(first.removeprefix(_LABEL))
            if not found and rest:
                raise DataError(f"{path}, line {number}: no {_LABEL} at its beginning: {rest[:80]!r}")
            if found:
                labels.append(found)
                texts.append(rest.strip())
    several = any(len(found) > 1 for found in labels)
    column: list[Any] = labels if several else [found[0] for found in labels]
    yield pa.table({"text": pa.array(texts, pa.string()), "label": column})
