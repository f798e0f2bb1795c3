"""A prefix and what a model is given: caches, beams, assistants, embeddings, masks, packed rows, sliding windows."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import adapters_kit as ak
from adapters_kit.methods.prefix.model import prefix_layers
from tests.methods.test_prefix import CLOSE, DECODERS, EAGER_ONLY, GENERATORS, TEXT, fill, logits, wrapped
from tests.support import tiny

GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": tiny.PAD}


def prompt(model, padding="left"):
    batch = tiny.inputs(model, padding=padding if model.get_base_model().main_input_name == "input_ids" else None)
    batch.pop("decoder_input_ids", None)
    return batch


def new_tokens(model, batch, **options):
    with torch.no_grad():
        return model.generate(**batch, **GREEDY, **options)


@pytest.mark.parametrize("name", GENERATORS)
def test_generation_is_the_same_with_every_cache(name):
    model = wrapped(name)
    batch = prompt(model)
    without = new_tokens(model, batch, use_cache=False)
    assert torch.equal(new_tokens(model, batch), without)
    assert torch.equal(new_tokens(model, batch, cache_implementation="static", disable_compile=True), without)


@pytest.mark.parametrize("name", GENERATORS)
def test_beams_and_assistants_find_what_plain_search_finds(name):
    model = wrapped(name)
    batch = prompt(model)
    beams = new_tokens(model, batch, num_beams=3)
    assert torch.equal(new_tokens(model, batch, num_beams=3, use_cache=False), beams)
    one = {key: value[:1] for key, value in batch.items()}
    greedy = new_tokens(model, one)
    if name != "whisper":  # prompt lookup needs text to look up, and Whisper reads sound
        assert torch.equal(new_tokens(model, one, prompt_lookup_num_tokens=3), greedy)
    assert torch.equal(new_tokens(model, one, assistant_model=tiny.build(name)), greedy)


@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_of_ones_own_filled_in_two_steps(name):
    model = wrapped(name)
    batch = tiny.inputs(model)
    full = logits(model, **batch)
    config = model.get_base_model().config
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=16)):
        first = logits(model, input_ids=ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache)
        second = logits(model, input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cache)
        torch.testing.assert_close(torch.cat([first, second], 1), full, **CLOSE)
        assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("name", [name for name in GENERATORS if name not in DECODERS])
def test_a_cache_of_ones_own_in_an_encoder_decoder(name):
    model = wrapped(name)
    batch = tiny.inputs(model)
    full = logits(model, **batch)
    ids = batch.pop("decoder_input_ids")
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    steps = [logits(model, **batch, decoder_input_ids=part, past_key_values=cache) for part in (ids[:, :3], ids[:, 3:])]
    torch.testing.assert_close(torch.cat(steps, 1), full, **CLOSE)
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("name", TEXT)
def test_inputs_embeds_equal_input_ids(name):
    model = wrapped(name)
    batch = tiny.inputs(model, padding="right")
    expected = logits(model, **batch)
    ids = batch.pop("input_ids")
    got = logits(model, inputs_embeds=model.get_input_embeddings()(ids), **batch)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", TEXT)
def test_a_four_dimensional_mask_is_respected(name):
    model = wrapped(name)
    batch = tiny.inputs(model, length=4)  # within every window: there the model's own mask is this one
    del batch["attention_mask"]
    expected = logits(model, **batch)
    seen = torch.ones(2, 1, 4, 4)
    if name in DECODERS:
        seen = seen.tril()
        batch["position_ids"] = torch.arange(4)[None].expand(2, 4)  # OPT would count them in a mask of two dimensions
    holes = seen * (torch.rand(seen.shape, generator=torch.Generator().manual_seed(3)) < 0.6)
    holes = torch.maximum(holes, torch.eye(4))
    found = []
    for attn in ("eager", "eager" if name in EAGER_ONLY else "sdpa"):
        model.get_base_model().set_attn_implementation(attn)
        whole, some = (
            logits(model, **batch, attention_mask=(1 - mask) * torch.finfo(torch.float32).min) for mask in (seen, holes)
        )
        torch.testing.assert_close(whole, expected, **CLOSE)
        assert (some - whole).abs().max() > 1e-3
        found.append(some)
    torch.testing.assert_close(*found, **CLOSE)


# OPT and gpt-oss do not keep packed sequences apart without a prefix either: the test below.
APART = [name for name in DECODERS if name not in ("opt", "gpt-oss")]


@pytest.mark.parametrize("name", APART)
def test_packed_sequences_each_see_the_prefix_and_not_each_other(name):
    model = wrapped(name)
    ids = tiny.inputs(model, batch=1, length=12)["input_ids"]
    apart = [logits(model, input_ids=part) for part in (ids[:, :5], ids[:, 5:])]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = logits(model, input_ids=ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed, torch.cat(apart, 1), **CLOSE)


@pytest.mark.parametrize("name", ["opt", "gpt-oss"])
def test_packed_sequences_mix_without_a_prefix_too(name):
    """Once this fails, the two belong into `APART`."""
    model = tiny.build(name)
    ids = tiny.inputs(model, batch=1, length=12)["input_ids"]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert (packed[:, 5:] - model(input_ids=ids[:, 5:]).logits).abs().max() > 0.1


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "starcoder2", "gpt-oss", "modernbert"])
def test_a_sliding_window_never_hides_the_prefix(name):
    window = {"local_attention": 8} if name == "modernbert" else {"sliding_window": 8}
    model = tiny.build(name, num_hidden_layers=1 if name != "gemma3" else 2, **window)
    model = fill(ak.wrap(model, "prefix", num_virtual_tokens=3)).eval()
    ids = tiny.inputs(model, batch=1, length=60)["input_ids"]
    layer = prefix_layers(model)[0]
    out = model.get_base_model().base_model(input_ids=ids).last_hidden_state
    key, value = layer.prefix_key["default"], layer.prefix_value["default"]
    grads = torch.autograd.grad(out[0, 50].square().sum(), (key, value))
    assert all(grad.abs().max() > 1e-6 for grad in grads)
