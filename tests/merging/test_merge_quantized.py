"""Merging with 4 and 8 bit: what the training saw, and what rounding again leaves of an update."""

import json

import bitsandbytes
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import adapters_kit as ak
from adapters_kit.artifacts.checkpoint import open_checkpoint
from adapters_kit.artifacts.record import record_base
from adapters_kit.loading import load as load_quantized
from adapters_kit.merging.roundtrip import Rounding
from tests.support.shipping import disturb, load, save_base, train_on

LORA = peft.LoraConfig


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_a_quantized_base_is_merged_dequantized(family, quantize, tmp_path):
    """GPT-2 stores its linears transposed, and bitsandbytes quantizes them the other way round."""
    base = save_base(family, tmp_path / "base")
    config = LORA(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"] if family == "llama" else ["c_attn"])
    model = peft.get_peft_model(load_quantized(base, quantize=quantize), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    record_base(tmp_path / "adapter", base, model)
    report = ak.merge(tmp_path / "adapter", tmp_path / "merged")
    linears = {name for name in load_file(base / "model.safetensors") if ".weight" in name and "proj" in name}
    assert report.changed >= len(linears)  # those without an update too: they were rounded in training
    original = ak.merge(tmp_path / "adapter", tmp_path / "original", base="original", dtype="bfloat16")
    assert any("not the trained model" in note for note in original.notes)
    # Weight by weight: dequantized + update, rounded once.
    name = "model.layers.0.self_attn.q_proj" if family == "llama" else "transformer.h.0.attn.c_attn"
    weight = load_file(base / "model.safetensors")[f"{name}.weight"].bfloat16()
    record = json.loads((tmp_path / "adapter" / "adapters_kit.json").read_text())
    settings, rounding = record["quantize"], Rounding.of(record)
    assert settings["type"] == quantize and name in settings["modules"]
    layer = model.get_submodule(f"base_model.model.{name}")
    held = rounding(weight) if family == "llama" else rounding(weight.T).T
    update = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * 1.0
    expected = held.double() + (update if family == "llama" else update.T)
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    assert torch.allclose(merged.double(), expected, rtol=2**-8, atol=1e-6)


def test_a_missing_record_is_asked_for_with_both_drifts(tmp_path):
    base = save_base("llama", tmp_path / "base")
    bare = load_quantized(base, quantize="nf4", dtype="float32")
    model = peft.get_peft_model(bare, LORA(target_modules=["q_proj", "up_proj"]))
    disturb(model)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    ak.merge(folder, tmp_path / "recorded")
    (folder / "adapters_kit.json").unlink()
    with pytest.raises(ak.AdapterError, match=r"(?s)no record.*KL .* for nf4 and .*KL .* for int8.*quantized='nf4'"):
        ak.merge(folder, tmp_path / "asked")
    said = ak.merge(folder, tmp_path / "said", quantized="nf4")
    assert "bnb_4bit_use_double_quant" in str(said)
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("recorded", "said"))
    assert left.keys() == right.keys() and all(torch.equal(left[name].float(), right[name].float()) for name in left)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "nf4"), ("llama", "fp4"), ("llama", "int8"), ("gpt2", "nf4"), ("gpt2", "int8")]
)
def test_requantized(family, kind, tmp_path, capsys):
    """What is loaded is the merged weights rounded, and the survival is that of the definition in float64."""
    base = save_base(family, tmp_path / "base", torch.bfloat16, max_shard_size="60KB")
    linears = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "c_fc"]
    train_on(base, LORA(target_modules=linears), tmp_path / "adapter", scale=0.05)
    plain = ak.merge(tmp_path / "adapter", tmp_path / "plain", base=base)
    report = ak.merge(tmp_path / "adapter", tmp_path / "small", base=base, quantize=kind)
    assert report.check == plain.check and report.nbytes < plain.nbytes
    merged, original = load(tmp_path / "plain").state_dict(), load(base).state_dict()
    rounding = Rounding(kind, frozenset(), torch.bfloat16)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    arrived = size = 0.0
    for name, module in small.named_modules():
        if type(module).__name__ not in ("Linear4bit", "Linear8bitLt"):
            continue
        held = module.weight.data
        if kind != "int8":
            assert module.weight.quant_state.quant_type == kind
            held = bitsandbytes.functional.dequantize_4bit(held, module.weight.quant_state)
        else:
            held = bitsandbytes.functional.int8_vectorwise_dequant(held, module.weight.SCB)
        one, other = merged[f"{name}.weight"].bfloat16(), original[f"{name}.weight"].bfloat16()
        one, other = (one.T.contiguous(), other.T.contiguous()) if family == "gpt2" else (one, other)
        after, before = rounding(one).double(), rounding(other).double()
        assert torch.equal(held.double(), after)
        update = one.double() - other.double()
        arrived, size = arrived + ((after - before) * update).sum().item(), size + update.square().sum().item()
    assert size > 0 and report.survival.overall == pytest.approx(arrived / size, rel=1e-5)
    assert f"{report.survival.overall:.1%} of the update survived" in str(report)
    assert all(any(part in name for part in linears) for name in report.survival.tensors)
    files = json.loads((tmp_path / "small" / "manifest.json").read_text())["files"]
    assert files.keys() == {path.name for path in (tmp_path / "small").iterdir()} - {"manifest.json"}
    with open_checkpoint(tmp_path / "small"), torch.no_grad():
        ids = torch.arange(5, 15)[None]
        assert small(ids).logits.isfinite().all()


def test_a_small_update_drowns_in_four_bits_and_that_is_told(tmp_path):
    base = save_base("llama", tmp_path / "base", torch.bfloat16)
    train_on(base, LORA(target_modules=["q_proj"]), tmp_path / "adapter", scale=0.005)
    nf4 = ak.merge(tmp_path / "adapter", tmp_path / "nf4", base=base, quantize="nf4", verify="off").survival
    assert nf4.noise > 1 and "Ship the adapter beside" in str(nf4)
    with pytest.raises(ak.AdapterError, match=r"quantize='int4'.*'nf4'"):
        ak.merge(tmp_path / "adapter", tmp_path / "x", base=base, quantize="int4")
