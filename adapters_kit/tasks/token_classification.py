"""Token classification: a tag for every word (names, parts of speech); words are split into pieces by the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, List, Value
from datasets import Features as RowFeatures
from torch import nn

from adapters_kit.errors import DataError, MissingPackageError
from adapters_kit.tasks.base import IGNORED, Features, Task, compact, of_the_text, outputs_of, pad, pad_inputs
from adapters_kit.tasks.encoded import Encoded
from adapters_kit.tasks.labels import class_names, declared_names, from_brackets, label_reader, lists_of
from adapters_kit.tasks.marked_text import marked, sentences, words_of
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.rows import cells, in_parts, made
from adapters_kit.tasks.slow_tokens import encode_words, is_slow

_OWN = ("tokens", "tags")  # the columns of a text that was taken apart here
Tokens = tuple[list[int], list[int | None]]  # ids; the word of each, None for special tokens


class TokenClassification(Task):
    """A tag for each word of a sentence; a word's tag counts at its first piece."""

    name = "token-classification"
    needs = (("tokens", "tags"), ("text", "spans"))
    targets = ("tags", "spans")
    metric = "f1"
    higher_is_better = True

    @classmethod
    def refuse(cls, data: Dataset, given: Mapping[str, str]) -> None:
        """Refuses running text whose lines are a word and its tag, read as such by another suffix, and rows that an
        annotator rejected. Raises DataError."""
        text = data[0].get("text") if data.column_names == ["text"] else None
        lines = [line.split() for line in text.splitlines()] if isinstance(text, str) else []
        if lines and all(len(line) == len(lines[0]) > 1 for line in lines) and len(lines[0]) < 5:
            raise DataError(
                f"The rows are running text, the first {text!r:.80}. If each line is a word and its tag, with an empty "
                "line behind each sentence, name the file NAME.conll: then it is read so."
            )

        rejected, first = 0, (0, "")
        for row, answer in enumerate(cells(data, "answer") if "answer" in data.column_names else ()):
            if answer not in ("accept", "reject", "ignore"):
                return
            if answer != "accept":  # Prodigy's
                rejected, first = rejected + 1, first if rejected else (row + 1, answer)
        if rejected:
            raise DataError(
                f"{rejected:,} of {len(data):,} rows were not accepted by their annotator, by the column 'answer' "
                f"(first: row {first[0]}, {first[1]!r}). Keep the rows of 'accept'."
            )

    def unlabelled(self, data: Dataset) -> np.ndarray:
        """Rows whose tags, or one of them, are missing, or whose list of spans is."""
        if "spans" in self.columns:
            none = (cell is None or cell == "" for cell in cells(data, self.columns["spans"]))
            return np.flatnonzero(np.fromiter(none, bool, len(data)))
        rows = lists_of(as_lists(data, [self.columns["tags"]]), self.columns["tags"], self.recipe.labels)
        return np.flatnonzero(np.fromiter((names is None or None in names for names in rows), bool, len(data)))

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Checks that words and tags are lists of equal length; learns the tags."""
        seen: list[set[str]] = []
        words = tags = ""
        for given in (train,) if test is None else (train, test):
            data, words, tags = self._sentences(given, answers=True, notes=Notes())
            if "tokens" in self.columns and (row := _one_word(given, words)) is not None:
                raise DataError(
                    f"Each row of {words!r} and {tags!r} is one word and its tag, as {row!r:.80}; a row is a sentence, "
                    "a list of words and a list of tags. A file with a word and its tag on each line, a tab between "
                    "them and an empty line behind each sentence, is read so: name it NAME.conll."
                )
            read = label_reader(data, tags, self.recipe.labels)
            found: dict[Any, str | None] = {}
            for start, part in in_parts(data, [words, tags]):
                for index, (left, right) in enumerate(zip(part[words], part[tags], strict=True), start):
                    if not isinstance(left, list) or not isinstance(right, list) or len(left) != len(right):
                        raise DataError(
                            f"Row {index + 1}: {words!r} and {tags!r} are lists of equal length, one tag a word; "
                            f"here {left!r:.200} and {right!r:.200}."
                        )
                    if not all(isinstance(word, str) for word in left):
                        raise DataError(f"Row {index + 1}: {words!r} holds words, not {left!r:.200}.")
                    for tag in right:
                        if tag not in found:
                            found[tag] = read(tag, index)
            seen.append({name for name in found.values() if name is not None})
        held_out = seen[1] if test is not None else set()
        declared = declared_names(train, tags) if "tags" in self.columns else None
        self.labels = class_names(seen[0], held_out, self.recipe.labels, tags, self.notes, declared)

    def bind(self, processor: Any, model: nn.Module) -> None:
        """A checkpoint with a head for these very tags keeps its own order of them."""
        super().bind(processor, model)
        self.labels = outputs_of(model)

    def _sentences(self, data: Dataset, *, answers: bool, notes: Notes) -> tuple[Dataset, str, str]:
        """Rows of words and, with `answers`, tags; and the names of these two columns."""
        if "tokens" not in self.columns:
            return sentences(data, self.columns["text"], self.columns["spans"] if answers else None, notes), *_OWN
        words, tags = self.columns["tokens"], self.columns.get("tags", "")
        return as_lists(data, [words, tags] if answers else [words]), words, tags

    def _tokens(self, sentences: Sequence[Sequence[str]]) -> Iterator[Tokens]:
        if is_slow(self.processor):
            for words in sentences:
                yield encode_words(self.processor, words, self.max_length)
            return
        options = {"is_split_into_words": True, "truncation": True, "max_length": self.max_length}
        encoded = self.processor([list(words) for words in sentences], **options)
        for index, ids in enumerate(encoded["input_ids"]):
            yield ids, encoded.word_ids(index)

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """Ids and, with `answers`, tag numbers at the first piece of each word, without sentences that have no word."""
        data, words, tags = self._sentences(data, answers=answers, notes=self.notes)
        number = {name: index for index, name in enumerate(self.labels or [])}
        read = label_reader(data, tags, self.recipe.labels) if answers else None
        features = Encoded(small=("input_ids",))
        empty = cut = unread = 0
        for start, part in in_parts(data, [words, tags] if answers else [words]):
            for row, (ids, owner) in enumerate(self._tokens(part[words]), start):
                feature: dict[str, Any] = {"row": row, "input_ids": compact(ids)}
                missing = set(range(len(part[words][row - start]))) - set(owner)
                behind = {word for word in missing if word > max((w for w in owner if w is not None), default=-1)}
                behind = behind if len(ids) >= self.max_length else set()
                cut += bool(behind)
                unread += len(missing - behind)
                if read is not None:
                    own = [number[str(read(tag, row))] for tag in part[tags][row - start]]
                    before = [None, *owner][: len(owner)]
                    firsts = [w if w is not None and w != b else None for w, b in zip(owner, before, strict=True)]
                    feature["labels"] = compact([IGNORED if word is None else own[word] for word in firsts])
                    if not (feature["labels"] != IGNORED).any():
                        empty += 1
                        continue
                features.append(feature)
        if empty:
            self.notes.say(f"{empty:,} of {len(data):,} rows have no words and are left out.", rows_left_out=empty)
        if cut:
            self.notes.say(
                f"{cut:,} of {len(data):,} rows are longer than max_length {self.max_length}; the words behind it "
                f"{'do not count' if answers else 'get no tag'}.",
                rows_cut=cut,
            )
        if unread:
            self.notes.say(
                f"{unread:,} words are empty to the tokenizer (blanks, signs that it drops): they "
                f"{'do not count' if answers else 'get no tag'}.",
                words_not_read=unread,
            )
        if not len(features):
            raise DataError(f"No row has a word in column {words!r}.")
        return features

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """Ids, mask and labels, (rows, tokens) int64."""
        batch = pad_inputs(features, self.processor)
        if "labels" in features[0]:
            batch["labels"] = pad([feature["labels"] for feature in features], IGNORED)
        batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
        """Probabilities (tokens, classes) of each example."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = of_the_text(model(**inputs).logits, batch["input_ids"].shape[1])
        probabilities = logits.float().softmax(-1).cpu().numpy()
        lengths = batch["attention_mask"].sum(-1).tolist()
        return [row[:length] for row, length in zip(probabilities, lengths, strict=True)]

    def score(self, results: Sequence[np.ndarray], features: Features) -> dict[str, float]:
        """Loss (nats a word), accuracy, and F1: of whole spans for tags such as B-PER, else the mean over the tags."""
        names = self.labels or []
        truth, guess, picked, right = [], [], [], 0
        for result, feature in zip(results, features, strict=True):
            labels = feature["labels"]
            at = np.flatnonzero(labels != IGNORED)
            best = result[at].argmax(-1)
            right += int((best == labels[at]).sum())
            picked.append(np.log(np.clip(result[at, labels[at]], 1e-12, None)))
            truth.append([names[i] for i in labels[at]])
            guess.append([names[i] for i in best])
        words = sum(map(len, truth))
        scores = {"loss": float(-np.concatenate(picked).sum() / words), "accuracy": right / words}
        if (scheme := span_tags(names)) is not None:
            as_spans = [[[scheme[tag] for tag in tags] for tags in rows] for rows in (truth, guess)]
            return {**scores, **spans(*as_spans)}
        if others := _no_span_tags(names):
            self.notes.say(
                f"F1 is the mean over the tags, not of spans: {', '.join(others[:5])} are no tags such as B-PER or O."
            )
        from sklearn.metrics import f1_score

        flat = [[tag for tags in rows for tag in tags] for rows in (truth, guess)]
        return {
            **scores,
            "f1": float(f1_score(*flat, average="macro", zero_division=0)),
            "f1_micro": float(f1_score(*flat, average="micro", zero_division=0)),
        }

    def show(self, result: np.ndarray, row: Mapping[str, Any]) -> dict[str, Any]:
        """The words and their tags; words behind `max_length`, or empty to the tokenizer, have an empty one. Of a text
        that came whole, the spans too."""
        names, text = self.labels or [], row.get(self.columns.get("text", ""), "")
        words = [text[a:b] for a, b in words_of(text)] if text else _as_list(row[self.columns["tokens"]])
        ((_, owner),) = self._tokens([words])
        tags = ["" for _ in words]
        for index, word in reversed(list(enumerate(owner))):
            if word is not None:
                tags[word] = names[int(result[index].argmax())]
        spans = {"spans": marked(text, tags)} if "text" in self.columns else {}
        return {"tokens": words, "tags": tags, **spans}


