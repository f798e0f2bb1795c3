"""Tiny models that hear, saved as folders with what they need, and recordings that are made here: tones and melodies.

folder = sounds.model("wav2vec2")                  # transformers loads it; random weights, the same at every call
rows = sounds.tones(24, tmp_path)                  # [{"audio": ".../0.wav", "label": "high"}, ...]
rows = sounds.melodies(24, tmp_path)               # [{"audio": ".../0.wav", "text": "a cab"}, ...]
"""

import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.support import small, tiny

RATE = 16_000
PITCH = {"low": 220.0, "high": 1400.0}
LETTERS = {"a": 300.0, "b": 700.0, "c": 1500.0}
WAVES = {
    **tiny.LAYERS,
    "conv_dim": [32, 32],
    "conv_stride": [10, 8],
    "conv_kernel": [20, 16],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 64,
    "mask_time_length": 4,
    "vocab_size": 32,
    "pad_token_id": 0,
}
# (extractor, its options, config, its options); an extractor with "mask" tells the model what is padding
KINDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2FeatureExtractor", {"return_attention_mask": False}, "Wav2Vec2Config", WAVES),
    "hubert": (
        "Wav2Vec2FeatureExtractor",
        {"return_attention_mask": True},
        "HubertConfig",
        {**WAVES, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    ),
    "wavlm": (
        "Wav2Vec2FeatureExtractor",
        {"return_attention_mask": True},
        "WavLMConfig",
        {**WAVES, "feat_extract_norm": "layer", "num_buckets": 16, "max_bucket_distance": 32},
    ),
    "ast": (
        "ASTFeatureExtractor",
        {"num_mel_bins": 32, "max_length": 64},
        "ASTConfig",
        {**tiny.LAYERS, "patch_size": 8, "time_stride": 8, "frequency_stride": 8, "num_mel_bins": 32, "max_length": 64},
    ),
    "whisper": (
        "WhisperFeatureExtractor",
        {"feature_size": 16, "chunk_length": 1},
        "WhisperConfig",
        {**tiny.SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 64}
        | {"suppress_tokens": None, "begin_suppress_tokens": None, "classifier_proj_size": 64},
    ),
}


@cache
def model(name: str, head: str = "AutoModelForAudioClassification", **options: Any) -> Path:
    """The folder of a model: random weights, nowhere neutral, and its feature extractor."""
    extractor, how, config_class, fields = KINDS[name]
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=small._root()))
    config = getattr(transformers, config_class)(**fields | options)
    for key, value in vars(config).items():
        if ("drop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, head).from_config(config)
        tiny.perturb(made, seed, 0.3)
    made.save_pretrained(folder)
    getattr(transformers, extractor)(**how).save_pretrained(folder)
    return folder


# The languages in the order in which Whisper counts them.
SPOKEN = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
SPOKEN += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]


@cache
def speaker(name: str, letters: str = "|abc") -> Path:
    """As `model`, with a vocabulary of a few letters: Whisper in two languages, or a head for CTC."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-speaks-", dir=small._root()))
    if name != "whisper":
        plain = model(name)
        vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", *letters])}
        rows_file(folder / "vocab.json", [vocabulary])
        tokenizer = transformers.Wav2Vec2CTCTokenizer(
            str(folder / "vocab.json"), unk_token="<unk>", pad_token="<pad>", bos_token=None, eos_token=None
        )
        made = transformers.AutoModelForCTC.from_pretrained(
            model(name, "AutoModelForCTC", vocab_size=len(vocabulary), pad_token_id=0)
        )
        made.save_pretrained(folder)
        extractor = transformers.AutoFeatureExtractor.from_pretrained(plain)
        transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
        return folder
    words = ["a", "b", "c", "d", "Ġ", *SPOKEN]
    vocabulary = {token: index for index, token in enumerate(words)}
    tokenizer = transformers.WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPOKEN[1:]})
    ids = {token: vocabulary[token] for token in SPOKEN}
    ends = {"eos_token_id": ids["<|endoftext|>"], "bos_token_id": ids["<|endoftext|>"]}
    ends |= {"pad_token_id": ids["<|endoftext|>"], "decoder_start_token_id": ids["<|startoftranscript|>"]}
    source = model("whisper", "AutoModelForSpeechSeq2Seq", **ends)
    made = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(source)
    config = made.generation_config
    config._from_model_config = False
    config.is_multilingual, config.no_timestamps_token_id = True, ids["<|notimestamps|>"]
    config.lang_to_id = {token: ids[token] for token in ("<|en|>", "<|zh|>", "<|de|>")}
    config.task_to_id = {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]}
    made.save_pretrained(folder)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(source)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def tone(pitch: float, seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """A tone with some noise, float32."""
    noise = np.random.default_rng(seed).normal(0, 0.02, round(seconds * rate))
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(len(noise)) / rate) + noise).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    """A sound file, of the kind that the suffix says."""
    soundfile = pytest.importorskip("soundfile", reason="sound files need soundfile")
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
    return path


def tones(count: int, folder: Path, suffix: str = ".wav") -> list[dict[str, str]]:
    """Tones of different length, in a folder a class: low or high."""
    rows = []
    for index in range(count):
        label = ("low", "high")[index % 2]
        sound = tone(PITCH[label] * (0.9 + 0.02 * (index % 10)), 0.2 + 0.03 * (index % 7), seed=index)
        rows.append({"audio": str(write(folder / label / f"{index}{suffix}", sound)), "label": label})
    return rows


def melodies(count: int, folder: Path, longest: int = 4) -> list[dict[str, str]]:
    """A tone a letter, silence for a blank; the text says which."""
    rows = []
    draw = np.random.default_rng(7)
    for index in range(count):
        text = "".join(draw.choice(list(LETTERS), draw.integers(2, longest + 1)))
        parts = [tone(LETTERS[letter], 0.08, seed=index * 10 + place) for place, letter in enumerate(text)]
        gap = np.zeros(RATE // 50, np.float32)
        sound = np.concatenate([piece for part in parts for piece in (part, gap)])
        rows.append({"audio": str(write(folder / f"{index}.wav", sound)), "text": text})
    return rows


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
