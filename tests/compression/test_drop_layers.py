"""drop_layers(): what is written is the base with layers skipped, whatever the family; what cannot be is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.errors import ModelError, ShippingError
from tests.support import small

TEXTS = [f"{row['context']} {row['question']}" for row in small.questions(6)]
DEEP = {
    "llama": {"num_hidden_layers": 5},
    "gpt2": {"n_layer": 5},
    "bert": {"num_hidden_layers": 5},
    "distilbert": {"n_layers": 5},
    "gemma2": {"num_hidden_layers": 5},
    "mixtral": {"num_hidden_layers": 4},
    "bloom": {"n_layer": 5},
    "vit": {"num_hidden_layers": 4},
    "mamba": {"num_hidden_layers": 4},
}


@pytest.mark.parametrize("family", DEEP)
def test_a_shorter_base_is_the_base_with_layers_skipped(family, tmp_path):
    folder = small.model(family, **DEEP[family])
    report = ak.drop_layers(folder, layers=[1, 3], out=tmp_path / "short")
    assert report.dropped == (1, 3) and report.difference < 1e-5
    assert report.bytes_after < report.bytes_before
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    count = next(iter(DEEP[family].values()))
    assert count - 2 in config.values()
    if family == "gemma2":
        types = json.loads((folder / "config.json").read_text())["layer_types"]
        assert config["layer_types"] == types[::2] and len(set(types)) == 2
    manifest = json.loads((tmp_path / "short" / "manifest.json").read_text())
    assert manifest["dropped_layers"] == [1, 3] and "model.safetensors" in manifest["files"]


def test_data_finds_the_layers_that_do_nothing_and_an_adapter_trains_on_the_rest(tmp_path):
    folder = small.model("llama", num_hidden_layers=6)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for number in (2, 3):
            model.model.layers[number].self_attn.o_proj.weight.mul_(1e-4)
            model.model.layers[number].mlp.down_proj.weight.mul_(1e-4)
    model.save_pretrained(tmp_path / "base")
    ak.load_processor(folder).save_pretrained(tmp_path / "base")
    report = ak.drop_layers(tmp_path / "base", 2, data=TEXTS)
    assert report.path == tmp_path / "base-short"
    assert report.dropped == (2, 3) and len(report.distances) == 5 and report.distances[2] < 1e-3
    assert "without 2, 3" in str(report)
    ids = torch.tensor([[7, 8, 9, 10]])
    short = AutoModelForCausalLM.from_pretrained(report.path)
    assert torch.allclose(short(ids).logits, model(ids).logits, atol=1e-3)
    wrapped = ak.wrap(ak.load(report.path, "causal-lm"), "lora")
    assert sum("lora_A" in name for name, _ in wrapped.named_parameters()) == 4 * 7
    assert cli.main(["drop-layers", str(tmp_path / "base"), "2", "--out", str(tmp_path / "b")]) == 0
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["dropped_layers"] == [3, 4]


def test_what_cannot_be_left_out(tmp_path):
    folder = small.model("llama", num_hidden_layers=3)
    for call, told in (
        ({"n": 3}, "1 to 2"),
        ({"n": 0}, "1 to 2"),
        ({"layers": [3]}, "3 is none of them"),
        ({"layers": []}, "leaves nothing out"),
        ({}, "how many"),
        ({"layers": [1], "data": TEXTS}, "leave one of them out"),
    ):
        with pytest.raises(ShippingError, match=told):
            ak.drop_layers(folder, out=tmp_path / "x", **call)
    with pytest.raises(ModelError, match="2 of them"):
        ak.drop_layers(small.model("t5"), 1, tmp_path / "x")
    with pytest.raises(ShippingError, match="by their number"):
        ak.drop_layers(small.model("gpt2", scale_attn_by_inverse_layer_idx=True), 1, tmp_path / "x")
    # Which layers have no experts is told by a number: what was the second layer would lose its own.
    with pytest.raises(ShippingError, match="another kind of layer"):
        ak.drop_layers(small.model("deepseek-v3", num_hidden_layers=3), layers=[0], out=tmp_path / "x")
    wrapped = ak.wrap(ak.load(folder, "causal-lm"), "lora")
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ShippingError, match="merge it"):
        ak.drop_layers(tmp_path / "adapter", 1)
    assert not (tmp_path / "x").exists()


def test_a_backbone_without_a_head_is_measured_under_the_head_of_a_task(tmp_path):
    folder = small.model("bert", model_class="BertModel", num_hidden_layers=4)
    report = ak.drop_layers(folder, 2, tmp_path / "short", data=TEXTS, task="text-classification")
    assert len(report.distances) == 3 and report.layers == 2
