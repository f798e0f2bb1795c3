"""Tags of words: spans are scored as spans in whichever scheme they are written."""

import pytest

import adapters_kit as ak
from adapters_kit.errors import DataError
from adapters_kit.tasks.token_classification import span_tags, spans
from adapters_kit.training.resolve import prepare
from tests.support import small

WORDS = ["anna", "lives", "in", "rome", "and", "paris", "."]
# One person of one word, one place of three: [anna] … [rome and paris]
SCHEMES = {
    "IOB": ["B-P", "O", "O", "B-L", "I-L", "I-L", "O"],
    "IO": ["I-P", "O", "O", "I-L", "I-L", "I-L", "O"],
    "BIOES": ["S-P", "O", "O", "B-L", "I-L", "E-L", "O"],
    "BILOU": ["U-P", "O", "O", "B-L", "I-L", "L-L", "O"],
    "BMEWO": ["W_P", "O", "O", "B_L", "M_L", "E_L", "O"],
    "behind": ["P-B", "O", "O", "L-B", "L-I", "L-I", "O"],
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_a_span_is_no_span(scheme):
    tags = SCHEMES[scheme]
    read = span_tags(sorted(set(tags)))
    truth = [read[tag] for tag in tags]
    assert spans([truth], [truth])["f1"] == 1
    guess = [*truth[:5], "O", "O"]  # the place loses its last word: one of two spans is right
    assert spans([truth], [guess]) == {"f1": 0.5, "precision": 0.5, "recall": 0.5}


def test_tags_without_a_kind_and_tags_that_are_no_spans():
    assert span_tags(["B", "I", "O"]) == {"B": "B-_", "I": "I-_", "O": "O"}
    assert span_tags(["NOUN", "VERB", "S"]) is None and span_tags(["I", "S", "O"]) is None and span_tags(["O"]) is None
    assert span_tags(["B-P", "I-P", "O", "X"]) is None


@pytest.mark.parametrize("scheme", ["BILOU", "mixed"])
def test_a_run_says_what_its_f1_is_of(tmp_path, scheme):
    tags = SCHEMES["BILOU"] if scheme == "BILOU" else [*SCHEMES["BILOU"][:-1], "[SEP]"]
    rows = [{"tokens": WORDS[: 3 + i % 5], "tags": tags[: 3 + i % 5]} for i in range(20)]
    recipe = {"model": str(small.model("bert")), "task": "token-classification", "data": rows}
    run = ak.train({**recipe, "training": {"max_steps": 1, "samples": 0}}, tmp_path / "run", quiet=True)
    assert ("precision" in run.metrics) == (scheme == "BILOU")
    assert any("[SEP] are no tags" in note for note in run.metrics["notes"]) == (scheme == "mixed")


@pytest.mark.slow
@pytest.mark.parametrize("write", [str, " ".join, lambda items: str(items).replace(",", "")])
def test_lists_that_a_table_holds_as_text(tmp_path, write):
    """As pandas, people and numpy write lists into a cell."""
    rows = [{"tokens": WORDS[: 3 + i % 5], "tags": SCHEMES["IOB"][: 3 + i % 5]} for i in range(20)]
    texts = [{name: write(cell) for name, cell in row.items()} for row in rows]
    recipe = {
        "model": str(small.model("bert")),
        "task": "token-classification",
        "training": {"max_steps": 1, "samples": 0},
    }
    runs = [ak.train({**recipe, "data": given}, tmp_path / str(i), quiet=True) for i, given in enumerate((rows, texts))]
    assert runs[0].metrics["loss"] == runs[1].metrics["loss"] and "precision" in runs[1].metrics
    assert ak.predict(runs[1], texts[2:3]) == ak.predict(runs[0], rows[2:3])


def prepared(tmp_path, rows):
    path = small.write_jsonl(tmp_path / "rows.jsonl", rows)
    return prepare(ak.Recipe(model="m", task="token-classification", data=str(path)))


def test_a_word_a_row_is_no_sentence(tmp_path):
    rows = [{"tokens": word, "tags": tag} for word, tag in zip(WORDS, SCHEMES["IOB"], strict=True)]
    with pytest.raises(DataError, match=r"one word and its tag, as 'anna'.* NAME\.conll"):
        prepare(
            ak.Recipe(model="m", task="token-classification", data=str(small.write_jsonl(tmp_path / "a.jsonl", rows)))
        )


def test_sentences_of_one_word_are_sentences(tmp_path):
    task, _ = prepared(tmp_path, [{"tokens": ["a"], "tags": [tag]} for tag in "XY" * 9])
    assert task.labels == ["X", "Y"]


def test_words_and_tags_in_a_text_file_ask_for_another_suffix(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("anna B-P\nlives O\n\nrome B-L\nis O\n\n" * 9)
    recipe = ak.Recipe(model="m", task="token-classification", data=str(path))
    with pytest.raises(DataError, match=r"name the file NAME\.conll"):
        prepare(recipe)
    task, _ = prepare(recipe.changed(data={"train": str(path.rename(tmp_path / "rows.conll"))}))
    assert task.labels == ["B-L", "B-P", "O"]


def test_minus_100_is_no_tag(tmp_path):
    rows = [{"tokens": ["a", "b"], "tags": [i % 2, -100 if i == 3 else 1]} for i in range(20)]
    with pytest.raises(DataError, match="1 of 20 training rows have no label in column 'tags': row 4"):
        prepare(
            ak.Recipe(model="m", task="token-classification", data=str(small.write_jsonl(tmp_path / "a.jsonl", rows)))
        )
