"""Recordings as files, bytes or arrays: decoded, mixed to one channel, at the rate that a model hears."""

from __future__ import annotations

import io
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapters_kit.errors import DataError, MissingPackageError

INSTALL = "pip install 'adapters-kit[audio]'"
_LOUDEST = 8.0  # samples are within -1 to 1, a little over it where a mix was not limited
_RATES = (100, 1_000_000)  # what is recorded, whales and bats included; a damaged head says anything up to 2^32
_FINEST = 20_000  # the filter between two rates has 20 times as many taps as their ratio in lowest terms has parts
_RIFF_STREAMED = (0, 0xFFFFFFFF)  # what recorders write that do not know the length yet


class Clip(NamedTuple):
    """One recording."""

    samples: np.ndarray
    """(samples,) float32, the mean of all channels."""
    rate: int
    """Samples a second."""
    channels: int
    """As stored."""


def open_audio(value: Any, row: int, rate: Any = None) -> Clip:
    """A recording, whole.

    Args:
        value: a path, bytes of a file, {"path": …}, {"bytes": …}, {"array": …, "sampling_rate": …}, or samples, which
            need `rate`.
        row: its number in the data, from 0.
        rate: samples a second of samples that do not say it themselves.

    Raises:
        DataError: none of these, no file, a file that is no recording, is cut off or empty; by its row.
        MissingPackageError: a file, and soundfile is not installed.
    """
    array, own_rate = _array(value, rate)
    if array is not None:
        return _from_array(array, own_rate, row)
    soundfile, source = _soundfile(), _source(value, row)
    try:
        samples, found = soundfile.read(source, dtype="float32", always_2d=True)
    except _unreadable(soundfile) as error:
        raise DataError(f"Row {row + 1}: {_name(value)} is no recording that can be read ({error}).") from error
    if _cut_off(source):
        raise DataError(
            f"Row {row + 1}: {_name(value)} ends too early: the file was cut off. Fetch it again, or leave it out."
        )
    return _checked(samples.mean(1), found, samples.shape[1], row, _name(value))


class Kind(NamedTuple):
    """What the head of a recording's file says."""

    seconds: float
    """How long it is."""
    rate: int
    """Samples a second."""
    channels: int
    """As stored."""


def kind_of(value: Any, row: int, rate: Any = None) -> Kind:
    """Length, rate and channels of a recording; of a file only the head is read. Arguments and errors: `open_audio`."""
    array, own_rate = _array(value, rate)
    if array is not None:
        clip = _from_array(array, own_rate, row)
        return Kind(len(clip.samples) / clip.rate, clip.rate, clip.channels)
    soundfile, source = _soundfile(), _source(value, row)
    try:
        info = soundfile.info(source)
    except _unreadable(soundfile) as error:
        raise DataError(f"Row {row + 1}: {_name(value)} is no recording that can be read ({error}).") from error
    _check_rate(info.samplerate, row, _name(value))
    return Kind(info.frames / info.samplerate, info.samplerate, info.channels)


def resampled(clip: Clip, rate: int) -> np.ndarray:
    """The samples at another rate, (samples,) float32, through a polyphase filter."""
    if clip.rate == rate:
        return clip.samples
    from scipy.signal import resample_poly

    ratio = Fraction(rate, clip.rate).limit_denominator(_FINEST)  # exact, or off by less than nobody hears: 1e-6
    return resample_poly(clip.samples, ratio.numerator, ratio.denominator).astype(np.float32)


def _check_rate(rate: int, row: int, name: str) -> None:
    if not _RATES[0] <= rate <= _RATES[1]:
        raise DataError(
            f"Row {row + 1}: {name} says {rate:,} samples a second, and no recording has less than {_RATES[0]} or more "
            f"than {_RATES[1]:,}. The file is damaged, or the number is another one's."
        )


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the library that it stands on is missing
        raise MissingPackageError(f"Sound files need soundfile: {INSTALL}") from error
    return soundfile


