"""The map of a model beside its branches: experts, wrapped and quantized models, probe inputs, how it is shown."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import adapters_kit as ak
from adapters_kit.anatomy import (
    base_model,
    block_linears,
    expert_parameters,
    head,
    probe_inputs,
    render,
    routers,
)
from adapters_kit.errors import ModelError
from tests.anatomy.test_anatomy import FURTHER, further, model_of
from tests.anatomy.test_branches import COMPUTED
from tests.support import tiny

MIXTURES = ["mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss"]


@pytest.mark.parametrize("name", MIXTURES)
def test_fused_experts_train_through_target_parameters(name):
    model = tiny.build(name)
    experts = expert_parameters(model)
    amap = ak.map_model(model)
    assert experts == [weight.path for weight in amap.experts]
    assert experts == [path for _, branch in amap.branches("ffn") for path in branch.experts]
    assert {path.rpartition(".")[2] for path in experts} == {"gate_up_proj", "down_proj"}
    for weight in amap.experts:
        assert weight.shape == tuple(model.get_parameter(weight.path).shape)
        assert weight.shape[0] == 4

    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=experts))
    for path, parameter in wrapped.named_parameters():
        if "lora_B" in path:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped(**tiny.inputs(wrapped, batch=4, labels=True)).loss.backward()
    trained = {path: parameter.grad for path, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(experts)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in trained.values())


def test_routers_are_not_linears_to_adapt():
    shared = further("shared expert with a gate")
    assert routers(shared) == [f"model.layers.{n}.mlp.shared_expert_gate" for n in (0, 1)]
    routed = further("routed linears")
    assert {path.rpartition(".mlp.")[2] for path in routers(routed)} == {"router.classifier"}
    for model in (shared, routed):
        assert not set(routers(model)) & set(block_linears(model))
    assert any(".experts.expert_3.wi" in path for path in block_linears(routed))
    assert routers(tiny.build("llama")) == []


def test_three_dimensional_parameters_that_are_no_experts():
    assert expert_parameters(tiny.build("xlnet")) == []  # q, k, v, o of shape (width, heads, head width)
    assert expert_parameters(tiny.build("wav2vec2")) == []  # convolutions


# models in use


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "albert", "mixtral", "whisper"])
def test_a_wrapped_model_has_the_map_of_its_base(name):
    model = tiny.build(name)
    bare = ak.map_model(model)
    config = LoraConfig(
        r=2,
        target_modules=block_linears(model),
        target_parameters=expert_parameters(model) or None,
        modules_to_save=[path.rpartition(".")[2] for path in head(model)],
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
    )
    wrapped = get_peft_model(model, config)
    assert base_model(wrapped) is model
    assert ak.map_model(wrapped) == bare
    assert (block_linears(wrapped), head(wrapped)) == ([one.path for one in bare.linears], list(bare.head))


def test_the_model_is_left_as_it_was():
    model = get_peft_model(tiny.build("bert"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.train()
    model.base_model.model.bert.encoder.layer[0].eval()
    batch = tiny.inputs(model)
    modes = {path: module.training for path, module in model.named_modules()}
    needs = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
    values = copy.deepcopy(model.state_dict())
    before = model(**batch).logits
    random_state = torch.get_rng_state()
    ak.map_model(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert {path: parameter.requires_grad for path, parameter in model.named_parameters()} == needs
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**batch).logits, before)  # the adapters are on again
    with model.disable_adapter():
        assert not torch.allclose(model(**batch).logits, before)


def test_a_merged_adapter_stays_merged():
    model = get_peft_model(tiny.build("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.merge_adapter()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight.clone()
    ak.map_model(model)
    assert layer.merged
    assert torch.equal(layer.base_layer.weight, weight)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_quantized_model_has_the_map_of_its_original(name, quantization, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = tiny.build(name)
    bare = ak.map_model(model)
    model.save_pretrained(tmp_path)
    bits = {"load_in_8bit": True} if quantization == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = transformers.BitsAndBytesConfig(**bits, llm_int8_skip_modules=head(model))
    small = type(model).from_pretrained(tmp_path, quantization_config=config)
    stored = {path: parameter.clone() for path, parameter in small.named_parameters()}
    amap = ak.map_model(small)
    kinds = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
    assert kinds[quantization] in {linear.kind for linear in amap.linears}
    for block, original in zip(amap.blocks, bare.blocks, strict=True):
        assert block.branches == original.branches
        assert block.key_value_heads == original.key_value_heads
        facts = [
            [(one.path, one.role, one.in_features, one.out_features) for one in b.linears] for b in (block, original)
        ]
        assert facts[0] == facts[1]
    # bitsandbytes repacks 4-bit weights in an eval forward on some CPUs: not here.
    assert all(torch.equal(stored[path], parameter) for path, parameter in small.named_parameters())


# inputs


@pytest.mark.parametrize("name", COMPUTED)
def test_probe_inputs_run(name):
    model = model_of(name)
    inputs = probe_inputs(model)
    assert all(value.shape[0] == 1 and value.device == model.device for value in inputs.values())
    with torch.no_grad():
        output = model(**inputs)
    assert all(torch.isfinite(value).all() for value in output.values() if isinstance(value, torch.Tensor))
    again = probe_inputs(model)
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)


@pytest.mark.parametrize(
    ("name", "model_class"),
    [
        ("bert", "BertForTokenClassification"),
        ("bert", "BertForQuestionAnswering"),
        ("bert", "BertForMaskedLM"),
        ("gpt2", "GPT2ForSequenceClassification"),
        ("bart", "BartForSequenceClassification"),
        ("t5", "T5EncoderModel"),
        ("t5", "T5ForSequenceClassification"),
        ("vit", "ViTModel"),
        ("whisper", "WhisperForAudioClassification"),
        ("wav2vec2", "Wav2Vec2ForCTC"),
    ],
)
def test_probe_inputs_under_other_heads(name, model_class):
    model = tiny.build(name, model_class=model_class)
    assert all(block.branches for block in ak.map_model(model).blocks)


def test_probe_inputs_in_the_models_dtype():
    for name in ("vit", "whisper", "llama"):
        model = tiny.build(name).to(torch.bfloat16)
        assert all(value.dtype in (torch.bfloat16, torch.int64) for value in probe_inputs(model).values())
        assert ak.map_model(model).blocks == ak.map_model(tiny.build(name)).blocks


def test_a_model_that_reads_something_else():
    options = {"num_latents": 4, "d_latents": 64, "d_model": 48, "num_self_attends_per_block": 2, "vocab_size": 96}
    config = transformers.PerceiverConfig(
        **options, num_self_attention_heads=4, num_cross_attention_heads=4, max_position_embeddings=4
    )
    model = transformers.PerceiverForMaskedLM(config).eval()
    with pytest.raises(ModelError, match=r"PerceiverForMaskedLM: it reads 'inputs'.*map_model\(model, inputs="):
        ak.map_model(model)
    amap = ak.map_model(model, inputs={"inputs": torch.arange(4)[None]})
    assert [[branch.kind for branch in block.branches] for block in amap.blocks] == [["attention", "ffn"]] * 2


def test_inputs_that_fail_are_named():
    with pytest.raises(ModelError, match=r"LlamaForCausalLM failed on the probe inputs \{'pixel_values': \(1, 2\)\}"):
        ak.map_model(tiny.build("llama"), inputs={"pixel_values": torch.zeros(1, 2)})


# the tree


def test_equal_blocks_are_one_line():
    text = render(ak.map_model(tiny.build("llama", num_hidden_layers=6)))
    assert "model.layers.{0–5}  6 × LlamaDecoderLayer  hidden 64  2 key/value heads" in text
    assert text.count("self_attn.q_proj  64 → 64") == 1
    assert text.splitlines()[0].startswith("LlamaForCausalLM")
    assert "head lm_head" in text
    assert not any(line != line.rstrip() or len(line) > 120 for line in text.splitlines())


def test_every_group_of_different_blocks_is_shown():
    text = render(ak.map_model(tiny.build("deepseek-v3", num_hidden_layers=4, first_k_dense_replace=2)))
    assert "model.layers.{0–1}  2 ×" in text
    assert "model.layers.{2–3}  2 ×" in text
    assert "experts mlp.experts.gate_up_proj  4 × 128 × 64" in text
    options = {**FURTHER["mamba between attention"][1], "num_hidden_layers": 6, "attn_layer_period": 3}
    jamba = transformers.JambaForCausalLM(transformers.JambaConfig(**options)).eval()
    text = render(ak.map_model(jamba))
    for group in ("{0, 2}  2 × JambaMambaDecoderLayer", "{3, 5}  2 × JambaMambaDecoderLayer", "4  JambaAttention"):
        assert f"model.layers.{group}" in text


def test_the_tree_says_what_is_unusual():
    assert "(a raw operation, no module returns it)  added → rel_attn.layer_norm" in render(
        ak.map_model(tiny.build("xlnet"))
    )
    assert "mlp  → post_feedforward_layernorm → added" in render(ak.map_model(tiny.build("gemma2")))
    assert "weight read directly" in render(ak.map_model(tiny.build("mamba")))
    assert "run 2 times" in render(ak.map_model(tiny.build("albert")))


def test_a_folded_line_stands_for_blocks_of_lists_side_by_side():
    text = render(ak.map_model(further("two lists for one layer")))
    assert "transformer.attentions.{0–1}" in text
    assert "transformer.ffns.{0–1}" in text


@pytest.mark.parametrize("name", tiny.NAMES)
def test_shapes_alone_tell_the_same(name):
    """A model without weights (`inspect`, `plan`) has the same map, and stays without weights."""
    with torch.device("meta"):
        hollow = getattr(transformers, tiny.FAMILIES[name].model)(tiny.config(name)).eval()
    before = {key: (id(tensor), tensor.device) for key, tensor in hollow.named_parameters()}
    assert ak.map_model(hollow) == ak.map_model(tiny.build(name))
    assert {key: (id(tensor), tensor.device) for key, tensor in hollow.named_parameters()} == before
