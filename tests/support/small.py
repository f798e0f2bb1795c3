"""Tiny models saved as folders with a tokenizer of 128 words, and tiny data that can be learned: whole runs in seconds.

folder = small.model("bert")               # transformers loads it; random weights, the same at every call
rows = small.sentiment(64)                 # [{"text": "a fine film", "label": "good"}, ...]
"""

import atexit
import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from tests.support import tiny

GOOD = ["fine", "great", "lovely", "superb", "bright", "warm"]
BAD = ["dull", "poor", "awful", "weak", "grim", "cold"]
NOUNS = ["film", "plot", "cast", "scene", "score", "story", "ending", "actor", "script", "camera"]
OTHER = ["a", "the", "was", "is", "with", "and", "very", "quite", "one", "two", "three", "four", "five", "six", "plus"]
NAMES = ["anna", "ben", "carl", "dora", "emma", "finn"]
PLACES = ["paris", "rome", "oslo", "cairo", "lima", "delhi"]
MORE = ["lives", "in", "where", "does", "live", "?", ".", "user", "assistant", ":", "say", "hello", "upper"]
WORDS = [*GOOD, *BAD, *NOUNS, *OTHER, *NAMES, *PLACES, *MORE]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} [EOS] {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@cache
def _root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="adapters_kit_small_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def tokenizer(*, encoder: bool, chat: bool = False) -> PreTrainedTokenizerFast:
    """Words of `WORDS`, lower case; ids below 5 are special. An encoder's adds [CLS] and [SEP]."""
    special = ["[PAD]", "[CLS]", "[EOS]", "[UNK]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    assert len(vocabulary) <= tiny.VOCAB
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if encoder:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [EOS]", pair="[CLS] $A [EOS] $B:1 [EOS]:1", special_tokens=[("[CLS]", 1), ("[EOS]", 2)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        cls_token="[CLS]",
        sep_token="[EOS]",
        model_max_length=64,
    )
    if chat:
        fast.chat_template = CHAT
    return fast


@cache
def model(name: str, *, model_class: str | None = None, chat: bool = False, **overrides: Any) -> Path:
    """The folder of a family of tiny.py, weights and processor."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_root()))
    kind = tiny.FAMILIES[name].kind
    tiny.build(name, model_class=model_class, **overrides).save_pretrained(folder)
    if kind == "vision":
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        tokenizer(encoder=kind != "decoder", chat=chat).save_pretrained(folder)
    return folder


def sentiment(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Sentences of different length whose label follows from one word."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        label = ("bad", "good")[index % 2]
        words = [draw.choice(OTHER) for _ in range(draw.randint(1, 12))]
        words.insert(draw.randrange(len(words) + 1), draw.choice(GOOD if label == "good" else BAD))
        rows.append({"text": " ".join([*words, draw.choice(NOUNS)]), "label": label})
    return rows


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`anna lives in rome` and where she lives: prompt and completion, and the parts for every other task."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        name, place, filler = draw.choice(NAMES), draw.choice(PLACES), [draw.choice(OTHER) for _ in range(3)]
        words = [*filler[: draw.randint(0, 3)], name, "lives", "in", place, "."]
        rows.append(
            {
                "words": words,
                "context": " ".join(words),
                "question": f"where does {name} live ?",
                "answer": place,
                "name": name,
            }
        )
    return rows


def judgements(queries: int, seed: int = 0) -> list[dict[str, Any]]:
    """Four documents for each query: where somebody lives. The one that says it is relevant."""
    draw = random.Random(seed)
    rows = []
    for number in range(queries):
        name = draw.choice(NAMES)
        for place in range(4):
            other = name if place == 0 else draw.choice([one for one in NAMES if one != name])
            document = f"{draw.choice(OTHER)} {other} lives in {draw.choice(PLACES)}"
            query = f"{OTHER[number % len(OTHER)]} {MORE[number % 7]} does {name} live"
            rows.append({"query": query, "document": document, "label": int(place == 0)})
    return rows


def stories(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of four sentences, each about one person."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        name = draw.choice(NAMES)
        places = [draw.choice(PLACES) for _ in range(4)]
        made.append({"text": "\n".join(f"{draw.choice(OTHER)} {name} lives in {place}" for place in places)})
    return made


def preferences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions with a good and a bad answer."""
    draw = random.Random(seed)
    return [
        {
            "prompt": f"{draw.choice(OTHER)} where does {draw.choice(NAMES)} live ?",
            "chosen": f"{draw.choice(GOOD)} {draw.choice(PLACES)}",
            "rejected": " ".join(draw.choices(BAD, k=draw.randint(1, 4))),
        }
        for _ in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
