"""What stands in front of a text displaces neither labels, nor places of answers, nor the token that is read."""

import pytest
import torch
from torch import nn

import adapters_kit as ak
from tests.support import tiny

METHODS = ("prompt", "p-tuning")
COUNT = 3


def wrapped(family, method, model_class):
    torch.manual_seed(0)
    return ak.wrap(tiny.build(family, model_class=model_class), method, num_virtual_tokens=COUNT).eval()


def batch(rows=2, length=7):
    draw = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(5, tiny.VOCAB, (rows, length), generator=draw),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
    }


@pytest.mark.parametrize("method", METHODS)
def test_tags_are_learned_at_their_own_tokens(method):
    model, given = wrapped("bert", method, "BertForTokenClassification"), batch()
    tags = torch.randint(0, 2, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = model(**given, labels=tags)
    assert out.logits.shape[1] == COUNT + 7
    expected = nn.functional.cross_entropy(out.logits[:, COUNT:].flatten(0, 1), tags.flatten())
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_learned_at_their_own_places(method):
    model, given = wrapped("bert", method, "BertForQuestionAnswering"), batch()
    starts, ends = torch.tensor([1, 3]), torch.tensor([2, 6])
    with torch.no_grad():
        out = model(**given, start_positions=starts, end_positions=ends)
    losses = [
        nn.functional.cross_entropy(logits[:, COUNT:].float(), places)
        for logits, places in ((out.start_logits, starts), (out.end_logits, ends))
    ]
    # The places before the text are candidates of the model's own loss too: nearly the same number, and never less.
    assert out.loss >= sum(losses) / 2
    everywhere = [
        nn.functional.cross_entropy(logits.float(), places + COUNT)
        for logits, places in ((out.start_logits, starts), (out.end_logits, ends))
    ]
    torch.testing.assert_close(out.loss, sum(everywhere) / 2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_a_decoder_is_read_at_the_last_token_of_each_text(method, side):
    model, given = wrapped("llama", method, "LlamaForSequenceClassification"), batch(1)
    with torch.no_grad():
        alone = model(**given).logits
        filler = torch.full((1, 4), 9)
        parts = [filler, given["input_ids"]] if side == "left" else [given["input_ids"], filler]
        mask = torch.cat([torch.zeros_like(part) if part is filler else torch.ones_like(part) for part in parts], dim=1)
        padded = model(input_ids=torch.cat(parts, dim=1), attention_mask=mask).logits
    if side == "right":  # on the left, positions move with the padding
        torch.testing.assert_close(padded, alone)
    else:
        assert padded.shape == alone.shape
