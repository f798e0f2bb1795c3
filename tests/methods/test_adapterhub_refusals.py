"""AdapterHub's folders whose files do not say enough: converted where the model proves the place, else refused."""

import json

import pytest
import torch
import transformers

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
