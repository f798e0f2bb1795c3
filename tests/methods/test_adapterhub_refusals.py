"""AdapterHub's folders whose files do not say enough: converted where the model proves the place, else refused."""

import json

import pytest
import torch
import transformers
from peft import get_peft_model_state_dict

import adapters_kit as ak
from adapters_kit.errors import AdapterError, ModelError, ShippingError, UnknownNameError

WIDTH, SIZE = 16, 4
TEXT = {"vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0}
SERIAL = {"mh_adapter": True, "output_adapter": True, "original_ln_before": False}
AFTER = {"mh_adapter": False, "output_adapter": True, "original_ln_before": True}
BESIDE = {"mh_adapter": False, "output_adapter": True, "is_parallel": True}


def saved(folder, model, options, places, tensors=None):
    """A folder as AdapterHub's library writes it, with random weights at `places`."""
    folder.mkdir(exist_ok=True)
    config = {"non_linearity": "relu", "reduction_factor": WIDTH / SIZE, "original_ln_after": True, **options}
    about = {"config": config, "name": "a", "hidden_size": WIDTH, "model_type": model.config.model_type}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    weights = dict(tensors or {})
    for place in places:
        start = f"{place}.adapters.a."
        weights[f"{start}adapter_down.0.weight"], weights[f"{start}adapter_down.0.bias"] = (
            torch.randn(SIZE, WIDTH),
            torch.randn(SIZE),
        )
        weights[f"{start}adapter_up.weight"], weights[f"{start}adapter_up.bias"] = (
            torch.randn(WIDTH, SIZE),
            torch.randn(WIDTH),
        )
    torch.save(weights, folder / "pytorch_adapter.bin")
    return folder


def gptj():
    return transformers.GPTJForCausalLM(
        transformers.GPTJConfig(vocab_size=40, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=2, rotary_dim=4)
    ).eval()


def beit():
    config = transformers.BeitConfig(
        **{
            key: value
            for key, value in TEXT.items()
            if key in ("hidden_size", "num_hidden_layers", "intermediate_size")
        },
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        layer_scale_init_value=0.3,
    )
    return transformers.BeitModel(config).eval()


def albert():
    return transformers.AlbertModel(transformers.AlbertConfig(**TEXT, embedding_size=8)).eval()


def bert(labels=3):
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=labels)).eval()


BERT_PLACES = [f"bert.encoder.layer.{n}.output" for n in (0, 1)]


@pytest.mark.parametrize("options", [AFTER, BESIDE])
def test_branches_side_by_side_are_refused_where_the_stream_is_read(options, tmp_path):
    folder = saved(tmp_path / "a", gptj(), options, [f"transformer.h.{n}.output_adapters" for n in (0, 1)])
    with pytest.raises(ModelError, match="side by side"):
        ak.wrap(gptj(), folder)


def test_a_serial_adapter_needs_no_stream(tmp_path):
    places = [f"transformer.h.{n}.{kind}_adapters" for n in (0, 1) for kind in ("attention", "output")]
    assert ak.wrap(gptj(), saved(tmp_path / "a", gptj(), SERIAL, places)).active_adapter == "default"


@pytest.mark.parametrize("options", [SERIAL, AFTER, BESIDE])
def test_scaled_branches_are_refused(options, tmp_path):
    kinds = ("attention", "output") if options is SERIAL else ("output",)
    places = [f"encoder.layer.{n}.{kind}_adapters" for n in (0, 1) for kind in kinds]
    with pytest.raises(ModelError, match="scaled"):
        ak.wrap(beit(), saved(tmp_path / "a", beit(), options, places))


