"""A prefix in use: checkpointing, several prefixes, mixed batches, compiling, dtypes, bad options."""

import re

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from transformers import AutoModelForCausalLM

import adapters_kit as ak
from adapters_kit.methods.prefix import holders as prefix_probe
from adapters_kit.methods.prefix.attention import CHILD
from adapters_kit.methods.prefix.model import prefix_layers
from tests.methods.test_prefix import CLOSE, DECODERS, EAGER_ONLY, GENERATORS, ON, SEQ2SEQ, fill, logits, wrapped
from tests.methods.test_prefix_generation import new_tokens, prompt
from tests.support import tiny


@pytest.mark.parametrize("name", [name for name in ON if name != "albert"])  # which has no checkpointing
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(name, reentrant):
    model = wrapped(name)
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


@pytest.mark.parametrize("name", SEQ2SEQ)
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


@pytest.mark.parametrize("name", ["t5", "flan-t5"])
def test_t5_keeps_its_position_bias_for_real_tokens(name):
    """A prefix that nobody attends to leaves the model as it was; a shifted bias would not."""
    model = wrapped(name)
    for layer in prefix_layers(model):
        layer.prefix_key["default"].data.zero_()
        layer.prefix_value["default"].data.zero_()
        layer._bias = lambda names, parts, query: torch.full((len(query), 1, query.shape[2], 3), -1e9)
    batch = tiny.inputs(model, padding="right")
    ours = logits(model, **batch)
    with model.disable_adapter():
        torch.testing.assert_close(ours, logits(model, **batch), **CLOSE)


@pytest.mark.parametrize("name", ON)
def test_each_row_of_a_mixed_batch_gets_its_own_prefix(name):
    # peft mixes saved heads of a single layer, such as BERT's, but not of several: a language model has none.
    encoder = tiny.FAMILIES[name].kind == "encoder" and name != "bert"
    head = tiny.FAMILIES[name].model.replace("SequenceClassification", "MaskedLM") if encoder else None
    model = wrapped(name, model_class=head)
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
    for attn in ("eager",) if name in EAGER_ONLY else ("sdpa", "eager"):
        model.get_base_model().set_attn_implementation(attn)
        mixed = logits(model, **batch, adapter_names=["long", "__base__", "default"])
        torch.testing.assert_close(mixed, torch.cat(expected), **CLOSE)
    with pytest.raises(ak.AdapterError, match=r"'lomg'.*long"):
        model(**batch, adapter_names=["lomg"] * 3)


@pytest.mark.parametrize("name", GENERATORS)
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


@pytest.mark.parametrize("name", ON)
def test_two_prefixes_switch_stack_and_go(name, tmp_path):
    model = wrapped(name)
    batch = tiny.inputs(model)
    first = logits(model, **batch)
    ak.wrap(model, "prefix", adapter_name="long", num_virtual_tokens=5)
    fill(model, "long", seed=9).eval()
    second = logits(model, **batch)
    ak.activate(model, ["default", "long"])
    both = logits(model, **batch)
    assert (first - second).abs().max() > 1e-3 < (both - second).abs().max()
    assert all(layer(*[torch.zeros(1, 4, 1, 16)] * 2).key.shape[2] == 3 + 5 for layer in prefix_layers(model))
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    model.set_adapter("long")
    torch.testing.assert_close(logits(model, **batch), second)
    again = PeftModel.from_pretrained(tiny.build(name), tmp_path, adapter_name="a")
    again.load_adapter(tmp_path / "long", "b")
    torch.testing.assert_close(logits(again, **batch), first)
    again.set_adapter("b")
    torch.testing.assert_close(logits(again, **batch), second)


@pytest.mark.parametrize("name", ON)
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


def test_a_start_from_a_text_stands_for_that_text():
    ids = [5, 9, 11, 7]
    for mlp in ({}, {"prefix_projection": True, "projection_hidden_size": 16}):
        model = ak.wrap(tiny.build("llama"), "prefix", num_virtual_tokens=4, init_ids=ids, **mlp).eval()
        tail = tiny.inputs(model, batch=1)["input_ids"]
        with model.disable_adapter():
            expected = logits(model, input_ids=torch.cat([torch.tensor([ids]), tail], 1))[:, 4:]
        positions = torch.arange(4, 12)[None]
        torch.testing.assert_close(logits(model, input_ids=tail, position_ids=positions), expected, **CLOSE)