def _unreadable(soundfile: Any) -> tuple[type[Exception], ...]:
    return (soundfile.SoundFileError, OSError, ValueError, TypeError, RuntimeError)


def _array(value: Any, rate: Any) -> tuple[Any, Any]:
    """Samples and their rate where a value is such; (None, …) for a file."""
    if isinstance(value, Mapping) and value.get("array") is not None:
        return value["array"], value.get("sampling_rate") or rate
    return (value, rate) if isinstance(value, list | tuple | np.ndarray) else (None, None)


def _from_array(array: Any, rate: Any, row: int) -> Clip:
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not rate > 0:
        raise DataError(
            f"Row {row + 1}: samples without a sampling rate (it is {rate!r}). Give each as {{'array': …, "
            "'sampling_rate': 16000}, or name the column that says it: data.columns: {sampling_rate: NAME}."
        )
    try:
        samples = np.asarray(array, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"Row {row + 1}: the samples are no list of numbers ({error}).") from error
    if samples.ndim == 2:  # a few channels of many samples each, whichever comes first
        samples = samples if samples.shape[0] >= samples.shape[1] else samples.T
    if samples.ndim not in (1, 2):
        raise DataError(f"Row {row + 1}: samples are (samples,) or (channels, samples); these are {samples.shape}.")
    channels = samples.shape[1] if samples.ndim == 2 else 1
    mono = samples.mean(1) if samples.ndim == 2 and channels else samples.reshape(-1)
    return _checked(mono, int(rate), channels, row, "the recording")


def _checked(samples: np.ndarray, rate: int, channels: int, row: int, name: str) -> Clip:
    _check_rate(rate, row, name)
    if not len(samples):
        raise DataError(f"Row {row + 1}: {name} is empty: it has no samples.")
    loudest = float(np.abs(samples).max())
    if not np.isfinite(loudest):
        raise DataError(f"Row {row + 1}: {name} has samples that are no numbers (NaN or infinite).")
    if loudest > _LOUDEST:
        raise DataError(
            f"Row {row + 1}: {name} has samples of {loudest:,.0f}, and samples are from -1 to 1. Divide 16-bit ones by "
            "32768."
        )
    return Clip(samples.astype(np.float32, copy=False), rate, channels)


def _source(value: Any, row: int) -> Any:
    """What soundfile opens: a path or a file of bytes."""
    source = value
    if isinstance(value, Mapping):
        source = value["bytes"] if value.get("bytes") else value.get("path")
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str):
        if not Path(source).is_file():
            raise DataError(f"Row {row + 1}: no sound file {source!r}.")
        return source
    raise DataError(
        f"Row {row + 1}: {value!r:.80} ({type(value).__name__}) is no recording: give a path, or {{'array': …, "
        "'sampling_rate': 16000}."
    )


def _cut_off(source: Any) -> bool:
    """Whether a WAV or Ogg file, which is decoded as far as it goes, is shorter than it says. FLAC's decoder tells."""
    if isinstance(source, str):
        with open(source, "rb") as file:
            head, size = file.read(12), file.seek(0, io.SEEK_END)
            file.seek(max(size - 65536, 0))
            tail = file.read()
    else:
        content = source.getvalue()
        head, size, tail = content[:12], len(content), content[-65536:]
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        told = int.from_bytes(head[4:8], "little")
        return told not in _RIFF_STREAMED and told + 8 > size + 1  # a byte of padding may be left out
    if head[:4] == b"OggS":
        page = tail[max(tail.rfind(b"OggS"), 0) :]
        if len(page) < 27 or not page[5] & 4:  # the last page says that it is the last
            return True
        segments = page[27 : 27 + page[26]]  # the sizes of its pieces, which follow
        return len(page) < 27 + page[26] + sum(segments)
    return False


def _name(value: Any) -> str:
    if isinstance(value, Mapping):
        return repr(value.get("path") or "the recording")
    return repr(value)[:200] if isinstance(value, str) else "the recording"
