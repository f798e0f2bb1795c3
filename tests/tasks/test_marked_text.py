"""Spans that annotators marked by characters: read from what their tools export, trained on, and predicted."""

import csv
import json

import pytest

import adapters_kit as ak
from adapters_kit.errors import DataError
from adapters_kit.tasks.marked_text import marked, words_of
from adapters_kit.training.resolve import prepare
from tests.support import small

TEXT = "anna lives in rome , and paris ."
MARKS = [[0, 4, "P"], [14, 18, "L"]]
TAGS = ["B-P", "O", "O", "B-L", "O", "O", "O", "O"]
SAID = [{"start": start, "end": end, "text": TEXT[start:end], "labels": [label]} for start, end, label in MARKS]


def task_of(number, **more):
    controls = [{"from_name": "label", "type": "labels", "value": mark} for mark in SAID]
    mood = {"from_name": "mood", "type": "choices", "value": {"choices": ["good" if number % 2 else "bad"]}}
    done = [{"was_cancelled": True, "result": []}, {"result": [*controls, mood, {"type": "relation"}]}]
    return {"id": number, "data": {"text": TEXT, "source": "x"}, "annotations": done, "predictions": [], **more}


def written(tmp_path, name, rows):
    path = tmp_path / name
    if name.endswith(".csv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)))
    return path


def read(tmp_path, name, rows, columns=None):
    """The task, and the words and tags of its first row."""
    path = written(tmp_path, name, rows)
    recipe = ak.Recipe(model="m", task="token-classification", data={"train": str(path), "columns": columns or {}})
    task, parts = prepare(recipe)
    sentences, words, tags = task._sentences(parts.train, answers=True, notes=task.notes)
    return task, sentences[0][words], sentences[0][tags]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("doccano.jsonl", {"text": TEXT, "label": MARKS, "Comments": []}),
        (
            "related.jsonl",
            {
                "text": TEXT,
                "entities": [{"id": 1, "start_offset": a, "end_offset": b, "label": c} for a, b, c in MARKS],
                "relations": [],
            },
        ),
        ("spacy.json", [TEXT, {"entities": MARKS}]),
        ("spacy.jsonl", [TEXT, {"entities": MARKS}]),
        ("ents.jsonl", {"text": TEXT, "ents": [{"start": a, "end": b, "label": c} for a, b, c in MARKS]}),
        ("prodigy.jsonl", {"text": TEXT, "spans": SAID, "tokens": [{"text": "anna", "id": 0}], "answer": "accept"}),
        ("studio.json", task_of(1)),
        ("short.json", {"id": 1, "text": TEXT, "label": SAID, "annotator": 1}),
        ("short.csv", {"text": TEXT, "label": json.dumps(SAID)}),
        (
            "turks.jsonl",
            {
                "content": TEXT,
                "annotation": [
                    {"label": [c], "points": [{"start": a, "end": b - 1, "text": TEXT[a:b]}]} for a, b, c in MARKS
                ],
            },
        ),
    ],
)
def test_exports_of_annotators(tmp_path, name, row):
    task, words, tags = read(tmp_path, name, [row] * 6)
    assert (words, tags) == (TEXT.split(), TAGS)
    assert task.labels == ["B-L", "B-P", "O"]
    moved = any("name their last character" in sentence for sentence in task.notes.sentences)
    assert moved == (name == "turks.jsonl")


def test_a_document_of_pairs_with_its_classes(tmp_path):
    _, _, tags = read(
        tmp_path, "tool.json", {"classes": ["P", "L"], "annotations": [[TEXT, {"entities": MARKS}]] * 6 + [None]}
    )
    assert tags == TAGS


