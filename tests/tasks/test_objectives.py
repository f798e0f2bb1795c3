"""Objectives of causal-lm: how pairs are read, what the loss is, and that every method learns by it."""

import importlib.util

import pytest
import torch
from datasets import Dataset

import adapters_kit as ak
from adapters_kit import wrap
from adapters_kit.errors import DataError, MissingPackageError, ModelError, RecipeError
from adapters_kit.kernels.cross_entropy import chunked_loss
from adapters_kit.loading import load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.tasks import of
from adapters_kit.tasks.base import IGNORED
from adapters_kit.training import data
from adapters_kit.training.resolve import prepare, resolve
from tests.support import small

pytest.importorskip("trl", reason="its losses need trl: pip install 'adapters-kit[trl]'")
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
        ({"objective": "dpo", "training": {"packing": True}}, "joins rows, which dpo takes"),
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
    features = task.encode(rows)
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
        features = task.encode(rows)
        task.refer(base, features, 4)
        torch.manual_seed(0)
        model = wrap(base, "lora", r=4, init_lora_weights=False).train()
        assert not lazily or chunked_loss(model).chunked
        task.loss(model, task.collate(features)).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert found[0].any() and torch.allclose(*found, rtol=1e-4, atol=1e-7)


def judged(count: int, seed: int = 0) -> list[dict]:
    """Answers with whether they are good."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 2 else "rejected"], "label": bool(n % 2)}
        for n, row in enumerate(small.preferences(count, seed))
    ]


def prepared(method, rows, objective):
    """Task, features, and the base with an adapter of random numbers."""
    task, rows, base = bound(rows, objective)
    features = task.encode(rows)
    task.refer(base, features, 4)
    model = wrap(base, method)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return task, features, model


def check_gradients(loss, model):
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def logistic(x):
    return torch.nn.functional.logsigmoid(x)


@pytest.mark.parametrize("method", ["lora", "houlsby", "prefix", "prompt"])
def test_orpo_is_that_of_the_paper(method):
    task, features, model = prepared(method, small.preferences(4), "orpo")
    batch = task.collate(features)
    means = sums(model.eval(), task, batch) / (batch["labels"][:, 1:] != IGNORED).sum(1)
    odds = means - torch.log1p(-means.exp())
    whole = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}
    chosen = sums(model, task, whole)[:4].sum() / (whole["labels"][:4, 1:] != IGNORED).sum()
    wanted = -chosen - 0.1 * logistic(odds[:4] - odds[4:]).mean()
    loss = task.loss(model, batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    check_gradients(loss, model)
    assert task.score(task.run(model, features, 2), features)["loss"] == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "houlsby", "prefix", "prompt"])
def test_kto_is_that_of_the_paper(method):
    task, features, model = prepared(method, judged(6), "kto")
    batch = task.collate(features)
    found = sums(model.eval(), task, batch).detach() - batch["reference"].float()
    kl = found[6:].mean().clamp(min=0)
    signed = torch.where(batch["good"], found[:6] - kl, kl - found[:6])
    wanted = (1 - torch.sigmoid(0.1 * signed)).mean()
    loss = task.loss(model, batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    check_gradients(loss, model)
    assert task.score(task.run(model, features, 3), features)["loss"] == pytest.approx(wanted.item(), rel=1e-4)


def test_pairs_are_two_judged_answers_for_kto():
    task, rows, _ = bound(small.preferences(3), "kto")
    features = task.encode(rows)
    assert [feature["good"] for feature in features] == [True, False] * 3
    assert [feature["row"] for feature in features] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["yes", "no"], "Row 1, column 'label': a label is true or false .or 1 or 0., not 'yes'"),
        ([0.5, 1.0], "not 0.5. Grades become labels by a threshold"),
        ([1, 1], "All 2 answers are good .column 'label'.: KTO learns from both"),
    ],
)
def test_labels_that_say_no_yes_or_no_are_refused(labels, words):
    with pytest.raises(DataError, match=words):
        bound([{"prompt": "a", "completion": "b", "label": label} for label in labels], "kto")
    task, rows, _ = bound([{"prompt": "a", "completion": "b", "label": one} for one in ("True", "false")], "kto")
    assert [feature["good"] for feature in task.encode(rows)] == [True, False]


RUNS = {
    "dpo": (lambda count, seed: small.preferences(count, seed), {"name": "dpo", "beta": 0.2}),
    "orpo": (lambda count, seed: small.preferences(count, seed), "orpo"),
    "kto": (lambda count, seed: judged(count, seed), "kto"),
    "reward": (lambda count, seed: small.preferences(count, seed), {"name": "reward", "center": 0.01}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_is_scored_again_alike(name, tmp_path):
    rows, objective = RUNS[name]
    recipe = {
        "model": str(small.model("llama")),
        "task": "causal-lm",
        "objective": objective,
        "data": {"train": rows(32, 0), "test": rows(8, 1)},
        "training": {"epochs": 3, "learning_rate": 5e-3, "batch_size": 8},
        "max_new_tokens": 4,
    }
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    told = run.metrics
    assert told["rewards_accuracy"] == 1.0 and told["rewards_margin"] > told["base_rewards_margin"] + 0.05
    again = ak.evaluate(run)
    assert again["rewards_margin"] == pytest.approx(told["rewards_margin"], rel=1e-4)
    assert again["loss"] == pytest.approx(told["loss"], rel=1e-4)
    card = (run.path / "README.md").read_text()
    assert "rewards_margin" in card and f"by {name}" in card
    assert ak.plan(recipe).trainable == told["trainable_params"]
    ak.merge(run.path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()
    if name != "reward":
        (answer,) = ak.predict(run, [{"prompt": "where does anna live ?"}])
        assert set(answer) == {"prompt", "answer"}
        return
    good, bad = small.preferences(1, 2)[0]["chosen"], "poor weak"
    rows = [{"prompt": "where does anna live ?", "completion": text} for text in (good, bad)]
    scores = [row["score"] for row in ak.predict(run, rows)]
    assert scores[0] > scores[1]
    (pair,) = ak.predict(run, [{"prompt": rows[0]["prompt"], "chosen": good, "rejected": bad}])
    assert pair["score_chosen"] == pytest.approx(scores[0], abs=1e-4)
    assert pair["score_rejected"] == pytest.approx(scores[1], abs=1e-4)


def test_the_reference_of_an_adapter_that_goes_on_is_the_base_and_that_is_said(tmp_path):
    recipe = {
        "model": str(small.model("llama")),
        "task": "causal-lm",
        "objective": "dpo",
        "data": {"train": small.preferences(8), "test": small.preferences(4, seed=1)},
        "training": {"max_steps": 2, "learning_rate": 5e-3, "batch_size": 8, "samples": 0},
    }
    first = ak.train(recipe, tmp_path / "run", quiet=True)
    on = ak.train({**recipe, "method": str(first.path)}, tmp_path / "on", quiet=True)
    assert any("reference is the base model without any adapter" in note for note in on.metrics["notes"])
    assert on.metrics["base_rewards_margin"] == 0.0
    assert on.metrics["rewards_margin"] > first.metrics["rewards_margin"] > 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_reference_of_a_quantized_base_is_that_base(kind):
    pytest.importorskip("bitsandbytes")
    folder = str(small.model("llama"))
    base = ak.load(folder, "causal-lm", quantize=kind)
    task, rows, _ = bound(small.preferences(4), chat=False)
    features = task.encode(rows)
    task.refer(base, features, 2)
    model = wrap(base, "lora", r=4, init_lora_weights=False)
    assert task.score(task.run(model, features, 2), features)["rewards_margin"] != 0
    with model.disable_adapter():
        assert task.score(task.run(model, features, 2), features)["rewards_margin"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", ["lora", "houlsby", "prefix", "prompt"])
@pytest.mark.parametrize("chunked", [False, True])
def test_distilling_is_the_divergence_from_the_teacher(method, chunked):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in small.preferences(4)]
    teacher = str(small.model("llama", chat=True, num_hidden_layers=1))
    task, data, base = bound(rows, {"name": "distill", "teacher": teacher, "temperature": 2.0})
    features = task.encode(data)
    task.refer(base, features, 4)
    model = wrap(base, method).train()
    if chunked:
        chunked_loss(model)
    batch = task.collate(features)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    length, kept = batch["labels"].shape[1], batch["labels"][:, 1:] != IGNORED
    theirs, ours = (
        (one(**inputs).logits[:, -length:-1][kept] / 2.0).log_softmax(-1)
        for one in (ak.load(teacher, "causal-lm"), model.eval())
    )
    wanted = 4 * torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = task.loss(model, batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in [*base.parameters(), *task.teacher.parameters()] if not p.requires_grad)
    assert task.score(task.run(model, features, 2), features)["loss"] == pytest.approx(wanted.item(), rel=1e-4)


def test_a_quantized_student_comes_nearer_to_its_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    recipe = {
        "model": str(small.model("llama")),
        "task": "causal-lm",
        "objective": "distill",
        "quantize": "nf4",
        "data": {"train": [{"text": row["text"]} for row in small.sentiment(32)], "test_size": 6},
        "training": {"epochs": 8, "learning_rate": 3e-3, "batch_size": 8, "samples": 0},
    }
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    assert 0 < run.metrics["loss"] < 0.8 * run.metrics["base_loss"]
    assert ak.evaluate(run)["loss"] == pytest.approx(run.metrics["loss"], rel=1e-2)
    assert any("teacher is the base itself" in note for note in run.metrics["notes"])


def test_teachers_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError, match=r"has nothing to learn from itself\. Name a teacher, or quantize"):
        Recipe(model="m", task="causal-lm", data="-", objective="distill")
    rows = [{"text": "a fine film"}]
    task, data, base = bound(rows, {"name": "distill", "teacher": str(small.model("llama", vocab_size=160))})
    with pytest.raises(ModelError, match=r"gives 160 probabilities for a token and .* 128"):
        task.refer(base, task.encode(data), 1)
    task.processor.add_tokens(["zebra"])
    with pytest.raises(ModelError, match=r"another vocabulary than .*: 1 tokens differ .'zebra' is number None to it"):
        task.refer(base, task.encode(data), 1)
