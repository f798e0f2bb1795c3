"""Under several processes: what is trained and a step does not use; BigBird, whose attention hangs on lengths."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BigBirdConfig, BigBirdForSequenceClassification

import adapters_kit as ak
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.sparse_attention import attend_fully
from adapters_kit.training.loop import leaves_some_out
from tests.support import tiny

BATCH = {"input_ids": torch.arange(5, 45).view(1, 40), "attention_mask": torch.ones(1, 40), "labels": torch.tensor([0])}
BY_MODEL = SimpleNamespace(loss=lambda model, batch: model(**batch).loss)  # a task whose loss is the model's


@pytest.fixture(scope="module")
def bigbird():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sparse = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    config = BigBirdConfig(vocab_size=tiny.VOCAB, max_position_embeddings=128, pad_token_id=0, **sizes, **sparse)
    return BigBirdForSequenceClassification(config).eval()


def test_bigbird_answers_a_row_as_alone(bigbird):
    notes = Notes()
    attend_fully(bigbird, "m", 64, notes)
    assert "attends fully" in notes.sentences[0] and "up to 28 tokens" in notes.sentences[0]
    longer = torch.zeros(2, 60, dtype=torch.long)
    longer[0, :40], longer[1] = BATCH["input_ids"][0], 7
    with torch.no_grad():
        alone = bigbird(input_ids=longer[:1, :40]).logits
        beside = bigbird(input_ids=longer, attention_mask=(longer != 0).long()).logits[:1]
    torch.testing.assert_close(alone, beside)
    quiet = Notes()
    attend_fully(bigbird, "m", 64, quiet)
    assert not quiet.sentences


def test_what_a_step_leaves_out_is_found(bigbird):
    wrapped = ak.wrap(bigbird, "lora", r=2).train()
    state = torch.get_rng_state()
    assert leaves_some_out(wrapped, BATCH, BY_MODEL)  # its pooler, which the head does not read
    assert torch.equal(torch.get_rng_state(), state)
    assert not leaves_some_out(
        ak.wrap(tiny.build("bert", model_class="BertForSequenceClassification"), "lora"), BATCH, BY_MODEL
    )
    dropping = tiny.build("bart", encoder_layerdrop=0.1)
    assert leaves_some_out(ak.wrap(dropping, "lora"), BATCH, BY_MODEL)
