"""Objectives of causal-lm: how pairs are read, what the loss is, and that every method learns by it."""

import importlib.util

import pytest
import torch
from datasets import Dataset

import adapters_kit as ak
from adapters_kit import wrap
from adapters_kit.errors import DataError, MissingPackageError, RecipeError
from adapters_kit.kernels.cross_entropy import chunked_loss
from adapters_kit.loading import load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.tasks import of
from adapters_kit.tasks.base import IGNORED
from adapters_kit.training import data
from adapters_kit.training.resolve import prepare, resolve
from tests.support import small

METHODS = ["lora", "dora", "houlsby", "pfeiffer", "prefix", "ia3", "prompt", "vera", "compacter"]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def bound(rows, objective="dpo", chat=True, **keys):
    """The task on `rows`, and its base."""
    folder = str(small.model("llama", chat=chat))
    recipe = Recipe(model=folder, task="causal-lm", objective=objective, data="-", max_new_tokens=4, **keys)
    kind, rows = of(recipe), Dataset.from_list(rows)
    task = kind(recipe, data.recognise(rows, {}, kind.needs, kind.optional))
    task.fit(rows, None)
    base = ak.load(folder, "causal-lm")
    task.bind(load_processor(folder), base)
    return task, rows, base


def said(task, feature) -> tuple[str, str]:
    """What is learned of both answers, as text."""
    words = []
    for name in ("labels", "rejected_labels"):
        words.append(task.processor.decode([i for i in feature[name] if i != IGNORED], skip_special_tokens=True))
    return words[0], words[1]


