"""Evaluating a causal model without the logits of a whole row, which at 128,000 words are gigabytes."""

import pytest
import torch
import torch.nn.functional as F

import adapters_kit as ak
from adapters_kit.kernels import token_scores
from adapters_kit.kernels.cross_entropy import LazyLogits, chunked_loss
from adapters_kit.kernels.token_scores import lazy_head, log_probabilities
from tests.support import tiny


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("way", ["bare", "lora", "chunked", "prompt"])
def test_scores_are_those_of_the_logits_and_only_a_few_tokens_have_them(family, way, monkeypatch):
    model = tiny.build(family)
    if way != "bare":
        model = ak.wrap(model, "prompt" if way == "prompt" else "lora")
    if way == "chunked":
        chunked_loss(model)
    model.eval()
    batch = tiny.inputs(model, batch=2, length=9, labels=True, padding="right")
    labels = batch.pop("labels").index_fill(1, torch.tensor([2]), -100)
    most = []
    real = LazyLogits.make
    monkeypatch.setattr(LazyLogits, "make", lambda self: (most.append(len(self.hidden)), real(self))[1])
    monkeypatch.setattr(token_scores, "tokens_at_once", lambda *_: 3)
    with torch.no_grad():
        with lazy_head(model) as lazy:
            found = log_probabilities(model(**batch, use_cache=False).logits, labels)
        logits = model(**batch, use_cache=False).logits[:, -9:]
    assert lazy and isinstance(logits, torch.Tensor), "afterwards the model is as it was"
    assert most and max(most) <= 3
    expected = -F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(found, expected.view(found.shape), rtol=1e-5, atol=1e-5)


def test_a_head_of_its_own_kind_makes_its_logits():
    model = ak.wrap(tiny.build("llama"), "lora", target_modules=["lm_head"])
    with lazy_head(model) as lazy, torch.no_grad():
        assert isinstance(model(**tiny.inputs(model, batch=1, length=4)).logits, torch.Tensor)
    assert not lazy
