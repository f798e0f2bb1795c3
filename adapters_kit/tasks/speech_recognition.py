"""Speech recognition: what a recording says. Models that write it (Whisper) and models that spell it (CTC)."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import nn

from adapters_kit.errors import DataError, MissingPackageError, ModelError, RecipeError, did_you_mean
from adapters_kit.tasks.audio import INSTALL
from adapters_kit.tasks.base import IGNORED, Features, compact, pad
from adapters_kit.tasks.generation import tokenizer_of
from adapters_kit.tasks.hearing import HearingTask
from adapters_kit.tasks.opened import Opened
from adapters_kit.tasks.rows import cells

Result = tuple[float, int, str]
"""Negative log-likelihood of the transcript (nats), its tokens, and what the model hears."""


class SpeechRecognition(HearingTask):
    """The words of a recording.

    Attributes:
        ctc: whether the model gives each moment a character, and does not write.
        spelled: how texts are spelled for a vocabulary of one case: `str.upper`, `str.lower`, or None for as they are.
    """

    name = "speech-recognition"
    needs = (("audio", "transcript"),)
    targets = ("transcript",)
    metric = "cer"  # finer than words: these are all wrong for long

    def unlabelled(self, data: Dataset) -> np.ndarray:
        """Rows without words."""
        none = (text is None or text == "" for text in cells(data, self.columns["transcript"]))
        return np.flatnonzero(np.fromiter(none, bool, len(data)))

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Checks that transcripts are text, and opens every recording. Raises DataError, MissingPackageError."""
        _jiwer()
        if self.recipe.training.max_length is not None:
            raise RecipeError(["training.max_length counts tokens of an input, and recordings have none"])
        for data in (train, test) if test is not None else (train,):
            for row, text in enumerate(self.texts(data, "transcript")):
                if not text.strip():
                    raise DataError(f"Row {row + 1}: the transcript {text!r} has no words. Leave the row out.")
        self.look(train, test)

    def bind(self, processor: Any, model: nn.Module) -> None:
        """Takes extractor and tokenizer; sets the language that the model is told.

        Raises:
            ModelError: no tokenizer; a language that the model does not have.
        """
        super().bind(processor, model)
        self.tokenizer = tokenizer_of(processor)
        self.ctc = not hasattr(model, "generate") or not model.can_generate()
        if not callable(getattr(self.tokenizer, "convert_ids_to_tokens", None)):
            raise ModelError(
                f"{self.recipe.model} has no tokenizer, so that it has no letters to spell with. For a CTC model make "
                "a base with the letters of your texts: adapters_kit.tasks.speech_recognition.make_ctc_base("
                f"{self.recipe.model!r}, texts, 'base'), and set model: base."
            )
        self.options: dict[str, Any] = {}
        if self.ctc:
            self.unplanned = ("labels",)
            model.config.ctc_loss_reduction = "mean"  # with "sum", long batches take long steps
            self.blank = int(model.config.pad_token_id)
            known = set(self.tokenizer.get_vocab())
            lower, upper = (sum(letter in known for letter in letters) for letters in (_LOWER, _LOWER.upper()))
            self.spelled = None if lower and upper else str.upper if upper else str.lower
        else:
            self.spelled, self.most = None, int(getattr(model.config, "max_target_positions", None) or 448)
        self._set_language(model)

    def _set_language(self, model: nn.Module) -> None:
        data, several = self.recipe.data, getattr(model.generation_config, "lang_to_id", None) if not self.ctc else None
        if not several:
            if next(model.parameters()).is_meta:  # a plan, which reads no generation_config.json
                return
            if data.language or data.speech_task:
                raise ModelError(f"{self.recipe.model} is told no language and no task: leave data.language out.")
            return
        languages = sorted(token.strip("<|>") for token in several)
        if data.language and data.language not in languages:
            raise ModelError(
                f"data.language: {self.recipe.model} has no {data.language!r}. {did_you_mean(data.language, languages)}"
            )
        if data.language is None:
            self.notes.say("No data.language is set: the model is told none while it learns, and guesses when asked.")
        task = data.speech_task or "transcribe"
        self.tokenizer.set_prefix_tokens(language=data.language, task=task)
        self.options = {"task": task, **({"language": data.language} if data.language else {})}

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """Recordings, with `labels` and the `target` text where there are answers.

        Raises:
            DataError: a recording or transcript that the model cannot take; by row.
        """
        kinds = self.kinds(data, training=answers)
        long = self.too_long(kinds)
        if long and not answers:
            raise DataError(
                f"Row {long[0] + 1} is {kinds[long[0]].seconds:.1f} seconds long; {self.recipe.model} hears "
                f"{self.max_seconds:g} at once. Cut it into pieces" + (", or raise data.max_seconds." * self.ctc or ".")
            )
        positions = [self.positions(kind.seconds) for kind in kinds]
        if not answers:
            return self.opened(data, range(len(data)), {"positions": positions})
        texts = self._spelled(list(self.texts(data, "transcript")))
        labels = [self._ids(text) for text in texts]
        out = set(long)
        if self.ctc:
            self._check_room(labels, positions, out)
        else:
            out |= {row for row, ids in enumerate(labels) if len(ids) > self.most}
        kept = [row for row in range(len(data)) if row not in out]
        if out:
            self.notes.say(
                f"{len(out):,} of {len(data):,} recordings are longer than {self.max_seconds:g} seconds "
                f"(data.max_seconds){'' if self.ctc else f' or {self.most} tokens'} and were left out: rows "
                f"{', '.join(str(row + 1) for row in sorted(out)[:10])}{' …' if len(out) > 10 else ''}.",
                recordings_left_out=len(out),
            )
        if not kept:
            raise DataError(f"All {len(data):,} recordings are longer than {self.max_seconds:g} seconds: cut them.")
        more: dict[str, list[Any]] = {"positions": positions, "labels": [compact(ids) for ids in labels]}
        more["target"] = texts
        return self.opened(data, kept, {name: [values[row] for row in kept] for name, values in more.items()})

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text)["input_ids"])
        # The model puts its start token there by itself, shifting the labels.
        start = None if self.ctc else self.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
        return ids[1:] if ids and ids[0] == start else ids

    def _spelled(self, texts: list[str]) -> list[str]:
        """The texts in the letters that a CTC model has; says what was changed."""
        if not self.ctc:
            return texts
        known = set(self.tokenizer.get_vocab()) | {" "}
        cased = [self.spelled(text) if self.spelled else text for text in texts]
        if cased != texts:
            self.notes.say(f"Transcripts are spelled in {'upper' if self.spelled is str.upper else 'lower'} case.")
        strange = Counter(letter for text in cased for letter in text if letter not in known and not letter.isspace())
        if strange:
            shown = " ".join(f"{letter!r} ({count:,})" for letter, count in strange.most_common(10))
            self.notes.say(
                f"{self.recipe.model} cannot spell {shown}{' …' if len(strange) > 10 else ''}: they are left out of "
                "the transcripts, and of what is scored.",
                characters_left_out=sum(strange.values()),
            )
        found = [" ".join("".join(letter for letter in text if letter not in strange).split()) for text in cased]
        if empty := [row + 1 for row, text in enumerate(found) if not text]:
            raise DataError(
                f"Row {empty[0]}: {self.recipe.model} has none of the letters of {texts[empty[0] - 1]!r:.80}. Make a "
                "base with the letters of your texts: adapters_kit.tasks.speech_recognition.make_ctc_base."
            )
        return found

    def _check_room(self, labels: Sequence[Sequence[int]], positions: Sequence[int], out: set[int]) -> None:
        """A character takes a moment of the recording, and one more where it follows itself."""
        for row, (ids, moments) in enumerate(zip(labels, positions, strict=True)):
            needed = len(ids) + sum(a == b for a, b in pairwise(ids))
            if row not in out and needed > moments:
                raise DataError(
                    f"Row {row + 1}: a transcript of {len(ids)} characters, and the model makes {moments} positions of "
                    "the recording: it is too short for these words. Is it theirs?"
                )

    def collate_training(self, features: Features) -> dict[str, torch.Tensor]:
        """The model's input, `attention_mask` where its extractor makes one, labels (rows, longest) and row (rows,)."""
        batch, _ = self.hear(features)
        if "labels" in features[0]:
            batch["labels"] = pad([feature["labels"] for feature in features], IGNORED)
        return {**batch, "row": torch.tensor([feature["row"] for feature in features])}

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """As to train on, with `lengths` (rows,) before padding."""
        batch, lengths = self.hear(features)
        if "labels" in features[0]:
            batch["labels"] = pad([feature["labels"] for feature in features], IGNORED)
        return {**batch, "lengths": torch.tensor(lengths)}

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Result]:
        """The loss of each transcript, its tokens, and what the model hears."""
        labels = batch["labels"]
        counts = (labels != IGNORED).sum(-1)
        if self.ctc:
            losses, texts = [], []
            for logits, ids, count in zip(self._logits(model, batch), labels, counts, strict=True):
                spoken = logits.float().log_softmax(-1)[:, None]
                moments = torch.tensor([len(spoken)])
                loss = nn.functional.ctc_loss(spoken, ids[None, :count], moments, count[None], self.blank, "sum")
                losses.append(float(loss))
                texts.append(self._read(logits))
        else:
            logits = model(**{self.input: batch[self.input]}, labels=labels).logits.float()
            each = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
            )
            losses, texts = each.view(labels.shape).double().sum(-1).tolist(), self.listen(model, batch)
        return list(zip(losses, counts.tolist(), texts, strict=True))

    def listen(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[str]:
        """What the model hears in each recording: greedily, at most `max_new_tokens` where it writes."""
        if self.ctc:
            return [self._read(logits) for logits in self._logits(model, batch)]
        limit = min(self.recipe.max_new_tokens, self.most - 5)  # behind the tokens that tell language and task
        out = model.generate(
            **{self.input: batch[self.input]}, max_new_tokens=limit, do_sample=False, num_beams=1, **self.options
        )
        return [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]

    def _logits(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """(positions, letters) of each recording, without those of padding."""
        lengths = batch["lengths"].tolist()
        if "attention_mask" in batch or len(set(lengths)) == 1:
            inputs = {key: batch[key] for key in (self.input, "attention_mask") if key in batch}
            logits = model(**inputs).logits
            # Without a rule of the model's own, as for filter banks, padding's share of the positions is cut.
            ends = [
                self._positions(length) if self._positions else -(-length * logits.shape[1] // max(lengths))
                for length in lengths
            ]
            return [one[:end] for one, end in zip(logits, ends, strict=True)]
        # Nothing tells such a model what is padding: it hears each by itself.
        alone = [batch[self.input][row : row + 1, :length] for row, length in enumerate(lengths)]
        return [model(**{self.input: one}).logits[0] for one in alone]

    def _read(self, logits: torch.Tensor) -> str:
        return str(self.tokenizer.decode(logits.argmax(-1).cpu().numpy())).strip()

    def score(self, results: Sequence[Result], features: Features) -> dict[str, float]:
        """Loss of a token (nats), word and character error rates (errors for each word or character of the truth)."""
        jiwer = _jiwer()
        truth, heard = [str(feature["target"]) for feature in _targets(features)], [text for *_, text in results]
        loss = sum(nll for nll, *_ in results) / max(sum(count for _, count, _ in results), 1)
        return {"loss": loss, "wer": float(jiwer.wer(truth, heard)), "cer": float(jiwer.cer(truth, heard))}

    def predict(self, model: nn.Module, data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        """Of each row the words, as `answer`, and the recording's path where it has one."""
        features = self.encode(data, answers=False)
        texts = self.run(model, features, batch_size, self.listen)
        return [self.show((0.0, 0, text), row) for text, row in zip(texts, data, strict=True)]

    def show(self, result: Result, row: Mapping[str, Any]) -> dict[str, Any]:
        """The words, and the recording's path where it has one."""
        value = row[self.columns["audio"]]
        return {**({"audio": value} if isinstance(value, str) else {}), "answer": result[2]}


_LOWER = "abcdefghijklmnopqrstuvwxyz"


def _targets(features: Features) -> list[dict[str, Any]]:
    assert isinstance(features, Opened)
    return [{"target": text} for text in features.more["target"]]


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise MissingPackageError(f"Word error rates need jiwer: {INSTALL}") from error
    return jiwer


def make_ctc_base(name: str | os.PathLike[str], texts: Sequence[str], out: str | os.PathLike[str]) -> Path:
    """A base for CTC from a model that was pretrained on sound alone: a tokenizer of the letters of `texts`, and a new
    head for them, which adapters train and save.

    Args:
        name: a folder or hub id with a Wav2Vec2, HuBERT or WavLM encoder and its feature extractor.
        texts: the transcripts, spelled as the model shall spell.
        out: the folder to write; must not exist.

    Raises:
        DataError: no letters; `out` exists.
    """
    letters = sorted({letter for text in texts for letter in text if not letter.isspace()})
    if not letters or isinstance(texts, str):
        raise DataError("The texts have no letters to make a vocabulary of: give a list of transcripts.")
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists already: choose another folder for the base.")
    out.mkdir(parents=True)
    vocabulary = {
        token: index for index, token in enumerate(["<pad>", "<unk>", "|", *(x for x in letters if x != "|")])
    }
    (out / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    tokenizer = transformers.Wav2Vec2CTCTokenizer(
        str(out / "vocab.json"), unk_token="<unk>", pad_token="<pad>", bos_token=None, eos_token=None
    )
    extractor = transformers.AutoFeatureExtractor.from_pretrained(name)
    model = transformers.AutoModelForCTC.from_pretrained(
        name, vocab_size=len(vocabulary), pad_token_id=vocabulary["<pad>"], ignore_mismatched_sizes=True
    )
    model.save_pretrained(out)
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(out)
    return out
