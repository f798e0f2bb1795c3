"""Sentence embeddings: what is learned, scored and shipped, with sentence-transformers as the judge."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import nn

import adapters_kit as ak
from adapters_kit import tasks
from adapters_kit.errors import DataError, ModelError
from adapters_kit.loading import load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.wrapping import wrap
from tests.support import small

TASK = "sentence-embedding"
EXAMPLE = Path(__file__).parents[2] / "examples" / "recipes" / "sentence_embedding.yaml"


def pairs(count: int, seed: int = 0) -> list[dict]:
    """A question and the sentence that answers it: both name the same person, at the same place."""
    rows = small.questions(count, seed)
    return [{"anchor": f"{row['question']} {row['answer']}", "positive": row["context"]} for row in rows]


def triplets(count: int, seed: int = 0) -> list[dict]:
    others = pairs(count, seed + 5)
    return [{**row, "negative": other["positive"]} for row, other in zip(pairs(count, seed), others, strict=True)]


def scored(count: int, seed: int = 0) -> list[dict]:
    one, two = small.questions(count, seed), small.questions(count, seed + 3)
    return [
        {
            "sentence1": a["context"],
            "sentence2": b["context"],
            "score": float(a["name"] == b["name"]) + float(a["answer"] == b["answer"]),
        }
        for a, b in zip(one, two, strict=True)
    ]


def columns(rows: list[dict]) -> dict[str, str]:
    roles = {"anchor": "anchor", "sentence1": "anchor", "sentence2": "positive"}
    return {roles.get(name, name): name for name in rows[0]}


def bound(rows: list[dict], folder: Path, model: nn.Module | None = None, **recipe) -> tuple[tasks.Task, Dataset]:
    made = tasks.get(TASK)(Recipe(model=str(folder), task=TASK, data="x", **recipe), columns(rows))
    data = Dataset.from_list(rows)
    made.fit(data, None)
    made.bind(load_processor(folder), model if model is not None else ak.load(folder, TASK))
    return made, data


def with_layers(folder: Path, *layers: nn.Module) -> Path:
    """A copy of a model's folder with sentence-transformers' own files in it."""
    whole = SentenceTransformer(str(folder))
    made = SentenceTransformer(modules=[whole[0], *layers])
    made.save(str(folder.parent / f"{folder.name}-layers"))
    return folder.parent / f"{folder.name}-layers"


@pytest.mark.parametrize("make", [pairs, triplets, scored])
def test_a_run_learns_and_sentence_transformers_opens_what_it_ships(make, tmp_path, monkeypatch):
    folder = small.model("bert")
    held_out = 0 if make is scored else 1  # which pairs are alike is learned by heart
    parts = {"train": make(96), "test": make(96, held_out)}
    data = {name: str(small.write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in parts.items()}
    more = {"training.epochs": 6.0, "training.batch_size": 16, "training.learning_rate": 5e-3}
    recipe = Recipe.read(EXAMPLE).changed(model=str(folder), data=data, **more)
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    metric = "spearman" if make is scored else "ndcg@10"
    assert run.metrics["loss"] < 0.98 * run.metrics["base_loss"]
    assert run.metrics[metric] > run.metrics[f"base_{metric}"] + 0.02
    again = ak.evaluate(run.path)
    assert again[metric] == pytest.approx(run.metrics[metric], rel=1e-5)
    assert ("triplet_accuracy" in again) == (make is triplets)
    texts = [row["context"] for row in small.questions(5, seed=9)]
    ours = np.asarray([row["embedding"] for row in ak.predict(run, [{"anchor": text} for text in texts])])
    merged = ak.merge(run, tmp_path / "merged").path
    monkeypatch.chdir(run.adapter)  # from there on it names a base on this disk
    for path in (".", merged):
        theirs = SentenceTransformer(str(path)).encode(texts)
        assert np.abs(theirs - ours).max() < 2e-6
    assert "pipeline_tag: sentence-similarity" in (run.path / "README.md").read_text()


METHODS = ["lora", "dora", "houlsby", "pfeiffer", "prefix", "ia3", "vera"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_every_trained_number_gets_a_gradient(family, method):
    folder = small.model(family)
    model = ak.load(folder, TASK)
    task, data = bound(triplets(8), folder, model)
    wrapped = wrap(model, method)
    batch = task.collate(list(task.encode(data)))
    batch.pop("row")
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    task.loss(wrapped, batch).backward()
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained and not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert all(p.grad is None for name, p in wrapped.named_parameters() if name not in trained)
    assert not any("pooler" in name for name in trained)


@pytest.mark.parametrize("make", [pairs, triplets, scored])
def test_the_loss_is_that_of_sentence_transformers(make):
    """Where no two texts of the batch are equal."""
    folder = small.model("bert")
    rows = make(40)
    seen: set[str] = set()
    distinct = []
    for row in rows:
        texts = {value for value in row.values() if isinstance(value, str)}
        if not texts & seen:
            distinct.append(row)
            seen |= texts
    task, data = bound(distinct[:8], folder)
    model = ak.load(folder, TASK)
    batch = task.collate(list(task.encode(data)))
    whole = SentenceTransformer(str(folder))
    names = [name for name in distinct[0] if name != "score"]
    features = [whole.preprocess([row[name] for row in distinct[:8]]) for name in names]
    loss = CoSENTLoss(whole) if make is scored else MultipleNegativesRankingLoss(whole)
    wanted = loss(features, torch.tensor([row.get("score", 0.0) for row in distinct[:8]]))
    assert task.loss(model, batch).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_equal_texts_are_not_told_apart():
    """A batch of two rows that are the same has nothing to tell apart; a third text is told from both."""
    folder = small.model("bert")
    model = ak.load(folder, TASK)
    row, other = pairs(2, seed=1)
    task, data = bound([row, row], folder, model)
    assert task.loss(model, task.collate(list(task.encode(data)))).item() == pytest.approx(0.0, abs=1e-6)
    swapped = [row, {"anchor": row["anchor"], "positive": other["positive"]}]
    task, data = bound(swapped, folder, model)
    assert task.loss(model, task.collate(list(task.encode(data)))).item() == pytest.approx(0.0, abs=1e-6)
    task, data = bound([row, other], folder, model)
    assert task.loss(model, task.collate(list(task.encode(data)))).item() > 0.01


def test_scores_are_those_of_sentence_transformers():
    folder = small.model("bert")
    whole = SentenceTransformer(str(folder))
    rows = pairs(60)
    task, data = bound(rows, folder)
    model = ak.load(folder, TASK)
    features = task.encode(data)
    ours = task.score(task.run(model, features, 7), features)
    corpus = {text: text for text in {row["positive"] for row in rows}}
    queries = {str(i): row["anchor"] for i, row in enumerate(rows)}
    relevant = {
        str(i): {other["positive"] for other in rows if other["anchor"] == row["anchor"]} for i, row in enumerate(rows)
    }
    judge = InformationRetrievalEvaluator(queries, corpus, relevant, accuracy_at_k=[1, 5], show_progress_bar=False)
    theirs = judge(whole)
    for name in ("ndcg@10", "mrr@10", "accuracy@1", "accuracy@5"):
        assert ours[name] == pytest.approx(theirs[f"cosine_{name}"], abs=0.02), name
    rows = scored(60)
    task, data = bound(rows, folder)
    features = task.encode(data)
    judge = EmbeddingSimilarityEvaluator(*([row[name] for row in rows] for name in ("sentence1", "sentence2", "score")))
    found = task.score(task.run(model, features, 7), features)
    assert found["spearman"] == pytest.approx(judge(whole)["spearman_cosine"], abs=1e-4)


@pytest.mark.parametrize("mode", ["cls", "lasttoken", "max", "weightedmean"])
def test_the_layers_of_the_base_are_kept(mode, tmp_path):
    """Pooling, a dense layer, normalizing: as sentence-transformers has them, from training to shipping."""
    base = small.model("bert")
    width = ak.load(base, TASK).config.hidden_size
    folder = with_layers(base, Pooling(width, mode), Dense(width, 8), Normalize())
    task, _ = bound(pairs(4), folder)
    assert not task.notes.sentences
    texts = ["anna lives in rome", "ben", "where does carl live ?"]
    ours = ak.predict(str(folder), [{"anchor": text} for text in texts], task=TASK)
    theirs = SentenceTransformer(str(folder)).encode(texts)
    assert np.abs(np.asarray([row["embedding"] for row in ours]) - theirs).max() < 2e-6
    task.write_beside(tmp_path, ak.load(folder, TASK))
    named = [layer["type"].rpartition(".")[2] for layer in json.loads((tmp_path / "modules.json").read_text())]
    assert named == ["Transformer", "Pooling", "Dense", "Normalize"]


def test_lists_of_positives_and_negatives():
    """As retrieval sets have them: query, pos: [...], neg: [...]. Each positive is an example with all negatives."""
    folder = small.model("bert")
    rows = [{"anchor": "anna", "positive": ["anna lives", "anna in rome"], "negative": ["ben lives", "carl"]}] * 2
    rows[1] = {"anchor": "ben", "positive": ["ben lives"], "negative": []}
    task, data = bound(rows, folder)
    features = list(task.encode(data))
    assert [(feature["row"], len(feature["ends"])) for feature in features] == [(0, 4), (0, 4), (1, 2)]
    batch = task.collate(features)
    assert batch["example"].tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1, 1]
    model = ak.load(folder, TASK)
    assert torch.isfinite(task.loss(model, batch))
    shown = task.predict(model, data)
    assert [len(row["similarity"]) for row in shown] == [2, 1]


@pytest.mark.parametrize(
    ("rows", "recipe", "message"),
    [
        ([{"anchor": "a"}], {}, "needs? .*second column|a second column is needed"),
        ([{"anchor": "a", "positive": 3}], {}, "row 1 holds 3"),
        ([{"anchor": "a", "positive": "b", "score": "high"}], {}, "row 1 holds 'high'"),
        ([{"anchor": "a", "positive": "b", "score": 1}] * 2, {}, "one score only"),
        ([{"anchor": "a", "positive": "b", "negative": "c", "score": 1}], {}, "not both"),
        ([{"anchor": "a", "positive": "b"}] * 2, {"training": {"batch_size": 1}}, "batch_size is 1"),
    ],
)
def test_rows_that_cannot_be_learned_from(rows, recipe, message):
    with pytest.raises(DataError, match=message):
        bound(rows, small.model("bert"), **recipe)


def test_models_that_give_no_embedding(tmp_path):
    with pytest.raises(ModelError, match="encoder-decoder"):
        bound(pairs(4), small.model("t5"))
    folder = with_layers(small.model("bert"), Pooling(ak.load(small.model("bert"), TASK).config.hidden_size))
    named = json.loads((folder / "modules.json").read_text())
    named[1]["type"] = "evil.Layer"
    (folder / "modules.json").write_text(json.dumps(named))
    with pytest.raises(ModelError, match=r"evil\.Layer.*Pooling, Normalize, Dense"):
        bound(pairs(4), folder)


def test_prompts_of_the_base_are_told(tmp_path):
    folder = with_layers(small.model("bert"), Pooling(ak.load(small.model("bert"), TASK).config.hidden_size))
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prompts": {"query": "query: ", "document": ""}}))
    task, _ = bound(pairs(4), folder)
    assert any("query 'query: '" in sentence for sentence in task.notes.sentences)


def test_a_plan_counts_every_text(tmp_path):
    folder = small.model("bert")
    data = small.write_jsonl(tmp_path / "rows.jsonl", triplets(32))
    recipe = Recipe(model=str(folder), task=TASK, data=str(data), training={"batch_size": 8})
    three = ak.plan(recipe).memory
    data = small.write_jsonl(tmp_path / "pairs.jsonl", pairs(32))
    two = ak.plan(recipe.changed(data={"train": str(data)})).memory
    assert two.activations < three.activations
    assert ak.plan(recipe, length=16).memory.total > 0


def test_a_merged_reranker_is_a_cross_encoder(tmp_path):
    data = small.write_jsonl(tmp_path / "rows.jsonl", small.judgements(20))
    training = {"max_steps": 4, "learning_rate": 5e-3}
    recipe = Recipe(model=str(small.model("bert")), task="reranking", data=str(data), training=training)
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    merged = ak.merge(run, tmp_path / "merged").path
    pairs = [(row["query"], row["document"]) for row in small.judgements(3, seed=4)]
    ours = ak.predict(run, [{"query": query, "document": document} for query, document in pairs])
    theirs = CrossEncoder(str(merged)).predict(pairs)
    assert [row["score"] for row in ours] == pytest.approx(theirs.tolist(), abs=2e-6)