def test_alberts_attention_adapter_reads_the_stream(tmp_path):
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    places = [f"{layer}.attention.attention_adapters", f"{layer}.output_adapters"]
    torch.manual_seed(1)
    model = albert()
    folder = saved(tmp_path / "a", model, {**SERIAL, "output_adapter": False}, places[:1])
    batch = {"input_ids": torch.arange(3, 11)[None]}
    # What the library computes: LN(A(x) + x + h), with A on what goes into the attention.
    weights = {
        key.rpartition("adapter_")[2]: value for key, value in torch.load(folder / "pytorch_adapter.bin").items()
    }
    attention = model.get_submodule(f"{layer}.attention")
    stream = []

    def adapted(module, args):
        hidden = torch.relu(stream.pop() @ weights["down.0.weight"].T + weights["down.0.bias"])
        return (args[0] + hidden @ weights["up.weight"].T + weights["up.bias"],)

    hooks = [
        attention.register_forward_pre_hook(lambda module, args: stream.append(args[0])),
        attention.LayerNorm.register_forward_pre_hook(adapted),
    ]
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        for hook in hooks:
            hook.remove()
        plain = model(**batch).last_hidden_state
        found = ak.wrap(model, folder).eval()(**batch).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)


def gemma2():
    config = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**config)).eval()


@pytest.mark.parametrize("options", [AFTER, BESIDE])
def test_a_branch_that_is_normalized_first_is_refused_where_the_stream_is_read(options, tmp_path):
    folder = saved(tmp_path / "a", gemma2(), options, [f"model.layers.{n}.output_adapters" for n in (0, 1)])
    with pytest.raises(ModelError, match="normalized before it is added"):
        ak.wrap(gemma2(), folder)


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("Deberta", {}, r"in_proj a bias that this DebertaModel does not have"),
        ("Xmod", {"default_language": "en_XX"}, "one ffn branch, where this XmodModel adds two"),
        ("Xmod", {"default_language": "en_XX", "pre_norm": True, "adapter_layer_norm": True}, "adds two"),
        ("Phi3", {}, r"qkv_proj a bias"),
    ],
)
def test_classes_that_the_library_computes_otherwise_are_refused(kind, more, why, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**TEXT, **more)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    lora = {"architecture": "lora", "r": 2, "alpha": 4, "attn_matrices": ["q", "v"]}
    with pytest.raises(ModelError, match=f"{why}.*even without an adapter"):
        ak.wrap(model, saved(tmp_path / "a", model, lora, []))


def interface(folder, **names):
    """What the library saves of a class that it was told about."""
    (folder / "adapter_interface.json").write_text(json.dumps({"interface": names}))
    return folder


def test_a_class_whose_stream_the_library_was_not_told_is_refused_where_it_is_read(tmp_path):
    config = transformers.MPNetConfig(**TEXT)
    model = transformers.MPNetModel(config).eval()
    folder = saved(tmp_path / "a", model, AFTER, [f"encoder.layer.{n}.output_adapters" for n in (0, 1)])
    with pytest.raises(ModelError, match="was not told where the stream is"):
        ak.wrap(model, interface(folder, layer_pre_ffn=None, layer_output_proj="output.dense"))


def test_a_fused_projection_that_the_library_gave_a_random_bias_is_refused(tmp_path):
    model = transformers.ModernBertModel(transformers.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2)).eval()
    folder = saved(tmp_path / "a", model, {"architecture": "lora", "r": 2, "alpha": 4, "attn_matrices": ["q"]}, [])
    with pytest.raises(ModelError, match=r"layers\.0\.attn\.Wqkv a bias that this ModernBertModel does not have"):
        ak.wrap(model, interface(folder, attn_qkv_proj="Wqkv"))


PREFIX = {"architecture": "prefix_tuning", "flat": True, "prefix_length": 3, "encoder_prefix": True}
PREFIX |= {"cross_prefix": True, "reduction_factor": None, "original_ln_after": False}
NUMBERS = 3 * 2 * 2 * WIDTH  # tokens, layers, keys and values


