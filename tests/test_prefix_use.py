"""A prefix in use: generation with every cache, checkpointing, packing, windows, several prefixes, trainers, dtypes."""

import pytest
import tiny
import torch
from peft import PeftModel
from test_prefix import CLOSE, DECODERS, EAGER_ONLY, ON, fill, logits, wrapped
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import adapters_kit as ak
from adapters_kit.methods.prefix import prefix_layers

SEQ2SEQ = [*tiny.names("encoder-decoder"), "whisper"]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": tiny.PAD}


def prompt(model, padding="left"):
    batch = tiny.inputs(model, padding=padding if model.get_base_model().main_input_name == "input_ids" else None)
    batch.pop("decoder_input_ids", None)
    return batch


def new_tokens(model, batch, **options):
    with torch.no_grad():
        return model.generate(**batch, **GREEDY, **options)


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_generation_is_the_same_with_every_cache(name):
    model = wrapped(name)
    batch = prompt(model)
    without = new_tokens(model, batch, use_cache=False)
    assert torch.equal(new_tokens(model, batch), without)
    assert torch.equal(new_tokens(model, batch, cache_implementation="static", disable_compile=True), without)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "deepseek-v3", "gpt-oss", "t5", "bart"])
def test_beams_and_assistants_find_what_plain_search_finds(name):
    model = wrapped(name)
    batch = prompt(model)
    beams = new_tokens(model, batch, num_beams=3)
    assert torch.equal(new_tokens(model, batch, num_beams=3, use_cache=False), beams)
    one = {key: value[:1] for key, value in batch.items()}
    greedy = new_tokens(model, one)
    assert torch.equal(new_tokens(model, one, prompt_lookup_num_tokens=3), greedy)
    if name in ("llama", "gpt2"):
        assert torch.equal(new_tokens(model, one, assistant_model=tiny.build(name)), greedy)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi", "gpt2"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_ones_own_filled_in_two_steps(name, kind):
    model = wrapped(name)
    batch = tiny.inputs(model)
    full = logits(model, **batch)
    config = model.get_base_model().config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=16)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    first = logits(model, input_ids=ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache)
    second = logits(model, input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(torch.cat([first, second], 1), full, **CLOSE)
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "opt"])
def test_inputs_embeds_equal_input_ids(name):
    model = wrapped(name)
    batch = tiny.inputs(model)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    expected = logits(model, **batch)
    got = logits(model, inputs_embeds=embedded, attention_mask=batch["attention_mask"])
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_four_dimensional_mask_is_respected(name, attn):
    model = wrapped(name, attn=attn)
    batch = tiny.inputs(model)
    expected = logits(model, **batch)
    causal = torch.ones(8, 8).tril()[None, None].expand(2, 1, 8, 8)
    mask = (1 - causal) * torch.finfo(torch.float32).min
    torch.testing.assert_close(logits(model, input_ids=batch["input_ids"], attention_mask=mask), expected, **CLOSE)


# GPT-2 and OPT look positions up in a table of their own, and gpt-oss itself does not keep packed sequences apart.
@pytest.mark.parametrize("name", [name for name in DECODERS if name not in ("gpt2", "opt", "gpt-oss")])
def test_packed_sequences_each_see_the_prefix_and_not_each_other(name):
    model = wrapped(name)
    ids = tiny.inputs(model, batch=1, length=12)["input_ids"]
    apart = [logits(model, input_ids=part) for part in (ids[:, :5], ids[:, 5:])]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = logits(model, input_ids=ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed, torch.cat(apart, 1), **CLOSE)


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


