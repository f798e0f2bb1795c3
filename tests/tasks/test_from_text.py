"""Tasks that make what is to be learned from running text: next sentences, spans in a drawn order."""

from itertools import product

import numpy as np
import pytest
import torch
from datasets import Dataset

import adapters_kit as ak
from adapters_kit import tasks
from adapters_kit.errors import AdapterError, DataError, ModelError
from adapters_kit.loading import load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import IGNORED
from adapters_kit.wrapping import wrap
from tests.support import small

MODELS = {
    "next-sentence": ("bert", "BertForNextSentencePrediction"),
    "permutation-lm": ("xlnet", "XLNetLMHeadModel"),
}


def bound(
    name: str, rows: list[dict], model: tuple[str, str] | None = None
) -> tuple[tasks.Task, Dataset, torch.nn.Module]:
    family, model_class = model or MODELS[name]
    folder = small.model(family, model_class=model_class)
    made = tasks.get(name)(Recipe(model=str(folder), task=name, data="x"), {"text": "text"})
    data = Dataset.from_list(rows)
    made.fit(data, None)
    loaded = ak.load(folder, name)
    made.bind(load_processor(folder), loaded)
    return made, data, loaded


@pytest.mark.parametrize("name", MODELS)
def test_a_row_scores_alone_as_in_company(name):
    task, data, model = bound(name, [*small.stories(6), {"text": "anna lives.\nben ?"}])
    features = list(task.encode(data))
    together, alone = task.run(model, features, 8), task.run(model, features, 1)
    for one, other in zip(together, alone, strict=True):
        assert np.allclose(one[0], other[0], atol=1e-5)
    assert task.score(together, features)["loss"] > 0


@pytest.mark.parametrize(
    ("name", "method"), [*product(MODELS, ["lora", "ia3"]), ("next-sentence", "houlsby"), ("next-sentence", "prefix")]
)
def test_every_trained_number_gets_a_gradient(name, method):
    task, data, model = bound(name, small.stories(6))
    wrapped = wrap(model, method)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    batch = task.collate_training(list(task.encode(data))[:8])
    batch.pop("row")
    wrapped.eval()
    task.loss(wrapped, batch).backward()
    named = dict(wrapped.named_parameters())
    assert not [path for path, p in named.items() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert all(p.grad is None for p in named.values() if not p.requires_grad)


def test_a_bottleneck_beside_two_streams_is_refused():
    """XLNet reads its layers twice for spans: once for what is said, once for what is to be guessed."""
    task, data, model = bound("permutation-lm", small.stories(4))
    with pytest.raises(AdapterError, match="forward differs from the one that the adapter was placed on"):
        task.run(wrap(model, "houlsby"), list(task.encode(data)), 4)


def test_every_other_pair_has_a_sentence_of_another_text():
    task, data, model = bound("next-sentence", small.stories(30))
    features = list(task.encode(data))
    assert [feature["labels"] for feature in features] == [0, 1] * 45
    again = list(task.encode(data))
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(features, again, strict=True))
    said = [sentence for row in small.stories(30) for sentence in row["text"].split("\n")]
    for feature in features[:2]:
        first, second = task.processor.decode(feature["input_ids"]).removeprefix("[CLS] ").split(" [EOS]")[:2]
        follows = said.index(second.strip()) == said.index(first.strip()) + 1
        assert follows == (feature["labels"] == 0)
    (answer,) = task.predict(model, data.select([0]))
    assert len(answer["follows"]) == 3


def test_what_is_guessed_is_hidden():
    task, data, _ = bound("permutation-lm", small.stories(4))
    feature = task.encode(data)[0]
    batch = task.collate([feature])
    at = batch["labels"] != IGNORED
    assert at.any()
    assert (batch["input_ids"][at] == task.processor.mask_token_id).all()
    whole = torch.where(at, batch["labels"], batch["input_ids"])[0, -len(feature["input_ids"]) :]
    assert whole.tolist() == feature["input_ids"].tolist()
    assert batch["perm_mask"][0].diagonal()[at[0]].all()
    drawn = [task.collate_training([feature])["labels"] for _ in range(8)]
    assert any(not torch.equal(labels, batch["labels"]) for labels in drawn)


def test_models_and_texts_that_do_not_fit():
    with pytest.raises(ModelError, match=r"takes no order of tokens .*causal-lm and masked-lm train other models"):
        bound("permutation-lm", small.stories(4), ("gpt2", "GPT2LMHeadModel"))
    with pytest.raises(ModelError, match="no head for 'next-sentence'"):
        bound("next-sentence", small.stories(4), ("xlnet", "XLNetLMHeadModel"))
    with pytest.raises(DataError, match=r"training data: next-sentence needs two texts of several sentences"):
        bound("next-sentence", [{"text": "one two"}, {"text": "three"}])
    with pytest.raises(DataError, match="No row has text"):
        task, data, _ = bound("permutation-lm", [{"text": ""}])
        task.encode(data)
