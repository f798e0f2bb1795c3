"""Questions: without an answer, too long for the window, on tokenizers that do not say where a token was read."""

import json
import random

import pytest
import torch
import transformers

import adapters_kit as ak
from adapters_kit.errors import DataError
from adapters_kit.recipe import Recipe
from adapters_kit.tasks import question_answering as qa
from adapters_kit.tasks.slow_tokens import encode_pair, encode_words
from adapters_kit.training.resolve import prepare
from tests.support import small

NONE = {"text": [], "answer_start": []}


def rows(count, unanswerable=True, seed=0):
    """A third of the questions ask about a person who is not in the context."""
    draw = random.Random(seed)
    made = []
    for index, row in enumerate(small.questions(count, seed)):
        answers = {"text": [row["answer"]], "answer_start": [row["context"].index(row["answer"])]}
        question = row["question"]
        if unanswerable and index % 3 == 0:
            question, answers = "say hello ?", draw.choice([NONE, None, {"text": [""], "answer_start": [-1]}])
        made.append({"question": question, "context": row["context"], "answers": answers})
    return made


@pytest.mark.slow
def test_a_question_without_an_answer_is_learned_and_scored(tmp_path):
    train, test = (
        small.write_jsonl(tmp_path / "a.jsonl", rows(240)),
        small.write_jsonl(tmp_path / "b.jsonl", rows(60, seed=1)),
    )
    training = {"epochs": 12, "learning_rate": 1e-2, "head_learning_rate": 1e-2, "batch_size": 16, "evals_per_epoch": 0}
    recipe = Recipe(
        model=str(small.model("bert", model_class="BertForQuestionAnswering")),
        task="question-answering",
        data={"train": str(train), "test": str(test)},
        method={"name": "lora", "r": 8},
        training=training,
    )
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    found = run.metrics
    assert run.recipe.unanswerable is True
    assert found["no_answer_exact_match"] > 0.9
    weighted = (20 * found["no_answer_f1"] + 40 * found["has_answer_f1"]) / 60
    assert found["f1"] == pytest.approx(weighted)
    assert found["best_f1"] >= found["f1"] - 1e-9
    asked = [{key: row[key] for key in ("question", "context")} for row in rows(6)]
    answers = [row["answer"] for row in ak.predict(run.path, asked)]
    assert [not answer for answer in answers] == [True, False, False] * 2
    everything = ak.evaluate(run.path, no_answer_threshold=1e9)
    assert everything["no_answer_f1"] == 0
    best = ak.evaluate(run.path, no_answer_threshold=found["best_f1_threshold"])
    assert best["f1"] == pytest.approx(found["best_f1"])


def test_the_best_threshold_is_the_best():
    """Against trying every one."""
    draw = random.Random(0)
    for _ in range(50):
        best = {row: qa.Answer("a b", draw.uniform(-5, 5), (0, 0, 0)) for row in range(draw.randint(1, 12))}
        truth = {row: draw.choice([[], ["a b"], ["b c"], ["x"]]) for row in best}

        def score(threshold, best=best, truth=truth):
            return sum(qa.overlap_of(best[row].under(threshold), truth[row]) for row in best) / len(best)

        found, threshold = qa._best_threshold(best, truth)
        assert found == pytest.approx(score(threshold))
        assert found == pytest.approx(max(map(score, [-9, 9, *[answer.null_margin for answer in best.values()]])))


def test_answers_are_never_empty_where_all_questions_have_one(tmp_path):
    path = small.write_jsonl(tmp_path / "a.jsonl", rows(40, unanswerable=False))
    task, _ = prepare(Recipe(model="m", task="question-answering", data=str(path)))
    assert task.found()["unanswerable"] is False
    with pytest.raises(DataError, match="training rows have no answer, and the recipe says unanswerable: false"):
        path = small.write_jsonl(tmp_path / "b.jsonl", rows(40))
        prepare(Recipe(model="m", task="question-answering", data=str(path), unanswerable=False))


@pytest.mark.parametrize("words", [20, 25, 40, 70])
def test_a_question_that_fills_the_window_is_refused_by_its_row(tmp_path, words):
    made = [
        *rows(12, unanswerable=False),
        {"question": "where " * words, "context": "anna lives in rome", "answers": NONE},
    ]
    path = small.write_jsonl(tmp_path / "a.jsonl", made)
    folder = small.model("bert", model_class="BertForQuestionAnswering")
    data = {"train": str(path), "test": str(path)}
    recipe = Recipe(
        model=str(folder), task="question-answering", data=data, training={"max_length": 30, "max_steps": 1}
    )
    with pytest.raises(DataError, match=rf"Row 13: the question has {words} tokens"):
        ak.train(recipe, tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["rome"], "answer_start": []}, "1 answers with 0 positions"),
        ({"text": ["oslo"], "answer_start": [3]}, "'oslo' does not stand in the context at 3"),
        (7, "not 7"),
        ({"text": ["rome"], "answer_start": ["x"]}, "does not stand"),
    ],
)
def test_answers_that_do_not_fit(answers, message):
    row = {"q": "x", "context": "anna lives in rome", "answers": answers}
    with pytest.raises(DataError, match=message):
        qa.spans_of(row, {"context": "context", "answers": "answers"}, 0)


