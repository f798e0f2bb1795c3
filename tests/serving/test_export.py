"""The canonical adapter computes the same and leaves a server nothing to ignore; re-ranking is the best there is."""

import json
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import adapters_kit as ak
from tests.support import tiny
from tests.support.shipping import LLAMA_LINEARS, disturb, gap, load, save_base, train_on

LORA = peft.LoraConfig
ODD = {
    "rslora": LORA(use_rslora=True, r=4, lora_alpha=24, target_modules=LLAMA_LINEARS),
    "patterns": LORA(
        r=4,
        lora_alpha=10,
        target_modules=LLAMA_LINEARS,
        rank_pattern={"q_proj": 2, r"layers\.1\..*\.up_proj": 7},
        alpha_pattern={"down_proj": 3},
    ),
    "both": LORA(use_rslora=True, r=4, target_modules=LLAMA_LINEARS, rank_pattern={"v_proj": 6}),
    "embeddings": LORA(r=4, lora_alpha=7, target_modules=["embed_tokens", "q_proj"]),
    "head": LORA(r=4, lora_alpha=7, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base("llama", tmp_path_factory.mktemp("export") / "base")


@pytest.mark.parametrize("case", ODD)
def test_canonical_computes_the_same(case, base, tmp_path):
    trained = train_on(base, ODD[case], tmp_path / "adapter")
    report = ak.export(tmp_path / "adapter", tmp_path / "canonical", canonical=True)
    again = peft.PeftModel.from_pretrained(load(base), tmp_path / "canonical").eval()
    assert gap(trained, again) < 3e-5
    config = json.loads((tmp_path / "canonical" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == report.rank
    assert not config["use_rslora"] and config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "canonical" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {report.rank}


def naive(folder, base) -> torch.nn.Module:
    """What a server does that reads A, B, r and lora_alpha and nothing else."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    model = load(base)
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith("lora_A.weight"):
                layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                layer.weight += tensors[name.replace("lora_A", "lora_B")] @ a * (config["lora_alpha"] / config["r"])
    return model


@pytest.mark.parametrize("case", ["rslora", "patterns", "both"])
def test_a_naive_server_is_right_only_with_the_canonical_form(case, base, tmp_path):
    trained = train_on(base, ODD[case], tmp_path / "adapter")
    ak.export(tmp_path / "adapter", tmp_path / "canonical", canonical=True)
    wrong, right = gap(trained, naive(tmp_path / "adapter", base)), gap(trained, naive(tmp_path / "canonical", base))
    assert right < 3e-5 < 1e-2 < wrong


def test_a_lower_rank_is_the_best_one_and_its_error_is_told(base, tmp_path):
    trained = train_on(base, LORA(r=8, lora_alpha=12, target_modules=["q_proj", "up_proj"]), tmp_path / "adapter")
    report = ak.export(tmp_path / "adapter", tmp_path / "small", rank=3)
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert len(report.errors) == 4 and "re-ranking lost" in str(report)
    for path, error in report.errors.items():
        update = trained.get_submodule(f"base_model.model.{path}").get_delta_weight("default").double()
        _, s, _ = torch.linalg.svd(update)
        prefix = f"base_model.model.{path}.lora_"
        low = tensors[f"{prefix}B.weight"].double() @ tensors[f"{prefix}A.weight"].double()
        best = (s[3:].square().sum() / s.square().sum()).sqrt().item()
        assert error == pytest.approx(best, rel=1e-4)
        assert ((update - low).norm() / update.norm()).item() == pytest.approx(best, rel=1e-4)
    ak.export(tmp_path / "adapter", tmp_path / "half", rank=3, dtype="bfloat16")
    half = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in tensors.items())
    same = ak.export(tmp_path / "adapter", tmp_path / "large", rank=16)
    assert same.rank == 16 and not same.errors
    assert gap(trained, peft.PeftModel.from_pretrained(load(base), tmp_path / "large").eval()) < 3e-5


def test_what_has_no_canonical_form_says_what_to_do(base, tmp_path):
    cases = {
        "DoRA": LORA(use_dora=True, target_modules=["q_proj"]),
        "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        "pissa": LORA(init_lora_weights="pissa", target_modules=["q_proj"]),
    }
    for name, config in cases.items():
        train_on(base, config, tmp_path / name)
        with pytest.raises(ak.AdapterError, match=rf"{name}.*adapters-kit merge"):
            ak.export(tmp_path / name, tmp_path / "canonical", canonical=True)
        assert not (tmp_path / "canonical").exists()


def test_any_adapter_ships_as_it_is(base, tmp_path):
    trained = train_on(base, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), tmp_path / "adapter")
    (tmp_path / "adapter" / "optimizer.pt").write_bytes(b"large")
    ak.export(tmp_path / "adapter", tmp_path / "shipped")
    assert gap(trained, peft.PeftModel.from_pretrained(load(base), tmp_path / "shipped").eval()) == 0
    assert not (tmp_path / "shipped" / "optimizer.pt").exists()
    assert "adapter_model.safetensors" in json.loads((tmp_path / "shipped" / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
@torch.no_grad()
def test_a_prefix_as_a_cache_is_exact(family, tmp_path):
    """Plain transformers with the cache computes what the adapter computes: forward, padding free, and generate."""
    place = save_base(family, tmp_path / "base")
    trained = ak.wrap(load(place), "prefix", num_virtual_tokens=5)
    disturb(trained, 1.0)
    trained.save_pretrained(tmp_path / "adapter")
    ak.export(tmp_path / "adapter", tmp_path / "cache", format="kv-cache", base=place)
    trained, plain = trained.eval(), load(place)
    ids = torch.randint(5, tiny.VOCAB, (3, 9))
    expected = trained(ids).logits
    assert (plain(ids).logits - expected).abs().max() > 1e-2
    cache = ak.load_cache(tmp_path / "cache", plain, batch_size=3)
    assert torch.allclose(plain(ids, past_key_values=cache).logits, expected, atol=1e-5)
    # As the model card says it, with nothing of ours.
    parts = load_file(tmp_path / "cache" / "prefix_cache.safetensors")
    layers = plain.config.num_hidden_layers
    cache = transformers.DynamicCache(
        [(parts[f"layers.{i}.key"][None], parts[f"layers.{i}.value"][None]) for i in range(layers)]
    )
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids[:1]], dim=1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = plain.generate(padded, attention_mask=torch.ones_like(padded), past_key_values=cache, **options)[:, 5:]
    assert torch.equal(text, trained.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **options))
    assert f"range({layers})" in (tmp_path / "cache" / "README.md").read_text()


@pytest.mark.parametrize(("family", "reason"), [("gpt2", "not rotary"), ("mistral", "sliding window")])
def test_where_a_cache_would_not_be_exact_it_is_refused(family, reason, tmp_path):
    place = save_base(family, tmp_path / "base")
    ak.wrap(load(place), "prefix", num_virtual_tokens=3).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ak.AdapterError, match=rf"cannot be shipped as a KV cache.*{reason}"):
        ak.export(tmp_path / "adapter", tmp_path / "cache", format="kv-cache", base=place)
    assert not (tmp_path / "cache").exists()


def test_a_cache_is_of_a_prefix_and_for_its_model(base, tmp_path):
    train_on(base, LORA(target_modules=["q_proj"]), tmp_path / "lora")
    with pytest.raises(ak.AdapterError, match="only a prefix"):
        ak.export(tmp_path / "lora", tmp_path / "cache", format="kv-cache", base=base)
    with pytest.raises(ak.AdapterError, match=r"format='kv-cache'\)"):
        ak.load_cache(tmp_path / "lora", load(base))
    ak.wrap(load(base), "prefix", num_virtual_tokens=3).save_pretrained(tmp_path / "prefix")
    ak.export(tmp_path / "prefix", tmp_path / "cache", format="kv-cache", base=base)
    other = tiny.build("llama", num_hidden_layers=3)
    with pytest.raises(ak.AdapterError, match="for 2 layers"):
        ak.load_cache(tmp_path / "cache", other)


@pytest.mark.slow
def test_what_cannot_merge_ships_and_loads_with_plain_peft(base, tmp_path):
    """Another process, plain peft and `import adapters_kit`: the same outputs."""
    methods = ["houlsby", "prefix", "compacter"]
    for method in methods:
        trained, place = ak.wrap(load(base), method), tmp_path / method
        disturb(trained)
        trained.save_pretrained(place / "adapter")
        (place / "adapter" / "optimizer.pt").write_bytes(b"large")
        with pytest.raises(ak.AdapterError, match="cannot be merged"):
            ak.merge(place / "adapter", place / "merged", base=base)
        ak.export(place / "adapter", place / "shipped")
        assert not (place / "shipped" / "optimizer.pt").exists()
        batch = tiny.inputs(trained)
        with torch.no_grad():
            torch.save({"batch": batch, "logits": trained.eval()(**batch).logits}, place / "expected.pt")
    code = (
        "import sys, torch, peft, adapters_kit, transformers\n"
        "base, *places = sys.argv[1:]\n"
        "for place in places:\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(base)\n"
        "    model = peft.PeftModel.from_pretrained(model, place + '/shipped').eval()\n"
        "    wanted = torch.load(place + '/expected.pt')\n"
        "    with torch.no_grad():\n"
        "        assert torch.allclose(model(**wanted['batch']).logits, wanted['logits'], atol=1e-6)\n"
    )
    places = [base, *(tmp_path / method for method in methods)]
    subprocess.run([sys.executable, "-c", code, *map(str, places)], check=True)
