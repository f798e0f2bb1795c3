"""What a row costs from its file to the batches: a gigabyte of short rows needs less memory than that, for every task.

Each task reads, splits and encodes few and many rows; what many need more, divided by how many more, is told in bytes.
"""

import gc
import random
import tracemalloc
from itertools import cycle, islice

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from sklearn.model_selection import train_test_split

from adapters_kit.artifacts import growing, mapped_table
from adapters_kit.loading import load_processor, skeleton
from adapters_kit.recipe import Recipe
from adapters_kit.task_table import TASKS
from adapters_kit.tasks import encoded, next_sentence, reranking, rows
from adapters_kit.training.data import json_tables, row_file, split
from adapters_kit.training.resolve import prepare
from adapters_kit.training.sampling import OrderedByEpoch
from tests.support import small

FEW, MANY = 300, 1100


def _turns(row: dict) -> list[dict]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]


def _words(row: dict) -> dict:
    words = row["text"].split()
    return {"tokens": words, "tags": ["O" if place else "B-X" for place in range(len(words))]}


def _spans(row: dict) -> dict:
    return {"text": row["text"], "spans": [{"start": 0, "end": len(row["text"].split()[0]), "label": "X"}]}


_PAIRS, _TEXTS, _ASKED = small.preferences(40), small.sentiment(40), small.questions(40)
_GOOD = {"good": 1, "bad": 0}
KINDS = {
    "text": ("causal-lm", "llama", [{"text": row["text"]} for row in _TEXTS], {}),
    "packed": ("causal-lm", "llama", [{"text": row["text"]} for row in _TEXTS], {"training": {"packing": True}}),
    "answers": ("causal-lm", "llama", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in _PAIRS], {}),
    "talks": ("causal-lm", "llama", [{"messages": _turns(row)} for row in _PAIRS], {}),
    "dpo": ("causal-lm", "llama", _PAIRS, {"objective": "dpo"}),
    "kto": (
        "causal-lm",
        "llama",
        [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0} for n, row in enumerate(_PAIRS)],
        {"objective": "kto"},
    ),
    "classes": ("text-classification", "bert", _TEXTS, {}),
    "lists": (
        "text-classification",
        "bert",
        [{"text": row["text"], "label": [row["label"], "x"]} for row in _TEXTS],
        {},
    ),
    "marks": (
        "text-classification",
        "bert",
        [{**row, "label": f"{row['label']}|x"} for row in _TEXTS],
        {"problem": "multi-label"},
    ),
    "numbers": (
        "text-classification",
        "bert",
        [{"text": row["text"], "label": n / 7} for n, row in enumerate(_TEXTS)],
        {"problem": "regression"},
    ),
    "tags": ("token-classification", "bert", [_words(row) for row in _TEXTS], {}),
    "tags as text": (
        "token-classification",
        "bert",
        [{key: " ".join(value) for key, value in _words(row).items()} for row in _TEXTS],
        {},
    ),
    "spans": ("token-classification", "bert", [_spans(row) for row in _TEXTS], {}),
    "masked": ("masked-lm", "bert", [{"text": row["text"]} for row in _TEXTS], {}),
    "follows": ("next-sentence", "bert", small.stories(40), {}),
    "found": ("question-answering", "bert", _ASKED, {}),
    "ranked": ("reranking", "bert", small.judgements(40), {}),
    "translated": ("seq2seq", "t5", [{"source": row["prompt"], "target": row["chosen"]} for row in _PAIRS], {}),
}


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    """As if little were much: everything that is held for a while is held for a few rows."""
    for module, name, value in [
        (growing, "_IN_MEMORY", 1 << 10),
        (mapped_table, "_PIECE", 1 << 14),
        (rows, "_AT_ONCE", 40),
        (rows, "_NUMBERS", 40),
        *((module, "AT_ONCE", 40) for module in (encoded, next_sentence, reranking)),
        (json_tables, "_AT_ONCE", 1 << 14),
        (row_file, "_IN_MEMORY", 0),
    ]:
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_a_row(kind, tmp_path):
    task, family, made, keys = KINDS[kind]
    folder = small.model(family, chat=kind == "talks")
    held, most = [], []
    for count in (40, FEW, MANY):
        path = small.write_jsonl(tmp_path / f"{count}.jsonl", list(islice(cycle(made), count)))
        recipe = Recipe(model=str(folder), task=task, data=str(path), **keys)
        arrow = pa.total_allocated_bytes()
        tracemalloc.start()
        try:
            one, parts = prepare(recipe)
            bare = skeleton(str(folder), recipe.head, labels=one.labels if TASKS[recipe.head].labelled else None)
            one.bind(load_processor(str(folder)), bare)
            tracemalloc.reset_peak()
            features = one.training_features(one.encode(parts.train))
            iter(OrderedByEpoch(one.lengths(features), 8, 0))
            _, peak = tracemalloc.get_traced_memory()
            gc.collect()
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        held.append(kept + pa.total_allocated_bytes() - arrow)
        most.append(peak)
    kept, peak = ((found[2] - found[1]) / (MANY - FEW) for found in (held, most))
    assert len(features)
    many = max(len(features) / len(parts.train), 1)  # a row of several sentences makes as many examples
    assert kept < 30 * many
    assert peak < 90 * many


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("rows_in_all", [40, 333])
def test_held_out_rows_are_those_of_scikit_learn(seed, rows_in_all):
    """Drawn from numbers alone, as its functions draw them from lists of all rows."""
    data = Dataset.from_dict({"row": list(range(rows_in_all))})
    draw = random.Random(seed)
    for names in ("ab", "abcdefg", "aaaaaaaaab"):
        classes = [names[row % len(names)] for row in range(rows_in_all)]
        draw.shuffle(classes)
        for size in (0.25, 0.4, 15):
            count = size if size > 1 else round(size * rows_in_all)
            for given in (None, classes):
                _, wanted = train_test_split(range(rows_in_all), test_size=count, random_state=seed, stratify=given)
                found = split(data, size, seed, given)
                assert found.test["row"][:] == sorted(wanted)
                assert sorted(found.train["row"][:] + found.test["row"][:]) == list(range(rows_in_all))


def test_chosen_rows_are_those_of_select():
    data = Dataset.from_dict({"row": list(range(500)), "text": [f"row {n}" for n in range(500)]})
    draw = np.random.default_rng(0)
    once = draw.permutation(500)[:300]
    for given, numbers in [(data, once), (data, np.sort(once)), (data.select(once), draw.permutation(300)[:90])]:
        found, wanted = rows.chosen(given, numbers), given.select(numbers)
        assert found[:] == wanted[:]
        assert rows.chosen(found, np.arange(20, 50))[:] == wanted.select(range(20, 50))[:]
        seen = [(number, row["row"]) for number, row in rows.each_row(found)]
        assert seen == list(enumerate(wanted["row"][:]))
    assert len(rows.chosen(data, np.arange(0))) == 0