def prefixes(folder, model, places):
    """A folder with a flat prefix of constant numbers for each (module, name of a prefix)."""
    tensors = {
        f"{place}.prefix_tuning.pool.prefix_tunings.a.{called}.control_trans": torch.full((NUMBERS,), float(number))
        for number, (place, called) in enumerate(places, start=1)
    }
    return saved(folder, model, PREFIX, [], tensors)


def numbers(model, folder):
    """Attention module -> the number that its prefix is made of."""
    state = ak.wrap(model, folder).state_dict()
    found = {name: value for name, value in state.items() if ".prefix_key" in name}
    assert all(len(set(value.flatten().tolist())) == 1 for value in found.values())
    return {
        name.removeprefix("base_model.model.").partition(".prefix")[0]: value.max().item()
        for name, value in found.items()
    }


def eager(model):
    model.set_attn_implementation("eager")
    return model.eval()


def test_towers_have_prefixes_of_their_own(tmp_path):
    model = eager(clip())
    called = ["clip_text_model_self_prefix", "clip_vision_model_self_prefix"]
    folder = prefixes(tmp_path / "a", model, [("text_model.encoder.layers.0.self_attn", name) for name in called])
    found = numbers(model, folder)
    assert {value for name, value in found.items() if "text_model" in name} == {1.0}
    assert {value for name, value in found.items() if "vision_model" in name} == {2.0}


def test_encoder_and_decoder_that_call_their_prefixes_the_same_are_told_apart(tmp_path):
    text = transformers.BertConfig(**TEXT)
    writer = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    model = transformers.EncoderDecoderModel(
        encoder=transformers.BertModel(text), decoder=transformers.BertLMHeadModel(writer)
    )
    model = eager(model)
    model.config.decoder_start_token_id, model.config.pad_token_id, model.config.hidden_size = 1, 0, WIDTH
    layer = "bert.encoder.layer"
    places = [
        *((f"encoder.encoder.layer.{n}.attention.self", "self_prefix") for n in (0, 0)),
        (f"decoder.{layer}.0.attention.self", "self_prefix"),
        (f"decoder.{layer}.0.crossattention.self", "cross_prefix"),
    ]
    found = numbers(model, prefixes(tmp_path / "a", model, places))
    assert {value for name, value in found.items() if name.startswith("encoder.")} == {2.0}
    assert {value for name, value in found.items() if ".attention." in name and "decoder." in name} == {3.0}
    assert {value for name, value in found.items() if "crossattention" in name} == {4.0}


def test_distilberts_prefix_has_a_name_of_its_own(tmp_path):
    config = transformers.DistilBertConfig(vocab_size=40, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=24)
    model = eager(transformers.DistilBertModel(config))
    found = numbers(model, prefixes(tmp_path / "a", model, [("transformer.layer.0.attention", "self")]))
    assert len(found) == 2 and set(found.values()) == {1.0}


def test_prefixes_that_differ_under_one_name_are_refused(tmp_path):
    model = eager(bert())
    places = [(f"bert.encoder.layer.{n}.attention.self", "self_prefix") for n in (0, 1)]
    with pytest.raises(ModelError, match="is not known"):
        ak.wrap(model, prefixes(tmp_path / "a", model, places))


def test_a_trained_head_comes_along(tmp_path):
    model, head = bert(), {"classifier.weight": torch.randn(3, WIDTH), "classifier.bias": torch.randn(3)}
    folder = saved(tmp_path / "a", model, AFTER, BERT_PLACES)
    torch.save(head, folder / "pytorch_model_head.bin")
    wrapped = ak.wrap(model, folder)
    weight = wrapped.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(weight, head["classifier.weight"]) and weight.requires_grad
    with pytest.raises(ShippingError, match=r"holds a head that was trained.*copy the folder without"):
        ak.wrap(bert(labels=2), folder)


