"""Forms in which public data sets are published: read as they are meant, or refused with what to do."""

import json
import warnings

import pyarrow as pa
import pyarrow.feather
import pytest

import adapters_kit as ak
from adapters_kit.errors import DataError
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_sections import DATA_SUFFIXES, DataSpec
from adapters_kit.tasks.conversation import as_turns
from adapters_kit.tasks.notes import Notes
from adapters_kit.training.data import read, read_table
from adapters_kit.training.data.row_file import READERS
from tests.support import small

UNIVERSAL = """# sent_id = 1
1-2\tDelmar\t_\t_\t_\t_\t_\t_\t_\t_
1\tDel\tdel\tADP\tIN\t_\t2\tcase\t_\t_
2\tmar\tmar\tNOUN\tNN\t_\t0\troot\t_\tSpaceAfter=No
2.1\tes\tser\tVERB\t_\t_\t_\t_\t_\t_

1\tSi\tsi\tINTJ\tUH\t_\t0\troot\t_\t_
"""


@pytest.mark.parametrize("suffix", [".conllu", ".conll"])
def test_universal_dependencies(tmp_path, suffix):
    path = tmp_path / f"es{suffix}"
    path.write_text(UNIVERSAL)
    notes = Notes()
    rows = read(DataSpec(train=str(path)), notes).train
    assert rows["tokens"][:] == [["Del", "mar"], ["Si"]]
    assert rows["tags"][:] == [["ADP", "NOUN"], ["INTJ"]]
    assert "fourth" in notes.sentences[0]


def test_numbers_that_are_words_are_words(tmp_path):
    path = tmp_path / "years.conll"
    path.write_text("1 CD B-DATE\nJanuary NNP I-DATE\n\n2 CD O\n3 CD O\n\n")
    assert read_table(path)["tokens"][:] == [["1", "January"], ["2", "3"]]
    path.write_text("1 Anna B-PER\n2 lives O\n\nx y z\n")
    with pytest.raises(DataError, match=r"line 4: no number before the word"):
        read_table(path)


def test_conll_2003_in_a_text_file(tmp_path):
    path = tmp_path / "eng.txt"
    path.write_text("-DOCSTART- -X- -X- O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n")
    assert read_table(path)[:] == {"tokens": [["EU", "rejects"]], "tags": [["B-ORG", "O"]]}


@pytest.mark.parametrize("given", [None, {"text": "what a film", "label": "good"}])
def test_a_table_without_a_line_of_names(tmp_path, given):
    """Refused; and where the first row's cells are given as names, the row that is lost is told."""
    path = tmp_path / "rows.tsv"
    path.write_text("good\twhat a film\n" + "".join(f"{'good' if i % 2 else 'bad'}\ta film {i}\n" for i in range(40)))
    recipe = Recipe(
        model=str(small.model("bert", model_class="BertForSequenceClassification")),
        task="text-classification",
        data={"train": str(path), **({"columns": given} if given else {})},
        training={"max_steps": 1, "samples": 0},
    )
    if given is None:
        with pytest.raises(DataError, match=r"'good' is also a value in the lines below.*put a line with names above"):
            ak.train(recipe, tmp_path / "run", quiet=True)
        path.write_text("label\ttext\n" + path.read_text())  # the advice
        assert ak.train(recipe, tmp_path / "run", quiet=True).recipe.labels == ["bad", "good"]
    else:
        run = ak.train(recipe, tmp_path / "run", quiet=True)
        assert any("put a line with names above it" in note for note in run.metrics["notes"])


def test_files_put_together_with_their_headers(tmp_path):
    path = tmp_path / "all.csv"
    path.write_text("text,label\na,x\ntext,label\nb,y\n")
    notes = Notes()
    assert read(DataSpec(train=str(path)), notes).train[:] == {"text": ["a", "b"], "label": ["x", "y"]}
    assert notes.counts == {"headers_left_out": 1}


def test_conversations_whose_turns_differ(tmp_path):
    """A text here, a list of parts there; a call with a number here, with a text there."""
    talks = [
        [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "hello"},
        ],
        *(
            [
                {"role": "user", "content": "how many"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "count", "arguments": {"of": value}}}],
                },
            ]
            for value in (1, "one", [1])
        ),
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    found = [as_turns(value, "here") for value in read_table(path)["messages"][:]]
    assert found == [as_turns(talk, "here") for talk in talks]
    assert found[0][1]["content"] == "hi"


def test_what_the_viewer_of_the_hub_has_cut(tmp_path):
    path = tmp_path / "rows.json"
    rows = [{"row_idx": i, "row": {"text": "a"}, "truncated_cells": ["text"] * (i == 1)} for i in range(3)]
    path.write_text(json.dumps({"rows": rows[:1]}))
    assert read_table(path)["text"][:] == ["a"]
    path.write_text(json.dumps({"rows": rows}))
    with pytest.raises(DataError, match=r"has cut long values .first: row 2, text"):
        read_table(path)


def test_feather(tmp_path):
    pyarrow.feather.write_feather(pa.table({"text": ["a", "b"]}), tmp_path / "rows.feather")
    assert read_table(tmp_path / "rows.feather")["text"][:] == ["a", "b"]


def test_every_suffix_that_is_read_is_known_as_data():
    assert set(READERS) == set(DATA_SUFFIXES)


@pytest.mark.slow
def test_evaluation_and_prediction_tell_what_was_done_to_the_rows(tmp_path):
    rows = small.sentiment(40)
    run = ak.train(
        Recipe(
            model=str(small.model("bert", model_class="BertForSequenceClassification")),
            task="text-classification",
            data=str(small.write_jsonl(tmp_path / "rows.jsonl", rows)),
            training={"max_steps": 1, "samples": 0, "max_length": 12},
        ),
        tmp_path / "run",
        quiet=True,
    )
    longer = [{**row, "text": row["text"] + " film" * 20} for row in rows[:3]] + [{**rows[3], "label": None}]
    with pytest.warns(UserWarning, match="1 of 4 rows") as told:
        ak.evaluate(run, longer)
    assert any("3 of 3 texts are longer than max_length 12" in str(note.message) for note in told)
    with pytest.warns(UserWarning, match="1 of 1 texts are longer"):
        ak.predict(run, [longer[0]["text"]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ak.predict(run, ["a film"])