@pytest.fixture(scope="module")
def canine(tmp_path_factory):
    """A model of characters, whose tokenizer is written in Python."""
    folder = tmp_path_factory.mktemp("canine")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.CanineModel(
        transformers.CanineConfig(**sizes, max_position_embeddings=128, num_hash_buckets=64)
    ).save_pretrained(folder)
    transformers.CanineTokenizer(model_max_length=128).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_slow_tokenizer_answers_and_tags(tmp_path, canine):
    training = {"max_steps": 2, "batch_size": 8, "samples": 2}
    path = small.write_jsonl(tmp_path / "a.jsonl", rows(24))
    run = ak.train(
        Recipe(model=str(canine), task="question-answering", data=str(path), training=training),
        tmp_path / "qa",
        quiet=True,
    )
    assert run.metrics["loss"] > 0
    tagged = [
        {"tokens": r["words"], "tags": ["B-X" if w in small.NAMES else "O" for w in r["words"]]}
        for r in small.questions(24)
    ]
    path = small.write_jsonl(tmp_path / "b.jsonl", tagged)
    run = ak.train(
        Recipe(model=str(canine), task="token-classification", data=str(path), training=training),
        tmp_path / "ner",
        quiet=True,
    )
    (answer,) = ak.predict(run.path, [{"tokens": ["anna", "lives"]}])
    assert all(answer["tags"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["CanineTokenizer", "ByT5Tokenizer"])
def test_places_of_tokens_that_are_not_told(kind):
    """The pieces of windows spell what stands at the places that are said of them."""
    tokenizer = getattr(transformers, kind)()
    context = "anna lives in zürich and ben  lives in oslo ."
    windows = encode_pair(tokenizer, "where ?", context, 30, 6)
    assert len(windows) > 1
    seen = set()
    for ids, types, offsets, inside in windows:
        assert len(ids) <= 30
        assert len(ids) == len(types) == len(offsets) == len(inside)
        text = "".join(
            context[begin] for begin in sorted({b for (b, _), i in zip(offsets.tolist(), inside, strict=True) if i})
        )
        decoded = tokenizer.decode([i for i, keep in zip(ids, inside, strict=True) if keep])
        assert decoded.replace("�", "") in text.replace(" ", "") + decoded
        seen |= {int(begin) for (begin, _), keep in zip(offsets, inside, strict=True) if keep}
    assert seen == {i for i, letter in enumerate(context) if letter != " "}
    ids, owner = encode_words(tokenizer, ["anna", "lives"], 7)
    assert len(ids) == len(owner) == 7
    assert set(owner) - {None} == {0, 1} if kind == "ByT5Tokenizer" else {0, 1} >= set(owner) - {None}


ROME = "anna lives in rome , ben in rome too"


def given(tmp_path, answers, count=12):
    made = [{"question": "where", "context": f"{i} {ROME}", "answers": answers(f"{i} {ROME}")} for i in range(count)]
    path = small.write_jsonl(tmp_path / "rows.jsonl", made)
    return prepare(Recipe(model="m", task="question-answering", data=str(path)))


@pytest.mark.parametrize(
    "write",
    [
        lambda found: found,
        str,
        json.dumps,
        lambda found: {**found, "answer_start": [str(at) for at in found["answer_start"]]},
        lambda found: [{"text": found["text"][0], "answer_start": found["answer_start"][0]}],
    ],
)
def test_answers_in_the_spellings_of_tables(tmp_path, write):
    task, parts = given(tmp_path, lambda context: write({"text": ["rome"], "answer_start": [context.rindex("rome")]}))
    for row in parts.train:
        assert qa.spans_of(row, task.columns, 0) == [(row["context"].rindex("rome"), "rome")]
    assert not task.unanswerable and "answers_placed_first" not in task.notes.counts


def test_a_blank_at_the_end_of_an_answer_is_of_no_token(tmp_path):
    task, parts = given(tmp_path, lambda context: {"text": [" rome "], "answer_start": [context.index(" rome")]})
    row = parts.train[0]
    assert qa.spans_of(row, task.columns, 0) == [(row["context"].index("rome"), "rome")]
    assert qa.spans_of({**row, "answers": " "}, task.columns, 0) == []


def test_an_answer_longer_than_any_that_is_given_is_told(tmp_path):
    rows = [{"question": "where", "context": "film " * 45, "answers": {"text": ["film " * 40], "answer_start": [0]}}]
    recipe = {"model": str(small.model("bert")), "task": "question-answering", "data": rows * 8}
    run = ak.train({**recipe, "training": {"max_steps": 1, "samples": 0}}, tmp_path / "run", quiet=True)
    assert run.metrics["counts"]["answers_long"] == 8 and "answers_cut" not in run.metrics["counts"]


def test_an_answer_in_another_place_says_where_it_stands(tmp_path):
    for wrong in (15, 17, 999, -3):
        with pytest.raises(DataError, match=rf"Row 1: .* at {wrong}\. It first stands at 16; places count characters"):
            given(tmp_path, lambda _, at=wrong: {"text": ["rome"], "answer_start": [at]})
    with pytest.raises(DataError, match="It stands nowhere in it"):
        given(tmp_path, lambda _: "Rome")
    task, _ = given(tmp_path, lambda _: "rome")
    assert task.notes.counts["answers_placed_first"] == 12


@pytest.mark.parametrize(
    "given",
    [
        {"value": "rome", "aliases": ["roma"]},
        {"spans": ["rome"], "types": ["span"]},
        "{'text': array(['rome'], dtype=object), 'answer_start': array([9], dtype=int32)}",
        "{'spans': ['rome']}",
    ],
)
def test_answers_as_other_data_sets_write_them(given):
    row = {"context": "she saw: rome", "answers": given}
    assert qa.spans_of(row, {"context": "context", "answers": "answers"}, 0) == [(9, "rome")]


@pytest.mark.parametrize("given", [{"aliases": ["rome"]}, {"text": 7}, {"text": ["rome"], "answer_start": 8}])
def test_an_object_that_is_no_answer_is_refused(given):
    """Not taken for a question without one."""
    row = {"context": "she saw rome", "answers": given}
    with pytest.raises(DataError, match="Row 1: answers are"):
        qa.spans_of(row, {"context": "context", "answers": "answers"}, 0)
