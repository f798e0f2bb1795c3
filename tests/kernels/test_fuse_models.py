"""Fused LoRA in whole models: families, groups, saving, merging, copies."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adapters_kit.kernels.fuse import FusedLinear, fuse, unfuse, why_plain
from tests.support import tiny
from tests.support.fused import gradients, live, lora, relative, with_seeded_dropout

FAMILIES = sorted(set(tiny.NAMES) - {"mamba"})  # peft refuses to adapt Mamba's linears


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """One training step with dropout, against peft with the same masks, in fp32."""
    base = tiny.build(name)
    experts = name in ("mixtral", "qwen3-moe", "deepseek-v3")  # there peft's "all-linear" refuses dropout
    plain = lora(base, lora_dropout=0.0 if experts else 0.1).train()
    fused = copy.deepcopy(plain)
    plain = with_seeded_dropout(plain)
    report = fuse(fused)
    batch = tiny.inputs(base, labels=True)
    losses = []
    for model in (plain, fused):
        torch.manual_seed(4)
        losses.append(model(**batch).loss)
        losses[-1].backward()
    assert report.fused
    if report.plain:
        assert experts
        assert set(report.plain.values()) == {"ParamWrapper is not a kind of layer that is fused"}
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    theirs, ours = gradients(plain), gradients(fused)
    for key, grad in theirs.items():
        assert (grad is None) == (ours[key] is None), key
        assert grad is None or relative(ours[key], grad) < 1e-4, key


def test_groups_of_a_llama():
    report = fuse(lora(tiny.build("llama")))
    assert report.unshared is None
    blocks = [f"base_model.model.model.layers.{i}" for i in range(2)]
    names = {tuple(f"{block}.self_attn.{name}_proj" for name in "qkv") for block in blocks} | {
        tuple(f"{block}.mlp.{name}_proj" for name in ("gate", "up")) for block in blocks
    }
    assert set(report.groups) == names
    assert "14 of 14" in str(report)


def test_groups_hold_only_adapted_layers():
    report = fuse(lora(tiny.build("llama"), target_modules=["q_proj", "v_proj", "up_proj"]))
    assert [tuple(path.rsplit(".", 1)[1] for path in group) for group in report.groups] == [("q_proj", "v_proj")] * 2


def test_unfuse_gives_pefts_classes_back():
    model = lora(tiny.build("llama"))
    before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    fuse(model)
    assert sum(isinstance(module, FusedLinear) for module in model.modules()) == 14
    assert unfuse(model) == 14 and unfuse(model) == 0
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == before


def test_state_dict_save_load_merge(tmp_path):
    plain = lora(tiny.build("llama"), lora_dropout=0.1).eval()
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert plain.state_dict().keys() == fused.state_dict().keys()
    batch = tiny.inputs(plain)
    fused.train()
    fused(**batch).logits.sum().backward()
    fused.eval()
    fused.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.build("llama"), tmp_path).eval()
    report = fuse(again)
    assert len(report.fused) == 14
    with torch.no_grad():
        expected = plain(**batch).logits
        torch.testing.assert_close(fused(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        again.merge_adapter()
        assert why_plain(again.base_model.model.model.layers[0].self_attn.q_proj) == "its adapter is merged"
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-3, atol=1e-4)
        again.unmerge_adapter()
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-3, atol=1e-4)
        merged = again.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_modules())
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-3, atol=1e-4)


def test_copies_and_pickles(tmp_path):
    fused = lora(tiny.build("llama"))
    fuse(fused)
    batch = tiny.inputs(fused)
    layer = fused.base_model.model.model.layers[0].self_attn
    x = torch.randn(1, 3, layer.q_proj.in_features)
    layer.q_proj(x)  # k and v wait now
    expected = fused(**batch).logits
    torch.save(fused, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(fused), read):
        assert torch.equal(other(**batch).logits, expected)
        mine = other.base_model.model.model.layers[0].self_attn
        assert mine.q_proj._fused_siblings.members[0] is mine.q_proj
        assert mine.q_proj._fused_siblings is not layer.q_proj._fused_siblings


def test_nothing_waits_after_a_step():
    fused = lora(tiny.build("llama"))
    fuse(fused)
    fused(**tiny.inputs(fused, labels=True)).loss.backward()
    groups = [m._fused_siblings for m in fused.modules() if hasattr(m, "_fused_siblings")]
    assert groups and all(group.waiting is None for group in groups)


def test_adapters_added_later_are_fused():
    base = tiny.build("llama")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(fuse(model).fused) == 2
    model.add_adapter("more", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=5))
    model.set_adapter("more")
    live(model)
    report = fuse(model)
    assert len(report.fused) == 4 and len(report.groups) == 2
    batch = tiny.inputs(model)
    ours = model(**batch).logits
    unfuse(model)
    torch.testing.assert_close(ours, model(**batch).logits, rtol=1e-4, atol=1e-5)