@pytest.mark.parametrize("name", ON)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(name, reentrant):
    model = wrapped(name)
    if not model.get_base_model().supports_gradient_checkpointing:
        pytest.skip("the model has no gradient checkpointing")
    batch = tiny.inputs(model, labels=True)
    model.train()

    def grads():
        model.zero_grad()
        model(**batch).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if ".prefix_" in key and p.grad is not None}

    plain = grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    saved = grads()
    assert plain.keys() == saved.keys() and len(plain) == 2 * len(prefix_layers(model))
    for key in plain:
        torch.testing.assert_close(saved[key], plain[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_encoder_decoders_have_three_kinds_of_prefix(name):
    whole = wrapped(name)
    paths = set(whole.peft_config["default"].shapes)
    apart = {}
    for kind in ("encoder", "decoder", "cross"):
        model = wrapped(name, attentions=kind)
        apart[kind] = set(model.peft_config["default"].shapes)
        batch = tiny.inputs(model)
        with model.disable_adapter():
            base = model(**batch)
        ours = model(**batch)
        moved = (ours.encoder_last_hidden_state - base.encoder_last_hidden_state).abs().max() > 1e-3
        assert moved == (kind == "encoder") and (ours.logits - base.logits).abs().max() > 1e-3
    assert paths == set.union(*apart.values()) and sum(map(len, apart.values())) == len(paths) == 6


def test_t5_keeps_its_position_bias_for_real_tokens():
    """A prefix that nobody attends to leaves the model as it was; a shifted bias would not."""
    model = wrapped("t5")
    for layer in prefix_layers(model):
        layer.prefix_key["default"].data.zero_()
        layer.prefix_value["default"].data.zero_()
        layer._bias = lambda names, parts, query: torch.full((len(query), 1, query.shape[2], 3), -1e9)
    batch = tiny.inputs(model, padding="right")
    ours = logits(model, **batch)
    with model.disable_adapter():
        torch.testing.assert_close(ours, logits(model, **batch), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "deepseek-v3", "whisper", "mistral"])
def test_each_row_of_a_mixed_batch_gets_its_own_prefix(name):
    model = wrapped(name)
    ak.wrap(model, "prefix", adapter_name="long", num_virtual_tokens=5)
    fill(model, "long", seed=9).eval()
    model.set_adapter("default")
    batch = tiny.inputs(model, batch=3)
    expected = []
    for row, adapter in enumerate(["long", "__base__", "default"]):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        if adapter == "__base__":
            with model.disable_adapter():
                expected.append(logits(model, **one))
        else:
            model.set_adapter(adapter)
            expected.append(logits(model, **one))
    for attn in ("sdpa", "eager"):
        model.get_base_model().set_attn_implementation(attn)
        mixed = logits(model, **batch, adapter_names=["long", "__base__", "default"])
        torch.testing.assert_close(mixed, torch.cat(expected), **CLOSE)
    with pytest.raises(ak.AdapterError, match=r"'lomg'.*long"):
        model(**batch, adapter_names=["lomg"] * 3)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_mixed_batches_generate_with_beams(name):
    model = wrapped(name)
    ak.wrap(model, "prefix", adapter_name="long", num_virtual_tokens=5)
    fill(model, "long", seed=9).eval()
    batch = prompt(model, padding=None)
    for search in ({}, {"num_beams": 2}):
        mixed = new_tokens(model, batch, adapter_names=["long", "default"], **search)
        for row, adapter in enumerate(["long", "default"]):
            model.set_adapter(adapter)
            alone = new_tokens(model, {key: value[row : row + 1] for key, value in batch.items()}, **search)
            assert torch.equal(mixed[row], alone[0])


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_two_prefixes_switch_stack_and_go(name, tmp_path):
    model = wrapped(name)
    batch = tiny.inputs(model)
    first = logits(model, **batch)
    ak.wrap(model, "prefix", adapter_name="long", num_virtual_tokens=5)
    fill(model, "long", seed=9).eval()
    second = logits(model, **batch)
    model.base_model.set_adapter(["default", "long"])
    both = logits(model, **batch)
    assert (first - second).abs().max() > 1e-3 < (both - second).abs().max()
    assert {len(layer(*[torch.zeros(1, 4, 1, 16)] * 2).key[0, 0]) for layer in prefix_layers(model)} == {8}
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    model.set_adapter("long")
    torch.testing.assert_close(logits(model, **batch), second)
    again = PeftModel.from_pretrained(tiny.build(name), tmp_path, adapter_name="a")
    again.load_adapter(tmp_path / "long", "b")
    torch.testing.assert_close(logits(again, **batch), first)
    again.set_adapter("b")
    torch.testing.assert_close(logits(again, **batch), second)


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_ejecting_the_mlp_changes_no_output(name, tmp_path):
    torch.manual_seed(0)
    model = ak.wrap(tiny.build(name), "prefix", num_virtual_tokens=3, prefix_projection=True, projection_hidden_size=8)
    batch = tiny.inputs(model, labels=True)
    model(**batch).loss.backward()
    ours = [p for key, p in model.named_parameters() if ".prefix_" in key]
    assert all(p.grad.abs().sum() > 0 for p in ours)
    model.eval()
    expected = logits(model, **batch)
    model.save_pretrained(tmp_path / "mlp")
    assert ak.eject(model) == len(prefix_layers(model))
    assert ak.eject(model) == 0
    torch.testing.assert_close(logits(model, **batch), expected)
    assert all(p.requires_grad for key, p in model.named_parameters() if ".prefix_" in key)
    model.save_pretrained(tmp_path / "flat")
    for folder in ("mlp", "flat"):
        again = PeftModel.from_pretrained(tiny.build(name), tmp_path / folder)
        torch.testing.assert_close(logits(again, **batch), expected)


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_start_from_activations_is_what_the_model_computes(name):
    ids = [5, 9, 11, 7]
    model = ak.wrap(tiny.build(name), "prefix", num_virtual_tokens=6, init_ids=ids).eval()
    layer = prefix_layers(model)[0]
    key = layer.prefix_key["default"]
    torch.testing.assert_close(key[4:], key[:2])  # repeated
    if name == "llama":  # a prefix of the text's own activations stands for the text itself
        four = ak.wrap(tiny.build(name), "prefix", num_virtual_tokens=4, init_ids=ids).eval()
        tail = tiny.inputs(model, batch=1)["input_ids"]
        full = torch.cat([torch.tensor([ids]), tail], 1)
        with four.disable_adapter():
            expected = logits(four, input_ids=full)[:, 4:]
        positions = torch.arange(4, 12)[None]
        torch.testing.assert_close(logits(four, input_ids=tail, position_ids=positions), expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_gate_listens_token_by_token(name):
    model = wrapped(name, gate=True)
    batch = tiny.inputs(model, labels=True)
    model(**batch).loss.backward()
    gates = {key: p for key, p in model.named_parameters() if "prefix_gate" in key}
    assert len(gates) == 2 * len(prefix_layers(model)) and all(p.grad.abs().sum() > 0 for p in gates.values())
    expected = logits(model, **batch)
    model.get_base_model().set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, **batch), expected, **CLOSE)
    for layer in prefix_layers(model):
        layer.prefix_gate["default"].weight.data.zero_()
        layer.prefix_gate["default"].bias.data.fill_(-100)
    closed = logits(model, **batch)
    with model.disable_adapter():
        torch.testing.assert_close(closed, logits(model, **batch), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bert"])
def test_flex_attention_agrees(name):
    model = wrapped(name, attn="eager")
    batch = tiny.inputs(model, padding="right")
    expected = logits(model, **batch)
    model.get_base_model().set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # the same function, without minutes of compiling
        got = logits(model, **batch)
    real = batch["attention_mask"].bool() if expected.dim() == 3 else slice(None)
    torch.testing.assert_close(got[real], expected[real], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_compiled_equals_eager_mode(name):
    torch._dynamo.reset()
    model = wrapped(name)
    batch = tiny.inputs(model, length=4)
    expected = logits(model, **batch)
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, **batch), expected, **CLOSE)
    with model.disable_adapter():
        base = logits(model, **batch)
        torch.testing.assert_close(logits(compiled, **batch), base, **CLOSE)
    torch.testing.assert_close(logits(compiled, **batch), expected, **CLOSE)


