"""What tasks on recordings share: every recording is looked at before training, and heard when its batch is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from adapters_kit.errors import DataError, ModelError
from adapters_kit.tasks.audio import Kind, kind_of, open_audio, resampled
from adapters_kit.tasks.base import Features, Task
from adapters_kit.tasks.opened import Opened, undecoded

MAX_SECONDS = 30.0
"""Of a recording, where neither the recipe nor the model says."""
_FRAME = 0.01  # seconds, where an extractor counts what it takes in frames of a filter bank


class HearingTask(Task):
    """A task whose rows are recordings.

    Attributes:
        extractor: the feature extractor of the model.
        rate: samples a second that the model hears.
        input: the name of the model's input.
        max_seconds: of a recording.
    """

    optional = ("sampling_rate",)

    def found(self) -> dict[str, Any]:
        """What the same run needs again."""
        return {"labels": self.labels, "data.columns": self.columns, "data.max_seconds": self.max_seconds}

    def look(self, *parts: Dataset | None) -> None:
        """Opens every recording; says which are silent. Raises DataError by row."""
        for data in parts:
            clips = self._clips(data) if data is not None else ()
            silent = [row + 1 for row, value, rate in clips if not open_audio(value, row, rate).samples.any()]
            if silent:
                self.notes.say(
                    f"{len(silent):,} recordings hold nothing but silence: row{'s' * (len(silent) > 1)} "
                    f"{', '.join(map(str, silent[:10]))}{' …' if len(silent) > 10 else ''}.",
                    silent_recordings=len(silent),
                )

    def bind(self, processor: Any, model: nn.Module) -> None:
        """Takes the feature extractor: the rate that it hears, and how long a recording may be.

        Raises:
            ModelError: a processor that is for no recordings; a `data.max_seconds` that the model cannot take.
        """
        self.processor, self.input = processor, str(getattr(model, "main_input_name", ""))
        self.extractor = getattr(processor, "feature_extractor", processor)
        rate = getattr(self.extractor, "sampling_rate", None)
        if not isinstance(rate, int):
            raise ModelError(
                f"The processor of {self.recipe.model} ({type(self.extractor).__name__}) is for no recordings. Copy "
                "preprocessor_config.json of the original model beside the weights."
            )
        self.rate = rate
        counts = getattr(model, "_get_feat_extract_output_lengths", None) if self.input == "input_values" else None
        self._positions = (lambda samples: int(counts(samples))) if counts is not None else None
        # SpecAugment hides spans of positions; a recording that is shorter than one is an error in the model.
        masks = getattr(model.config, "apply_spec_augment", False) and getattr(model.config, "mask_time_prob", 0) > 0
        self.shortest = self._samples_of(model.config.mask_time_length if masks else 1) / self.rate
        self.shortest_heard = self._samples_of(1) / self.rate
        asked, takes = self.recipe.data.max_seconds, self._takes()
        if asked is not None and takes is not None and asked > takes:
            raise ModelError(f"data.max_seconds is {asked:g}; {self.recipe.model} hears {takes:g} seconds at most.")
        self.max_seconds = asked or takes or MAX_SECONDS
        self.max_length = self.longest = self.positions(self.max_seconds)

    def _takes(self) -> float | None:
        """Seconds behind which the extractor cuts by itself; None where it takes everything."""
        samples, frames = (getattr(self.extractor, name, None) for name in ("n_samples", "max_length"))
        if isinstance(samples, int | float):  # Whisper's
            return samples / self.rate
        return frames * _FRAME if isinstance(frames, int) else None  # the audio spectrogram transformer's

    def _samples_of(self, positions: int) -> int:
        """The fewest samples of which the model makes so many positions."""
        if self._positions is None:
            return 1
        high = 1
        while self._positions(high) < positions:
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._positions(middle) < positions else (low, middle)
        return high

    def positions(self, seconds: float) -> int:
        """Of the model for a recording of so many seconds; 1 where all recordings take equally many."""
        return max(self._positions(round(seconds * self.rate)), 1) if self._positions is not None else 1

    def kinds(self, data: Dataset, *, training: bool) -> list[Kind]:
        """Length, rate and channels of each recording; says what is made of those that the model hears differently.

        Raises:
            DataError: recordings that are too short for the model; by row.
        """
        found = [kind_of(value, row, rate) for row, value, rate in self._clips(data)]
        least = self.shortest if training else self.shortest_heard
        if low := [row for row, kind in enumerate(found) if round(kind.seconds * self.rate) < round(least * self.rate)]:
            told = ", ".join(f"row {row + 1} ({found[row].seconds:.3g} s)" for row in low[:10])
            raise DataError(
                f"{len(low):,} of {len(found):,} recordings are too short: {told}{' …' if len(low) > 10 else ''}. "
                f"{self.recipe.model} needs {least:.3g} seconds at least{' to train on' * training}. Leave them out."
            )
        rates = [kind.rate for kind in found if kind.rate != self.rate]
        if rates:
            self.notes.say(
                f"{len(rates):,} of {len(found):,} recordings have {', '.join(f'{r:,}' for r in sorted(set(rates)))} "
                f"samples a second; the model hears {self.rate:,}: they are resampled.",
                recordings_resampled=len(rates),
            )
        several = sum(kind.channels > 1 for kind in found)
        if several:
            self.notes.say(
                f"{several:,} of {len(found):,} recordings have several channels: their mean is heard.",
                recordings_mixed=several,
            )
        return found

    def too_long(self, kinds: Sequence[Kind]) -> list[int]:
        """Numbers of the recordings that are longer than `max_seconds`."""
        most = round(self.max_seconds * self.rate)
        return [row for row, kind in enumerate(kinds) if round(kind.seconds * self.rate) > most]

    def hear(self, features: Features) -> tuple[dict[str, torch.Tensor], list[int]]:
        """The model's input of a batch, padded with zeros behind, with its mask where the extractor makes one; and the
        length of each row before padding. Each recording goes through the extractor alone: what it is does not depend
        on the others."""
        inputs, masks = [], []
        for feature in features:
            clip = open_audio(feature["audio"], feature["row"], feature.get("sampling_rate"))
            heard = clip.samples[: round((self.max_seconds + 1) * clip.rate)]  # a second more than the filter sees
            samples = resampled(clip._replace(samples=heard), self.rate)[: round(self.max_seconds * self.rate)]
            with torch.autocast("cpu", enabled=False):  # numpy has no bf16
                made = self.extractor(samples, sampling_rate=self.rate, return_tensors="np")
            inputs.append(torch.from_numpy(np.asarray(made[self.input][0], dtype=np.float32)))
            if "attention_mask" in made:
                masks.append(torch.from_numpy(np.asarray(made["attention_mask"][0], dtype=np.int64)))
        batch = {self.input: pad_sequence(inputs, batch_first=True)}
        if masks:
            batch["attention_mask"] = pad_sequence(masks, batch_first=True)
        return batch, [len(one) for one in inputs]

    def opened(self, data: Dataset, rows: Sequence[int], more: Mapping[str, Any]) -> Opened:
        """Rows that are heard when their batch is made, with what else is known of each."""
        roles = [role for role in ("audio", "sampling_rate") if role in self.columns]
        return Opened(data, {role: self.columns[role] for role in roles}, rows, more)

    def length(self, feature: Mapping[str, Any]) -> int:
        """Positions of the model."""
        return int(feature["positions"])

    def _clips(self, data: Dataset) -> Iterator[tuple[int, Any, Any]]:
        """(number, recording, its sampling rate where a column says it) of each row."""
        audio, rate = self.columns["audio"], self.columns.get("sampling_rate")
        for row, cells in enumerate(undecoded(data, audio).select_columns([audio, *([rate] if rate else [])])):
            yield row, cells[audio], cells[rate] if rate else None