def as_lists(data: Dataset, columns: Sequence[str]) -> Dataset:
    """The rows' columns of these names, with lists that stand there as text, "['a', 'b']" or "a b", as lists."""
    data = data.select_columns(list(dict.fromkeys(columns)))
    if not any(getattr(kind, "dtype", "") in ("string", "large_string") for kind in data.features.values()):
        return data
    texts = [name for name, kind in data.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    parts = (
        {**part, **{name: [_as_list(value) for value in part[name]] for name in texts}}
        for _, part in in_parts(data, data.column_names)
    )
    return made(parts, RowFeatures({**data.features, **{name: List(Value("string")) for name in texts}}))


def _as_list(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.strip()
    return from_brackets(text) if text[:1] == "[" and text[-1:] == "]" else text.split()


def _one_word(data: Dataset, words: str) -> Any:
    """The first cell, if the cells are texts of one word each: a table with a word a row."""
    cells = data[words][: 1000 if len(data) > 1000 else len(data)]
    return (
        cells[0] if len(cells) > 2 and all(isinstance(cell, str) and len(cell.split()) == 1 for cell in cells) else None
    )


# A word's place in a span, in the letters of IOB, IOE, BIOES, BILOU and BMEWO, and in those that seqeval knows.
_PLACES = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S", "W": "S"}
_BEFORE = re.compile(rf"(?P<place>[{''.join(_PLACES)}])(?:[-_](?P<kind>.+))?")
_BEHIND = re.compile(rf"(?P<kind>.+)[-_](?P<place>[{''.join(_PLACES)}])")


def span_tags(names: Sequence[str]) -> dict[str, str] | None:
    """Each tag as seqeval writes it, of names in any of the schemes for spans (B-PER, L_PER, PER-U, B); else None."""
    tags = [name for name in names if name != "O"]
    for spelling in (_BEFORE, _BEHIND):
        found = {tag: match for tag in tags if (match := spelling.fullmatch(tag))}
        # Letters alone are parts of speech just as well, unless one begins a span.
        if tags and len(found) == len(tags) and (all(match["kind"] for match in found.values()) or "B" in tags):
            made = {tag: f"{_PLACES[match['place']]}-{match['kind'] or '_'}" for tag, match in found.items()}
            return {**made, **{name: name for name in names if name == "O"}}
    return None


def _no_span_tags(names: Sequence[str]) -> list[str]:
    """The tags that keep the others from being read as spans; none if those are no spans either."""
    begins = {name[2:] for name in names if name[:2] in ("B-", "B_")}
    others = [name for name in names if name != "O" and not (_BEFORE.fullmatch(name) and name[2:])]
    return others if begins else []


def spans(truth: list[list[str]], guess: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole spans (an entity counts if its type and both ends are right)."""
    try:
        from seqeval import metrics
    except ImportError as error:
        raise MissingPackageError("Span scores need seqeval: pip install 'adapters-kit[metrics]'") from error
    return {
        "f1": float(metrics.f1_score(truth, guess, zero_division=0)),
        "precision": float(metrics.precision_score(truth, guess, zero_division=0)),
        "recall": float(metrics.recall_score(truth, guess, zero_division=0)),
    }
