"""Special tokens in a model's configs that are none of its tokens: refused by name, or said and not looked at."""

import json
import shutil

import pytest

import adapters_kit as ak
from adapters_kit.errors import ModelError
from adapters_kit.tasks.generation import set_stops
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.special_ids import check_special
from tests.support import small, tiny


def changed(tmp_path, family, **keys):
    """A copy of a small model whose config says this."""
    folder = shutil.copytree(small.model(family), tmp_path / "model")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))
    return str(folder)


@pytest.mark.parametrize("pad", [tiny.VOCAB, -tiny.VOCAB - 1])
def test_padding_behind_the_vocabulary_is_refused(tmp_path, pad):
    with pytest.raises(ModelError, match=rf"pad_token_id is {pad} in the config.json .*tokens 0 to 127. Set it there"):
        ak.load(changed(tmp_path, "llama", pad_token_id=pad))
    ak.load(changed(tmp_path / "mended", "llama", pad_token_id=0))  # the advice


@pytest.mark.parametrize("start", [tiny.VOCAB, -1])
def test_a_start_that_is_no_token_is_refused(tmp_path, start):
    model = ak.load(changed(tmp_path, "t5", decoder_start_token_id=start), "seq2seq")
    with pytest.raises(ModelError, match=f"decoder_start_token_id is {start} .*tokens 0 to 127"):
        check_special(model, "m", model.get_input_embeddings().num_embeddings, Notes())


def test_others_are_said_and_stop_nothing(tmp_path):
    model = ak.load(changed(tmp_path, "llama", pad_token_id=-1, eos_token_id=[2, 999]))
    notes, tokens = Notes(), small.tokenizer(encoder=False)
    check_special(model, "m", tiny.VOCAB, notes)
    (said,) = notes.sentences
    assert "pad_token_id -1" in said and "eos_token_id [2, 999]" in said
    model.generation_config.eos_token_id = -1
    set_stops(model, tokens)
    assert model.generation_config.eos_token_id == tokens.eos_token_id
    check_special(model, "m", None, Notes())  # not known how many there are