def test_half_precision_keeps_the_prefix_in_full():
    model = ak.wrap(tiny.build("llama").bfloat16(), "prefix", num_virtual_tokens=3)
    assert all(p.dtype == torch.float32 for key, p in model.named_parameters() if ".prefix_" in key)
    out = model(**tiny.inputs(model, labels=True))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    reference = wrapped("llama")
    fill(model)
    got = logits(model, **tiny.inputs(model)).float()
    assert (got - logits(reference, **tiny.inputs(model))).abs().max() < 0.3


def test_a_saved_prefix_loads_from_its_folder_alone(tmp_path):
    base = tiny.build("llama")
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = fill(ak.wrap(base, "prefix", num_virtual_tokens=3)).eval()
    batch = tiny.inputs(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(again, **batch), logits(model, **batch))
    again.disable_adapters()
    with model.disable_adapter():
        torch.testing.assert_close(logits(again, **batch), logits(model, **batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ({"attentions": "corss"}, "cross"),
        ({"attentions": "cross"}, "no 'cross' attention.*decoder"),
        ({"layers_to_transform": [7]}, "no layer 7.*0 to 1"),
        ({"prefix_projection": True, "init_ids": [1]}, "prefix_projection"),
        ({"init_ids": [999]}, "999.*127"),
        ({"init_text": "hello"}, "tokenizer_name_or_path"),
        ({"target_modules": ["layers.0"]}, "target_modules"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(options, message):
    model = tiny.build("llama")
    with pytest.raises(ak.AdapterError, match=message):
        ak.wrap(model, "prefix", **options)
    assert not prefix_layers(model) and all(p.requires_grad for p in model.parameters())


def test_unknown_implementations_and_merging_are_refused():
    model = wrapped("llama")
    with pytest.raises(ak.AdapterError, match="no weight"):
        model.merge_and_unload()
    with pytest.raises(ak.AdapterError, match="no weight"):
        model.merge_adapter()


@pytest.mark.parametrize("name", EAGER_ONLY)
def test_families_without_sdpa_run_as_they_are(name):
    model = wrapped(name)
    assert model.config._attn_implementation == "eager"
    model(**tiny.inputs(model, padding="left", labels=True)).loss.backward()
