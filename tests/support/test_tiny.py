"""tests/support/tiny.py itself: what the other tests lean on without saying so."""

import pytest
import torch

from tests.support import tiny


def test_there_are_families_of_every_kind():
    assert len(tiny.NAMES) >= 32
    kinds = ("decoder", "encoder", "encoder-decoder", "vision", "audio")
    assert sorted(name for kind in kinds for name in tiny.names(kind)) == sorted(tiny.names()) == sorted(tiny.NAMES)
    with pytest.raises(ValueError, match="speech"):
        tiny.names("speech")


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_family_is_seeded_random_everywhere_and_repeatable(name):
    torch.manual_seed(1)
    model = tiny.build(name)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = tiny.build(name)
    assert torch.equal(torch.get_rng_state(), state), "building leaves the test's own random state alone"
    weights = model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in again.state_dict().items())
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    neutral = [key for key, p in model.named_parameters() if p.requires_grad and ((p == 0) | (p == 1)).any()]
    assert not neutral
    batch = tiny.inputs(model, batch=3, labels=True)
    output = model(**batch)
    assert output.loss.isfinite() and not torch.allclose(output.logits[0], output.logits[1], atol=1e-3)
    torch.testing.assert_close(model.train()(**batch).logits, output.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in tiny.names() if tiny.FAMILIES[name].kind not in ("vision", "audio")])
def test_padding_is_masked_out(name):
    model = tiny.build(name)
    for side in ("left", "right"):
        batch = tiny.inputs(model, batch=3, padding=side, labels=True)
        mask = batch["attention_mask"]
        assert mask.sum(1).tolist() == [8, 6, 4]
        assert mask[:, -1 if side == "left" else 0].all()
        assert (batch["input_ids"][mask == 0] == tiny.PAD).all()
        assert model(**batch).loss.isfinite()


def test_overrides_and_other_heads():
    assert tiny.build("llama", num_hidden_layers=3).config.num_hidden_layers == 3
    model = tiny.build("bert", model_class="BertForTokenClassification", hidden_dropout_prob=0.5)
    assert model.config.hidden_dropout_prob == 0.5 and model.config.attention_probs_dropout_prob == 0
    assert tiny.inputs(model, labels=True)["labels"].shape == (2, 8)