@pytest.mark.parametrize("name", ON)
def test_a_start_from_activations_is_what_the_model_computes(name):
    """Each virtual token is a word of its own, and no two are trained alike."""
    torch.manual_seed(0)
    model = ak.wrap(tiny.build(name), "prefix", num_virtual_tokens=6, init="words")
    batch = tiny.inputs(model, labels=True)
    model(**batch).loss.backward()
    text = model.get_base_model().main_input_name == "input_ids"
    for layer in prefix_layers(model):
        for part in (layer.prefix_key["default"], layer.prefix_value["default"]):
            assert part.dtype == torch.float32 and part.is_leaf and part.grad.abs().sum() > 0
            assert torch.pdist(part.detach().flatten(1)).min() > 1e-3
        assert (layer.prefix_key["default"].std() > 0.03) == text
        assert not text or layer.prefix_value["default"].std() > 0.03
    for init in ("random", None):  # decoders start from words by themselves, encoders at random
        words = init is None and name in [*DECODERS, *tiny.names("encoder-decoder")]
        other = ak.wrap(tiny.build(name), "prefix", num_virtual_tokens=6, init=init, init_std=0.02)
        assert all((layer.prefix_key["default"].std() > 0.03) == words for layer in prefix_layers(other))
    if text:
        short = ak.wrap(tiny.build(name), "prefix", num_virtual_tokens=6, init_ids=[5, 9])
        for layer in prefix_layers(short):
            assert torch.pdist(layer.prefix_key["default"].detach().flatten(1)).min() > 1e-3


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_a_random_start_has_values_of_half_the_size_of_the_models_own(name):
    """So that tokens differ; keys are near zero, and a decoder's values too. `init_std` is for both."""
    base = tiny.build(name)
    own = prefix_probe.run(base)
    model = ak.wrap(base, "prefix", num_virtual_tokens=400, init="random")
    layers = {path.removeprefix("base_model.model."): layer for path, layer in model.named_modules()}
    for path, seen in own.items():
        layer, size = layers[f"{path}.kv_prefix"], seen.value.square().mean().sqrt()
        value = layer.prefix_value["default"].std()
        if seen.kind == "decoder":
            assert 0.015 < value < 0.025
        else:
            assert value > 0.03 and 0.3 * size < value < 0.8 * size
        assert 0.015 < layer.prefix_key["default"].std() < 0.025
    given = ak.wrap(tiny.build(name), "prefix", num_virtual_tokens=400, init="random", init_std=0.5)
    for layer in prefix_layers(given):
        for part in (layer.prefix_key["default"], layer.prefix_value["default"]):
            assert 0.4 < part.std() < 0.6


@pytest.mark.parametrize("name", ON)
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


# Not on a CPU: gpt-oss (sinks). T5 without a prefix fails there as well, since transformers 5.20: its position bias has
# one row for the batch.
NO_FLEX = ("gpt-oss", "t5", "flan-t5") if Version(transformers.__version__) >= Version("5.20") else ("gpt-oss",)
FLEX = [
    name for name in ON if name not in NO_FLEX and getattr(transformers, tiny.FAMILIES[name].model)._supports_flex_attn
]


@pytest.mark.parametrize("name", FLEX)
def test_flex_attention_agrees(name):
    model = wrapped(name, attn="eager")
    batch = tiny.inputs(model, padding="right")
    expected = logits(model, **batch)
    model.get_base_model().set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # the same function, without minutes of compiling
        got = logits(model, **batch)
        with model.disable_adapter():
            assert (logits(model, **batch) - got).abs().max() > 1e-3
    text = expected.dim() == 3 and "attention_mask" in batch and "decoder_input_ids" not in batch
    real = batch["attention_mask"].bool() if text else slice(None)
    torch.testing.assert_close(got[real], expected[real], **CLOSE)


def test_flex_attention_fails_on_t5_without_a_prefix_too():
    """Once this no longer raises, the two belong into `FLEX`."""
    for name in {"t5", "flan-t5"} & set(NO_FLEX):
        model = tiny.build(name)
        model.set_attn_implementation("flex_attention")
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), pytest.raises(IndexError):
            model(**tiny.inputs(model, padding="right"))


@pytest.mark.parametrize("name", ON)
def test_every_attention_compiles_without_a_break(name):
    """What a prefix adds to a compiled model is inside its attentions; each kind of them is compiled whole."""
    torch._dynamo.reset()
    model = wrapped(name)
    batch = tiny.inputs(model)
    if tiny.FAMILIES[name].kind in ("decoder", "encoder-decoder"):
        batch["use_cache"] = False  # a cache would be filled twice
    calls = {}

    def note(module, args, kwargs, output):
        calls[re.sub(r"\.\d+\.", ".0.", paths[module])] = (module, args, kwargs, output[0])

    paths = {layer.home: path for path, layer in zip(homes(model), prefix_layers(model), strict=True)}
    hooks = [home.register_forward_hook(note, with_kwargs=True) for home in paths]
    logits(model, **batch)
    for hook in hooks:
        hook.remove()
    backend = "aot_eager" if name == "llama" else "eager"
    for module, args, kwargs, expected in calls.values():
        module._forward_hooks.clear()  # transformers' own, which collect attention maps for the whole model
        compiled = torch.compile(module, backend=backend, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args, **kwargs)[0], expected, **CLOSE)


def homes(model):
    """The paths of the attentions that hold a prefix, in the order of `prefix_layers`."""
    return [path for path, module in model.named_modules() if hasattr(module, CHILD)]


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


@pytest.mark.parametrize("name", ON)
def test_half_precision_keeps_the_prefix_in_full(name):
    reference = wrapped(name)
    batch = tiny.inputs(reference, labels=True)
    model = fill(ak.wrap(tiny.build(name).bfloat16(), "prefix", num_virtual_tokens=3)).eval()
    ours = [p for key, p in model.named_parameters() if ".prefix_" in key]
    assert all(p.dtype == torch.float32 for p in ours)
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    out = model(**half)
    out.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in ours)
    with torch.no_grad():
        expected = reference(**batch)
    # As far from fp32 as the base model alone in bf16 is, or not much further.
    with model.disable_adapter(), reference.disable_adapter():
        alone = (logits(model, **half).float() - logits(reference, **batch)).abs().max()
    assert (out.logits.float() - expected.logits).abs().max() < 4 * alone + 0.05


def test_a_saved_prefix_loads_from_its_folder_alone(tmp_path, monkeypatch):
    # 5.24 asks for a peft that is not out; what it does to the layers is the same with this one.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
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
        ({"init": "word"}, "'word'.*words"),
        ({"init": "random", "init_ids": [1]}, "init='random'"),
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