SPELLINGS = {
    "texts": {"prompt": "hello anna", "chosen": "fine", "rejected": "dull"},
    "other names": {"question": "hello anna", "response_j": "fine", "response_k": "dull"},
    "answers as turns": {
        "prompt": turns("hello anna"),
        "chosen": [{"role": "assistant", "content": "fine"}],
        "rejected": [{"role": "assistant", "content": "dull"}],
    },
    "whole conversations": {
        "prompt": "hello anna",
        "chosen": turns("hello anna", "fine"),
        "rejected": turns("hello anna", "dull"),
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    },
    "no prompt": {"chosen": turns("hello anna", "fine"), "rejected": turns("hello anna", "dull")},
    "written out": {
        "chosen": "\n\nHuman: hello anna\n\nAssistant: fine",
        "rejected": "\n\nHuman: hello anna\n\nAssistant: dull",
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_pair_is_the_same_pair(name):
    task, rows, _ = bound([SPELLINGS[name]])
    (wanted,) = bound([SPELLINGS["texts"]])[0].encode(Dataset.from_list([SPELLINGS["texts"]]))
    (feature,) = task.encode(rows)
    assert said(task, feature) == ("fine", "dull")
    for key in ("input_ids", "rejected_ids"):
        assert feature[key].tolist() == wanted[key].tolist()


def test_what_texts_begin_with_alike_is_the_prompt_and_that_is_said():
    task, rows, _ = bound([{"chosen": "the film is fine", "rejected": "the film is dull"}])
    (feature,) = task.encode(rows)
    assert said(task, feature) == ("fine", "dull")
    assert any("No column is a prompt" in one and "the film is" in one for one in task.notes.sentences)
    assert task.predict(ak.load(small.model("llama", chat=True), "causal-lm"), rows)[0]["prompt"] == "the film is"


def test_rows_that_teach_nothing_are_left_out_aloud():
    good = {"prompt": "hello", "chosen": "fine", "rejected": "dull", "score_chosen": 3.0, "score_rejected": 1.0}
    odd = [{"rejected": "fine"}, {"chosen": ""}, {"score_chosen": 1.0}]
    task, rows, _ = bound([good, *({**good, **one} for one in odd)])
    assert [feature["row"] for feature in task.encode(rows)] == [0]
    told = " ".join(task.notes.sentences)
    assert "same text as chosen and rejected" in told and "empty answer" in told and "score is not above" in told
    assert task.notes.counts["rows_left_out"] == 3
    task, rows, _ = bound([{**good, **odd[0]}])
    with pytest.raises(DataError, match="None of the 1 rows has two answers to compare: 1 have the same text"):
        task.encode(rows)


def test_answers_that_are_cut_are_counted():
    task, rows, _ = bound([{"prompt": "hello", "chosen": "fine " * 600, "rejected": "dull"}])
    task.encode(rows)
    assert any("answers are longer than max_length" in one for one in task.notes.sentences)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "fine"}, "the task needs prompt and chosen and rejected or chosen and rejected"),
        ({"prompt": "a", "chosen": "fine", "rejected": None}, "Row 1, column 'rejected': an answer is a text"),
        ({"prompt": "a", "chosen": 3, "rejected": 4}, "column 'chosen': an answer is a text or a list of turns, not 3"),
        ({"chosen": turns("a"), "rejected": turns("a", "b")}, "ends with a turn of the role user"),
    ],
)
def test_what_is_no_pair_is_refused(row, words):
    with pytest.raises(DataError, match=words):
        bound([row])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"objective": "dpoo"}, "did you mean dpo\\? It is one of dpo"),
        ({"objective": {"name": "dpo", "betta": 1}}, "no key 'betta'"),
        ({"objective": "dpo", "training": {"packing": True}}, "joins rows, which dpo compares"),
        ({"objective": "dpo", "task": "seq2seq"}, "only causal-lm has this key"),
        ({"objective": "dpo", "data": {"train": "-", "columns": {"label": "x"}}}, "dpo has no column 'label'"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(keys, words):
    with pytest.raises(RecipeError, match=words):
        Recipe(**{"model": "m", "task": "causal-lm", "data": "-", **keys})


def test_a_loss_that_trl_does_not_have_is_refused_before_work(tmp_path):
    rows = small.write_jsonl(tmp_path / "rows.jsonl", small.preferences(4))
    recipe = Recipe(
        model="nowhere", task="causal-lm", data=str(rows), objective={"name": "dpo", "loss_type": "sigmoidal"}
    )
    with pytest.raises(RecipeError, match=r"objective.loss_type: .*sigmoidal.*hinge"):
        prepare(recipe)


def test_a_missing_package_is_named_before_work(monkeypatch):
    monkeypatch.setattr("adapters_kit.training.resolve.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'adapters-kit\[trl\]'"):
        resolve(Recipe(model="nowhere", task="causal-lm", data="-", objective="dpo"))
    assert importlib.util.find_spec("trl") is not None


def sums(model, task, batch) -> torch.Tensor:
    """Log-likelihoods of the answers, from whole logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits[:, -batch["labels"].shape[1] :][:, :-1].log_softmax(-1)
    target = batch["labels"][:, 1:]
    return (logits.gather(2, target.clamp(min=0)[..., None])[..., 0] * (target != IGNORED)).sum(1)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_that_of_the_paper_and_every_trained_number_gets_a_gradient(method):
    task, rows, base = bound(small.preferences(4))
    features = list(task.encode(rows))
    task.refer(base, features, 2)
    batch = task.collate(features)
    reference = sums(base, task, batch).detach()
    assert torch.allclose(batch["reference"].float(), reference, atol=1e-4)
    model = wrap(base, method).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    chunked_loss(model)
    loss = task.loss(model, batch)
    ratio = sums(model.eval(), task, batch) - reference
    wanted = -torch.nn.functional.logsigmoid(0.1 * (ratio[:4] - ratio[4:])).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert task.score(task.run(model, features, 2), features)["loss"] == pytest.approx(wanted.item(), rel=1e-4)


def test_lazy_logits_and_whole_ones_give_the_same_gradients():
    found = []
    for lazily in (False, True):
        task, rows, base = bound(small.preferences(4))
        features = list(task.encode(rows))
        task.refer(base, features, 4)
        torch.manual_seed(0)
        model = wrap(base, "lora", r=4, init_lora_weights=False).train()
        assert not lazily or chunked_loss(model).chunked
        task.loss(model, task.collate(features)).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert found[0].any() and torch.allclose(*found, rtol=1e-4, atol=1e-7)


def test_a_run_learns_the_preference_and_is_scored_again_alike(tmp_path):
    recipe = {
        "model": str(small.model("llama")),
        "task": "causal-lm",
        "objective": {"name": "dpo", "beta": 0.2},
        "data": {"train": small.preferences(32), "test": small.preferences(8, seed=1)},
        "training": {"epochs": 3, "learning_rate": 5e-3, "batch_size": 8},
        "max_new_tokens": 4,
    }
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    assert run.metrics["base_loss"] == pytest.approx(0.6931, abs=1e-4) and run.metrics["base_rewards_accuracy"] == 0.5
    assert run.metrics["rewards_accuracy"] == 1.0 and run.metrics["rewards_margin"] > 0.5
    again = ak.evaluate(run)
    assert again["rewards_margin"] == pytest.approx(run.metrics["rewards_margin"], rel=1e-4)
    (answer,) = ak.predict(run, [{"prompt": "where does anna live ?"}])
    assert set(answer) == {"prompt", "answer"}
    card = (run.path / "README.md").read_text()
    assert "rewards_margin" in card and "dpo" in card
    plan = ak.plan(recipe)
    assert plan.trainable == run.metrics["trainable_params"]
    on = ak.train({**recipe, "method": str(run.path), "training.epochs": 1}, tmp_path / "on", quiet=True)
    assert any("reference is the base model without any adapter" in note for note in on.metrics["notes"])
    assert on.metrics["base_rewards_margin"] == 0.0
    ak.merge(run.path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()
