"""Reranking: pairs and lists, whole queries held out, scores of lists, what a run ships."""

import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import ndcg_score

import adapters_kit as ak
from adapters_kit import tasks
from adapters_kit.errors import DataError, MissingPackageError
from adapters_kit.loading import load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.tasks import metrics
from adapters_kit.tasks.notes import Notes
from adapters_kit.training.data import split
from adapters_kit.wrapping import wrap
from tests.support import small

TASK = "reranking"
PAIRS = {"query": "query", "document": "document", "label": "label"}
LISTS = {"query": "query", "positive": "positive", "negative": "negative"}


def lists(queries: int) -> list[dict]:
    rows = small.judgements(queries)
    return [
        {
            "query": rows[at]["query"],
            "positive": [rows[at]["document"]],
            "negative": [row["document"] for row in rows[at + 1 : at + 4]],
        }
        for at in range(0, len(rows), 4)
    ]


def bound(rows: list[dict], columns: dict[str, str], **recipe) -> tuple[tasks.Task, Dataset]:
    folder = small.model("bert")
    made = tasks.get(TASK)(Recipe(model=str(folder), task=TASK, data="x", **recipe), columns)
    data = Dataset.from_list(rows)
    made.fit(data, None)
    made.bind(load_processor(folder), ak.load(folder, TASK, labels=made.labels))
    return made, data


def test_lists_are_the_same_pairs_as_rows():
    one, two = bound(small.judgements(6), PAIRS), bound(lists(6), LISTS)
    rows, listed = (list(task.encode(data)) for task, data in (one, two))
    assert [row["input_ids"].tolist() for row in rows] == [row["input_ids"].tolist() for row in listed]
    assert [row["labels"] for row in rows] == [row["labels"] for row in listed] == [1.0, 0.0, 0.0, 0.0] * 6
    assert [row["row"] for row in listed] == [place // 4 for place in range(24)]


def test_grades_are_divided_by_the_highest_and_that_is_said():
    rows = [{**row, "label": 3 * row["label"] + place % 2} for place, row in enumerate(small.judgements(2))]
    task, data = bound(rows, PAIRS)
    assert max(row["labels"] for row in task.encode(data)) == 1.0
    assert any("divided" in sentence for sentence in task.notes.sentences)


def test_the_loss_is_binary_cross_entropy_and_every_trained_number_gets_a_gradient():
    task, data = bound(small.judgements(2), PAIRS)
    base = ak.load(small.model("bert"), TASK, labels=task.labels)
    task.adapt(base)
    model = wrap(base, "lora", r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = task.collate(list(task.encode(data)))
    batch.pop("row")
    loss = model(**batch).loss
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_queries_are_held_out_whole():
    rows = Dataset.from_list(small.judgements(30))
    groups = rows["query"][:]
    parts = split(rows, 0.25, 0, groups=groups)
    train, test = (set(part["query"][:]) for part in parts)
    assert not train & test
    assert len(parts.test) >= 30
    assert len(parts.train) + len(parts.test) == 120
    notes = Notes()
    alone = split(rows.select(range(4)), 0.25, 0, notes=notes, groups=groups[:4])
    assert alone.train is alone.test
    assert "belong together" in notes.sentences[0]


@pytest.mark.slow
def test_a_run_learns_ranks_and_predicts(tmp_path):
    rows = small.judgements(60)
    data = small.write_jsonl(tmp_path / "rows.jsonl", rows)
    training = {"epochs": 6, "learning_rate": 5e-3, "batch_size": 16}
    recipe = Recipe(model=str(small.model("bert")), task=TASK, data=str(data), training=training)
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    assert run.metrics["loss"] < 0.98 * run.metrics["base_loss"]
    assert {"ndcg@10", "mrr@10", "accuracy@1", "average_precision"} <= set(run.metrics)
    query, documents = rows[0]["query"], [row["document"] for row in rows[:4]]
    one = ak.predict(run, [{"query": query, "document": document} for document in documents])
    (many,) = ak.predict(run, [{"query": query, "positive": documents[:1], "negative": documents[1:]}])
    ranked = {row["document"]: row["score"] for row in many["documents"]}
    assert {row["document"]: row["score"] for row in one} == pytest.approx(ranked, abs=2e-6)
    assert list(ranked.values()) == sorted(ranked.values(), reverse=True)


def test_rankings_are_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    rankings, wanted = metrics.Rankings(), []
    for size in (2, 5, 30):
        scores, relevant = draw.normal(size=size), draw.integers(0, 4, size=size).astype(float)
        relevant[0] = 2
        rankings.add(scores, relevant)
        wanted.append(ndcg_score([relevant], [scores], k=10))
    assert rankings.means()["ndcg@10"] == pytest.approx(np.mean(wanted))
    constant = metrics.Rankings()
    constant.add(np.zeros(3), np.asarray([1.0, 0.0, 0.0]))
    assert constant.means()["accuracy@1"] == 0.0
    assert constant.means()["mrr@10"] == pytest.approx(1 / 3)


def test_pairs_of_different_queries_are_scored_as_pairs():
    rows = [{**row, "query": f"{row['query']} {row['document']}"} for row in small.judgements(3)]
    task, data = bound(rows, PAIRS)
    features = task.encode(data)
    assert task.metric == "average_precision"
    assert "ndcg@10" not in task.score([np.asarray([0.5])] * len(features), features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 1}, "All 4 pairs of the training data are relevant"),
        ({"label": "yes"}, "Reranking needs numbers; column 'label', row 1 holds 'yes'"),
        ({"label": -1}, "row 1 holds -1"),
        ({"document": 7}, "row 1 holds 7"),
    ],
)
def test_rows_that_cannot_be_learned_from(change, message):
    with pytest.raises(DataError, match=message):
        bound([{**row, **change} for row in small.judgements(1)], PAIRS)


def test_what_sentence_embedding_needs_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers.sentence_transformer.losses", None)
    rows = [{"anchor": "a", "positive": "b"}] * 2
    with pytest.raises(MissingPackageError, match=r"pip install 'adapters-kit\[embeddings\]'"):
        ak.train({"model": str(small.model("bert")), "task": "sentence-embedding", "data": rows}, quiet=True)