def test_a_flexible_head_is_refused_and_the_advice_works(tmp_path):
    folder = saved(tmp_path / "a", bert(), AFTER, BERT_PLACES)
    torch.save({"heads.a.1.weight": torch.randn(WIDTH, WIDTH)}, folder / "pytorch_model_head.bin")
    with pytest.raises(ShippingError, match="a flexible head"):
        ak.wrap(bert(), folder)
    (folder / "pytorch_model_head.bin").unlink()
    ak.wrap(bert(), folder)


def test_a_trained_language_head_is_refused_and_the_advice_works(tmp_path):
    torch.manual_seed(0)
    model = gptj()
    folder = saved(
        tmp_path / "a", model, SERIAL | {"mh_adapter": False}, [f"transformer.h.{n}.output_adapters" for n in (0, 1)]
    )
    head = {"lm_head.weight": torch.randn(40, WIDTH), "lm_head.bias": torch.randn(40)}
    torch.save(head, folder / "pytorch_model_head.bin")
    with pytest.raises(ShippingError, match=r"Put it there first: model.load_state_dict\(torch.load\("):
        ak.wrap(model, folder)
    model.load_state_dict(torch.load(folder / "pytorch_model_head.bin"), strict=False)
    assert torch.equal(ak.wrap(model, folder).get_output_embeddings().weight, head["lm_head.weight"])


def clip():
    sight = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    sight |= {"image_size": 16, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=sight, projection_dim=WIDTH))
    model.config.hidden_size = WIDTH  # as the library notes it
    return model.eval()


def test_two_towers_have_bottlenecks_of_their_own(tmp_path):
    model = clip()
    layers = [f"{tower}_model.encoder.layers.{n}" for tower in ("text", "vision") for n in (0, 1)]
    folder = saved(tmp_path / "a", model, AFTER, [f"{layer}.output_adapters" for layer in layers])
    weights = torch.load(folder / "pytorch_adapter.bin")
    state = get_peft_model_state_dict(ak.wrap(model, folder))
    for layer in layers:
        (found,) = [value for name, value in state.items() if _tower_and_layer(layer, name) and "up.weight" in name]
        assert torch.equal(found, weights[f"{layer}.output_adapters.adapters.a.adapter_up.weight"])


def _tower_and_layer(old, name):
    tower, number = old.split("_")[0], old[-1]
    return f"{tower}_model" in name and f"layers.{number}." in name


def test_alberts_groups_have_bottlenecks_of_their_own(tmp_path):
    groups = transformers.AlbertConfig(**TEXT, embedding_size=8, num_hidden_groups=2)
    model = transformers.AlbertModel(groups).eval()
    places = [f"encoder.albert_layer_groups.{n}.albert_layers.0.output_adapters" for n in (0, 1)]
    folder = saved(tmp_path / "a", model, AFTER, places)
    weights = torch.load(folder / "pytorch_adapter.bin")
    state = get_peft_model_state_dict(ak.wrap(model, folder))
    for number, place in enumerate(places):
        (found,) = [v for name, v in state.items() if f"layer_groups.{number}" in name and "up.weight" in name]
        assert torch.equal(found, weights[f"{place}.adapters.a.adapter_up.weight"])


def test_folders_of_several_adapters_are_named(tmp_path):
    several = tmp_path / "several"
    several.mkdir()
    for name in ("a", "b"):
        saved(several / name, bert(), AFTER, BERT_PLACES)
    with pytest.raises(UnknownNameError, match=r"a folder of 2 adapters: 'a', 'b'\. Name one"):
        ak.wrap(bert(), several)
    (several / "adapter_setup.json").write_text(json.dumps({"adapter_setup": {"type": "Stack", "children": []}}))
    with pytest.raises(UnknownNameError, match=r"Stack of the adapters 'a', 'b'.*ak\.activate"):
        ak.wrap(bert(), several)
    (tmp_path / "fusion").mkdir()
    (tmp_path / "fusion" / "adapter_fusion_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="AdapterFusion"):
        ak.wrap(bert(), tmp_path / "fusion")
