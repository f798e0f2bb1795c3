"""peft's PREFIX_TUNING checkpoints become prefixes inside attention and go back, with equal outputs."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import adapters_kit as ak
from adapters_kit.methods.adapterhub.folder import convert_folder
from tests.methods.test_prefix import fill, logits, wrapped
from tests.support import tiny

ADAPTERHUB = Path(__file__).parents[1] / "fixtures" / "adapterhub"

EXACT = ["llama", "qwen2", "qwen3", "gpt-neox", "phi", "stablelm", "olmo2", "cohere", "granite", "mixtral", "qwen3-moe"]


def pefts_own(name, folder):
    torch.manual_seed(1)
    model = get_peft_model(tiny.build(name), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    model.prompt_encoder["default"].embedding.weight.data.mul_(0.7)
    model.save_pretrained(folder)
    return model


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", EXACT)
def test_from_peft(name, tmp_path):
    theirs = pefts_own(name, tmp_path)
    batch = tiny.inputs(theirs)
    model = ak.from_peft_prefix(tiny.build(name), tmp_path).eval()
    same(logits(model, **batch), logits(theirs, **batch)[:, -8:])
    assert all(p.requires_grad for key, p in model.named_parameters() if "prefix_" in key)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("mlp", [False, True])
def test_to_peft(name, mlp, tmp_path):
    options = {"prefix_projection": True, "projection_hidden_size": 8} if mlp else {}
    model = wrapped(name, **options)
    fill(model, scale=0.3)
    batch = tiny.inputs(model)
    ak.to_peft_prefix(model, tmp_path)
    theirs = PeftModel.from_pretrained(tiny.build(name), tmp_path)
    same(logits(model, **batch), logits(theirs, **batch)[:, -8:])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", "not rotary"),
        ("opt", "not rotary"),
        ("mistral", "sliding window"),
        ("t5", "encoder-decoder"),
        ("bert", "not rotary"),
        ("bloom", "BloomAttention"),
    ],
)
def test_what_is_not_exact_is_refused(name, reason, tmp_path):
    PrefixTuningConfig(num_virtual_tokens=3).save_pretrained(tmp_path)
    with pytest.raises(ak.AdapterError, match=reason):
        ak.from_peft_prefix(tiny.build(name), tmp_path)


def test_other_adapters_and_other_models_are_refused(tmp_path):
    ak.wrap(tiny.build("llama"), "lora").save_pretrained(tmp_path / "lora")
    with pytest.raises(ak.AdapterError, match="LORA"):
        ak.from_peft_prefix(tiny.build("llama"), tmp_path / "lora")
    pefts_own("llama", tmp_path / "prefix")
    with pytest.raises(ak.AdapterError, match=r"\(5, 128\)"):
        ak.from_peft_prefix(tiny.build("llama", num_hidden_layers=1), tmp_path / "prefix")
    model = wrapped("llama", layers_to_transform=[0])
    with pytest.raises(ak.AdapterError, match="every layer"):
        ak.to_peft_prefix(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["prefix", "prefix-mlp"])
@pytest.mark.parametrize(
    ("family", "model_class"),
    [
        ("bert", "BertForMaskedLM"),
        ("llama", "LlamaForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("bart", "BartForConditionalGeneration"),
    ],
)
def test_from_adapterhub(family, model_class, name, tmp_path):
    kind, eager = getattr(transformers, model_class), {"attn_implementation": "eager"}
    with pytest.raises(ak.AdapterError, match=r"'sdpa'.*attn_implementation='eager'"):  # the library differs there
        convert_folder(ADAPTERHUB / family / name, kind.from_pretrained(ADAPTERHUB / family / "base"), tmp_path / "no")
    base = kind.from_pretrained(ADAPTERHUB / family / "base", **eager)
    known = load_file(ADAPTERHUB / family / "expected.safetensors")
    batch = {key.removeprefix("inputs."): value for key, value in known.items() if key.startswith("inputs.")}
    folder = convert_folder(ADAPTERHUB / family / name, base, tmp_path / "converted")
    model = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(logits(model, **batch), known[name], rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, **batch), known["base"], rtol=1e-5, atol=1e-5)


def test_adapterhub_prefixes_for_other_models_are_refused(tmp_path):
    options = {"num_hidden_layers": 1, "attn_implementation": "eager"}
    other = transformers.BertForMaskedLM.from_pretrained(ADAPTERHUB / "bert" / "base", **options)
    with pytest.raises(ak.AdapterError, match=r"1 layers.*trained on"):
        convert_folder(ADAPTERHUB / "bert" / "prefix", other, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("flat", [True, False])
def test_adapterhub_prefixes_of_t5_are_refused_with_the_reason(flat, tmp_path):
    """AdapterHub's T5 computes with position biases that are off by the length of the prefix."""
    base = transformers.T5ForConditionalGeneration.from_pretrained(ADAPTERHUB / "t5" / "base")
    bert = ADAPTERHUB / "bert" / ("prefix" if flat else "prefix-mlp")
    saved = json.loads((bert / "adapter_config.json").read_text())
    changes = {"model_type": "t5", "model_class": "T5ForConditionalGeneration"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved | changes))
    # 3 tokens · 2 layers · keys and values · 2 heads of 4, as AdapterHub 1.3 names them.
    name = f"prefix_tuning.prefix_tunings.{saved['name']}.encoder_prefix.control_trans"
    save_file({name: torch.randn(96)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ak.AdapterError, match="relative positions"):
        convert_folder(tmp_path, base, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
