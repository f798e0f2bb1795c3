"""check() gives every reason, no false alarm for a plain adapter, and fixes that work."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from shipping_tools import save_base, train_on

import adapters_kit as ak

LORA = peft.LoraConfig
TARGETS = ["peft", "transformers", "vllm", "sglang", "llama.cpp", "ollama"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base("llama", tmp_path_factory.mktemp("check") / "base")


def adapter(base, folder, config):
    train_on(base, config, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_a_plain_adapter_loads_everywhere(target, base, tmp_path):
    report = ak.check(adapter(base, tmp_path / "a", LORA(r=8, target_modules=["q_proj"])), target)
    if target == "llama.cpp":
        assert [problem.what for problem in report.problems] == ["it takes GGUF files"]
    else:
        assert report, str(report)


CASES = [
    (LORA(r=48, target_modules=["q_proj"]), "vllm", "rank 48"),
    (LORA(use_dora=True, target_modules=["q_proj"]), "vllm", "DoRA"),
    (LORA(bias="all", target_modules=["q_proj"]), "vllm", "biases"),
    (LORA(target_modules=["q_proj"], modules_to_save=["lm_head"]), "vllm", "lm_head"),
    (LORA(target_modules=["q_proj"], rank_pattern={"q_proj": 4}), "vllm", "rank_pattern ignored"),
    (LORA(init_lora_weights="pissa", target_modules=["q_proj"]), "vllm", "pissa"),
    (LORA(target_modules=["q_proj"], trainable_token_indices=[3]), "sglang", "single tokens"),
    (LORA(use_rslora=True, target_modules=["q_proj"]), "sglang", "use_rslora ignored"),
    (LORA(target_modules=["q_proj"], alpha_pattern={"q_proj": 4}), "llama.cpp", "alpha_pattern ignored"),
    (LORA(target_modules=["q_proj"], modules_to_save=["lm_head"]), "llama.cpp", "neither lora_A nor lora_B"),
    (LORA(lora_alpha=2.5, target_modules=["q_proj"]), "ollama", "whole number"),
    (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "vllm", "LoRA only"),
    (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "transformers", "prompt learning"),
]


@pytest.mark.parametrize(("config", "target", "reason"), CASES, ids=[f"{c[1]}: {c[2]}" for c in CASES])
def test_every_reason_is_given_with_a_fix(config, target, reason, base, tmp_path):
    report = ak.check(adapter(base, tmp_path / "a", config), target)
    found = [problem for problem in report.problems if reason in problem.what]
    assert found, str(report)
    assert found[0].fix and reason in str(report) and not report.ok


def test_the_fix_fixes(base, tmp_path):
    odd = LORA(r=48, use_rslora=True, target_modules=["q_proj"], alpha_pattern={"layers.0": 4})
    folder = adapter(base, tmp_path / "a", odd)
    assert len(ak.check(folder, "vllm").problems) == 2
    ak.export(folder, tmp_path / "b", rank=16)
    assert ak.check(tmp_path / "b", "vllm") and ak.check(tmp_path / "b", "sglang")
    ak.merge(folder, tmp_path / "merged", verify="off")
    assert ak.check(tmp_path / "merged", "transformers")


def test_broken_adapters_are_found_for_every_target(base, tmp_path):
    folder = adapter(base, tmp_path / "a", LORA(target_modules=["q_proj"]))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    for target in TARGETS:
        assert "NaN" in str(ak.check(folder, target))
    zero = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    save_file(zero, folder / "adapter_model.safetensors")
    assert "changes nothing" in str(ak.check(folder, "vllm"))


def test_models(base, tmp_path):
    assert ak.check(base, "transformers")
    assert "tokenizer" in str(ak.check(base, "vllm"))
    assert "GGUF" in str(ak.check(base, "llama.cpp"))
    shards = save_base("llama", tmp_path / "shards", max_shard_size="60KB")
    next(shards.glob("*.safetensors")).unlink()
    assert "Fetch the missing shard" in str(ak.check(shards, "transformers"))


def test_unknown_names(base, tmp_path):
    with pytest.raises(ak.AdapterError, match="Did you mean vllm"):
        ak.check(base, "vlm")
    with pytest.raises(ak.AdapterError, match="neither an adapter"):
        ak.check(tmp_path)