def test_choices_of_label_studio_are_labels_of_texts(tmp_path):
    path = written(tmp_path, "studio.json", [task_of(number) for number in range(8)])
    recipe = ak.Recipe(
        model="m", task="text-classification", data={"train": str(path), "columns": {"text": "text", "label": "mood"}}
    )
    assert prepare(recipe)[0].labels == ["bad", "good"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"label": [[0, 4, "P"], [0, 10, "X"]]},
            r"Row 1, column 'label': the spans 'anna' \(P\) and 'anna lives' \(X\)",
        ),
        ({"label": [[0, 3, "P"]]}, r"'ann' \(P, 0 to 3\) cuts the word 'anna'\. Move its edge"),
        ({"label": [[0, 400, "P"]]}, "0 to 400 .* outside its text of 32 characters"),
        ({"label": [[4, 4, "P"]]}, "4 to 4 .* is empty"),
        ({"label": [[4, 5, "P"]]}, "nothing but blanks"),
        ({"label": [{"start": 0, "end": 4, "text": "bert", "label": "P"}]}, "is 'anna' in the text, and says .*'bert'"),
        ({"label": [{"start": 0, "end": 4, "labels": ["P", "L"]}]}, "a span with 2 labels"),
        ({"label": [{"start": 0, "label": "P"}]}, "is no span"),
        ({"label": [{"start": float("inf"), "end": 4, "label": "P"}]}, "is no span"),
        ({"label": [{"label": ["P"], "points": [7]}]}, "is no span"),
        ({"label": "good"}, r"'good' is no list of spans.*data\.columns: {tokens: NAME, tags: NAME}"),
        ({"label": None}, "6 of 6 training rows have no label in column 'label'"),
        ({"label": MARKS, "answer": "reject"}, "6 of 6 rows were not accepted .*Keep the rows of 'accept'"),
        (task_of(1, annotations=[{"result": []}] * 2), "row 1: 2 annotations of one task"),
    ],
)
def test_what_cannot_be_tags_is_refused_by_row(tmp_path, row, message):
    rows = [row if "data" in row else {"text": TEXT, **row}] * 6
    with pytest.raises(DataError, match=message):
        read(tmp_path, "rows.json", rows)


def test_what_was_mended_is_counted(tmp_path):
    text = "\U0001f600 anna lives"
    spans = [{"start": 3, "end": 8, "text": "anna ", "label": "P"}]  # as UTF-16 counts, with a blank behind it
    rows = [{"text": text, "spans": spans * 2}] * 5 + [{"text": text, "spans": []}] * 5
    task, words, _ = read(tmp_path, "rows.jsonl", rows)
    assert words == ["\U0001f600", "anna", "lives"]
    task.processor = small.tokenizer(encoder=True)
    task.encode(prepare(task.recipe)[1].train)
    assert {name for name in task.notes.counts if name.startswith("spans")} == {
        "spans_trimmed",
        "spans_recounted",
        "spans_twice",
    }
    assert task.notes.counts["rows_without_spans"] > 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Anna's 3.5 km, (b)", ["Anna", "'", "s", "3", ".", "5", "km", ",", "(", "b", ")"]),
        ("\u5b89\u5a1c\u4f4f", ["\u5b89", "\u5a1c", "\u4f4f"]),
        ("\u0939\u093f\u0928\u094d\u0926\u0940 x", ["\u0939\u093f\u0928\u094d\u0926\u0940", "x"]),
        ("cafe\u0301\u00a0a_b", ["cafe\u0301", "a_b"]),
        ("\u0e01\u0e34\u0e19", ["\u0e01\u0e34", "\u0e19"]),
        (" \n", []),
    ],
)
def test_words(text, words):
    assert [text[start:end] for start, end in words_of(text)] == words


def test_a_run_answers_with_spans(tmp_path):
    rows = [{"text": TEXT, "spans": SAID} for _ in range(24)]
    recipe = {"model": str(small.model("bert")), "task": "token-classification", "data": rows}
    training = {"epochs": 12, "learning_rate": 1e-2, "samples": 2, "batch_size": 4}
    run = ak.train({**recipe, "training": training}, tmp_path / "run", quiet=True)
    assert run.metrics["f1"] == 1.0
    expected = [{"start": a, "end": b, "label": c, "text": TEXT[a:b]} for a, b, c in MARKS]
    for asked in (TEXT, [{"text": TEXT}]):
        (answer,) = ak.predict(run, asked)
        assert answer["spans"] == expected and answer["tags"] == TAGS
    assert ak.evaluate(run, rows[:3])["f1"] == 1.0
    assert marked("a b c", ["B-X", "I-X", "I-Y"])[1] == {"start": 4, "end": 5, "label": "Y", "text": "c"}
