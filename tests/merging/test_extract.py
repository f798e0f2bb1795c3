"""A LoRA from two checkpoints, from other methods, from a higher rank: against the definition, in float64."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapters_kit as ak
from tests.support.shipping import gap, load, save_base, train_on

LORA = peft.LoraConfig


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request, tmp_path_factory):
    """A base and a full tuning of it: every linear moved by a matrix of rank 3, a norm and the embedding too."""
    folder = tmp_path_factory.mktemp("extract")
    base = save_base(request.param, folder / "base")
    linears = ["q_proj", "down_proj"] if request.param == "llama" else ["c_attn", "c_fc"]
    model = train_on(base, LORA(r=3, target_modules=linears), folder / "adapter", scale=0.2)
    model.merge_and_unload().save_pretrained(folder / "tuned")
    return folder


def test_a_low_rank_difference_comes_back_exactly(pair, tmp_path):
    report = ak.extract(pair / "base", pair / "tuned", tmp_path / "lora", r=8, energy=0.999999)
    assert report.error < 2e-3 and not report.left and set(report.ranks.values()) == {3}
    again = peft.PeftModel.from_pretrained(load(pair / "base"), tmp_path / "lora").eval()
    assert gap(again, load(pair / "tuned")) < 1e-3
    merged = ak.merge(tmp_path / "lora", tmp_path / "merged", base=pair / "base")
    assert "same function" in str(merged) and gap(load(tmp_path / "merged"), load(pair / "tuned")) < 1e-3


def test_the_error_is_that_of_the_best_approximation(pair, tmp_path):
    report = ak.extract(pair / "base", pair / "tuned", tmp_path / "lora", r=2)
    before, after = (load(pair / name).state_dict() for name in ("base", "tuned"))
    for path, error in report.errors.items():
        singular = torch.linalg.svdvals(after[f"{path}.weight"].double() - before[f"{path}.weight"].double())
        expected = (singular[2:].square().sum() / singular.square().sum()).sqrt()
        assert error == pytest.approx(expected.item(), abs=1e-4)
    assert 0 < report.error < 1 and "misses" in str(report)


def test_what_a_lora_cannot_hold_is_told(pair, tmp_path):
    tuned = tmp_path / "tuned"
    load(pair / "tuned").save_pretrained(tuned)
    tensors = load_file(tuned / "model.safetensors")
    norm = next(name for name in tensors if "norm" in name or "ln_f.weight" in name)
    tensors[norm] += 1
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    report = ak.extract(pair / "base", tuned, tmp_path / "lora", r=4)
    assert len(report.left) == 1 and "Warning: 1 tensors changed" in str(report)
    with pytest.raises(ak.AdapterError, match="every tensor is the same"):
        ak.extract(pair / "base", pair / "base", tmp_path / "none")
    with pytest.raises(ak.AdapterError, match="r=0"):
        ak.extract(pair / "base", tuned, tmp_path / "none", r=0)
    assert not (tmp_path / "none").exists()


KINDS = {
    "dora": lambda: LORA(r=4, target_modules=["q_proj", "up_proj"], use_dora=True),
    "pissa": lambda: LORA(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["v_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["v_proj"]),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj"]),
    "rslora": lambda: LORA(r=4, target_modules=["q_proj"], use_rslora=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_methods_become_plain_lora(kind, tmp_path):
    base = save_base("llama", tmp_path / "base")
    trained = train_on(base, KINDS[kind](), tmp_path / "adapter", scale=0.05)
    report = ak.convert(tmp_path / "adapter", to="lora", r=64, base=base)
    assert report.path == tmp_path / "adapter-lora" and report.error < 1e-3
    again = peft.PeftModel.from_pretrained(load(base), report.path)
    assert again.peft_config["default"].peft_type == "LORA" and not again.peft_config["default"].use_dora
    assert gap(trained, again.eval()) < 1e-4
    assert ak.check(report.path, "vllm", max_lora_rank=64)
    small = ak.convert(tmp_path / "adapter", r=1, base=base, overwrite=True)
    assert small.error >= report.error and set(small.ranks.values()) == {1}
    with pytest.raises(ak.AdapterError, match="to='dora'"):
        ak.convert(tmp_path / "adapter", to="dora")


def test_compress_finds_the_rank_that_was_used(tmp_path):
    base = save_base("llama", tmp_path / "base")
    trained = train_on(base, LORA(r=2, target_modules=["q_proj", "down_proj"]), tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wide = {n: torch.cat([t, 1e-4 * torch.randn(14, t.shape[1])]) if "lora_A" in n else t for n, t in weights.items()}
    wide = {n: torch.cat([t, 1e-4 * torch.randn(t.shape[0], 14)], 1) if "lora_B" in n else t for n, t in wide.items()}
    config = (tmp_path / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "adapter" / "adapter_config.json").write_text(config.replace('"r": 2', '"r": 16'))
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        config.replace('"r": 2', '"r": 16').replace('"lora_alpha": 8', '"lora_alpha": 64')
    )
    save_file(wide, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    report = ak.compress(tmp_path / "adapter", energy=0.9999)
    assert report.path == tmp_path / "adapter-small" and max(report.ranks.values()) <= 2 and report.error < 0.02
    again = peft.PeftModel.from_pretrained(load(base), report.path).eval()
    assert gap(trained, again) < 0.02
